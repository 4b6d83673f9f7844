"""Remote shards, from a server that stalls, cuts, errs and lies, and from fsspec; the cache they are kept in."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import islice
from pathlib import Path

import fsspec
import pytest
import torch

from bevt_ds.config import Config, DataConfig
from bevt_ds.data import cache as cache_module
from bevt_ds.data.cache import ShardCache
from bevt_ds.data.limits import BadSample
from bevt_ds.data.loader import Loader
from bevt_ds.data.remote import RemoteError, redacted
from bevt_ds.data.shards import expand
from bevt_ds.data.storage import Storage
from bevt_ds.data.timing import StageTimes
from bevt_ds.errors import UserError


class Server(ThreadingHTTPServer):
    """Serves `files`. `faults` are used up, one a request: "500", "404", "stall", "cut", "trickle"."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.faults: list[str] = []
        self.requests: list[str] = []
        self.released = threading.Event()

    def url(self, name: str) -> str:
        return f"http://127.0.0.1:{self.server_port}/{name}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def log_message(self, *_: object) -> None:
        """Nothing: pytest shows what fails."""

    def do_GET(self) -> None:
        data, begin = self.server.files.get(self.path[1:], b""), 0
        fault = self.server.faults.pop(0) if self.server.faults else ""
        self.server.requests.append(f"{self.path[1:]} {self.headers.get('Range', '')} {fault}".strip())
        if fault.isdigit() or not data:
            self.send_error(int(fault or 404))
            return
        if range_ := self.headers.get("Range"):
            begin = int(range_.removeprefix("bytes=").rstrip("-"))
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {begin}-{len(data) - 1}/{len(data)}")
        else:
            self.send_response(200)
        self.send_header("ETag", '"1"')
        self.send_header("Content-Length", str(len(data) - begin))
        self.end_headers()
        self._send(data[begin:], fault)

    def _send(self, data: bytes, fault: str) -> None:
        half = len(data) // 2
        self.wfile.write(data[:half])
        self.wfile.flush()
        if fault == "cut":
            return
        if fault == "stall":
            self.server.released.wait(20)
            return
        for byte in data[half : half + 200] if fault == "trickle" else b"":
            try:
                self.wfile.write(bytes([byte]))
            except OSError:
                return
            time.sleep(0.05)
        self.wfile.write(data[half:])


@pytest.fixture
def server(shards: Path) -> Iterator[Server]:
    with Server() as server:
        server.files = {path.name: path.read_bytes() for path in shards.glob("*.tar")}
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.released.set()
        server.shutdown()
        thread.join()


@pytest.fixture
def cache(tmp_path: Path) -> ShardCache:
    return ShardCache(tmp_path / "cache", 1 << 30, seconds=0.5, first_pause=0.01)


NAME = "video-000000.tar"


@pytest.mark.parametrize(
    "faults",
    [[], ["500"], ["503", "429"], ["cut"], ["stall"], ["trickle"], ["cut", "500", "stall", "cut"]],
)
def test_a_server_in_trouble(server: Server, cache: ShardCache, faults: list[str]) -> None:
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
def test_a_server_that_will_not(server: Server, cache: ShardCache, faults: list, requests: int, message: str) -> None:
    server.faults = list(faults)
    with pytest.raises(RemoteError, match=f"{NAME}: .*{message}"):
        cache.local(server.url(NAME))
    assert len(server.requests) == requests
    assert not list(cache.folder.glob("*.tar"))
    assert not list(cache.folder.glob(".fetch*"))


def test_nobody_there(cache: ShardCache) -> None:
    with pytest.raises(RemoteError, match="Connection refused|timed out"):
        cache.local("http://127.0.0.1:9/a.tar")


