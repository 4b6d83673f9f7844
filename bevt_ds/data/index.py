"""Where each sample lies inside its tar: made once, kept beside the tar, checked at each start.

Reading by offset is what makes the sample plan a pure function: any rank reaches any sample without reading the ones
before it. The index holds the checksum of each member, so a repacked or damaged tar cannot pass for the indexed one.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import tarfile
import tempfile
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO

from bevt_ds.errors import UserError

VERSION = 1
SUFFIX = ".index.json"
VIDEO_EXTENSIONS = frozenset({"mp4", "avi", "mkv", "webm"})
IMAGE_EXTENSIONS = frozenset({"jpg", "jpeg", "png"})
EXTENSIONS = {"video": VIDEO_EXTENSIONS, "image": IMAGE_EXTENSIONS}
_CHUNK = 1 << 20


class BadSample(Exception):
    """A sample that cannot be used. The message says why, not which."""


@dataclass(frozen=True)
class Member:
    """One media file inside a tar. `key` is its name without the extension; it is never used as a path."""

    path: str  # of the tar
    key: str
    extension: str  # lower case, no dot
    offset: int  # bytes, of the data
    size: int  # bytes
    crc: int  # CRC-32 of the data


@dataclass(frozen=True)
class Shard:
    """The media members of one tar, in columns: a million samples should cost megabytes."""

    path: str
    keys: tuple[str, ...]
    extensions: tuple[str, ...]
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    crcs: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.keys)

    def member(self, i: int) -> Member:
        columns = (self.keys, self.extensions, self.offsets, self.sizes, self.crcs)
        return Member(self.path, *(column[i] for column in columns))

    def only(self, kind: str) -> Shard:
        """The members of one kind, "video" or "image"."""
        keep = [i for i, extension in enumerate(self.extensions) if extension in EXTENSIONS[kind]]
        columns = (self.keys, self.extensions, self.offsets, self.sizes, self.crcs)
        return Shard(self.path, *(tuple(column[i] for i in keep) for column in columns))


def load_shards(paths: Sequence[str], kind: str, threads: int = 8) -> list[Shard]:
    """The shards' members of `kind`, indexing on first use.

    UserError: not a readable tar, the same key twice in a tar, a tar without a usable sample.
    """
    with ThreadPoolExecutor(threads) as pool:
        shards = [shard.only(kind) for shard in pool.map(load_shard, paths)]
    for shard in shards:
        if not len(shard):
            wanted = ", ".join(sorted(EXTENSIONS[kind]))
            raise UserError(f"{shard.path} holds no {kind} sample (members named *.{wanted})")
    return shards


def load_shard(path: str) -> Shard:
    """One tar's members, from its index if that describes it, else by reading it once."""
    with _open_tar(path) as tar, _exclusive(tar):
        identity = _identity(tar)
        for place in _index_places(path):
            if (shard := _read_index(place, path, identity)) is not None:
                return shard
        shard = scan(path, tar)
        _write_index(path, identity, shard)
    return shard


def scan(path: str, tar: BinaryIO) -> Shard:
    """Walk the tar's headers and checksum its media members. Anything that is not a regular file is passed over."""
    rows: dict[str, tuple[str, int, int, int]] = {}
    try:
        with tarfile.open(fileobj=tar, mode="r:") as archive:
            for info in archive:
                key, extension = split_name(info.name)
                if not info.isreg() or extension not in VIDEO_EXTENSIONS | IMAGE_EXTENSIONS:
                    continue
                if key in rows:
                    raise UserError(f"{path} holds two samples named {key!r}: rename or remove one")
                crc = _checksum(tar, info.offset_data, info.size)
                rows[key] = (extension, info.offset_data, info.size, crc)
    except tarfile.ReadError as error:
        raise UserError(f"{path} is {_what_is_wrong(tar, error)}") from error
    columns = zip(*rows.values(), strict=True) if rows else ((), (), (), ())
    return Shard(path, tuple(rows), *(tuple(column) for column in columns))


