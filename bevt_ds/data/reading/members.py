"""Samples by place: where in which tar a media file lies, and reading it from there."""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import BinaryIO

from bevt_ds.data.limits import BadSample
from bevt_ds.data.reading.remote import is_remote, redacted

VIDEO_EXTENSIONS = frozenset({"mp4", "avi", "mkv", "webm"})
IMAGE_EXTENSIONS = frozenset({"jpg", "jpeg", "png"})
EXTENSIONS = {"video": VIDEO_EXTENSIONS, "image": IMAGE_EXTENSIONS}
KINDS = {extension: kind for kind, extensions in EXTENSIONS.items() for extension in extensions}
BLOCK = 512  # bytes of a tar header


@dataclass(frozen=True)
class Member:
    """One media file inside a tar. `key` is its name without the extension; it is never used as a path."""

    path: str  # of the tar, or its URL
    key: str
    extension: str  # lower case, no dot
    offset: int  # bytes, of the data
    size: int  # bytes
    crc: int  # CRC-32 of the data
    is_remote: bool = False

    def __str__(self) -> str:
        return f"sample {self.key!r} at byte {self.offset} of {redacted(self.path)}"


@dataclass(frozen=True)
class Shard:
    """The media members of one tar, in columns: a million samples should cost megabytes.

    A video and an image may have the same key: each is a sample of its kind.
    """

    path: str
    keys: tuple[str, ...]
    extensions: tuple[str, ...]
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    crcs: tuple[int, ...]
    heads: tuple[int, ...]  # CRC-32 of the header block before the data
    labels: tuple[str, ...]  # from `<key>.cls`, or else "label" in `<key>.json`; empty: none
    json_labels: tuple[str, ...]  # the latter where it is another than the former; else empty
    ignored: int  # members named like media that cannot be read by offset, or AppleDouble
    dropped: int = 0  # samples left out because one of the same key and kind came before
    ignored_names: tuple[str, ...] = ()  # the first few of `ignored`, each with the reason

    def __len__(self) -> int:
        return len(self.keys)

    @cached_property
    def is_remote(self) -> bool:
        return is_remote(self.path)

    def member(self, i: int) -> Member:
        columns = (self.keys, self.extensions, self.offsets, self.sizes, self.crcs)
        return Member(self.path, *(column[i] for column in columns), self.is_remote)

    def members(self) -> Iterator[Member]:
        return map(self.member, range(len(self)))

    def ignored_note(self) -> str:
        """How many members were passed over, and which; "" where there are none."""
        if not self.ignored:
            return ""
        rest = f"; and {more} more" if (more := self.ignored - len(self.ignored_names)) else ""
        return f"{self.ignored} passed over: {'; '.join(self.ignored_names)}{rest}"

    def only(self, kind: str) -> Shard:
        """The members of one kind, "video" or "image"."""
        return self.at(i for i, extension in enumerate(self.extensions) if KINDS[extension] == kind)

    def at(self, members: Iterable[int]) -> Shard:
        """The members with these numbers."""
        keep = list(members)
        return replace(self, **{name: tuple(getattr(self, name)[i] for i in keep) for name in COLUMNS})


COUNTS = ("ignored", "dropped")
COLUMNS = tuple(f.name for f in fields(Shard) if f.name not in ("path", *COUNTS, "ignored_names"))


def read_member(member: Member, verify: bool = True, tar: BinaryIO | None = None) -> bytes:
    """The member's bytes, `verify`: checked against the index. BadSample: they are not what was indexed.

    tar: its shard, or a copy of it, which is closed then; None: the shard is opened.
    """
    try:
        with tar or open(member.path, "rb") as tar:
            data = read_at(tar, member.offset, member.size)
    except OSError as error:
        raise BadSample(f"cannot read the shard: {error.strerror}", transient=True) from error
    if len(data) != member.size:
        raise BadSample(f"the shard ends {member.size - len(data)} bytes before the sample does")
    if verify and zlib.crc32(data) != member.crc:
        raise BadSample("its bytes are not those that were indexed: damaged or rewritten")
    return data


def read_at(tar: BinaryIO, offset: int, size: int) -> bytes:
    """Up to `size` bytes; fewer only at the end of the file. One read may return less than it was asked for.

    The file's own position stays where it is.
    """
    data = os.pread(tar.fileno(), size, offset)
    while len(data) < size and (more := os.pread(tar.fileno(), size - len(data), offset + len(data))):
        data += more
    return data


def is_apple_double(name: str) -> bool:
    """Whether macOS made that file: `._NAME` holds what its file systems know of NAME, and looks like media by name."""
    return name.rpartition("/")[2].startswith("._")


def split_name(name: str) -> tuple[str, str]:
    """`a/b.c.JPG` -> (`a/b.c`, `jpg`); a name without a dot has the extension ""."""
    key, dot, extension = name.rpartition(".")
    return (key, extension.lower()) if dot and "/" not in extension else (name, "")
