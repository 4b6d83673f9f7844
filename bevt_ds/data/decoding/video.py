"""Decode the frames of a clip with FFmpeg (PyAV), and only those packets that they need.

Shape letters: F frames, H W pixels. Needs neither torch nor DALI: it runs in decode workers.
"""

from __future__ import annotations

import io
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from typing import Any

import av
import numpy as np
from av.filter import Graph
from av.video.reformatter import Colorspace, Interpolation, VideoReformatter

from bevt_ds.data.decoding.container import Container, check_container
from bevt_ds.data.decoding.cut import Box
from bevt_ds.data.limits import BadSample, Limits

# Frame numbers follow presentation times only where the container states them for every packet.
TIMED_CONTAINERS = frozenset({"mp4", "matroska"})
# With these flags swscale's pixels equal those of DALI's CPU decoder, which knows BT.601 only.
_TO_RGB = Interpolation.BILINEAR | Interpolation.FULL_CHR_H_INT | Interpolation.ACCURATE_RND

# What NVDEC decodes; anything else is left to the CPU, Motion JPEG too, whose range of levels it may not know.
GPU_CODECS = frozenset({"h264", "hevc", "vp8", "vp9", "av1", "mpeg4"})
GPU_FORMATS = frozenset({"yuv420p", "yuvj420p"})
CUT_FORMATS = GPU_FORMATS  # of which a part at even pixels converts like the whole

Room = Callable[[int], np.ndarray]  # a number of bytes -> memory for them, uint8 (bytes,)


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
    hidden: int  # frames before or after these, that an edit list hides


def fits_gpu(facts: Mapping[str, Any]) -> bool:
    """Whether a GPU's decoder can be expected to take a video: `facts` are the fields of its VideoInfo."""
    if facts["container"] == "avi" or facts["hidden"]:
        return False
    if facts["width"] % 2 or facts["height"] % 2:  # DALI's kernel writes two by two pixels, also past an odd edge
        return False
    return facts["codec"] in GPU_CODECS and facts["pixel_format"] in GPU_FORMATS


class Video:
    """An opened video: its packets are known, none is decoded. Made by `opened`.

    `decoded` counts the frames that the decoder has put out, wanted or not.
    """

    def __init__(self, container, stream, claims: Container, limits: Limits) -> None:
        self.stream, self.limits, self.decoded = stream, limits, 0
        # An edit list hides some packets. They still go to the decoder, which drops their frames: others refer to them.
        self._every = [p for p in container.demux(stream) if p.size]
        self.packets = [p for p in self._every if not p.is_discard]
        context = stream.codec_context
        limits.check_picture(context.width, context.height)
        limits.check_frames(len(self.packets))
        self.size = (context.width, context.height)
        if self.size != (claims.width, claims.height):
            raise BadSample(
                f"its header says {claims.width}x{claims.height}, its stream {context.width}x{context.height}"
            )
        if claims.frames not in (None, len(self._every)):
            raise BadSample(f"its header says {claims.frames} frames, {len(self._every)} are found")
        self.container = claims.name
        self._is_timed = claims.name in TIMED_CONTAINERS and _has_distinct_times(self._every)

    @property
    def info(self) -> VideoInfo:
        context, frames = self.stream.codec_context, len(self.packets)
        fps = float(self.stream.average_rate or 0)
        keys = [i for i, p in enumerate(self.packets) if p.is_keyframe]
        gap = max((b - a for a, b in pairwise([*keys, frames])), default=frames)
        seconds = frames / fps if fps else 0.0
        hidden = len(self._every) - frames
        pixels = str(context.pix_fmt)
        return VideoInfo(frames, *self.size, fps, context.name, self.container, pixels, seconds, gap, hidden)

    def frames(self, wanted: np.ndarray) -> np.ndarray:
        """The frames with these numbers, in any order and with repeats: uint8 (F,H,W,3) RGB."""
        numbers, places = np.unique(wanted, return_inverse=True)
        return self.pictures(numbers, lambda size: np.empty(size, np.uint8))[places]

    def pictures(self, numbers: np.ndarray, room: Room, boxes: Sequence[Box] | None = None) -> np.ndarray:
        """The frames with these numbers, which ascend, in memory that `room` gives: uint8 (F,H,W,3) RGB.

        boxes: the part of each that is needed; what lies outside keeps what was in the memory.
        """
        self.limits.check_clip(len(numbers), *self.size)
        width, height = self.size
        pictures = room(len(numbers) * height * width * 3).reshape(-1, height, width, 3)
        boxes, writer = boxes or [Box(0, 0, height, width)] * len(numbers), RgbWriter()
        for picture, box, (_, frame) in zip(pictures, boxes, self.pick(numbers), strict=True):
            writer.write(frame, picture, box)
        return pictures

    def pick(self, numbers: np.ndarray) -> Iterator[tuple[int, av.VideoFrame]]:
        """The decoded frames with these numbers, which ascend. BadSample: not all of them are there."""
        pick = self._by_time if self._is_timed else self._by_count
        found = 0
        for number, frame in pick(numbers):
            _require_size(frame, self.size)
            found += 1
            yield number, frame
        if missing := len(numbers) - found:
            raise BadSample(f"{missing} of the {len(numbers)} frames needed are missing: cut, or its header lies")

    def _by_time(self, wanted: np.ndarray) -> Iterator[tuple[int, av.VideoFrame]]:
        """Frame i is the i-th in order of presentation; decoding starts at the keyframe before the first.

        A frame that is not wanted and that no other refers to is not decoded: the decoder passes over its packet.
        """
        times = sorted(p.pts for p in self.packets)
        number_of = {times[i]: i for i in wanted.tolist()}
        keyframes = [k for k, p in enumerate(self._every) if p.is_keyframe and p.pts <= min(number_of)]
        packets = self._every[keyframes[-1] if keyframes else 0 :]
        for frame in self._decode(packets, frozenset(number_of)):
            if (number := number_of.pop(frame.pts, None)) is not None:
                yield number, frame
            if not number_of:
                return

    def _by_count(self, wanted: np.ndarray) -> Iterator[tuple[int, av.VideoFrame]]:
        """Frame i is the i-th that the decoder puts out, from the beginning."""
        numbers = set(wanted.tolist())
        for i, frame in enumerate(self._decode(self._every)):
            if i in numbers:
                yield i, frame
            if i == max(numbers):
                return

    def _decode(self, packets: list, wanted_times: Collection[int] | None = None) -> Iterator[av.VideoFrame]:
        """Frames in order of presentation; with `wanted_times` some of the others may be left out."""
        context = self.stream.codec_context
        for packet in [*packets, None]:
            if wanted_times is not None and packet is not None:
                context.skip_frame = "DEFAULT" if packet.pts in wanted_times else "NONREF"
            for frame in context.decode(packet):
                self.decoded += 1
                yield frame

    def times(self) -> np.ndarray:
        """When each frame is shown, in seconds from the first: float64 (frames,), ascending."""
        if self._is_timed:
            ticks = np.sort([p.pts for p in self.packets])
            return (ticks - ticks[0]) * float(self.stream.time_base)
        return np.arange(len(self.packets)) / float(self.stream.average_rate or 25)

    def decode_all(self) -> int:
        """Decode every frame and drop it; returns how many there were. BadSample: fewer than packets."""
        decoded = 0
        for frame in self._decode(self._every):
            _require_size(frame, self.size)
            decoded += 1
        if decoded != len(self.packets):
            raise BadSample(f"{decoded} of its {len(self.packets)} frames can be decoded")
        return decoded

    def decode_first(self) -> None:
        """Decode the first frame. BadSample: that is not possible, or it has another size than the header says."""
        for frame in self._decode(self._every):
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
            if stream.codec_context is None:
                raise BadSample("FFmpeg does not know its codec")
            stream.codec_context.thread_count = 1  # the worker processes are the parallelism
            yield Video(container, stream, claims, limits)
    except av.error.FFmpegError as error:
        raise BadSample(f"FFmpeg cannot decode it: {error.strerror}") from error


