"""Where each sample lies inside its tar: made once, kept next to the tar or in the user's cache, checked at each start.

Reading by offset is what makes the sample plan a pure function: any rank reaches any sample without reading the ones
before it. The index holds the checksum of each member and of its tar header, so a repacked, cut or damaged tar cannot
pass for the indexed one.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import re
import stat
import tempfile
import time
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from bevt_ds.data.reading.deadline import heartbeat
from bevt_ds.data.reading.members import BLOCK, COLUMNS, COUNTS, EXTENSIONS, KINDS, Shard, read_at
from bevt_ds.data.reading.remote import redacted
from bevt_ds.data.reading.tar_scan import scan
from bevt_ds.errors import UserError

VERSION = 5
SUFFIX = ".index.json"
_PACKED_NAME = re.compile(r"(.*)-[0-9]{6}\.tar")
SPOT_CHECKS = 16  # headers that are compared at each start, when size and time of the tar are the indexed ones
LONGEST_TURN = 1800.0  # seconds to wait for another process

log = logging.getLogger(__name__)


def usable(shards: Iterable[Shard], kind: str) -> list[Shard]:
    """The members of `kind`. UserError: a tar without a usable sample of it."""
    shards = [shard.only(kind) for shard in shards]
    for shard in shards:
        if note := shard.ignored_note():
            log.warning("%s: %s", redacted(shard.path), note)
        if not len(shard):
            wanted = ", ".join(sorted(EXTENSIONS[kind]))
            raise UserError(f"{shard.path} holds no {kind} sample (members named *.{wanted})")
    return shards


def load_shard(path: str, fresh: bool = False, keep_first: bool = False, only_reading: bool = False) -> Shard:
    """One local tar's members, from its index if that describes it, else by reading it once.

    fresh: read it in any case. keep_first: of two samples of one kind and key take the first, instead of refusing the
    tar. only_reading: nothing is written next to a tar that `bevt shards pack` has not put there; its index is kept in
    the user's cache. UserError: not a readable tar, two samples of one kind and key, a tar that somebody is writing.
    """
    places = index_places(path)
    if only_reading and not is_packed(path):
        places = places[1:]
    with _open_tar(path) as tar:
        with suppress(OSError):  # a file system without locks costs repeated work only
            await_turn(tar, path)
        if not fresh and (shard := _indexed(path, tar, places)) is not None:
            return shard
        identity = tar_identity(tar)
        shard = scan(path, tar, keep_first)
        if tar_identity(tar) != identity:
            raise UserError(f"shard {path} has changed while it was read: start again when it is written")
        write_index(places, identity, shard)
    return shard


def is_packed(path: str) -> bool:
    """Whether the manifest that `bevt shards pack` writes with a tar of this name is next to it."""
    split = _PACKED_NAME.fullmatch(path)
    return split is not None and os.path.exists(f"{split[1]}-manifest.json")


def _indexed(path: str, tar: BinaryIO, places: Sequence[Path]) -> Shard | None:
    """The first stored index that describes this tar, or the tar that it was before it was cut.

    places: where one of a tar that was copied or touched, but is otherwise the same, is stored again.
    """
    identity = tar_identity(tar)
    stored = [(place, found) for place in index_places(path) if (found := read_index(place, path)) is not None]
    for place, (shard, indexed) in sorted(stored, key=lambda each: each[1][1] != identity):
        if identity == indexed:
            _require_own(shard, tar, place)
            return shard
        if _was_cut(shard, tar, identity["size"], indexed["size"]):
            lost = sum(o + s > identity["size"] for o, s in zip(shard.offsets, shard.sizes, strict=True))
            log.warning("%s has been cut since it was indexed: %d of its %d samples are lost", path, lost, len(shard))
            return shard
        if _same_heads(shard, tar, range(len(shard))) and identity["size"] == indexed["size"]:
            write_index(places, identity, shard)
            return shard
        log.warning("%s has been rewritten since it was indexed: it is indexed again", path)
    return None


def _require_own(shard: Shard, tar: BinaryIO, place: Path) -> None:
    if not looks_like(shard, tar):
        raise UserError(
            f"the index {place} does not match {shard.path}, though size and time do: it belongs to another tar, or"
            f" this one was overwritten in place. Run `bevt shards index --fresh {shard.path}`"
        )


def _was_cut(shard: Shard, tar: BinaryIO, size: int, indexed_size: int) -> bool:
    """Whether the tar is the indexed one without its end."""
    whole = [i for i, offset in enumerate(shard.offsets) if offset <= size]
    return size < indexed_size and _same_heads(shard, tar, whole)


def looks_like(shard: Shard, tar: BinaryIO) -> bool:
    """Whether some headers of the tar are the indexed ones."""
    step = max(len(shard) // SPOT_CHECKS, 1)
    return _same_heads(shard, tar, range(0, len(shard), step))


def _same_heads(shard: Shard, tar: BinaryIO, which: Sequence[int]) -> bool:
    return all(_head(shard, tar, i) == shard.heads[i] for i in which)


def _head(shard: Shard, tar: BinaryIO, i: int) -> int:
    at = shard.offsets[i] - BLOCK
    heartbeat(f"shard {redacted(shard.path)} at byte {at}")
    return zlib.crc32(read_at(tar, at, BLOCK))


@contextmanager
def _open_tar(path: str) -> Iterator[BinaryIO]:
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise UserError(f"shard {path} is no regular file: samples are read by offset")
        tar = open(path, "rb")  # noqa: SIM115 - closed below, opened here to tell its errors from the caller's
    except OSError as error:
        raise UserError(f"cannot open shard {path}: {error.strerror}") from error
    with tar:
        yield tar


def await_turn(file: BinaryIO, place: str) -> None:
    """Lock a file; while another process holds the lock it makes what this one will find.

    The lock saves work and nothing depends on it, so after half an hour this goes on without. OSError: there are no
    locks in this file system.
    """
    until = time.monotonic() + LONGEST_TURN
    while True:
        heartbeat(f"the lock of {place}")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() > until:
                log.warning("%s: another process holds its lock for over %g s; going on without", place, LONGEST_TURN)
                return
        time.sleep(0.05)


def tar_identity(tar: BinaryIO) -> dict[str, int]:
    facts = os.fstat(tar.fileno())
    return {"size": facts.st_size, "mtime_ns": facts.st_mtime_ns}


def cache_home() -> Path:
    """The user's cache folder of this package."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "bevt_ds"


