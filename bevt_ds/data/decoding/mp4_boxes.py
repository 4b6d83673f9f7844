"""The boxes of an MP4 and the tables in them (ISO/IEC 14496-12, 4.2)."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator

import numpy as np

from bevt_ds.data.limits import BadSample

Box = tuple[str, int, int]  # name, first and last + 1 byte of its content
_MAX_BOXES = 10_000  # a file of tiny boxes must not take long


def boxes(data: bytes, start: int, end: int, essential: Iterable[str] = ("",)) -> Iterator[Box]:
    """The boxes of data[start:end], each inside it.

    essential: once all of these were there, what is no whole box counts as one that ends at `end`, and fewer than 8
    bytes as nothing. By default that is never, since no box has that name.
    """
    lacking = set(essential)
    for _ in range(_MAX_BOXES):
        if end - start < 8:
            if any(data[start:end]) and lacking:
                raise BadSample(f"its MP4 has stray bytes at {start}")
            return
        size, name = struct.unpack_from(">I4s", data, start)
        header = 8
        if size == 1 and end - start >= 16:
            size, header = struct.unpack_from(">Q", data, start + 8)[0], 16
        elif size == 0:
            size = end - start  # up to the end of the file
        if size < header or size > end - start:
            if not lacking:
                yield _readable(name), start + 8, end
                return
            raise BadSample(f"its MP4 is cut or damaged: box {_readable(name)!r} at byte {start} says {size} bytes")
        yield _readable(name), start + header, start + size
        lacking.discard(_readable(name))
        start += size
    raise BadSample(f"its MP4 has more than {_MAX_BOXES} boxes in one place")


def _readable(name: bytes) -> str:
    return name.decode("latin-1")


def only(boxes: list[Box], name: str) -> Box:
    found = [box for box in boxes if box[0] == name]
    if len(found) != 1:
        raise BadSample(f"its MP4 has {len(found)} boxes {name!r} where there must be one")
    return found[0]


def child(data: bytes, parent: Box, name: str) -> Box:
    return only(list(boxes(data, *parent[1:])), name)


def count(data: bytes, box: Box, at: int) -> int:
    """A 32-bit number at byte `at` of a box."""
    if box[2] - box[1] < at + 4:
        raise BadSample(f"its MP4's box {box[0]!r} is too short")
    return struct.unpack_from(">I", data, box[1] + at)[0]


def table(data: bytes, box: Box, at: int, count: int, columns: int = 1, kind: str = ">u4") -> np.ndarray:
    """`count` rows of integers from byte `at` of a box: int64 (count, columns)."""
    width = np.dtype(kind).itemsize
    if count * columns * width > box[2] - box[1] - at:
        raise BadSample(f"its MP4's table {box[0]!r} says {count} entries, more than it holds")
    flat = np.frombuffer(data, np.dtype(kind), count * columns, box[1] + at)
    if kind == ">u8" and (flat >> 62).any():
        raise BadSample(f"its MP4's table {box[0]!r} points outside the file")
    return flat.astype(np.int64).reshape(count, columns)
