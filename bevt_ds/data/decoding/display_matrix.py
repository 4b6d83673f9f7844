"""How a video is turned to be upright: by a matrix in its container, or a message in its H.264 or HEVC stream.

What is shown is what FFmpeg says, once it has decoded a frame. That costs a decode, so a look at the headers tells
whether there may be anything to ask.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

import av
import numpy as np
from av.sidedata.sidedata import Type

from bevt_ds.data.decoding.bitstream import units
from bevt_ds.data.decoding.mp4_boxes import Box, boxes
from bevt_ds.data.decoding.turning import UPRIGHT, Turn, turn_of_matrix

_MATRIX_AT = {"mvhd": 36, "tkhd": 40}  # in the content of these boxes; 12 bytes later in version 1
_DISPLAY_ORIENTATION = 47  # H.264 D.1.27, HEVC D.2.17
_EXIF_CODECS = frozenset({"mjpeg", "png"})


def turn_of_frame(frame: av.VideoFrame) -> Turn:
    """BadSample: by no multiple of 90 degrees."""
    matrix = next((data for data in frame.side_data if data.type == Type.DISPLAYMATRIX), None)
    return UPRIGHT if matrix is None else turn_of_matrix(np.frombuffer(bytes(matrix), np.int32).tolist())


def mp4_may_be_turned(data: bytes, moov: Box) -> bool:
    """Whether the movie or one of its tracks has a matrix that is not the unit matrix, but for its scale."""
    tracks = [box for box in boxes(data, *moov[1:]) if box[0] == "trak"]
    headers = [box for parent in (moov, *tracks) for box in boxes(data, *parent[1:]) if box[0] in _MATRIX_AT]
    return any(not _is_upright(matrix) for header in headers for matrix in _matrices(data, header))


def _matrices(data: bytes, header: Box) -> Iterator[tuple[int, ...]]:
    name, start, end = header
    at = start + _MATRIX_AT[name] + (12 if start < end and data[start] else 0)
    if at + 36 <= end:
        yield struct.unpack_from(">9i", data, at)


def _is_upright(matrix: tuple[int, ...]) -> bool:
    a, b, _, c, d = matrix[:5]
    return a > 0 and d > 0 and b == c == 0


def stream_may_be_turned(codec: str, extradata: bytes, packet: bytes) -> bool:
    """Whether a stream asks to turn its frames. extradata: its header; packet: its first one."""
    if codec in _EXIF_CODECS:
        return b"Exif" in packet or b"eXIf" in packet
    if codec == "h264":
        length = (extradata[4] & 3) + 1 if extradata[:1] == b"\1" and len(extradata) > 4 else 0
        messages = [unit[1:] for unit in units(packet, length) if unit[0] & 31 == 6]
    elif codec == "hevc":
        length = (extradata[21] & 3) + 1 if extradata[:1] == b"\1" and len(extradata) > 21 else 0
        messages = [unit[2:] for unit in units(packet, length) if unit[0] >> 1 & 63 == 39]
        messages += [extradata[i + 2 :] for i in range(len(extradata)) if extradata[i : i + 2] == b"\x4e\1"]
    else:
        return False
    return any(kind == _DISPLAY_ORIENTATION for message in messages for kind in _kinds(bytes(message)))


def _kinds(messages: bytes) -> Iterator[int]:
    """The kinds of the supplemental messages in a NAL unit (H.264 7.3.2.3.1)."""
    messages = messages.replace(b"\0\0\3", b"\0\0")
    at = 0
    while at + 2 < len(messages):
        values = []
        for _ in ("kind", "size"):
            value = 0
            while at < len(messages) and messages[at] == 255:
                value, at = value + 255, at + 1
            value, at = value + (messages[at] if at < len(messages) else 0), at + 1
            values.append(value)
        yield values[0]
        at += values[1]
