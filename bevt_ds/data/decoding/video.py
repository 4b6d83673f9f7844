"""Decode the frames of a clip with FFmpeg (PyAV), and only those packets that they need.

Shape letters: F frames, H W pixels. Needs neither torch nor DALI: it runs in decode workers.
"""

from __future__ import annotations

import io
from collections import defaultdict, deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from functools import partial
from typing import Any

import av
import numpy as np
from av.codec.context import Flags
from av.filter import Graph
from av.sidedata.sidedata import Type
from av.video.reformatter import Colorspace, Interpolation, VideoReformatter

from bevt_ds.data.decoding import avi, bitstream, h264, hevc
from bevt_ds.data.decoding.frame_index import Codec, FrameIndex, counted, index_frames
from bevt_ds.data.decoding.geometry import UPRIGHT, Box, Turn, turn_of_matrix
from bevt_ds.data.decoding.matroska import MAGIC, check_matroska
from bevt_ds.data.decoding.mp4 import FIRST, check_mp4
from bevt_ds.data.limits import BadSample, Container, Limits

# With these flags swscale's pixels equal those of DALI's CPU decoder, which knows BT.601 only.
_TO_RGB = Interpolation.BILINEAR | Interpolation.FULL_CHR_H_INT | Interpolation.ACCURATE_RND

# What NVDEC decodes; anything else is left to the CPU, Motion JPEG too, whose range of levels it may not know.
GPU_CONTAINERS = frozenset({"mp4", "matroska"})
GPU_FORMATS = frozenset({"yuv420p", "yuvj420p"})
# The least and the most width and height, as NVIDIA states them for an H100.
GPU_SIZES = {
    "h264": ((48, 16), (4096, 4096)),
    "hevc": ((144, 144), (8192, 8192)),
    "vp8": ((48, 16), (4096, 4096)),
    "vp9": ((128, 128), (8192, 8192)),
    "av1": ((128, 128), (8192, 8192)),
    "mpeg4": ((48, 16), (2032, 2032)),
}
_UNITS = {"h264": (h264.header_units, h264.gpu_obstacle), "hevc": (hevc.header_units, hevc.gpu_obstacle)}
CUT_FORMATS = GPU_FORMATS  # of which a part at even pixels converts like the whole
_EXIF_CODECS = frozenset({"mjpeg", "png"})
# Their decoders pass over frames that no other refers to, as they are told before each packet.
_SKIPPING = frozenset({"h264", "hevc", "mpeg4"})
UNKNOWN_FPS = 25  # where a container states none

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
    duration: float  # seconds, as the container says
    keyframe_gap: int  # most frames from one keyframe at which decoding may begin to the next
    hidden: int  # packets that give no frame, or one that an edit list hides
    is_plain: bool  # a decoder that goes by timestamps and keyframes numbers the frames alike
    rotation: int = 0  # degrees clockwise by which frames are turned to be upright; width and height are as shown
    mirrored: bool = False  # left and right change places before that
    gpu_obstacle: str = ""  # what of its coding a GPU's decoder does not take, or takes otherwise than the CPU's


def fits_gpu(facts: Mapping[str, Any]) -> bool:
    """Whether a GPU's decoder can be expected to take a video: `facts` are the fields of its VideoInfo."""
    if facts["container"] not in GPU_CONTAINERS or facts["hidden"] or not facts["is_plain"]:
        return False
    if facts["rotation"] or facts["mirrored"]:  # which it would leave out
        return False
    width, height = facts["width"], facts["height"]
    if width % 2 or height % 2:  # DALI's kernel writes two by two pixels, also past an odd edge
        return False
    if facts["gpu_obstacle"] or facts["codec"] not in GPU_SIZES or facts["pixel_format"] not in GPU_FORMATS:
        return False
    least, most = GPU_SIZES[facts["codec"]]
    return least[0] <= width <= most[0] and least[1] <= height <= most[1]


