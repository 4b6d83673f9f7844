"""Bytes of samples, from local tars and, by way of a cache on local disk, from remote ones."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

from bevt_ds.config import ReadingConfig
from bevt_ds.data.cache import ShardCache
from bevt_ds.data.index import cache_home, load_shard, read_index, require_answer, write_index
from bevt_ds.data.limits import BadSample, Limits
from bevt_ds.data.members import Member, Shard, read_member
from bevt_ds.data.patience import Patience
from bevt_ds.data.remote import RemoteError, is_remote, redacted
from bevt_ds.data.tar_scan import scan
from bevt_ds.data.timing import StageTimes
from bevt_ds.errors import UserError

log = logging.getLogger(__name__)


class Storage:
    """Reads members by offset. Remote tars are fetched whole, once a node; see ShardCache."""

    def __init__(self, config: ReadingConfig) -> None:
        folder = Path(config.cache_dir) if config.cache_dir else cache_home() / "shards"
        self.cache = ShardCache(folder, config.cache_bytes, config.remote_seconds)
        self.limits, self._verify = Limits.of(config), config.verify
        self._patience = Patience(config.read_seconds)
        self._ahead = ThreadPoolExecutor(1, thread_name_prefix="fetch")

    def load_shard(self, path: str) -> Shard:
        """The index of a shard, made on first use. UserError: it cannot be had."""
        if not is_remote(path):
            self._patience.call(partial(require_answer, path), f"shard {path}")
            return load_shard(path)
        place = self.cache.index_place(path)
        if (stored := read_index(place, path)) is not None:
            return stored[0]
        try:
            local = self.cache.local(path)
        except RemoteError as error:
            raise UserError(str(error)) from error
        with local.open("rb") as tar:
            shard = replace(scan(redacted(path), tar), path=path)
        write_index((place,), {"size": local.stat().st_size}, shard)
        return shard

    def read(self, member: Member, times: StageTimes) -> bytes:
        """A member's bytes. BadSample: they cannot be had, are not what was indexed, or are too many.

        StorageStalled: a local disk or file server does not answer. CancelledError: `close` was called meanwhile.
        """
        if member.size > self.limits.file_bytes:
            raise BadSample(f"it has {member.size} bytes, over data.max_file_bytes={self.limits.file_bytes}")
        with times.measured("storage"):
            return self._read_remote(member) if is_remote(member.path) else self._read_local(member)

    def fetch_ahead(self, paths: Iterable[str]) -> None:
        """Fetch remote shards in the background; what fails is tried again, and reported, when it is read."""
        for path in filter(is_remote, paths):
            self._ahead.submit(self._fetch_quietly, path)

    def close(self) -> None:
        """Start nothing more and let nobody wait. A fetch under way ends by itself: it is bounded in time."""
        self._ahead.shutdown(wait=False, cancel_futures=True)
        self._patience.close()

    def _fetch_quietly(self, path: str) -> None:
        try:
            self.cache.local(path)
        except RemoteError as error:
            log.warning("%s", error)

    def _read_local(self, member: Member) -> bytes:
        place = f"sample {member.key!r} at byte {member.offset} of {member.path}"
        return self._patience.call(partial(read_member, member, self._verify), place)

    def _read_remote(self, member: Member) -> bytes:
        """From the cached tar; one that is damaged or gone is fetched once more."""
        try:
            return self._read_local(replace(member, path=str(self._local(member.path))))
        except BadSample as bad:
            log.warning("%s: %s; the cached copy is fetched again", redacted(member.path), bad)
        self.cache.discard(member.path)
        return self._read_local(replace(member, path=str(self._local(member.path))))

    def _local(self, path: str) -> Path:
        try:
            return self.cache.local(path)
        except RemoteError as error:
            raise BadSample(str(error), transient=True) from error
