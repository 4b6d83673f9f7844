"""Remote shards on local disk: fetched once by the processes of a node, checked, thrown out when space runs short."""

from __future__ import annotations

import fcntl
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

from bevt_ds.data.index import SUFFIX, write_atomic
from bevt_ds.data.remote import RemoteError, Source, open_source, redacted
from bevt_ds.errors import UserError

ATTEMPTS = 5
FIRST_PAUSE = 0.5  # seconds before the second attempt; each later pause is twice as long
SLOWEST = 1024  # bytes a second over the time of one wait; a server that trickles is as good as stalled

log = logging.getLogger(__name__)


class ShardCache:
    """A folder of fetched tars, shared by all processes of a node and user.

    folder: made on first use, for its owner only. most_bytes: the least recently used tars go when there are more;
    the one fetched last stays in any case. seconds: the longest wait for the next bytes of a fetch.
    """

    def __init__(self, folder: Path, most_bytes: int, seconds: float, first_pause: float = FIRST_PAUSE) -> None:
        self.folder, self.most_bytes, self.seconds, self.first_pause = folder, most_bytes, seconds, first_pause

    def local(self, url: str) -> Path:
        """A local copy of the whole file, fetched if need be. RemoteError: it cannot be had.

        The copy may be thrown out at any time; a file that is open stays readable.
        """
        place = self._place(url)
        if self._is_whole(place):
            os.utime(place)  # used just now
            return place
        self._make_folder()
        with self._locked(place.name):
            if not self._is_whole(place):
                self._fetch(url, place)
                self._throw_out(keep=place)
        return place

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
        """Whether a copy has the size that was fetched; its samples' checksums are compared when they are read."""
        try:
            facts = json.loads(place.with_suffix(".json").read_text(encoding="utf-8"))
            return place.lstat().st_size == facts["size"]
        except (OSError, ValueError, KeyError, TypeError):
            return False

    @contextmanager
    def _locked(self, name: str) -> Iterator[None]:
        handle = os.open(self.folder / f"{name}.lock", os.O_CREAT | os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        with os.fdopen(handle) as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _fetch(self, url: str, place: Path) -> None:
        handle, name = tempfile.mkstemp(dir=self.folder, prefix=".fetch.")
        try:
            with os.fdopen(handle, "wb") as file:
                self._fetch_into(file, url)
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
            file.write(chunk)
            if (elapsed := time.monotonic() - window) > self.seconds:
                if file.tell() - since < SLOWEST * elapsed:
                    raise RemoteError(url, f"{file.tell() - since} bytes in {elapsed:.0f} s")
                window, since = time.monotonic(), file.tell()
        if source.size is not None and file.tell() != source.size:
            raise RemoteError(url, f"cut after {file.tell()} of {source.size} bytes")

    def _throw_out(self, keep: Path) -> None:
        """Remove the least recently used copies until the rest fits."""
        tars = []
        for tar in self.folder.glob("*.tar"):
            with suppress(OSError):
                facts = tar.stat()
                tars.append((tar == keep, facts.st_mtime_ns, facts.st_size, tar))
        total = sum(size for _, _, size, _ in tars)
        for is_kept, _, size, tar in sorted(tars):
            if total <= self.most_bytes or is_kept:
                return
            tar.unlink(missing_ok=True)
            total -= size
