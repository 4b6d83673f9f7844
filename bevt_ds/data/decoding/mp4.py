"""A look at an MP4's boxes before any demuxer sees them (ISO/IEC 14496-12).

A header that contradicts the file can crash a decoder. What is checked: every box lies inside its parent, and of each
video track the size of the image and that every sample the tables point at lies inside the file. Other tracks are
ignored. Unknown boxes are passed over, as the standard says, but none that is checked in its place may stand elsewhere:
a demuxer reads it there too.
"""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from bevt_ds.data.limits import BadSample, Container, Limits

FIRST = frozenset(  # what an MP4 is known by
    {"ftyp", "styp", "moov", "mdat", "free", "skip", "wide", "pnot", "uuid", "meta", "sidx", "pdin", "udta", "junk"}
)
_ESSENTIAL = frozenset({"moov", "mdat"})
_WITHIN_MOOV = frozenset(
    {"trak", "mdia", "minf", "stbl", "hdlr", "edts", "elst", "mvex", "cmov", "hoov"}
    | {"stsd", "stsz", "stz2", "stco", "co64", "stsc", "stts", "ctts", "stss", "stps"}
)
_WITHIN_MOOF = frozenset({"traf", "tfhd", "tfdt", "trun"})
_MATRIX_AT = {"mvhd": 36, "tkhd": 40}  # in the content of these boxes; 12 bytes later in version 1
_MAX_BOXES = 10_000  # a file of tiny boxes must not take long
# Flags of tfhd and trun: which fields are there.
_BASE, _DESCRIPTION, _DURATION, _SIZE, _BASE_IS_MOOF = 0x1, 0x2, 0x8, 0x10, 0x20000
_OFFSET, _FIRST_FLAGS = 0x1, 0x4
_OF_SAMPLE = (0x100, 0x200, 0x400, 0x800)  # duration, size, flags, shift
_SAMPLE_SIZE = 0x200

Box = tuple[str, int, int]  # name, first and last + 1 byte of its content


def check_mp4(data: bytes, limits: Limits) -> Container:
    """The first video track. BadSample: the boxes do not describe a video that lies inside `data`."""
    top = list(boxes(data, 0, len(data), _ESSENTIAL))
    for name, _, _ in top:
        if name in _WITHIN_MOOV:
            raise BadSample(f"its MP4 has a box {name!r} outside 'moov'")
        if name in _WITHIN_MOOF:
            raise BadSample(f"its MP4 has a box {name!r} outside 'moof'")
    moov = only(top, "moov")
    parts, moofs = list(boxes(data, *moov[1:])), [box for box in top if box[0] == "moof"]
    mvex = [box for box in parts if box[0] == "mvex"]
    if moofs and not mvex:
        raise BadSample("its MP4 is fragmented, and its 'moov' has no 'mvex' that says so")
    fragments = _fragments(data, only(mvex, "mvex"), moofs) if mvex else None
    traks = [box for box in parts if box[0] == "trak"]
    turned = _may_be_turned(data, [moov, *traks])
    videos = [track for trak in traks if (track := _track(data, trak, limits, fragments, turned))]
    if not videos:
        raise BadSample("it has no video stream")
    return videos[0]


def _may_be_turned(data: bytes, parents: Sequence[Box]) -> bool:
    """Whether the movie or one of its tracks has a matrix that is not the unit matrix, but for its scale."""
    for name, start, end in (box for parent in parents for box in boxes(data, *parent[1:])):
        if name in _MATRIX_AT:
            at = start + _MATRIX_AT[name] + (12 if start < end and data[start] else 0)
            if at + 36 <= end:
                a, b, _, c, d = struct.unpack_from(">5i", data, at)
                if a <= 0 or d <= 0 or b or c:
                    return True
    return False