def gpu_obstacle(codec: Codec, packet: bytes) -> str:
    """What a GPU's decoder does not know of an H.264 or HEVC stream, or would show otherwise. packet: the first one."""
    if codec.name not in _UNITS:
        return ""
    header_units, obstacle = _UNITS[codec.name]
    try:
        sets, length = header_units(codec.extradata)
        return next(filter(None, map(obstacle, [*sets, *bitstream.units(packet, length)])), "")
    except (bitstream.Unknown, ValueError, LookupError):
        return "of unknown parameters"


@dataclass(frozen=True)
class _Source:
    """An opened container, its video stream, and the stream's packets, none of which is decoded."""

    container: Any
    stream: Any
    packets: list
    codec: Codec  # by its name, not by that of the library which decodes it
    size: tuple[int, int]  # width and height

    def frames(self) -> Iterator[av.VideoFrame]:
        """All frames, as they are shown. What cannot be decoded before the first keyframe is passed over."""
        context, refusal = self.stream.codec_context, None
        first_key = next((i for i, packet in enumerate(self.packets) if packet.is_keyframe), len(self.packets))
        shown = 0
        for i, packet in enumerate([*self.packets, None]):
            try:
                for frame in context.decode(packet):
                    shown += 1
                    yield frame
            except av.error.InvalidDataError as error:
                if i >= first_key:
                    raise
                refusal = refusal or error
        if refusal and not shown:
            raise refusal


