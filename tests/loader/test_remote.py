"""Fetching remote shards over HTTP and fsspec: stalls, cuts, errors, secrets. The cache: test_shard_cache.py."""

from __future__ import annotations

import io
import threading
from collections.abc import Iterator
from contextlib import closing
from itertools import islice, repeat
from pathlib import Path
from typing import ClassVar

import fsspec
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem

from bevt_ds.config.samples import DataConfig
from bevt_ds.config.schema import Config
from bevt_ds.data.loader import ALONE, BatchReader, Loader
from bevt_ds.data.open_stream import Source
from bevt_ds.data.plan import StreamId
from bevt_ds.data.reading import cache as cache_module
from bevt_ds.data.reading.cache import ShardCache
from bevt_ds.data.reading.remote import RemoteError, redacted
from bevt_ds.data.reading.shards import expand
from bevt_ds.data.reading.storage import Storage
from bevt_ds.errors import UserError
from tests.loader.server import Server
from tests.waiting import until

NAME = "video-000000.tar"


@pytest.mark.parametrize(
    "faults",
    [[], ["500"], ["503", "429"], ["cut"], ["stall"], ["trickle"], ["cut", "500", "stall", "cut"]],
)
def test_fetch_survives_stalls_cuts_and_http_errors_d24(server: Server, cache: ShardCache, faults: list[str]) -> None:
    """D24: every fault is got over; what has come is not fetched again."""
    server.faults = list(faults)
    assert cache.local(server.url(NAME)).read_bytes() == server.files[NAME]
    assert len(server.requests) == len(faults) + 1
    assert cache.local(server.url(NAME)).exists() and len(server.requests) == len(faults) + 1
    if faults and faults[-1] in ("cut", "stall"):
        assert "bytes=" in server.requests[-1]


@pytest.mark.parametrize(
    ("faults", "requests", "message"),
    [(["404"], 1, "HTTP 404"), (["403"], 1, "HTTP 403"), (["500"] * 5, 5, "HTTP 500"), (["cut"] * 5, 5, "cut after")],
)
def test_fetch_reports_http_refusal(server, cache, faults: list, requests: int, message: str) -> None:
    server.faults = list(faults)
    with pytest.raises(RemoteError, match=f"{NAME}: .*{message}"):
        cache.local(server.url(NAME))
    assert len(server.requests) == requests
    assert not list(cache.folder.glob("*.tar"))
    assert not list(cache.folder.glob(".fetch*"))


def test_fetch_from_a_closed_port(cache: ShardCache) -> None:
    with pytest.raises(RemoteError, match="Connection refused|timed out"):
        cache.local("http://127.0.0.1:9/a.tar")


def test_batches_from_a_server_equal_local_ones(config: Config, with_data, server: Server, tmp_path: Path) -> None:
    remote = with_data(
        videos=server.url("video-00000{0..2}.tar"),
        images=server.url("image-00000{0..2}.tar"),
        cache_dir=str(tmp_path / "cache"),
        remote_seconds=5.0,
    )
    with Loader(config) as loader, Loader(remote) as other:
        assert loader.fingerprint == other.fingerprint
        for a, b in zip(islice(loader, 4), islice(other, 4), strict=True):
            assert torch.equal(a.video.pixels, b.video.pixels) and torch.equal(a.image.pixels, b.image.pixels)
    assert len(server.requests) == 6
    with Loader(remote) as again:
        next(again)
    assert len(server.requests) == 6  # neither the index nor the shards are fetched again


def test_missing_remote_shard_is_named_at_the_start(with_data, server: Server, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="none.tar: HTTP 404"):
        Loader(with_data(videos=server.url("none.tar"), cache_dir=str(tmp_path / "cache")))


def test_next_shuffle_window_is_prefetched(with_data, server: Server, tmp_path: Path) -> None:
    remote = with_data(videos=server.url("video-00000{0..2}.tar"), cache_dir=str(tmp_path / "cache"), shuffle_window=1)
    videos = Source(StreamId.VIDEO, remote.data.videos, 4, 2)
    with closing(BatchReader(remote, [videos], ALONE, "cpu", None)) as reader:
        for path in (tmp_path / "cache").glob("*.tar"):
            path.unlink()
        reader.finish(reader.begin(0, 0))  # two clips of one shard
        until(lambda: len(list((tmp_path / "cache").glob("*.tar"))) >= 2)
        assert len(list((tmp_path / "cache").glob("*.tar"))) == 2  # the window that is read, and the one after it


def test_fsspec_shards_are_read(shards: Path, tmp_path: Path) -> None:
    memory = fsspec.filesystem("memory")
    for path in shards.glob("video-*.tar"):
        memory.pipe(f"/bucket/{path.name}", path.read_bytes())
    paths = expand("memory://bucket/video-*.tar")
    assert len(paths) == 3
    storage = Storage(DataConfig(cache_dir=str(tmp_path / "cache")))
    shard = storage.load_shard(paths[0])
    assert storage.read(shard.member(0))
    with pytest.raises(UserError, match="there is no such file"):
        storage.load_shard("memory://bucket/none.tar")
    with pytest.raises(UserError, match="nonsense"):
        storage.load_shard("nonsense://a.tar")
    with pytest.raises(UserError, match="no file matches"):
        expand("memory://bucket/none-*.tar")
    storage.close()


