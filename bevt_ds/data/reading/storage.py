"""Bytes of samples, from local tars and, by way of a cache on local disk, from remote ones."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from bevt_ds.config.samples import ReadingConfig
from bevt_ds.data.limits import BadSample, Limits
from bevt_ds.data.reading.cache import ShardCache
from bevt_ds.data.reading.deadline import Deadline, DeadlineExecutor, heartbeat
from bevt_ds.data.reading.index import cache_home, load_shard, read_index, usable, write_index
from bevt_ds.data.reading.members import Member, Shard, read_member
from bevt_ds.data.reading.remote import RemoteError, is_remote, redacted
from bevt_ds.data.reading.shards import expand, has_wildcard
from bevt_ds.data.reading.tar_scan import scan
from bevt_ds.errors import UserError

T = TypeVar("T")
log = logging.getLogger(__name__)


class Storage:
    """Reads members by offset. Remote tars are fetched whole, once a node; see ShardCache.

    executor: its threads read. threads: how many there are; None: data.readers.
    """

    def __init__(self, config: ReadingConfig, threads: int | None = None) -> None:
        folder = Path(config.cache_dir) if config.cache_dir else cache_home() / "shards"
        self.cache = ShardCache(folder, config.cache_bytes, config.remote_seconds)
        self.limits = Limits.of(config)
        self.executor = DeadlineExecutor(threads or config.readers)
        self._config, self._deadline = config, Deadline(config.read_seconds)
        both = config.read_seconds + config.remote_seconds  # a fetch waits for the server as well
        self._fetching = Deadline(both, "data.read_seconds + data.remote_seconds")
        self._damaged: set[str] = set()  # URLs whose copy was thrown out for that
        self._judging = threading.Lock()
        self._ahead = DeadlineExecutor(1, "fetch")

    def shards(self, patterns: str, kind: str) -> list[Shard]:
        """The members of `kind` of all shards that `patterns` names; see `expand` and `usable`.

        StorageStalled: a local disk or file server does not answer.
        """
        calls = [self.executor.submit(self.load_shard, path) for path in self.paths(patterns)]
        return usable([call.result() for call in calls], kind)

    def paths(self, patterns: str) -> list[str]:
        """`expand`, which lists folders and looks files up. StorageStalled: as `shards`."""
        return self.ask(expand, patterns, self._config.allow_pipe)

    def has_wildcard(self, patterns: str) -> bool:
        """Whether `patterns` stands for whatever files there are; see shards.py. StorageStalled: as `shards`."""
        return self.ask(has_wildcard, patterns)

    def ask(self, work: Callable[..., T], *arguments: Any, place: object = "the list of shards") -> T:
        """What `work(*arguments)` returns, which asks local storage for `place`. StorageStalled: as `shards`."""
        return self.executor.call(work, *arguments, place=place, deadline=self._deadline)

    def load_shard(self, path: str) -> Shard:
        """The index of a shard, made on first use. UserError: it cannot be had. StorageStalled: as `shards`."""
        if is_remote(path):
            return self.executor.call(self._load_remote, path, place=redacted(path), deadline=self._fetching)
        load = partial(load_shard, path, only_reading=True)
        return self.executor.call(load, place=f"shard {path}", deadline=self._deadline)

    def read(self, member: Member) -> bytes:
        """A member's bytes. BadSample: they cannot be had, are not what was indexed, or are too many.

        StorageStalled: a local disk or file server does not answer. UserError: the cache cannot be used, or the remote
        shard has been replaced. CancelledError: `close` was called meanwhile.
        """
        self.limits.check_file(member.size)
        if member.is_remote:
            return self.executor.call(self._read_remote, member, place=member, deadline=self._fetching)
        return self.executor.call(read_member, member, self._config.verify, place=member, deadline=self._deadline)

    def fetch_ahead(self, paths: Iterable[str]) -> None:
        """Fetch remote shards in the background; what fails is tried again, and reported, when it is read."""
        for path in filter(is_remote, paths):
            self._ahead.submit(self._fetch_quietly, path)

    def close(self) -> None:
        """Start nothing more and let no one wait. A fetch under way ends with its next piece."""
        self._ahead.close()
        self.executor.close()

    def _fetch_quietly(self, path: str) -> None:
        try:
            self.cache.local(path)
        except (RemoteError, UserError) as error:
            log.warning("%s", error)

    def _load_remote(self, path: str) -> Shard:
        place = self.cache.index_place(path)
        if (stored := read_index(place, path)) is not None:
            return stored[0]
        try:
            with self.cache.open(path) as tar:
                shard = replace(scan(redacted(path), tar), path=path)
                identity = {"size": os.fstat(tar.fileno()).st_size}
        except RemoteError as error:
            raise UserError(str(error)) from error
        except UserError:
            self.cache.discard(path)  # the next start asks the server again
            raise
        write_index((place,), identity, shard)
        return shard

    def _read_remote(self, member: Member) -> bytes:
        """From the cached tar; one that is damaged is fetched once more, once a run."""
        try:
            return self._read_copy(member)
        except BadSample as bad:
            if bad.transient:
                raise
            self._throw_out_damaged(member, bad)
        return self._read_copy(member)

    def _throw_out_damaged(self, member: Member, bad: BadSample) -> None:
        with self._judging:
            if member.path not in self._damaged:
                self._damaged.add(member.path)
                log.warning("%s: %s; the cached copy is fetched again", redacted(member.path), bad)
                self.cache.discard(member.path)

    def _read_copy(self, member: Member) -> bytes:
        try:
            copy = self.cache.open(member.path)
        except RemoteError as error:
            raise BadSample(str(error), transient=True) from error
        except OSError as error:
            raise BadSample(f"cannot read the cached shard: {error.strerror}", transient=True) from error
        heartbeat(member)
        return read_member(member, self._config.verify, copy)