class Video:
    """An opened video whose frames are numbered. Made by `opened`.

    total: its frames. size: width and height as they are shown, turned upright. `decoded` counts the frames that the
    decoder has put out, wanted or not.
    """

    def __init__(self, source: _Source, index: FrameIndex, turn: Turn, container: str, limits: Limits) -> None:
        self.index, self.turn, self.limits, self.container = index, turn, limits, container
        self._is_counted = index.numbers is None
        self.decoded = 0 if index.numbers else index.total  # which have been counted
        self._source, self.stream, self.total = source, source.stream, index.total
        self._stored_size = source.size  # the codec's context takes on that of whichever frame comes next
        self.size = turn.size(*source.size)
        self._is_interlaced = False  # until a frame says so

    @property
    def codec(self) -> Codec:
        return self._source.codec

    @property
    def packets(self) -> list:
        """PyAV's packets of the whole stream, in order of coding."""
        return self._source.packets

    @property
    def info(self) -> VideoInfo:
        stream, index = self.stream, self.index
        return VideoInfo(
            frames=self.total,
            width=self.size[0],
            height=self.size[1],
            fps=float(stream.average_rate or 0),
            codec=self._source.codec.name,
            container=self.container,
            pixel_format=str(stream.codec_context.pix_fmt),
            duration=self.seconds,
            keyframe_gap=index.keyframe_gap,
            hidden=max(len(self._source.packets) - self.total, 0),
            is_plain=index.is_plain,
            gpu_obstacle="interlaced" if self._is_interlaced else gpu_obstacle(self.codec, bytes(self.packets[0])),
            **self.turn.facts,
        )

    @property
    def seconds(self) -> float:
        """How long the frames are shown: what the container says, or, where it cannot be right, until the last ends."""
        times = self.times()
        stated = self._stated_seconds()
        if stated is not None and stated >= times[-1]:
            return stated
        return float(times[-1] + (times[-1] / (self.total - 1) if times[-1] else self._frame_seconds))

    def _stated_seconds(self) -> float | None:
        """The container's duration, less what is not shown before the first frame."""
        container, stream, index = self._source.container, self.stream, self.index
        if any(packet.is_discard for packet in self._source.packets):  # it holds for more than an edit list shows
            return None
        if stream.duration:
            return float((stream.duration - index.lead) * stream.time_base)
        if (end := _end_of_track(stream)) is None and len(container.streams) == 1 and container.duration:
            end = container.duration / av.time_base
        if end is None:
            return None
        return end - (0 if index.times is None else float(index.times[0] * stream.time_base))

    @property
    def _frame_seconds(self) -> float:
        """How long a frame is shown, where no times say so."""
        return 1 / float(self.stream.average_rate or UNKNOWN_FPS)

    def frames(self, wanted: np.ndarray) -> np.ndarray:
        """The frames with these numbers, in any order and with repeats: uint8 (F,H,W,3) RGB."""
        numbers, places = np.unique(wanted, return_inverse=True)
        return self.decode_into(numbers, lambda size: np.empty(size, np.uint8))[places]

    def decode_into(self, numbers: np.ndarray, room: Room, boxes: Sequence[Box] | None = None) -> np.ndarray:
        """The frames with these numbers, which ascend, in memory that `room` gives: uint8 (F,H,W,3) RGB.

        boxes: the part of each that is needed; what lies outside keeps what was in the memory.
        """
        self.limits.check_clip(len(numbers), *self.size)
        width, height = self.size
        images = room(len(numbers) * height * width * 3).reshape(-1, height, width, 3)
        boxes, writer = boxes or [Box(0, 0, height, width)] * len(numbers), RgbWriter()
        for image, box, (_, frame) in zip(images, boxes, self.pick(numbers), strict=True):
            if self.turn != UPRIGHT:
                image, box = self.turn.undone(image), self.turn.stored_box(box, width, height)
            writer.write(frame, image, box)
        return images

    def pick(self, numbers: np.ndarray) -> Iterator[tuple[int, av.VideoFrame]]:
        """The decoded frames with these numbers, which ascend, as they are stored. BadSample: not all are there."""
        for stretch in self.index.stretches(numbers.tolist()):
            wanted = deque(stretch.frames)
            for first in stretch.beginnings:
                yield from self._found(first, stretch.last, wanted)
                if not wanted:
                    break
            else:
                raise BadSample(f"{len(wanted)} of the {len(numbers)} frames needed do not come out of the decoder")

    def _found(self, first: int, last: int, wanted: deque[int]) -> Iterator[tuple[int, av.VideoFrame]]:
        """The frames of `wanted` with their numbers, taken off its front, as far as packets first to last give them."""
        self.stream.codec_context.flush_buffers()
        needed = frozenset(wanted)
        frames = enumerate(self._source.frames()) if self._is_counted else self._from(first, last, needed)
        for number, frame in frames:
            self.decoded += 1
            if number not in needed:
                continue
            if number != wanted[0]:
                return  # one before it did not come: decoding must begin earlier
            _require_size(frame, self._stored_size)
            if frame.rotation and turn_of_frame(frame) != self.turn:
                raise BadSample(f"its frame {number} is turned in another way than its first")
            yield wanted.popleft(), frame
            if not wanted:
                return

    def _from(self, first: int, last: int, wanted: Collection[int]) -> Iterator[tuple[int, av.VideoFrame]]:
        """Frames and their numbers, decoding packets `first` to `last`, in order of the numbers.

        A frame that is not wanted and that no other refers to is not decoded: the decoder passes over its packet. The
        decoder hands on a packet's time to its frame; here that is the frame's number.
        """
        context, index = self.stream.codec_context, self.index
        skips, is_skipping = self._source.codec.name in _SKIPPING, None
        for i, packet in enumerate(self._source.packets[first : last + 1], start=first):
            packet.pts = number = index.numbers[i]
            if skips and is_skipping != (skip := index.spare[i] and number not in wanted):
                context.skip_frame, is_skipping = "NONREF" if skip else "DEFAULT", skip
            for frame in context.decode(packet):
                yield frame.pts, frame
        for frame in context.decode(None):
            yield frame.pts, frame

    def times(self) -> np.ndarray:
        """When each frame is shown, in seconds from the first: float64 (frames,), ascending."""
        ticks = self.index.times
        if ticks is not None:
            return (ticks - ticks[0]) * float(self.stream.time_base)
        return np.arange(self.total) * self._frame_seconds

    def decode_first(self) -> av.VideoFrame:
        """The first frame, as stored. BadSample: it cannot be decoded, or has another size than the header says."""
        for frame in self._source.frames():
            _require_size(frame, self._stored_size)
            self._is_interlaced = bool(frame.interlaced_frame)
            return frame
        raise BadSample("none of its frames can be decoded")