def test_existing_remote_name_is_not_a_pattern() -> None:
    memory = fsspec.filesystem("memory")
    for name in ("data[v2]/t-0.tar", "data[v2]/t-1.tar", "datav/t-0.tar"):
        memory.pipe(f"/odd/{name}", b"")
    both = [f"memory:///odd/data[v2]/t-{i}.tar" for i in (0, 1)]
    assert expand("memory://odd/data[v2]/t-{0..1}.tar") == expand("memory://odd/data[v2]/t-*.tar") == both
    assert expand("memory://odd/data[v]/t-*.tar") == ["memory:///odd/datav/t-0.tar"]


def test_stalled_fsspec_file_system_is_given_up(tmp_path: Path, monkeypatch) -> None:
    released = threading.Event()

    class Stalled(MemoryFileSystem):
        protocol = "stalled"

        def size(self, path: str) -> int:
            released.wait(20)
            return 0

    fsspec.register_implementation("stalled", Stalled, clobber=True)
    monkeypatch.setattr(cache_module, "ATTEMPTS", 2)
    with pytest.raises(RemoteError, match="no bytes for 0.2 s"):
        ShardCache(tmp_path, 1 << 30, seconds=0.2, first_pause=0.01).local("stalled://a.tar")
    released.set()


class NotAnOSError(Exception):
    """As aiohttp and botocore have them."""


class Flaky(MemoryFileSystem):
    """A file of a MiB whose first reads fail, each later in it than the one before."""

    protocol, content = "flaky", bytes(range(256)) * (1 << 12)
    failures: ClassVar[list[int]] = []  # at which byte; -1: already when asked for the size
    read: ClassVar[list[int]] = []  # how many bytes each opening has given
    versions: ClassVar[Iterator[str]] = repeat("1")

    def size(self, path: str) -> int:
        if self.failures and self.failures[0] < 0:
            self.failures.pop(0)
            raise NotAnOSError("server disconnected")
        return len(self.content)

    def ukey(self, path: str) -> str:
        return next(self.versions)

    def open(self, path: str, mode: str = "rb", **_: object) -> io.BytesIO:
        failures, read = self.failures, self.read
        read.append(0)

        class File(io.BytesIO):
            def read1(self, size: int = -1) -> bytes:
                if failures and self.tell() >= failures[0]:
                    failures.pop(0)
                    raise NotAnOSError("payload error")
                chunk = super().read1(1 << 16)
                read[-1] += len(chunk)
                return chunk

        return File(self.content)


@pytest.fixture
def flaky(monkeypatch: pytest.MonkeyPatch) -> type[Flaky]:
    fsspec.register_implementation("flaky", Flaky, clobber=True)
    for name, value in (("failures", []), ("read", []), ("versions", repeat("1"))):
        monkeypatch.setattr(Flaky, name, value)
    return Flaky


def test_fsspec_errors_are_retried_and_fetches_resume(cache: ShardCache, flaky: type[Flaky], caplog) -> None:
    flaky.failures += [-1, 1 << 18, 1 << 19]
    assert cache.local("flaky://a.tar").read_bytes() == flaky.content
    assert flaky.read == [1 << 18, 1 << 18, 1 << 19]
    assert "cannot fetch flaky://a.tar: NotAnOSError: server disconnected; trying again" in caplog.text


def test_fsspec_starts_over_when_the_file_changed(cache: ShardCache, flaky: type[Flaky]) -> None:
    flaky.failures.append(1 << 18)
    flaky.versions = iter("12")
    assert cache.local("flaky://a.tar").read_bytes() == flaky.content
    assert flaky.read == [1 << 18, 1 << 20]


def test_persistent_fsspec_error_is_named_with_its_type(tmp_path: Path, flaky: type[Flaky]) -> None:
    flaky.failures += [-1] * cache_module.ATTEMPTS
    storage = Storage(DataConfig(cache_dir=str(tmp_path / "cache")))
    storage.cache.first_pause = 0.01
    with pytest.raises(UserError, match="cannot fetch flaky://a.tar: NotAnOSError: server disconnected"):
        storage.load_shard("flaky://a.tar")
    assert not flaky.failures
    storage.close()


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("http://h/ä.tar?t=secret", "http://h/ä.tar is no valid URL: .*percent-encoded: http://h/%C3%A4.tar$"),
        ("https://h/a b%20c.tar", "percent-encoded: https://h/a%20b%20c.tar$"),
        ("http://[::1/a.tar", "host or port cannot be read"),
        ("http://h:xx/a.tar", "host or port cannot be read"),
        ("http:///a.tar", "it names no host"),
        ("https://me:secret@h/a.tar", "https://h/a.tar is no valid URL: user and password are not sent"),
    ],
)
def test_invalid_urls_are_refused_at_once(url: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        expand(f"{url},http://h/b.tar")
    assert "secret" not in str(caught.value)


def test_pipe_urls_run_only_if_allowed_s5(shards: Path, tmp_path: Path) -> None:
    """S5."""
    canary = tmp_path / "canary"
    command = f"pipe:touch {canary}; cat {shards}/{NAME}"
    with pytest.raises(UserError, match="would run a shell command"):
        expand(command)
    assert not canary.exists()
    storage = Storage(DataConfig(cache_dir=str(tmp_path / "cache")))
    assert len(storage.load_shard(expand(command, allow_pipe=True)[0])) == 4
    assert canary.exists()
    with pytest.raises(UserError, match="ended with code 3"):
        storage.cache.first_pause = 0.01
        storage.load_shard("pipe:exit 3")
    storage.close()


def test_secrets_in_urls_are_not_shown() -> None:
    url = "https://me:word@host/a/b.tar?token=x"
    assert redacted(url) == "https://host/a/b.tar"
    assert "word" not in str(RemoteError(url, "HTTP 500")) and "token" not in str(RemoteError(url, "HTTP 500"))
