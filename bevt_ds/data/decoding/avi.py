"""A look at an AVI's chunks before any demuxer sees them (RIFF, with OpenDML's further parts)."""

from __future__ import annotations

import struct

from bevt_ds.data.limits import BadSample, Container, Limits

MAGIC, KIND = b"RIFF", b"AVI "  # bytes 0 to 3 and 8 to 11


def check_avi(data: bytes, limits: Limits) -> Container:
    """The first video stream's size. BadSample: a chunk is outside the file, or there is no video."""
    at = 0
    while at + 12 <= len(data):
        name, size = struct.unpack_from("<4sI", data, at)
        if name != b"RIFF":
            break  # what follows the RIFF parts is ignored
        if at + 8 + size > len(data):
            raise BadSample(f"the AVI is cut: it says {at + 8 + size} bytes and has {len(data)}")
        at += 8 + size + size % 2
    width, height = _video_format(data, 12, 8 + struct.unpack_from("<I", data, 4)[0])
    limits.check_size(width, height)
    return Container("avi", width, height, frames=None)


def _video_format(data: bytes, start: int, end: int) -> tuple[int, int]:
    """Width and height from the first video stream's format, found in LIST hdrl > LIST strl > strh, strf."""
    is_video = False
    while start + 8 <= end:
        name, size = struct.unpack_from("<4sI", data, start)
        content = start + 8
        if content + size > end:
            raise BadSample(f"its AVI is damaged at byte {start}")
        if name == b"LIST":
            start = content + 4 if data[content : content + 4] in (b"hdrl", b"strl") else content + size + size % 2
            continue
        if name == b"strh":
            is_video = data[content : content + 4] == b"vids"
        elif name == b"strf" and is_video and size >= 12:
            width, height = struct.unpack_from("<ii", data, content + 4)
            return width, abs(height)  # a negative height means top to bottom
        start = content + size + size % 2
    raise BadSample("it has no video stream")
