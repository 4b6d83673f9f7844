"""A look at an MP4's boxes before any demuxer sees them (ISO/IEC 14496-12).

A header that contradicts the file can crash a decoder. What is checked: every box lies inside its parent, and of each
video track the size of the picture and that every sample the tables point at lies inside the file. Other tracks, such
as sound, are nobody's business here. Boxes that nobody knows are passed over, as the standard says, but none that is
checked in its place may stand elsewhere: a demuxer reads it there too.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from bevt_ds.data.limits import BadSample, Limits

Box = tuple[str, int, int]  # name, first and last + 1 byte of its content

FIRST = frozenset(  # what an MP4 is known by
    {"ftyp", "styp", "moov", "mdat", "free", "skip", "wide", "pnot", "uuid", "meta", "sidx", "pdin", "udta", "junk"}
)
_ESSENTIAL = frozenset({"moov", "mdat"})
_WITHIN_MOOV = frozenset(
    {"trak", "mdia", "minf", "stbl", "hdlr", "edts", "elst", "mvex", "cmov", "hoov"}
    | {"stsd", "stsz", "stz2", "stco", "co64", "stsc", "stts", "ctts", "stss", "stps"}
)
_OF_FRAGMENTS = frozenset({"moof", "traf", "tfhd", "tfdt", "trun"})
CODECS = frozenset(
    {"avc1", "avc3", "hvc1", "hev1", "mp4v", "vp08", "vp09", "av01", "mjpa", "mjpb", "jpeg", "s263", "h263", "H263"}
)
_MAX_BOXES = 10_000  # a file of tiny boxes must not take long


@dataclass(frozen=True)
class Track:
    """A video track as its tables describe it."""

    width: int
    height: int
    frames: int  # samples that are not empty
    edited: bool  # an edit list may hide some of them


def check_mp4(data: bytes, limits: Limits) -> Track:
    """The first video track. BadSample: the boxes do not describe a video that lies inside `data`."""
    top = list(_boxes(data, 0, len(data), _ESSENTIAL))
    for name, _, _ in top:
        if name in _OF_FRAGMENTS:
            raise BadSample("it is a fragmented MP4: rewrite it with `ffmpeg -i IN -c copy OUT.mp4`")
        if name in _WITHIN_MOOV:
            raise BadSample(f"its MP4 has a box {name!r} outside 'moov'")
    moov = _only(top, "moov")
    tracks = [_track(data, box, limits) for box in _boxes(data, *moov[1:]) if box[0] == "trak"]
    videos = [track for track in tracks if track is not None]
    if not videos:
        raise BadSample("it has no video stream")
    return videos[0]


def _boxes(data: bytes, start: int, end: int, essential: Iterable[str] = ("",)) -> Iterator[Box]:
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


def _only(boxes: list[Box], name: str) -> Box:
    found = [box for box in boxes if box[0] == name]
    if len(found) != 1:
        raise BadSample(f"its MP4 has {len(found)} boxes {name!r} where there must be one")
    return found[0]


def _child(data: bytes, parent: Box, name: str) -> Box:
    return _only(list(_boxes(data, *parent[1:])), name)


def _track(data: bytes, trak: Box, limits: Limits) -> Track | None:
    """A track's facts, or None if it is no video."""
    mdia = _child(data, trak, "mdia")
    _, start, end = _child(data, mdia, "hdlr")
    if data[start + 8 : min(start + 12, end)] != b"vide":
        return None
    stbl = _child(data, _child(data, mdia, "minf"), "stbl")
    width, height = _picture(data, _child(data, stbl, "stsd"))
    limits.check_picture(width, height)
    sizes = _sample_sizes(data, stbl, limits)
    limits.check_frames(int(np.count_nonzero(sizes)))
    _require_inside(_chunk_offsets(data, stbl), _chunk_lengths(data, stbl), sizes, len(data))
    _require_times(data, stbl, len(sizes))
    edited = any(box[0] == "edts" for box in _boxes(data, *trak[1:]))
    return Track(width, height, int(np.count_nonzero(sizes)), edited)


def _picture(data: bytes, stsd: Box) -> tuple[int, int]:
    """Width and height from the one sample description."""
    if _count(data, stsd, 4) != 1:
        raise BadSample("its MP4 has several sample descriptions")
    ((fourcc, start, end), *rest) = _boxes(data, stsd[1] + 8, stsd[2])
    if rest or end - start < 78:
        raise BadSample("its MP4's sample description is damaged")
    if fourcc not in CODECS:
        raise BadSample(f"its codec {fourcc!r} is not one that is decoded here")
    return struct.unpack_from(">HH", data, start + 24)