def check_container(data: bytes, limits: Limits) -> Container:
    """BadSample: no container that is read here, cut, contradicting itself, or over a limit."""
    if not data:
        raise BadSample("it is empty")
    limits.check_file(len(data))
    if data.startswith(MAGIC):
        return check_matroska(data, limits)
    if data[:4] == avi.MAGIC and data[8:12] == avi.KIND:
        return avi.check_avi(data, limits)
    if data[4:8].decode("latin-1") in FIRST:
        return check_mp4(data, limits)
    raise BadSample("it is neither MP4, WebM, Matroska nor AVI")


@contextmanager
def opened(data: bytes, limits: Limits) -> Iterator[Video]:
    """A video in memory, its container checked first. BadSample: not a video, over a limit, or FFmpeg refuses it."""
    claims = check_container(data, limits)
    with ExitStack() as closing:
        try:
            source = closing.enter_context(_source(data, claims, limits))
            index = index_frames(source.codec, source.packets)
            if index is None:
                index = counted(source.packets, [_time(frame) for frame in source.frames()])
                source = closing.enter_context(_source(data, claims, limits))  # a decoder that has seen nothing
            if not index.total:
                raise BadSample("none of its frames can be decoded")
            yield Video(source, index, _turn(data, claims, limits, source), claims.name, limits)
        except av.error.FFmpegError as error:
            raise _refusal(error) from error


def _turn(data: bytes, claims: Container, limits: Limits, source: _Source) -> Turn:
    """How its frames are turned to be shown: what FFmpeg says once it has decoded the first one.

    That costs a decode, so a look at the headers tells whether there may be anything to ask.
    """
    codec, first = source.codec, bytes(source.packets[0])
    if codec.name in _EXIF_CODECS:
        is_possible = b"Exif" in first or b"eXIf" in first
    else:
        is_possible = bitstream.may_be_turned(codec.name, codec.extradata, first)
    if not claims.may_be_turned and not is_possible:
        return UPRIGHT
    with _source(data, claims, limits) as other:
        return next(map(turn_of_frame, other.frames()), UPRIGHT)


def turn_of_frame(frame: av.VideoFrame) -> Turn:
    """BadSample: by no multiple of 90 degrees."""
    matrix = next((data for data in frame.side_data if data.type == Type.DISPLAYMATRIX), None)
    return UPRIGHT if matrix is None else turn_of_matrix(np.frombuffer(bytes(matrix), np.int32).tolist())


def full_decode(data: bytes, limits: Limits) -> Iterator[av.VideoFrame]:
    """Every frame from the beginning, with no numbering: what `opened` is compared with. Raises BadSample."""
    claims = check_container(data, limits)
    try:
        with _source(data, claims, limits) as source:
            for frame in source.frames():
                _require_size(frame, source.size)
                yield frame
    except av.error.FFmpegError as error:
        raise _refusal(error) from error


def _refusal(error: av.error.FFmpegError) -> BadSample:
    return BadSample(f"FFmpeg cannot decode it: {error.strerror}")


@contextmanager
def _source(data: bytes, claims: Container, limits: Limits) -> Iterator[_Source]:
    """BadSample: its stream is not what its header claims, or over a limit."""
    with av.open(io.BytesIO(data), metadata_errors="replace") as container:
        if not container.streams.video:
            raise BadSample("it has no video stream")
        stream = container.streams.video[0]
        context = stream.codec_context
        if context is None:
            raise BadSample(f"FFmpeg does not know its codec{f' {claims.codec!r}' if claims.codec else ''}")
        context.thread_count = 1  # the worker processes are the parallelism
        context.flags |= Flags.unaligned  # crops at the left are to the pixel
        context.open(strict=False)  # what is set before that, skip_frame too, holds for the whole stream
        packets = [packet for packet in container.demux(stream) if packet.size]
        size = (context.width, context.height)
        limits.check_size(*size)
        limits.check_frames(len(packets))
        if size != (claims.width, claims.height):
            raise BadSample(f"its header says {claims.width}x{claims.height}, its stream {size[0]}x{size[1]}")
        if claims.frames not in (None, len(packets)):
            raise BadSample(f"its header says {claims.frames} frames, {len(packets)} are found")
        codec = context.codec
        facts = Codec(codec.canonical_name, codec.reorder, codec.intra_only, bytes(context.extradata or b""))
        yield _Source(container, stream, packets, facts, size)


