"""Read a tar once, from header to header, and checksum its media members."""

from __future__ import annotations

import json
import logging
import os
import posixpath
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import BinaryIO

from bevt_ds.data.reading.deadline import heartbeat
from bevt_ds.data.reading.members import BLOCK, KINDS, Shard, is_apple_double, read_at, split_name
from bevt_ds.errors import UserError

_CHUNK = 1 << 20
_MOST_HEADER_BYTES = 1 << 20  # of a long name or a PAX record
_MOST_LABEL_BYTES = 1 << 16  # of a .json or .cls; a larger one is no label
_MOST_NAMED = 20  # members that are passed over and named in the index
_LONGEST_NAMED = 200  # characters of a name there
_COMPRESSED = {  # what such a file begins with
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ\x00": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"\x04\x22\x4d\x18": "lz4",
    b"LZIP": "lzip",
    b"\x5d\x00\x00": "lzma",
    b"\x1f\x9d": "compress",
}
# What tarfile raises on headers that make no sense, next to its own errors.
_DAMAGE = (tarfile.TarError, ValueError, OverflowError, OSError, EOFError)

log = logging.getLogger(__name__)


@dataclass
class _Found:
    """What the walk has met so far."""

    rows: dict[tuple[str, str], tuple] = field(default_factory=dict)  # key, kind -> extension, offset, size, crc, head
    labels: dict[str, dict[str, str]] = field(default_factory=dict)  # key -> "cls" or "json" -> label
    files: dict[str, tarfile.TarInfo] = field(default_factory=dict)  # name -> the member that has its data
    ignored: list[str] = field(default_factory=list)  # names, each with the reason
    dropped: int = 0


def scan(path: str, tar: BinaryIO, keep_first: bool = False) -> Shard:
    """The media members of a tar, hard links to earlier members included.

    Other links, devices, sparse members and macOS's own files are passed over, counted and named.

    UserError: it is no tar, is cut or damaged, or holds two samples of one kind and key and `keep_first` is off. A tar
    that can be read only in part is refused, because an index of that part would pass for the whole.
    """
    found = _Found()
    try:
        for info in _members(path, tar):
            _note(found, path, tar, info, keep_first)
    except _DAMAGE as error:
        raise UserError(f"{path} is {_what_is_wrong(tar, error, len(found.rows))}") from error
    columns = zip(*found.rows.values(), strict=True) if found.rows else ((), (), (), (), ())
    extensions, offsets, sizes, crcs, heads = map(tuple, columns)
    keys = tuple(key for key, _ in found.rows)
    pairs = [_chosen(found.labels.get(key, {})) for key in keys]
    labels, json_labels = (tuple(pair[i] for pair in pairs) for i in (0, 1))
    counts = len(found.ignored), found.dropped
    names = tuple(found.ignored[:_MOST_NAMED])
    return Shard(path, keys, extensions, offsets, sizes, crcs, heads, labels, json_labels, *counts, names)


class _Headers:
    """The file as tarfile sees it, which reads headers only: none that claims megabytes is taken at its word."""

    def __init__(self, path: str, tar: BinaryIO) -> None:
        self._path, self._tar = path, tar
        self.tell, self.seek = tar.tell, tar.seek

    def read(self, size: int) -> bytes:
        """ValueError: no name or record is that long."""
        heartbeat(f"shard {self._path} at byte {self.tell()}")
        if not 0 <= size <= _MOST_HEADER_BYTES:
            raise ValueError(f"a header of {size} bytes")
        return self._tar.read(size)


def _members(path: str, tar: BinaryIO) -> Iterator[tarfile.TarInfo]:
    """The members in order; raises where tarfile would end early without a word."""
    total = os.fstat(tar.fileno()).st_size
    with tarfile.open(fileobj=_Headers(path, tar), mode="r:") as archive:
        end = 0
        for info in archive:
            if info.offset_data < end + BLOCK or info.size < 0:
                raise ValueError(f"the header at byte {info.offset} points backwards")
            # A sparse member's size counts its holes too; tarfile itself finds where the next member begins.
            if info.isreg() and info.sparse is None and info.offset_data + info.size > total:
                raise ValueError(f"member {info.name!r} ends after the file")
            end = info.offset_data
            yield info
        _require_end(path, tar, archive.offset, total)


