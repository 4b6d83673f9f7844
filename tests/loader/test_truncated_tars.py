"""Tars truncated at any byte, or with a flipped bit in any byte of a header (D3, D10).

Never indexed, it is refused by name or gives every sample that is whole. With its index it gives those in any case.
"""

from __future__ import annotations

import logging
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from bevt_ds.data.limits import BadSample
from bevt_ds.data.reading.index import SUFFIX, load_shard
from bevt_ds.data.reading.members import BLOCK, Shard, read_member
from bevt_ds.data.reading.tar_scan import scan
from bevt_ds.errors import UserError
from tests.loader.media import write_tar

LONG = "x" * 120  # a name that takes a PAX record before its header
NAMES = ["a.jpg", "a.cls", f"{LONG}.jpg", "c.mp4"]
SIZES = [700, 1, 1024, 100]  # one that fills its blocks, three that are padded
END = 1024  # zeros, without which it would be a tar too


class Tar:
    """A small tar, its bytes, and where in it the samples are."""

    def __init__(self, path: Path) -> None:
        self.path = path
        rng = np.random.default_rng(3)
        self.payloads = [rng.bytes(size) for size in SIZES]
        self.payloads[1] = b"3"
        write_tar(path, dict(zip(NAMES, self.payloads, strict=True)))
        with tarfile.open(path) as tar:
            infos = tar.getmembers()
        self.begins = [info.offset for info in infos]
        self.data = [info.offset_data for info in infos]
        self.ends = [offset + size for offset, size in zip(self.data, SIZES, strict=True)]
        self.next = [-(-end // BLOCK) * BLOCK for end in self.ends]
        os.truncate(path, self.next[-1] + END)
        self.bytes = path.read_bytes()

    def cuts(self) -> Iterator[int]:
        """From the end: every byte of headers, padding and end, and every 50th of the data."""
        for at in reversed(range(len(self.bytes))):
            inside = any(begin < at < end for begin, end in zip(self.data, self.ends, strict=True))
            if not inside or at % 50 == 0:
                yield at

    def header_bytes(self) -> Iterator[int]:
        for begin, data in zip(self.begins, self.data, strict=True):
            yield from range(begin, data)


@pytest.fixture
def tar(tmp_path: Path) -> Tar:
    return Tar(tmp_path / "s.tar")


def scanned(path: Path) -> Shard:
    with path.open("rb") as file:
        return scan(str(path), file)


def lost_and_read(tar: Tar, shard: Shard, length: int) -> int:
    """How many samples a tar of that length has lost; the others are read."""
    lost = 0
    for member in shard.members():
        which = tar.data.index(member.offset)
        if tar.ends[which] <= length:
            assert read_member(member) == tar.payloads[which]
        else:
            lost += 1
            with pytest.raises(BadSample, match="the shard ends"):
                read_member(member)
    return lost


def test_truncated_tar_before_indexing_is_refused_d3(tar: Tar, caplog: pytest.LogCaptureFixture) -> None:
    """A cut behind a member cannot be told from a tar without end: that is read, with a warning."""
    whole = scanned(tar.path)
    assert (whole.keys, whole.labels) == (("a", LONG, "c"), ("3", "", ""))
    outcomes = {"refused": 0, "read": 0}
    for length in tar.cuts():
        os.truncate(tar.path, length)
        caplog.clear()
        if length in tar.next or length > tar.next[-1]:
            shard = scanned(tar.path)
            present = sum(offset < length for offset in whole.offsets)
            assert shard.offsets == whole.offsets[:present] and shard.crcs == whole.crcs[:present]
            assert lost_and_read(tar, shard, length) == 0
            assert ("lacks the zeros that end a tar" in caplog.text) == (length in tar.next)
            outcomes["read"] += 1
        else:
            with pytest.raises(UserError, match="s.tar is (not a whole tar|empty)"):
                scanned(tar.path)
            outcomes["refused"] += 1
    assert outcomes["read"] == len(NAMES) + END - 1 and outcomes["refused"] > 4000


def test_tar_truncated_after_indexing_loses_only_the_cut_samples_d3(tar: Tar, caplog: pytest.LogCaptureFixture) -> None:
    """What lies before the cut is used; the index keeps the rest, so that the epoch keeps its length."""
    whole = load_shard(str(tar.path))
    for length in tar.cuts():
        os.truncate(tar.path, length)
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            assert load_shard(str(tar.path)) == whole
        assert f"{lost_and_read(tar, whole, length)} of its 3 samples are lost" in caplog.text
    assert load_shard(str(tar.path)).offsets == whole.offsets  # still, of a file of 0 bytes


def flipped(tar: Tar, places: Iterator[int]) -> Iterator[int]:
    """Flip one bit at each place, and back; neither size nor time gives it away."""
    times = tar.path.stat().st_atime_ns, tar.path.stat().st_mtime_ns
    with tar.path.open("r+b", buffering=0) as file:
        for at in places:
            os.pwrite(file.fileno(), bytes([tar.bytes[at] ^ 1 << at % 8]), at)
            os.utime(tar.path, ns=times)
            yield at
            os.pwrite(file.fileno(), tar.bytes[at : at + 1], at)


def test_flipped_header_bit_before_indexing_d10(tar: Tar) -> None:
    """Refused, or it changes nothing. A name in a PAX record has no checksum: there the sample may change its name."""
    whole = scanned(tar.path)
    record = range(tar.begins[2] + BLOCK, tar.begins[2] + 2 * BLOCK)
    refused = 0
    for at in flipped(tar, tar.header_bytes()):
        try:
            shard = scanned(tar.path)
        except UserError as error:
            assert "s.tar is not a whole tar" in str(error)
            refused += 1
            continue
        if at in record:
            assert {whole.offsets[0], whole.offsets[2]} <= set(shard.offsets) <= set(whole.offsets)
        else:
            columns = ("keys", "extensions", "offsets", "sizes", "crcs", "labels")
            assert all(getattr(shard, name) == getattr(whole, name) for name in columns), f"byte {at}"
    assert refused > 2300


def test_flipped_header_bit_after_indexing_d10(tar: Tar) -> None:
    """The header before a sample's data is compared; the samples are those of the index in any case."""
    whole = load_shard(str(tar.path))
    index = Path(f"{tar.path}{SUFFIX}").read_bytes()
    own = {at for offset in whole.offsets for at in range(offset - BLOCK, offset)}
    for at in flipped(tar, tar.header_bytes()):
        if at in own:
            with pytest.raises(UserError, match="s.tar.index.json does not match .*s.tar"):
                load_shard(str(tar.path))
        else:
            assert load_shard(str(tar.path)) == whole
        assert lost_and_read(tar, whole, len(tar.bytes)) == 0
    assert Path(f"{tar.path}{SUFFIX}").read_bytes() == index
