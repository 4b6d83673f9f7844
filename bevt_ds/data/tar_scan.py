"""Read a tar once, from header to header, and checksum its media members."""

from __future__ import annotations

import json
import os
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import BinaryIO

from bevt_ds.data.members import BLOCK, IMAGE_EXTENSIONS, VIDEO_EXTENSIONS, Shard, split_name
from bevt_ds.errors import UserError

_CHUNK = 1 << 20
_MOST_LABEL_BYTES = 1 << 16  # of a .json or .cls; a larger one is no label
# What tarfile raises on headers that make no sense, beside its own errors.
_DAMAGE = (tarfile.TarError, ValueError, OverflowError, OSError, EOFError)


@dataclass
class _Found:
    """What the walk has met so far."""

    rows: dict[str, tuple] = field(default_factory=dict)  # key -> extension, offset, size, crc, head
    labels: dict[str, str] = field(default_factory=dict)
    ignored: int = 0


def scan(path: str, tar: BinaryIO, keep_first: bool = False) -> Shard:
    """The media members of a tar; what is not a regular file is passed over and counted.

    UserError: it is no tar, is cut or damaged, or holds a key twice and `keep_first` is off. A tar that can be read
    only in part is refused, because an index of that part would pass for the whole.
    """
    found = _Found()
    try:
        for info in _members(tar):
            _note(found, path, tar, info, keep_first)
    except _DAMAGE as error:
        raise UserError(f"{path} is {_what_is_wrong(tar, error, len(found.rows))}") from error
    columns = zip(*found.rows.values(), strict=True) if found.rows else ((), (), (), (), ())
    extensions, offsets, sizes, crcs, heads = map(tuple, columns)
    labels = tuple(found.labels.get(key, "") for key in found.rows)
    return Shard(path, tuple(found.rows), extensions, offsets, sizes, crcs, heads, labels, found.ignored)


def _members(tar: BinaryIO) -> Iterator[tarfile.TarInfo]:
    """The members in order; raises where tarfile would end early without a word."""
    total = os.fstat(tar.fileno()).st_size
    with tarfile.open(fileobj=tar, mode="r:") as archive:
        end = 0
        for info in archive:
            if info.offset_data < end + BLOCK or info.size < 0:
                raise ValueError(f"the header at byte {info.offset} points backwards")
            if info.isreg() and info.offset_data + info.size > total:
                raise ValueError(f"member {info.name!r} ends after the file")
            end = info.offset_data
            yield info
        _require_end(tar, archive.offset, total)


def _require_end(tar: BinaryIO, at: int, total: int) -> None:
    """An archive ends with zeros, or with its file; anything else is a damaged header or a second archive."""
    for start in range(at, total, _CHUNK):
        block = os.pread(tar.fileno(), _CHUNK, start)
        if block.count(0) != len(block):
            raise ValueError(f"it goes on after its end, or the header at byte {at} is damaged")


def _note(found: _Found, path: str, tar: BinaryIO, info: tarfile.TarInfo, keep_first: bool) -> None:
    key, extension = split_name(info.name)
    if extension in ("cls", "json") and info.isreg() and info.size <= _MOST_LABEL_BYTES:
        if label := _label(extension, os.pread(tar.fileno(), info.size, info.offset_data)):
            found.labels.setdefault(key, label)
        return
    if extension not in VIDEO_EXTENSIONS | IMAGE_EXTENSIONS:
        return
    if not info.isreg() or info.sparse is not None:
        found.ignored += 1
    elif key not in found.rows:
        head = zlib.crc32(os.pread(tar.fileno(), BLOCK, info.offset_data - BLOCK))
        crc = _checksum(tar, info.offset_data, info.size)
        found.rows[key] = (extension, info.offset_data, info.size, crc, head)
    elif not keep_first:
        raise UserError(
            f"{path} holds two samples named {key!r}: rename or remove one, or take the first of them with"
            " `bevt shards index --dedupe first`"
        )


def _label(extension: str, data: bytes) -> str:
    """The class of a sample as text; empty: it has none that can be read."""
    text = data.decode(errors="replace")
    if extension == "cls":
        return text.strip()
    try:
        facts = json.loads(text)
    except (ValueError, RecursionError):
        return ""
    label = facts.get("label", "") if isinstance(facts, dict) else ""
    return str(label) if isinstance(label, str | int) and not isinstance(label, bool) else ""


def _checksum(tar: BinaryIO, offset: int, size: int) -> int:
    """CRC-32 of a member, read with pread: the archive's own file position stays where tarfile left it."""
    crc = 0
    for start in range(offset, offset + size, _CHUNK):
        crc = zlib.crc32(os.pread(tar.fileno(), min(_CHUNK, offset + size - start), start), crc)
    return crc


def _what_is_wrong(tar: BinaryIO, error: BaseException, found: int) -> str:
    magic = os.pread(tar.fileno(), 6, 0)
    if not magic:
        return "empty (0 bytes): write it again"
    if magic[:2] == b"\x1f\x8b" or magic == b"\xfd7zXZ\x00" or magic[:4] == b"\x28\xb5\x2f\xfd":
        return "compressed: unpack it to a plain tar, samples are read by offset"
    return f"not a whole tar file ({error}; {found} samples before that): write or copy it again"