def _count(data: bytes, box: Box, at: int) -> int:
    """A 32-bit number at byte `at` of a box."""
    if box[2] - box[1] < at + 4:
        raise BadSample(f"its MP4's box {box[0]!r} is too short")
    return struct.unpack_from(">I", data, box[1] + at)[0]


def _table(data: bytes, box: Box, at: int, count: int, columns: int = 1, kind: str = ">u4") -> np.ndarray:
    """`count` rows of integers from byte `at` of a box: int64 (count, columns)."""
    width = np.dtype(kind).itemsize
    if count * columns * width > box[2] - box[1] - at:
        raise BadSample(f"its MP4's table {box[0]!r} says {count} entries, more than it holds")
    flat = np.frombuffer(data, np.dtype(kind), count * columns, box[1] + at)
    if kind == ">u8" and (flat >> 62).any():
        raise BadSample(f"its MP4's table {box[0]!r} points outside the file")
    return flat.astype(np.int64).reshape(count, columns)


def _sample_sizes(data: bytes, stbl: Box, limits: Limits) -> np.ndarray:
    """Bytes of each sample: int64 (samples,)."""
    stsz = _child(data, stbl, "stsz")
    fixed, count = _count(data, stsz, 4), _count(data, stsz, 8)
    limits.check_frames(count)
    if fixed:
        return np.full(count, fixed, dtype=np.int64)
    return _table(data, stsz, 12, count)[:, 0]


def _chunk_offsets(data: bytes, stbl: Box) -> np.ndarray:
    """First byte of each chunk: int64 (chunks,)."""
    tables = [box for box in _boxes(data, *stbl[1:]) if box[0] in ("stco", "co64")]
    if len(tables) != 1:
        raise BadSample(f"its MP4 has {len(tables)} tables of chunk offsets")
    kind = ">u8" if tables[0][0] == "co64" else ">u4"
    return _table(data, tables[0], 8, _count(data, tables[0], 4), kind=kind)[:, 0]


def _chunk_lengths(data: bytes, stbl: Box) -> np.ndarray:
    """Runs of chunks with equally many samples: int64 (runs, 2), first chunk (from 0) and samples a chunk."""
    stsc = _child(data, stbl, "stsc")
    runs = _table(data, stsc, 8, _count(data, stsc, 4), columns=3)
    if len(runs) == 0 or runs[0, 0] != 1 or (np.diff(runs[:, 0]) <= 0).any() or (runs[:, 2] != 1).any():
        raise BadSample("its MP4's table 'stsc' is damaged")
    return runs[:, :2] - (1, 0)


def _require_inside(offsets: np.ndarray, runs: np.ndarray, sizes: np.ndarray, total: int) -> None:
    """BadSample: a chunk is outside the file, or the tables disagree about the number of samples."""
    if runs[-1, 0] >= len(offsets):
        raise BadSample("its MP4's tables disagree about the number of chunks")
    per_chunk = np.repeat(runs[:, 1], np.diff(np.append(runs[:, 0], len(offsets))))
    if per_chunk.sum() != len(sizes) or (per_chunk == 0).any():
        raise BadSample("its MP4's tables disagree about the number of frames")
    firsts = np.cumsum(per_chunk) - per_chunk
    ends = offsets + np.add.reduceat(sizes, firsts)
    if offsets.min() < 0 or ends.max() > total:
        raise BadSample(f"it is cut: its MP4 points at byte {ends.max()} of {total}")


def _require_times(data: bytes, stbl: Box, frames: int) -> None:
    """BadSample: the tables of times and of keyframes do not fit the number of frames."""
    for box in _boxes(data, *stbl[1:]):
        if box[0] in ("stts", "ctts"):
            runs = _table(data, box, 8, _count(data, box, 4), columns=2)
            if runs[:, 0].sum() != frames:
                raise BadSample(f"its MP4's table {box[0]!r} does not cover its frames")
        elif box[0] == "stss":
            numbers = _table(data, box, 8, _count(data, box, 4))[:, 0]
            if len(numbers) and (numbers.min() < 1 or numbers.max() > frames):
                raise BadSample("its MP4's table of keyframes points outside")
