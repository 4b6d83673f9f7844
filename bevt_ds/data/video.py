"""Decode the frames of a clip with FFmpeg (PyAV), and only those packets that they need.

Shape letters: F frames, H W pixels. Needs neither torch nor DALI: it runs in decode workers.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import av
import numpy as np
from av.video.reformatter import Colorspace, Interpolation

from bevt_ds.data.index import BadSample

# Frame numbers follow presentation times only where the container states them for every packet.
TIMED_CONTAINERS = frozenset({"mov", "mp4", "matroska", "webm"})
# With these flags swscale's pixels equal those of DALI's CPU decoder, which knows BT.601 only.
_TO_RGB = Interpolation.BILINEAR | Interpolation.FULL_CHR_H_INT | Interpolation.ACCURATE_RND

FrameChoice = Callable[[int], np.ndarray]  # total frames of the video -> wanted frame numbers (F,)


@dataclass(frozen=True)
class VideoInfo:
    """What the container says, after a look at every packet's header."""

    frames: int
    width: int
    height: int
    fps: float
    codec: str


def probe(data: bytes, max_pixels: int) -> VideoInfo:
    """Describe a video without decoding it. BadSample: not a video, no frames, or too large."""
    with _opened(data) as (container, stream):
        packets = _demux(container, stream)
        return _describe(stream, len(packets), max_pixels)


def decode_clip(data: bytes, choose: FrameChoice, max_pixels: int) -> np.ndarray:
    """The chosen frames of a video: uint8 (F,H,W,3) RGB.

    data: the whole file. choose: given the number of frames, returns the wanted frame numbers, in any order and with
    repeats. BadSample: the file cannot be decoded that far.
    """
    with _opened(data) as (container, stream):
        packets = _demux(container, stream)
        _describe(stream, len(packets), max_pixels)
        wanted = choose(len(packets))
        timed = bool(TIMED_CONTAINERS & set(container.format.name.split(",")))
        pick = _by_time if timed and _has_distinct_times(packets) else _by_count
        frames = pick(stream, packets, np.unique(wanted))
        return np.stack([frames[i] for i in wanted.tolist()])


@contextmanager
def _opened(data: bytes) -> Iterator[tuple]:
    """Container and its first video stream. FFmpeg's refusals become BadSample."""
    try:
        with av.open(io.BytesIO(data), metadata_errors="replace") as container:
            if not container.streams.video:
                raise BadSample("it has no video stream")
            stream = container.streams.video[0]
            stream.codec_context.thread_count = 1  # the worker processes are the parallelism
            yield container, stream
    except av.error.FFmpegError as error:
        raise BadSample(f"FFmpeg cannot decode it: {error.strerror}") from error


def _demux(container, stream) -> list:
    """The stream's packets in decoding order, without those that an edit list hides."""
    return [p for p in container.demux(stream) if p.size and not p.is_discard]


def _describe(stream, frames: int, max_pixels: int) -> VideoInfo:
    context = stream.codec_context
    if not frames or not context.width or not context.height:
        raise BadSample("it has no frames")
    if context.width * context.height > max_pixels:
        raise BadSample(f"its frames are {context.width}x{context.height}, over data.max_pixels")
    fps = float(stream.average_rate or 0)
    return VideoInfo(frames, context.width, context.height, fps, context.name)


def _has_distinct_times(packets: list) -> bool:
    times = [p.pts for p in packets]
    return None not in times and len(set(times)) == len(times)


def _by_time(stream, packets: list, wanted: np.ndarray) -> dict[int, np.ndarray]:
    """Frame i is the i-th in order of presentation; decoding starts at the keyframe before the first."""
    times = sorted(p.pts for p in packets)
    number_of = {times[i]: i for i in wanted.tolist()}
    keyframes = [k for k, p in enumerate(packets) if p.is_keyframe and p.pts <= min(number_of)]
    found: dict[int, np.ndarray] = {}
    for frame in _decode(stream, packets[keyframes[-1] if keyframes else 0 :]):
        if (number := number_of.get(frame.pts)) is not None:
            found[number] = _to_rgb(frame)
        if len(found) == len(number_of):
            return found
    raise _ends_early(len(number_of) - len(found), len(number_of))


def _by_count(stream, packets: list, wanted: np.ndarray) -> dict[int, np.ndarray]:
    """Frame i is the i-th that the decoder puts out, from the beginning."""
    numbers = set(wanted.tolist())
    found: dict[int, np.ndarray] = {}
    for i, frame in enumerate(_decode(stream, packets)):
        if i in numbers:
            found[i] = _to_rgb(frame)
        if len(found) == len(numbers):
            return found
    raise _ends_early(len(numbers) - len(found), len(numbers))


def _decode(stream, packets: list) -> Iterator:
    for packet in packets:
        yield from stream.codec_context.decode(packet)
    yield from stream.codec_context.decode(None)


def _to_rgb(frame) -> np.ndarray:
    rgb = frame.reformat(format="rgb24", interpolation=_TO_RGB, src_colorspace=Colorspace.ITU601, threads=1)
    return rgb.to_ndarray()


def _ends_early(missing: int, wanted: int) -> BadSample:
    return BadSample(f"{missing} of the {wanted} frames needed are missing: cut, or its header lies")
