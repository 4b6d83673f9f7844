"""Whether clips, decoded as in training, are made of the frames that a full decode shows."""

from __future__ import annotations

import zlib
from itertools import cycle

import av
import numpy as np

from bevt_ds.config.samples import DataConfig
from bevt_ds.data.decoding.geometry import Box
from bevt_ds.data.decoding.video import RgbWriter, VideoInfo, full_decode, opened
from bevt_ds.data.limits import BadSample, Limits

CLIPS = 4  # of each video


def verify_video(data: bytes, limits: Limits) -> VideoInfo:
    """Decode all of a video, then a few clips from drawn starts. BadSample: what fails, or which frame is another."""
    with opened(data, limits) as video:
        info = video.info
    clips = drawn_clips(data, info.frames)
    needed = frozenset(np.concatenate(clips).tolist())
    shown, total = {}, 0
    for number, frame in enumerate(full_decode(data, limits)):
        total = number + 1
        if number in needed:
            shown[number] = _digest(frame)
    if total != info.frames:
        raise BadSample(f"a full decode shows {total} frames, where its packets promise {info.frames}")
    for numbers in clips:
        with opened(data, limits) as video:
            for number, frame in video.pick(numbers):
                if _digest(frame) != shown[number]:
                    raise BadSample(f"decoding from frame {numbers[0]} on, frame {number} is not that of a full decode")
    return info


def drawn_clips(data: bytes, total: int) -> list[np.ndarray]:
    """Frame numbers of clips, each int64 and ascending: the same for the same file.

    From any frame on, every frame and as far apart as in training, whatever fits: recipes differ in stride and length.
    """
    rng = np.random.default_rng(zlib.crc32(data))
    starts = rng.integers(total, size=CLIPS).tolist()
    return [
        np.arange(start, total, stride)[: DataConfig.frames]
        for start, stride in zip(starts, cycle((1, DataConfig.stride)), strict=False)
    ]


def _digest(frame: av.VideoFrame) -> int:
    """Of its pixels as RGB, as clips are made of them."""
    pixels = np.empty((frame.height, frame.width, 3), np.uint8)
    RgbWriter().write(frame, pixels, Box(0, 0, frame.height, frame.width))
    return zlib.crc32(pixels)