def _end_of_track(stream: Any) -> float | None:
    """When a Matroska track ends, in seconds, by the tag that muxers write for each: the header's is of all tracks."""
    parts = stream.metadata.get("DURATION", "").split(":")
    try:
        hours, minutes, seconds = map(float, parts)
    except ValueError:
        return None
    return 3600 * hours + 60 * minutes + seconds


def _time(frame: av.VideoFrame) -> int | None:
    """When it is shown, or, of an AVI, when it was decoded."""
    return frame.dts if frame.pts is None else frame.pts


def probe(data: bytes, limits: Limits) -> VideoInfo:
    """Describe a video; only its first frame is decoded. BadSample: it cannot be used."""
    with opened(data, limits) as video:
        video.decode_first()
        return video.info


def _require_size(frame: av.VideoFrame, size: tuple[int, int]) -> None:
    if (frame.width, frame.height) != size:
        raise BadSample(f"a frame is {frame.width}x{frame.height}, its header says {size[0]}x{size[1]}")


@dataclass
class RgbWriter:
    """Writes frames of one video as RGB, or parts of them, as DALI would convert the whole."""

    reformatters: dict[Box, VideoReformatter] = field(default_factory=partial(defaultdict, VideoReformatter))
    cutters: dict[Box, Graph] = field(default_factory=dict)

    def write(self, frame: av.VideoFrame, image: np.ndarray, box: Box) -> None:
        """Into the part of uint8 (H,W,3); into all of it, where the frame cannot be cut without a trace.

        FFmpeg is quicker to planes, in the order G, B, R, than to pixels, and numpy than PyAV from there.
        """
        whole = Box(0, 0, frame.height, frame.width)
        # Chroma must be where it is in the whole: at every second pixel, exactly.
        if box != whole and frame.format.name in CUT_FORMATS and frame.width % 2 == frame.height % 2 == 0:
            frame = self._cut(frame, box)
        else:
            box = whole
        planar = self.reformatters[box].reformat(
            frame, format="gbrp", interpolation=_TO_RGB, src_colorspace=Colorspace.ITU601, threads=1
        )
        part = image[box.top : box.top + box.height, box.left : box.left + box.width]
        for channel, plane in zip((1, 2, 0), planar.planes, strict=True):
            part[..., channel] = np.frombuffer(plane, np.uint8).reshape(-1, plane.line_size)[:, : plane.width]

    def _cut(self, frame: av.VideoFrame, box: Box) -> av.VideoFrame:
        """The part of a frame, without a copy."""
        if box not in self.cutters:
            self.cutters[box] = filters(frame, [("crop", f"{box.width}:{box.height}:{box.left}:{box.top}")])
        self.cutters[box].push(frame)
        return self.cutters[box].pull()


def filters(frame: av.VideoFrame, chain: Sequence[tuple[str, str]]) -> Graph:
    """FFmpeg's filters, by name and arguments, one behind the other, for frames like this one."""
    graph, size = Graph(), {"width": frame.width, "height": frame.height}
    graph.threads = 1  # else it starts one for each core, for every clip
    source = graph.add_buffer(**size, format=frame.format, time_base=Fraction(1))
    graph.link_nodes(source, *(graph.add(*each) for each in chain), graph.add("buffersink")).configure()
    return graph
