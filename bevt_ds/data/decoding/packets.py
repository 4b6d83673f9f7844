"""The packets of a clip as a GPU's decoder takes them: no container, and none that its frames do not need. No torch."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import av
import numpy as np

from bevt_ds.data.decoding import h264, hevc
from bevt_ds.data.decoding.bitstream import Buffer, units
from bevt_ds.data.decoding.frame_index import FrameIndex
from bevt_ds.data.decoding.geometry import Box
from bevt_ds.data.decoding.video import RgbWriter, Video, filters, fits_gpu, opened
from bevt_ds.data.limits import Limits
from bevt_ds.data.plan import CHOICES

# Codecs whose frames are the same bits whoever decodes them, and their headers. MPEG-4's are not, by its standard.
_HEADERS = {"h264": h264.header_units, "hevc": hevc.header_units}
_START = b"\0\0\0\1"


def packets(data: bytes, limits: Limits, request: dict[str, Any]) -> tuple[dict[str, Any], bytes]:
    """{"choice", "positions", "frames", "stride"} -> {"sizes"} of packets (Annex B), and the packets one by one.

    "numbers": of each packet's frame. "lengths": how many packets each stretch has, which is decoded by itself.
    "wanted": those that clips need, ascending. "places": for each clip, which of them each of its frames is, (k,F).
    "codec", "width", "height", "full_range". "total": frames of the video. "refused" alone, with "total": it is not
    for a GPU. The first frame is decoded, so that what cannot be decoded at all gets no further. BadSample.
    """
    began = time.perf_counter()
    with opened(data, limits) as video:
        demuxed = time.perf_counter()
        first = video.decode_first()
        info, frames = video.info, request["frames"]
        times = {"demux": demuxed - began, "decode": time.perf_counter() - demuxed, "decoded": 1}
        reply = {"total": video.total, **times}
        if refusal := refused(vars(info)) or unlike_nv12(first):
            return {**reply, "refused": refusal}, b""
        choose = CHOICES[request["choice"]]
        chosen = [choose(video.total, frames, request["stride"], position) for position in request["positions"]]
        wanted, places = np.unique(chosen, return_inverse=True)
        limits.check_clip(len(wanted), *video.size)
        numbers, parts, lengths = coded(video, wanted)
    reply |= {
        "codec": info.codec,
        "width": video.size[0],
        "height": video.size[1],
        "full_range": info.pixel_format == "yuvj420p",
        "wanted": wanted.tolist(),
        "places": places.reshape(len(chosen), frames).tolist(),
        "numbers": numbers,
        "sizes": [len(part) for part in parts],
        "lengths": lengths,
    }
    return reply, b"".join(parts)


def refused(facts: Mapping[str, Any]) -> str:
    """Why a video is not given to NVDEC; "": it is. facts: the fields of its VideoInfo."""
    if facts["codec"] not in _HEADERS:
        return f"{facts['codec']} is decoded by workers"
    if facts["gpu_obstacle"]:
        return f"{facts['codec']}, {facts['gpu_obstacle']}"
    return "" if fits_gpu(facts) else "its container, size, format or order of frames is not for a GPU"


def unlike_nv12(frame: av.VideoFrame) -> str:
    """Why pixels of a decoded frame, which is written to, are not made as rgb.py makes them; "": they are.

    It takes chroma from the left, halfway between two lines. Where a stream says otherwise, a worker does as it says.
    """
    side = 16
    for plane in frame.planes[1:]:  # levels that tell where they lie
        rows = np.frombuffer(plane, np.uint8).reshape(-1, plane.line_size).copy()
        rows[: side // 2, : side // 2] = np.arange(side**2 // 4).reshape(side // 2, -1) * 37 % 191 + 32
        plane.update(rows)
    whole, pair = Box(0, 0, side, side), []
    for more in ((), (("setparams", "field_mode=prog:chroma_location=left"),)):
        graph = filters(frame, [("crop", f"{side}:{side}:0:0"), *more])
        graph.push(frame)
        pair.append(np.empty((side, side, 3), np.uint8))
        RgbWriter().write(graph.pull(), pair[-1], whole)
    return "" if np.array_equal(*pair) else "its chroma lies elsewhere than NVDEC's pixels are made of"


def coded(video: Video, wanted: np.ndarray) -> tuple[list[int], list[bytes], list[int]]:
    """Packets that the frames `wanted` need: the number of each one's frame, their bytes, how many each stretch has."""
    codec = video.codec
    sets, length = _HEADERS[codec.name](codec.extradata)
    numbers, parts, lengths = [], [], []
    for chosen in needed(video.index, wanted.tolist()):
        first, *others = (annex_b(units(memoryview(video.packets[i]), length)) for i in chosen)
        parts += [annex_b(sets) + first, *others]
        numbers += [video.index.numbers[i] for i in chosen]
        lengths.append(len(chosen))
    return numbers, parts, lengths


def needed(index: FrameIndex, wanted: Sequence[int]) -> list[list[int]]:
    """The packets of each stretch: from the last entry in front of its first frame on, less what no other refers to."""
    numbers = index.numbers
    chosen = []
    for frames, (first, *_), last in index.stretches(wanted):
        kept = frozenset(frames)
        chosen.append([i for i in range(first, last + 1) if numbers[i] in kept or not index.spare[i]])
    return chosen


def annex_b(parts: Collection[Buffer]) -> bytes:
    """NAL units with a start code before each (H.264 and HEVC, Annex B)."""
    return b"".join(part for unit in parts for part in (_START, unit))
