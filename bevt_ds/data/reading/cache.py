"""Remote shards on local disk: fetched once by the processes of a node, checked, thrown out when space runs short."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import random
import stat
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from bevt_ds.data.reading.deadline import heartbeat
from bevt_ds.data.reading.index import SUFFIX, await_turn, looks_like, read_index, write_atomic
from bevt_ds.data.reading.remote import RemoteError, Source, open_source, redacted
from bevt_ds.errors import UserError

ATTEMPTS = 5
OPENINGS = 100  # of a copy that other readers, in a cache too small for them all, throw out before it is opened
FIRST_PAUSE = 0.5  # seconds before the second attempt; each later pause is twice as long
SLOWEST = 1024  # bytes a second over the time of one wait; a server that trickles is as good as stalled
ABANDONED = 86400.0  # seconds without a byte after which a fetch under way was killed
_UNDER_WAY = ".fetch."  # how the name of a file begins that is being fetched
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})

log = logging.getLogger(__name__)


class ShardCache:
    """A folder of fetched tars, shared by all processes of a node and user.

    folder: made on first use, for its owner only. most_bytes: the least recently used tars go when there are more;
    the one fetched last stays in any case. seconds: the longest wait for the next bytes of a fetch.
    """

    def __init__(self, folder: Path, most_bytes: int, seconds: float, first_pause: float = FIRST_PAUSE) -> None:
        self.folder, self.most_bytes, self.seconds, self.first_pause = folder, most_bytes, seconds, first_pause

    def local(self, url: str) -> Path:
        """A local copy of the whole file, fetched if need be; it may be thrown out at any time.

        RemoteError: the file cannot be had. UserError: the folder cannot be used or is full, or the file is not the one
        whose index is kept.
        """
        place = self._place(url)
        try:
            if not self._is_whole(place):
                self._make_folder()
                with self._locked(place):
                    if not self._is_whole(place):
                        self._fetch(url, place)
                        self._throw_out(keep=place)
        except OSError as error:
            raise UserError(f"data.cache_dir={self.folder} cannot be used: {error.strerror}") from error
        return place

    def open(self, url: str) -> BinaryIO:
        """The same, opened: that stays readable even where the copy is thrown out."""
        for _ in range(OPENINGS):
            with suppress(FileNotFoundError):  # thrown out meanwhile
                return self.local(url).open("rb")
        raise RemoteError(url, f"data.cache_bytes={self.most_bytes} leaves no room for it next to the others in use")

    def discard(self, url: str) -> None:
        """Forget a copy that has turned out damaged."""
        self._place(url).unlink(missing_ok=True)

    def index_place(self, url: str) -> Path:
        """Where the index of a remote tar is kept; it stays when the tar goes."""
        self._make_folder()
        return self._place(url).with_suffix(SUFFIX)

    def _place(self, url: str) -> Path:
        return self.folder / f"{hashlib.sha256(url.encode()).hexdigest()[:40]}.tar"

    def _make_folder(self) -> None:
        """UserError: the folder is one that somebody else could write into."""
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        facts = self.folder.lstat()
        if not stat.S_ISDIR(facts.st_mode) or facts.st_uid != os.geteuid() or facts.st_mode & 0o022:
            raise UserError(
                f"data.cache_dir={self.folder} is a link, belongs to another user, or can be written by others: choose"
                " a folder of your own"
            )

    def _is_whole(self, place: Path) -> bool:
        """Whether a copy has the size that was fetched, marked as used just now if so.

        Its samples' checksums are compared when they are read.
        """
        heartbeat(str(place))
        try:
            facts = json.loads(place.with_suffix(".json").read_text(encoding="utf-8"))
            if place.lstat().st_size != facts["size"]:
                return False
            os.utime(place)
        except (OSError, ValueError, KeyError, TypeError):
            return False
        return True

    @contextmanager
    def _locked(self, place: Path) -> Iterator[None]:
        name = f"{place}.lock"
        with os.fdopen(os.open(name, os.O_CREAT | os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600), "r+b") as lock:
            await_turn(lock, name)
            yield

    def _fetch(self, url: str, place: Path) -> None:
        handle, name = tempfile.mkstemp(dir=self.folder, prefix=_UNDER_WAY)
        try:
            with os.fdopen(handle, "w+b", buffering=0) as file:  # so that a full disk is met where room can be made
                self._fetch_into(file, url)
                self._require_indexed(file, url)
                size = file.tell()
            write_atomic(place.with_suffix(".json"), json.dumps({"url": redacted(url), "size": size}).encode())
            os.replace(name, place)
        except BaseException:
            os.unlink(name)
            raise

    def _fetch_into(self, file: BinaryIO, url: str) -> None:
        """Several attempts, each from where the one before got to, if the server can do that."""
        tag = ""
        for attempt in range(ATTEMPTS):
            heartbeat(redacted(url))
            try:
                source = open_source(url, self.seconds, file.tell(), tag)
                tag = source.tag
                self._copy(source, file, url)
                return
            except RemoteError as error:
                if error.final or attempt == ATTEMPTS - 1:
                    raise
                pause = self.first_pause * 2**attempt * random.uniform(0.5, 1.5)
                log.warning("%s; trying again in %.1f s", error, pause)
                time.sleep(pause)

    def _copy(self, source: Source, file: BinaryIO, url: str) -> None:
        """The rest of a file. RemoteError: it ends early, or comes too slowly."""
        file.seek(source.offset)
        file.truncate()
        window, since = time.monotonic(), file.tell()
        for chunk in source.chunks:
            self._write(file, chunk, url)
            if (elapsed := time.monotonic() - window) > self.seconds:
                if file.tell() - since < SLOWEST * elapsed:
                    raise RemoteError(url, f"{file.tell() - since} bytes in {elapsed:.0f} s")
                window, since = time.monotonic(), file.tell()
        if source.size is not None and file.tell() != source.size:
            raise RemoteError(url, f"cut after {file.tell()} of {source.size} bytes")

    def _write(self, file: BinaryIO, chunk: bytes, url: str) -> None:
        """Write all of a chunk; where the disk is full, other copies make room."""
        rest = memoryview(chunk)
        while rest:
            heartbeat(f"{redacted(url)} on its way into {self.folder}")
            try:
                rest = rest[file.write(rest) :]
            except OSError as error:
                if error.errno not in _FULL:
                    raise
                self._make_room(url)

    def _make_room(self, url: str) -> None:
        """Throw out the least recently used copy. UserError: there is none."""
        for _, tar, size in self._copies():
            tar.unlink(missing_ok=True)
            log.warning("no room left in data.cache_dir=%s: a shard of %d bytes is thrown out", self.folder, size)
            return
        raise UserError(
            f"no room left in data.cache_dir={self.folder} for {redacted(url)}: free some, or choose a folder on a"
            " larger disk"
        )

    def _require_indexed(self, tar: BinaryIO, url: str) -> None:
        """UserError: the file is not the one whose index is kept. That is removed, so that the next start makes it."""
        place = self.index_place(url)
        if (stored := read_index(place, url)) is None:
            return
        shard, identity = stored
        if os.fstat(tar.fileno()).st_size == identity["size"] and looks_like(shard, tar):
            return
        place.unlink(missing_ok=True)
        raise UserError(f"{redacted(url)} is not the file that was indexed, it has been replaced: start the run again")

    def _throw_out(self, keep: Path) -> None:
        """Remove what killed fetches have left, and the least recently used copies until the rest fits."""
        for file in self.folder.glob(f"{_UNDER_WAY}*"):
            with suppress(OSError):
                if time.time() - file.stat().st_mtime > ABANDONED:
                    file.unlink()
        copies = self._copies()
        total = sum(size for _, _, size in copies)
        for _, tar, size in copies:
            if tar == keep and size > self.most_bytes:
                log.warning("a shard has %d bytes, over data.cache_bytes=%d: no other stays", size, self.most_bytes)
            elif tar != keep and total > self.most_bytes:
                tar.unlink(missing_ok=True)
                total -= size

    def _copies(self) -> list[tuple[int, Path, int]]:
        """When each copy was used last (nanoseconds), where it is, its bytes; the least recently used first."""
        copies = []
        for tar in self.folder.glob("*.tar"):
            with suppress(OSError):
                facts = tar.lstat()
                copies.append((facts.st_mtime_ns, tar, facts.st_size))
        return sorted(copies)