def read_member(member: Member) -> bytes:
    """The member's bytes, checked against the index. BadSample: they are not what was indexed."""
    try:
        with open(member.path, "rb") as tar:
            data = os.pread(tar.fileno(), member.size, member.offset)
    except OSError as error:
        raise BadSample(f"cannot read the shard: {error.strerror}") from error
    if len(data) != member.size:
        raise BadSample(f"the shard ends {member.size - len(data)} bytes before the sample does")
    if zlib.crc32(data) != member.crc:
        raise BadSample("its bytes are not those that were indexed: damaged or rewritten")
    return data


def split_name(name: str) -> tuple[str, str]:
    """`a/b.c.JPG` -> (`a/b.c`, `jpg`); a name without a dot has the extension ""."""
    key, dot, extension = name.rpartition(".")
    return (key, extension.lower()) if dot and "/" not in extension else (name, "")


@contextmanager
def _open_tar(path: str) -> Iterator[BinaryIO]:
    try:
        tar = open(path, "rb")  # noqa: SIM115 - closed below, opened here to tell its errors from the caller's
    except OSError as error:
        raise UserError(f"cannot open shard {path}: {error.strerror}") from error
    with tar:
        yield tar


@contextmanager
def _exclusive(tar: BinaryIO) -> Iterator[None]:
    """One process a node indexes; the others find its result. A file system without locks costs repeated work only."""
    with suppress(OSError):
        fcntl.flock(tar, fcntl.LOCK_EX)
    yield


def _identity(tar: BinaryIO) -> dict[str, int]:
    stat = os.fstat(tar.fileno())
    return {"size": stat.st_size, "mtime_ns": stat.st_mtime_ns}


def _index_places(path: str) -> tuple[Path, Path]:
    """Beside the tar, or in the user's cache where that is not writable."""
    absolute = os.path.abspath(path)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "bevt_ds" / "index"
    name = hashlib.sha256(absolute.encode()).hexdigest()[:32]
    return Path(absolute + SUFFIX), cache / (name + SUFFIX)


def _read_index(place: Path, path: str, identity: dict[str, int]) -> Shard | None:
    """The index at `place` if it is whole and describes this very tar."""
    try:
        stored = json.loads(place.read_text(encoding="utf-8"))
        if stored.pop("version") != VERSION or stored.pop("tar") != identity:
            return None
        shard = Shard(path=path, **{name: tuple(column) for name, column in stored.items()})
        _check_columns(shard, identity["size"])
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None
    return shard


def _check_columns(shard: Shard, tar_size: int) -> None:
    columns = (shard.extensions, shard.offsets, shard.sizes, shard.crcs)
    if any(len(column) != len(shard.keys) for column in columns):
        raise ValueError("columns of different lengths")
    if any(o < 0 or s < 0 or o + s > tar_size for o, s in zip(shard.offsets, shard.sizes, strict=True)):
        raise ValueError("a member outside the tar")


def _write_index(path: str, identity: dict[str, int], shard: Shard) -> None:
    columns = asdict(shard)
    del columns["path"]
    text = json.dumps({"version": VERSION, "tar": identity, **columns})
    for place in _index_places(path):
        with suppress(OSError):
            place.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(place, text.encode())
            return


def write_atomic(path: Path, data: bytes) -> None:
    """Write a file that appears whole or not at all."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            os.fchmod(handle, 0o644)  # mkstemp's files are private
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


def _checksum(tar: BinaryIO, offset: int, size: int) -> int:
    """CRC-32 of a member, read with pread: the archive's own file position stays where tarfile left it."""
    crc = 0
    for start in range(offset, offset + size, _CHUNK):
        crc = zlib.crc32(os.pread(tar.fileno(), min(_CHUNK, offset + size - start), start), crc)
    return crc


def _what_is_wrong(tar: BinaryIO, error: tarfile.ReadError) -> str:
    magic = os.pread(tar.fileno(), 6, 0)
    if not magic:
        return "empty (0 bytes): write it again"
    if magic[:2] == b"\x1f\x8b" or magic == b"\xfd7zXZ\x00" or magic[:4] == b"\x28\xb5\x2f\xfd":
        return "compressed: unpack it to a plain tar, samples are read by offset"
    return f"not a whole tar file ({error}): write or copy it again"
