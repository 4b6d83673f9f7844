"""A look at an MP4's boxes before any demuxer sees them (ISO/IEC 14496-12).

A header that contradicts the file can crash a decoder. What is checked: every box lies inside its parent, and of each
video track the size of the picture and that every sample the tables point at lies inside the file. Other tracks, such
as sound, are nobody's business here. Boxes that nobody knows are passed over, as the standard says, but none that is
checked in its place may stand elsewhere: a demuxer reads it there too.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

import numpy as np

from bevt_ds.data.decoding.display_matrix import mp4_may_be_turned
from bevt_ds.data.decoding.mp4_boxes import Box, boxes, child, count, only, table
from bevt_ds.data.decoding.mp4_fragments import Fragments
from bevt_ds.data.limits import BadSample, Limits

FIRST = frozenset(  # what an MP4 is known by
    {"ftyp", "styp", "moov", "mdat", "free", "skip", "wide", "pnot", "uuid", "meta", "sidx", "pdin", "udta", "junk"}
)
_ESSENTIAL = frozenset({"moov", "mdat"})
_WITHIN_MOOV = frozenset(
    {"trak", "mdia", "minf", "stbl", "hdlr", "edts", "elst", "mvex", "cmov", "hoov"}
    | {"stsd", "stsz", "stz2", "stco", "co64", "stsc", "stts", "ctts", "stss", "stps"}
)
_WITHIN_MOOF = frozenset({"traf", "tfhd", "tfdt", "trun"})


@dataclass(frozen=True)
class Track:
    """A video track as its tables describe it."""

    width: int
    height: int
    frames: int  # samples that are not empty
    edited: bool  # an edit list may hide some of them
    codec: str  # of its sample description
    is_fragmented: bool  # its samples may lie in fragments too
    may_be_turned: bool  # a matrix of the file says how it is shown


def check_mp4(data: bytes, limits: Limits) -> Track:
    """The first video track. BadSample: the boxes do not describe a video that lies inside `data`."""
    top = list(boxes(data, 0, len(data), _ESSENTIAL))
    for name, _, _ in top:
        if name in _WITHIN_MOOV:
            raise BadSample(f"its MP4 has a box {name!r} outside 'moov'")
        if name in _WITHIN_MOOF:
            raise BadSample(f"its MP4 has a box {name!r} outside 'moof'")
    moov = only(top, "moov")
    fragments = Fragments.of(data, moov, [box for box in top if box[0] == "moof"])
    turned = mp4_may_be_turned(data, moov)
    tracks = [_track(data, box, limits, fragments, turned) for box in boxes(data, *moov[1:]) if box[0] == "trak"]
    videos = [track for track in tracks if track is not None]
    if not videos:
        raise BadSample("it has no video stream")
    return videos[0]


def _track(data: bytes, trak: Box, limits: Limits, fragments: Fragments | None, turned: bool) -> Track | None:
    """A track's facts, or None if it is no video."""
    mdia = child(data, trak, "mdia")
    _, start, end = child(data, mdia, "hdlr")
    if data[start + 8 : min(start + 12, end)] != b"vide":
        return None
    stbl = child(data, child(data, mdia, "minf"), "stbl")
    codec, width, height = _picture(data, child(data, stbl, "stsd"))
    limits.check_picture(width, height)
    sizes = _sample_sizes(data, stbl, limits)
    if len(sizes) or not fragments:
        _require_inside(_chunk_offsets(data, stbl), _chunk_lengths(data, stbl), sizes, len(data))
    _require_times(data, stbl, len(sizes))
    frames = int(np.count_nonzero(sizes))
    if fragments:
        frames += fragments.frames(_track_number(data, trak))
    limits.check_frames(frames)
    edited = any(box[0] == "edts" for box in boxes(data, *trak[1:]))
    return Track(width, height, frames, edited, codec, fragments is not None, turned)


def _track_number(data: bytes, trak: Box) -> int:
    tkhd = child(data, trak, "tkhd")
    return count(data, tkhd, 20 if data[tkhd[1]] else 12)  # times take 64 bits in version 1


def _picture(data: bytes, stsd: Box) -> tuple[str, int, int]:
    """Codec, width and height from the one sample description."""
    if count(data, stsd, 4) != 1:
        raise BadSample("its MP4 has several sample descriptions")
    ((fourcc, start, end), *rest) = boxes(data, stsd[1] + 8, stsd[2])
    if rest or end - start < 78:
        raise BadSample("its MP4's sample description is damaged")
    return fourcc, *struct.unpack_from(">HH", data, start + 24)


def _sample_sizes(data: bytes, stbl: Box, limits: Limits) -> np.ndarray:
    """Bytes of each sample: int64 (samples,)."""
    stsz = child(data, stbl, "stsz")
    fixed, samples = count(data, stsz, 4), count(data, stsz, 8)
    limits.check_frames(max(samples, 1))  # none: all may lie in fragments
    if fixed:
        return np.full(samples, fixed, dtype=np.int64)
    return table(data, stsz, 12, samples)[:, 0]


def _chunk_offsets(data: bytes, stbl: Box) -> np.ndarray:
    """First byte of each chunk: int64 (chunks,)."""
    tables = [box for box in boxes(data, *stbl[1:]) if box[0] in ("stco", "co64")]
    if len(tables) != 1:
        raise BadSample(f"its MP4 has {len(tables)} tables of chunk offsets")
    kind = ">u8" if tables[0][0] == "co64" else ">u4"
    return table(data, tables[0], 8, count(data, tables[0], 4), kind=kind)[:, 0]


def _chunk_lengths(data: bytes, stbl: Box) -> np.ndarray:
    """Runs of chunks with equally many samples: int64 (runs, 2), first chunk (from 0) and samples a chunk."""
    stsc = child(data, stbl, "stsc")
    runs = table(data, stsc, 8, count(data, stsc, 4), columns=3)
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
    for box in boxes(data, *stbl[1:]):
        if box[0] in ("stts", "ctts"):
            runs = table(data, box, 8, count(data, box, 4), columns=2)
            if runs[:, 0].sum() != frames:
                raise BadSample(f"its MP4's table {box[0]!r} does not cover its frames")
        elif box[0] == "stss":
            numbers = table(data, box, 8, count(data, box, 4))[:, 0]
            if len(numbers) and (numbers.min() < 1 or numbers.max() > frames):
                raise BadSample("its MP4's table of keyframes points outside")