def test_processes_of_a_node_fetch_once(server: Server, cache: ShardCache) -> None:
    """Threads with locks of their own stand in for processes: flock does not tell them apart."""
    threads = [threading.Thread(target=cache.local, args=(server.url(NAME),)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(server.requests) == 1


def test_the_cache_is_bounded(server: Server, tmp_path: Path) -> None:
    names = sorted(server.files)[:4]
    size = max(len(server.files[name]) for name in names)
    cache = ShardCache(tmp_path / "cache", 2 * size, seconds=5)
    places = []
    for name in names:
        places.append(cache.local(server.url(name)))
        time.sleep(0.01)
    kept = [place for place in places if place.exists()]
    assert places[-1] in kept and places[0] not in kept
    assert sum(place.stat().st_size for place in kept) <= 2 * size


@pytest.mark.parametrize("damage", ["shorter", "no facts", "facts"])
def test_a_copy_that_is_not_whole_is_fetched_again(server: Server, cache: ShardCache, damage: str) -> None:
    place = cache.local(server.url(NAME))
    if damage == "shorter":
        os.truncate(place, 100)
    elif damage == "no facts":
        place.with_suffix(".json").unlink()
    else:
        place.with_suffix(".json").write_text("[]")
    assert cache.local(server.url(NAME)).read_bytes() == server.files[NAME]
    assert len(server.requests) == 2


def test_a_damaged_copy_is_replaced_and_a_damaged_source_is_a_bad_sample(server: Server, tmp_path: Path) -> None:
    """A flipped bit in the cache is got over; the same bit at the source is not the sample that was indexed."""
    storage = Storage(DataConfig(cache_dir=str(tmp_path / "cache"), remote_seconds=5.0))
    member = storage.load_shard(server.url(NAME)).member(0)
    good = storage.read(member, StageTimes())
    damaged = bytearray(server.files[NAME])
    damaged[member.offset + 5] ^= 1
    storage.cache.local(member.path).write_bytes(damaged)
    assert storage.read(member, StageTimes()) == good
    server.files[NAME] = bytes(damaged)
    storage.cache.discard(member.path)
    with pytest.raises(BadSample, match="not those that were indexed"):
        storage.read(member, StageTimes())
    storage.close()


def test_a_run_from_a_server_equals_a_local_one(config: Config, with_data, server: Server, tmp_path: Path) -> None:
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


def test_a_shard_that_is_not_there_is_named_at_the_start(with_data, server: Server, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="none.tar: HTTP 404"):
        Loader(with_data(videos=server.url("none.tar"), cache_dir=str(tmp_path / "cache")))


def test_the_next_window_is_fetched_before_it_is_read(with_data, server: Server, tmp_path: Path) -> None:
    remote = with_data(videos=server.url("video-00000{0..2}.tar"), cache_dir=str(tmp_path / "cache"), shuffle_window=1)
    with Loader(remote) as loader:
        for path in (tmp_path / "cache").glob("*.tar"):
            path.unlink()
        next(loader)
        deadline = time.monotonic() + 10
        while len(list((tmp_path / "cache").glob("*.tar"))) < 2 and time.monotonic() < deadline:
            time.sleep(0.02)
        assert len(list((tmp_path / "cache").glob("*.tar"))) >= 2  # the window that is read, and the one after it


def test_fsspec(shards: Path, tmp_path: Path) -> None:
    memory = fsspec.filesystem("memory")
    for path in shards.glob("video-*.tar"):
        memory.pipe(f"/bucket/{path.name}", path.read_bytes())
    paths = expand("memory://bucket/video-*.tar")
    assert len(paths) == 3
    storage = Storage(DataConfig(cache_dir=str(tmp_path / "cache")))
    shard = storage.load_shard(paths[0])
    assert storage.read(shard.member(0), StageTimes())
    with pytest.raises(UserError, match="there is no such file"):
        storage.load_shard("memory://bucket/none.tar")
    with pytest.raises(UserError, match="nonsense"):
        storage.load_shard("nonsense://a.tar")
    with pytest.raises(UserError, match="no file matches"):
        expand("memory://bucket/none-*.tar")
    storage.close()


def test_a_stalled_file_system_is_given_up(tmp_path: Path, monkeypatch) -> None:
    released = threading.Event()

    class Stalled(fsspec.implementations.memory.MemoryFileSystem):
        protocol = "stalled"

        def size(self, path: str) -> int:
            released.wait(20)
            return 0

    fsspec.register_implementation("stalled", Stalled, clobber=True)
    monkeypatch.setattr(cache_module, "ATTEMPTS", 2)
    began = time.monotonic()
    with pytest.raises(RemoteError, match="no bytes for 0.2 s"):
        ShardCache(tmp_path, 1 << 30, seconds=0.2, first_pause=0.01).local("stalled://a.tar")
    assert time.monotonic() - began < 5
    released.set()


def test_pipe_runs_a_shell_only_where_that_is_allowed(shards: Path, tmp_path: Path) -> None:
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


@pytest.mark.parametrize("trap", ["link", "writable"])
def test_a_cache_that_others_could_write_is_refused(tmp_path: Path, trap: str) -> None:
    """S6."""
    folder = tmp_path / "cache"
    if trap == "link":
        (tmp_path / "elsewhere").mkdir()
        folder.symlink_to(tmp_path / "elsewhere")
    else:
        folder.mkdir()
        folder.chmod(0o777)
    with pytest.raises(UserError, match="choose a folder of your own"):
        ShardCache(folder, 1 << 20, seconds=1).local("http://127.0.0.1:9/a.tar")
    assert not list(tmp_path.glob("elsewhere/*"))


def test_a_link_in_the_cache_is_not_followed(server: Server, cache: ShardCache, tmp_path: Path) -> None:
    """S6: even where somebody got in, no file outside is written."""
    place = cache.index_place(server.url(NAME)).with_suffix("").with_suffix(".tar")
    outside = tmp_path / "outside"
    outside.write_bytes(b"mine")
    place.symlink_to(outside)
    (cache.folder / f"{place.name}.lock").symlink_to(tmp_path / "lock")
    with pytest.raises(OSError, match="symbolic links"):
        cache.local(server.url(NAME))
    (cache.folder / f"{place.name}.lock").unlink()
    assert cache.local(server.url(NAME)).read_bytes() == server.files[NAME]
    assert outside.read_bytes() == b"mine"


def test_secrets_are_not_shown() -> None:
    url = "https://me:word@host/a/b.tar?token=x"
    assert redacted(url) == "https://host/a/b.tar"
    assert "word" not in str(RemoteError(url, "HTTP 500")) and "token" not in str(RemoteError(url, "HTTP 500"))
