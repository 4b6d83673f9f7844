"""The fragments of an MP4: samples whose tables lie in `moof` boxes behind `moov` (ISO/IEC 14496-12, 8.8)."""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Sequence

import numpy as np

from bevt_ds.data.decoding.mp4_boxes import Box, boxes, child, count, only, table
from bevt_ds.data.limits import BadSample

# Flags of tfhd and trun: which fields are there.
_BASE, _DESCRIPTION, _DURATION, _SIZE, _BASE_IS_MOOF = 0x1, 0x2, 0x8, 0x10, 0x20000
_OFFSET, _FIRST_FLAGS = 0x1, 0x4
_OF_SAMPLE = (0x100, 0x200, 0x400, 0x800)  # duration, size, flags, shift
_SAMPLE_SIZE = 0x200


class Fragments:
    """How many frames each track has in fragments."""

    def __init__(self, frames: Counter[int]) -> None:
        self._frames = frames

    @classmethod
    def of(cls, data: bytes, moov: Box, moofs: Sequence[Box]) -> Fragments | None:
        """None: the MP4 is not fragmented. BadSample: a fragment contradicts itself or points outside the file."""
        sizes = _default_sizes(data, moov)
        if sizes is None:
            if moofs:
                raise BadSample("its MP4 is fragmented, and its 'moov' has no 'mvex' that says so")
            return None
        frames: Counter[int] = Counter()
        for moof in moofs:
            end = moof[1] - 8  # where data without an offset lies: at first as far as the fragment's beginning
            for traf in (box for box in boxes(data, *moof[1:]) if box[0] == "traf"):
                track, samples, end = _samples(data, traf, moof[1] - 8, end, sizes)
                frames[track] += samples
        return cls(frames)

    def frames(self, track: int) -> int:
        """Samples of the track that are not empty."""
        return self._frames[track]


def _default_sizes(data: bytes, moov: Box) -> dict[int, int] | None:
    """Bytes of a sample, where a fragment does not say: by track. None: there are to be no fragments."""
    mvex = [box for box in boxes(data, *moov[1:]) if box[0] == "mvex"]
    if not mvex:
        return None
    tracks = [box for box in boxes(data, *only(mvex, "mvex")[1:]) if box[0] == "trex"]
    return {count(data, trex, 4): count(data, trex, 16) for trex in tracks}


def _samples(data: bytes, traf: Box, moof: int, end: int, sizes: dict[int, int]) -> tuple[int, int, int]:
    """Track, its samples that are not empty, and where their data ends. end: where that of the track before does."""
    tfhd = child(data, traf, "tfhd")
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