def _require_end(path: str, tar: BinaryIO, at: int, total: int) -> None:
    """An archive ends with zeros, or with its file; anything else is a damaged header or a second archive."""
    if at == total:
        log.warning("%s lacks the zeros that end a tar: if it was cut, what is left are the samples before", path)
    for start in range(at, total, _CHUNK):
        block = _read(path, tar, _CHUNK, start)
        if block.count(0) != len(block):
            raise ValueError(f"it goes on after its end, or the header at byte {at} is damaged")


def _note(found: _Found, path: str, tar: BinaryIO, info: tarfile.TarInfo, keep_first: bool) -> None:
    name, (key, extension) = info.name, split_name(info.name)
    place, problem = _place(found, info)
    if place is not None:
        found.files[posixpath.normpath(name)] = place
    if place is not None and extension in ("cls", "json") and place.size <= _MOST_LABEL_BYTES:
        if label := _label(extension, _read(path, tar, place.size, place.offset_data)):
            found.labels.setdefault(key, {}).setdefault(extension, label)
        return
    if (kind := KINDS.get(extension)) is None:
        return
    if is_apple_double(name):
        problem = "macOS's own"
    if problem:
        found.ignored.append(f"{name[:_LONGEST_NAMED]!r}, {problem}")
    elif (first := found.rows.get((key, kind))) is None:
        head = zlib.crc32(_read(path, tar, BLOCK, place.offset_data - BLOCK))
        crc = _checksum(path, tar, place.offset_data, place.size)
        found.rows[key, kind] = (extension, place.offset_data, place.size, crc, head)
    elif keep_first:
        found.dropped += 1
    else:
        raise UserError(
            f"{path} holds two {kind}s under the key {key!r} (.{first[0]} and .{extension}): rename or remove one, or"
            f" take the first {kind} of each key with `bevt shards index --dedupe first`"
        )


def _place(found: _Found, info: tarfile.TarInfo) -> tuple[tarfile.TarInfo | None, str]:
    """The member that holds the data of `info`, itself or what it links to; or None and why there is none."""
    if info.sparse is not None:
        return None, "sparse: pack it without `tar --sparse`"
    if info.isreg():
        return info, ""
    if not info.islnk():
        return None, "a symbolic link" if info.issym() else "no regular file"
    place = found.files.get(posixpath.normpath(info.linkname))
    return place, "" if place else f"a hard link to {info.linkname[:_LONGEST_NAMED]!r}, which is no file before it"


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
    return str(label).strip() if isinstance(label, str | int) and not isinstance(label, bool) else ""


def _chosen(labels: dict[str, str]) -> tuple[str, str]:
    """The label of a sample, and the one in its JSON if that is another; 03 and 3 are the same."""
    first, second = labels.get("cls", ""), labels.get("json", "")
    same = first == second or (first.isdecimal() and second.isdecimal() and int(first) == int(second))
    return (first, "" if same else second) if first else (second, "")


def _checksum(path: str, tar: BinaryIO, offset: int, size: int) -> int:
    """CRC-32 of a member."""
    crc = 0
    for start in range(offset, offset + size, _CHUNK):
        crc = zlib.crc32(_read(path, tar, min(_CHUNK, offset + size - start), start), crc)
    return crc


def _read(path: str, tar: BinaryIO, size: int, offset: int) -> bytes:
    heartbeat(f"shard {path} at byte {offset}")
    return read_at(tar, offset, size)


def _what_is_wrong(tar: BinaryIO, error: BaseException, found: int) -> str:
    magic = os.pread(tar.fileno(), 6, 0)
    if not magic:
        return "empty (0 bytes): write it again"
    if method := next((name for start, name in _COMPRESSED.items() if magic.startswith(start)), ""):
        return f"compressed ({method}): unpack it to a plain tar, samples are read by offset"
    return f"not a whole tar file ({error}; {found} samples before that): write or copy it again"