def _track(data: bytes, trak: Box, limits: Limits, fragments: Counter[int] | None, turned: bool) -> Container | None:
    """A track's facts, or None if it is no video."""
    mdia = only(boxes(data, *trak[1:]), "mdia")
    _, start, end = only(boxes(data, *mdia[1:]), "hdlr")
    if data[start + 8 : min(start + 12, end)] != b"vide":
        return None
    minf = only(boxes(data, *mdia[1:]), "minf")
    stbl = only(boxes(data, *minf[1:]), "stbl")
    codec, width, height = _codec_and_size(data, only(boxes(data, *stbl[1:]), "stsd"))
    limits.check_size(width, height)
    sizes = _sample_sizes(data, stbl, limits)
    if len(sizes) or fragments is None:
        _require_inside(*_chunks(data, stbl), sizes, len(data))
    _require_times(data, stbl, len(sizes))
    frames = int(np.count_nonzero(sizes))
    if fragments is not None:
        frames += fragments[_track_number(data, trak)]
    limits.check_frames(frames)
    edited = any(box[0] == "edts" for box in boxes(data, *trak[1:]))  # which may hide some of them
    name = "mp4" if fragments is None else "fragmented mp4"
    return Container(name, width, height, None if edited else frames, codec, turned)


def _track_number(data: bytes, trak: Box) -> int:
    tkhd = only(boxes(data, *trak[1:]), "tkhd")
    return count(data, tkhd, 20 if data[tkhd[1]] else 12)  # times take 64 bits in version 1


def _codec_and_size(data: bytes, stsd: Box) -> tuple[str, int, int]:
    """Codec, width and height from the one sample description."""
    if count(data, stsd, 4) != 1:
        raise BadSample("its MP4 has several sample descriptions")
    ((fourcc, start, end), *rest) = boxes(data, stsd[1] + 8, stsd[2])
    if rest or end - start < 78:
        raise BadSample("its MP4's sample description is damaged")
    return fourcc, *struct.unpack_from(">HH", data, start + 24)


def _sample_sizes(data: bytes, stbl: Box, limits: Limits) -> np.ndarray:
    """Bytes of each sample: int64 (samples,)."""
    stsz = only(boxes(data, *stbl[1:]), "stsz")
    fixed, samples = count(data, stsz, 4), count(data, stsz, 8)
    limits.check_frames(max(samples, 1))  # none: all may lie in fragments
    if fixed:
        return np.full(samples, fixed, dtype=np.int64)
    return table(data, stsz, 12, samples)[:, 0]


def _chunks(data: bytes, stbl: Box) -> tuple[np.ndarray, np.ndarray]:
    """First byte of each chunk, int64 (chunks,), and runs of chunks with equally many samples.

    The runs are int64 (runs, 2): first chunk (from 0) and samples a chunk.
    """
    parts = list(boxes(data, *stbl[1:]))
    tables, stsc = [box for box in parts if box[0] in ("stco", "co64")], only(parts, "stsc")
    if len(tables) != 1:
        raise BadSample(f"its MP4 has {len(tables)} tables of chunk offsets")
    kind = ">u8" if tables[0][0] == "co64" else ">u4"
    runs = table(data, stsc, 8, count(data, stsc, 4), columns=3)
    if len(runs) == 0 or runs[0, 0] != 1 or (np.diff(runs[:, 0]) <= 0).any() or (runs[:, 2] != 1).any():
        raise BadSample("its MP4's table 'stsc' is damaged")
    return table(data, tables[0], 8, count(data, tables[0], 4), kind=kind)[:, 0], runs[:, :2] - (1, 0)


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
    for box in boxes(data, *stbl[1:]):
        if box[0] in ("stts", "ctts"):
            runs = table(data, box, 8, count(data, box, 4), columns=2)
            if runs[:, 0].sum() != frames:
                raise BadSample(f"its MP4's table {box[0]!r} does not cover its frames")
        elif box[0] == "stss":
            numbers = table(data, box, 8, count(data, box, 4))[:, 0]
            if len(numbers) and (numbers.min() < 1 or numbers.max() > frames):
                raise BadSample("its MP4's table of keyframes points outside")