def index_places(path: str) -> tuple[Path, Path]:
    """Next to the tar, and in the user's cache."""
    absolute = os.path.abspath(path)
    name = hashlib.sha256(absolute.encode()).hexdigest()[:32]
    return Path(absolute + SUFFIX), cache_home() / "index" / (name + SUFFIX)


def read_index(place: Path, path: str) -> tuple[Shard, dict[str, Any]] | None:
    """A stored index and the identity of the tar it was made of; None: there is none, or it is damaged."""
    heartbeat(f"index {place}")
    try:
        stored = json.loads(place.read_text(encoding="utf-8"))
        if stored["version"] != VERSION or stored.pop("digest") != index_digest(stored):
            return None
        del stored["version"]
        identity, counts = stored.pop("tar"), {name: stored.pop(name) for name in COUNTS}
        shard = Shard(path=path, **counts, **{name: tuple(column) for name, column in stored.items()})
        _check_columns(shard, identity["size"])
    except (OSError, ValueError, TypeError, KeyError, AttributeError, ArithmeticError, RecursionError):
        return None
    return shard, identity


def index_digest(stored: dict[str, Any]) -> str:
    """The digest that an index carries of itself: a part of it that has changed cannot pass for the whole."""
    return hashlib.sha256(json.dumps(stored, sort_keys=True).encode()).hexdigest()


def _check_columns(shard: Shard, tar_size: int) -> None:
    """Refuse what no tar of that size can hold; the message is not shown, the index is made again."""
    if any(len(getattr(shard, name)) != len(shard.keys) for name in COLUMNS):
        raise ValueError("columns of different lengths")
    if any(type(count) is not int or count < 0 for count in (tar_size, shard.ignored, shard.dropped)):
        raise ValueError("no size of the tar, or no count of what is passed over")
    if len(shard.ignored_names) > shard.ignored:
        raise ValueError("more names than are counted")
    texts = (*shard.keys, *shard.extensions, *shard.labels, *shard.json_labels, *shard.ignored_names)
    numbers = (*shard.offsets, *shard.sizes, *shard.crcs, *shard.heads)
    if not all(type(text) is str for text in texts) or not all(type(number) is int for number in numbers):
        raise ValueError("a column of another type")
    if any(o < BLOCK or s < 0 or o + s > tar_size for o, s in zip(shard.offsets, shard.sizes, strict=True)):
        raise ValueError("a member outside the tar")
    kinds = [KINDS[extension] for extension in shard.extensions]
    if len(set(zip(shard.keys, kinds, strict=True))) != len(shard.keys):
        raise ValueError("a key twice")


def write_index(places: Sequence[Path], identity: dict[str, Any], shard: Shard) -> None:
    """Store an index at the first place that can be written; that none can costs time at the next start only."""
    fields = {name: getattr(shard, name) for name in (*COUNTS, *COLUMNS, "ignored_names")}
    stored = {"version": VERSION, "tar": identity, **fields}
    text = json.dumps({**stored, "digest": index_digest(stored)})
    for place in places:
        heartbeat(f"index {place}")
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
