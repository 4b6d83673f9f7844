"""Decode the frames of a clip with FFmpeg (PyAV), and only those packets that they need.

Shape letters: F frames, H W pixels. Needs neither torch nor DALI: it runs in decode workers.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise

import av
import numpy as np
from av.video.reformatter import Colorspace, Interpolation

from bevt_ds.data.container import Container, check_container
from bevt_ds.data.limits import BadSample, Limits

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
    container: str
    pixel_format: str
    duration: float  # seconds
    keyframe_gap: int  # most frames from one keyframe to the next


class Video:
    """An opened video: its packets are known, none is decoded. Made by `opened`."""

    def __init__(self, container, stream, claims: Container, limits: Limits) -> None:
        self.stream, self.limits = stream, limits
        self.timed = bool(TIMED_CONTAINERS & set(container.format.name.split(",")))
        every = [p for p in container.demux(stream) if p.size]
        self.packets = [p for p in every if not p.is_discard]  # an edit list hides the others
        context = stream.codec_context
        limits.check_picture(context.width, context.height)
        limits.check_frames(len(self.packets))
        self.size = (context.width, context.height)
        if self.size != (claims.width, claims.height):
            raise BadSample(
                f"its header says {claims.width}x{claims.height}, its stream {context.width}x{context.height}"
            )
        if claims.frames not in (None, len(every)):
            raise BadSample(f"its header says {claims.frames} frames, {len(every)} are found")
        self.container = claims.name

    @property
    def info(self) -> VideoInfo:
        context, frames = self.stream.codec_context, len(self.packets)
        fps = float(self.stream.average_rate or 0)
        keys = [i for i, p in enumerate(self.packets) if p.is_keyframe]
        gap = max((b - a for a, b in pairwise([*keys, frames])), default=frames)
        seconds = frames / fps if fps else 0.0
        return VideoInfo(frames, *self.size, fps, context.name, self.container, str(context.pix_fmt), seconds, gap)

    def frames(self, wanted: np.ndarray) -> np.ndarray:
        """The frames with these numbers, in any order and with repeats: uint8 (F,H,W,3) RGB."""
        numbers = np.unique(wanted)
        self.limits.check_clip(len(numbers), *self.size)
        pick = _by_time if self.timed and _has_distinct_times(self.packets) else _by_count
        pictures = {number: _to_rgb(frame, self.size) for number, frame in pick(self.stream, self.packets, numbers)}
        if missing := len(numbers) - len(pictures):
            raise BadSample(f"{missing} of the {len(numbers)} frames needed are missing: cut, or its header lies")
        return np.stack([pictures[i] for i in wanted.tolist()])

    def decode_all(self) -> int:
        """Decode every frame and drop it; returns how many there were. BadSample: fewer than packets."""
        decoded = 0
        for frame in _decode(self.stream, self.packets):
            _require_size(frame, self.size)
            decoded += 1
        if decoded != len(self.packets):
            raise BadSample(f"{decoded} of its {len(self.packets)} frames can be decoded")
        return decoded

    def decode_first(self) -> None:
        """Decode the first frame. BadSample: that is not possible, or it has another size than the header says."""
        for frame in _decode(self.stream, self.packets):
            _require_size(frame, self.size)
            return
        raise BadSample("none of its frames can be decoded")


@contextmanager
def opened(data: bytes, limits: Limits) -> Iterator[Video]:
    """A video in memory, its container checked first. BadSample: not a video, over a limit, or FFmpeg refuses it."""
    claims = check_container(data, limits)
    try:
        with av.open(io.BytesIO(data), metadata_errors="replace") as container:
            if not container.streams.video:
                raise BadSample("it has no video stream")
            stream = container.streams.video[0]
            stream.codec_context.thread_count = 1  # the worker processes are the parallelism
            yield Video(container, stream, claims, limits)
    except av.error.FFmpegError as error:
        raise BadSample(f"FFmpeg cannot decode it: {error.strerror}") from error


def probe(data: bytes, limits: Limits) -> VideoInfo:
    """Describe a video; only its first frame is decoded. BadSample: it cannot be used."""
    with opened(data, limits) as video:
        video.decode_first()
        return video.info


def decode_clip(data: bytes, choose: FrameChoice, limits: Limits) -> np.ndarray:
    """The chosen frames of a video: uint8 (F,H,W,3) RGB.

    data: the whole file. choose: given the number of frames, returns the wanted frame numbers, in any order and with
    repeats. BadSample: the file cannot be decoded that far.
    """
    with opened(data, limits) as video:
        return video.frames(choose(len(video.packets)))


def _has_distinct_times(packets: list) -> bool:
    times = [p.pts for p in packets]
    return None not in times and len(set(times)) == len(times)


def _by_time(stream, packets: list, wanted: np.ndarray) -> Iterator[tuple[int, av.VideoFrame]]:
    """Frame i is the i-th in order of presentation; decoding starts at the keyframe before the first.

    A frame that is not wanted and that no other refers to is not decoded: its packet is passed over by the decoder.
    """
    times = sorted(p.pts for p in packets)
    number_of = {times[i]: i for i in wanted.tolist()}
    keyframes = [k for k, p in enumerate(packets) if p.is_keyframe and p.pts <= min(number_of)]
    for frame in _decode(stream, packets[keyframes[-1] if keyframes else 0 :], frozenset(number_of)):
        if (number := number_of.pop(frame.pts, None)) is not None:
            yield number, frame
        if not number_of:
            return


def _by_count(stream, packets: list, wanted: np.ndarray) -> Iterator[tuple[int, av.VideoFrame]]:
    """Frame i is the i-th that the decoder puts out, from the beginning."""
    numbers = set(wanted.tolist())
    for i, frame in enumerate(_decode(stream, packets)):
        if i in numbers:
            yield i, frame
        if i == max(numbers):
            return


def _decode(stream, packets: list, wanted_times: Collection[int] | None = None) -> Iterator[av.VideoFrame]:
    """Frames in order of presentation; with `wanted_times` some of the others may be left out."""
    context = stream.codec_context
    for packet in packets:
        if wanted_times is not None:
            context.skip_frame = "DEFAULT" if packet.pts in wanted_times else "NONREF"
        yield from context.decode(packet)
    yield from context.decode(None)


def _require_size(frame: av.VideoFrame, size: tuple[int, int]) -> None:
    if (frame.width, frame.height) != size:
        raise BadSample(f"a frame is {frame.width}x{frame.height}, its header says {size[0]}x{size[1]}")


def _to_rgb(frame: av.VideoFrame, size: tuple[int, int]) -> np.ndarray:
    """uint8 (H,W,3), as DALI would convert it."""
    _require_size(frame, size)
    rgb = frame.reformat(format="rgb24", interpolation=_TO_RGB, src_colorspace=Colorspace.ITU601, threads=1)
    return rgb.to_ndarray()