def _fragments(data: bytes, mvex: Box, moofs: Sequence[Box]) -> Counter[int]:
    """How many samples that are not empty each track has in fragments: `moof` boxes behind `moov` (8.8).

    BadSample: a fragment contradicts itself or points outside the file.
    """
    tracks = [box for box in boxes(data, *mvex[1:]) if box[0] == "trex"]
    sizes = {count(data, trex, 4): count(data, trex, 16) for trex in tracks}  # where a fragment does not say
    frames: Counter[int] = Counter()
    for moof in moofs:
        end = moof[1] - 8  # where data without an offset lies: at first as far as the fragment's beginning
        for traf in (box for box in boxes(data, *moof[1:]) if box[0] == "traf"):
            track, samples, end = _samples(data, traf, moof[1] - 8, end, sizes)
            frames[track] += samples
    return frames


def _samples(data: bytes, traf: Box, moof: int, end: int, sizes: dict[int, int]) -> tuple[int, int, int]:
    """Track, its samples that are not empty, and where their data ends. end: where that of the track before does."""
    tfhd = only(boxes(data, *traf[1:]), "tfhd")
    flags, track, at = count(data, tfhd, 0) & 0xFFFFFF, count(data, tfhd, 4), 8
    base = moof if flags & _BASE_IS_MOOF else end
    if flags & _BASE:
        base, at = count(data, tfhd, at) << 32 | count(data, tfhd, at + 4), at + 8
    at += 4 * bool(flags & _DESCRIPTION) + 4 * bool(flags & _DURATION)
    if track not in sizes:
        raise BadSample(f"its MP4 has a fragment of a track {track} that 'mvex' does not name")
    size = count(data, tfhd, at) if flags & _SIZE else sizes[track]
    frames, end = 0, base
    for trun in (box for box in boxes(data, *traf[1:]) if box[0] == "trun"):
        lengths, offset = _run(data, trun, size)
        start = end if offset is None else base + offset
        end = start + int(lengths.sum())
        if start < 0 or end > len(data):
            raise BadSample(f"it is cut: a fragment of its MP4 points at byte {end} of {len(data)}")
        frames += int(np.count_nonzero(lengths))
    return track, frames, end


def _run(data: bytes, trun: Box, size: int) -> tuple[np.ndarray, int | None]:
    """Bytes of each sample, int64 (samples,), and where the first lies, from the base on; None: behind the last."""
    flags, samples, at, offset = count(data, trun, 0) & 0xFFFFFF, count(data, trun, 4), 8, None
    if flags & _OFFSET:
        (offset,) = struct.unpack(">i", struct.pack(">I", count(data, trun, at)))
        at += 4
    at += 4 * bool(flags & _FIRST_FLAGS)
    columns = [flag for flag in _OF_SAMPLE if flags & flag]
    if not columns and samples > len(data):
        raise BadSample(f"its MP4's table 'trun' says {samples} entries, more than the file has bytes")
    rows = table(data, trun, at, samples, columns=len(columns)) if columns else np.empty((samples, 0), np.int64)
    if _SAMPLE_SIZE in columns:
        return rows[:, columns.index(_SAMPLE_SIZE)], offset
    return np.full(samples, size, np.int64), offset


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
        size, header, name = struct.unpack_from(">I", data, start)[0], 8, data[start + 4 : start + 8].decode("latin-1")
        if size == 1 and end - start >= 16:
            size, header = struct.unpack_from(">Q", data, start + 8)[0], 16
        elif size == 0:
            size = end - start  # up to the end of the file
        if size < header or size > end - start:
            if not lacking:
                yield name, start + 8, end
                return
            raise BadSample(f"its MP4 is cut or damaged: box {name!r} at byte {start} says {size} bytes")
        yield name, start + header, start + size
        lacking.discard(name)
        start += size
    raise BadSample(f"its MP4 has more than {_MAX_BOXES} boxes in one place")


def only(boxes: Iterable[Box], name: str) -> Box:
    """The one box of that name. BadSample: there is none, or several."""
    found = [box for box in boxes if box[0] == name]
    if len(found) != 1:
        raise BadSample(f"its MP4 has {len(found)} boxes {name!r} where there must be one")
    return found[0]


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