def probe(data: bytes, limits: Limits) -> VideoInfo:
    """Describe a video; only its first frame is decoded. BadSample: it cannot be used."""
    with opened(data, limits) as video:
        video.decode_first()
        return video.info


def _has_distinct_times(packets: list) -> bool:
    times = [p.pts for p in packets]
    return None not in times and len(set(times)) == len(times)


def _require_size(frame: av.VideoFrame, size: tuple[int, int]) -> None:
    if (frame.width, frame.height) != size:
        raise BadSample(f"a frame is {frame.width}x{frame.height}, its header says {size[0]}x{size[1]}")


class RgbWriter:
    """Writes frames of one video as RGB, or parts of them, as DALI would convert the whole."""

    def __init__(self) -> None:
        self._reformatters: dict[Box, VideoReformatter] = defaultdict(VideoReformatter)
        self._cutters: dict[Box, Graph] = {}

    def write(self, frame: av.VideoFrame, picture: np.ndarray, box: Box) -> None:
        """Into the part of uint8 (H,W,3); into all of it, where the frame cannot be cut without a trace.

        FFmpeg is quicker to planes, in the order G, B, R, than to pixels, and numpy than PyAV from there.
        """
        whole = Box(0, 0, frame.height, frame.width)
        if box != whole and _can_be_cut(frame):
            frame = self._cut(frame, box)
        else:
            box = whole
        planar = self._reformatters[box].reformat(
            frame, format="gbrp", interpolation=_TO_RGB, src_colorspace=Colorspace.ITU601, threads=1
        )
        part = picture[box.top : box.top + box.height, box.left : box.left + box.width]
        for channel, plane in zip((1, 2, 0), planar.planes, strict=True):
            part[..., channel] = np.frombuffer(plane, np.uint8).reshape(-1, plane.line_size)[:, : plane.width]

    def _cut(self, frame: av.VideoFrame, box: Box) -> av.VideoFrame:
        """The part of a frame, without a copy."""
        if box not in self._cutters:
            self._cutters[box] = _cutter(frame, box)
        self._cutters[box].push(frame)
        return self._cutters[box].pull()


def _can_be_cut(frame: av.VideoFrame) -> bool:
    """Chroma must be where it is in the whole: at every second pixel, exactly."""
    return frame.format.name in CUT_FORMATS and frame.width % 2 == frame.height % 2 == 0


def _cutter(frame: av.VideoFrame, box: Box) -> Graph:
    graph, size = Graph(), {"width": frame.width, "height": frame.height}
    source = graph.add_buffer(**size, format=frame.format, time_base=Fraction(1))
    crop = graph.add("crop", f"{box.width}:{box.height}:{box.left}:{box.top}")
    sink = graph.add("buffersink")
    source.link_to(crop)
    crop.link_to(sink)
    graph.configure()
    return graph
