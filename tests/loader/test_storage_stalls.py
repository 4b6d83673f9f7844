"""Local storage that does not answer ends the run with its name, in every phase (D24).

A FIFO that no one writes to blocks whoever opens it, in the kernel, as a dead file server does.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError
from contextlib import closing
from pathlib import Path

import fsspec
import pytest

from bevt_ds.config.samples import DataConfig
from bevt_ds.data.decoding import subprocess_env
from bevt_ds.data.limits import BadSample
from bevt_ds.data.loader import Loader
from bevt_ds.data.reading import deadline, index, tar_scan
from bevt_ds.data.reading.deadline import Deadline, DeadlineExecutor, StorageStalled, heartbeat
from bevt_ds.data.reading.index import SUFFIX, load_shard
from bevt_ds.data.reading.members import Member, read_at
from bevt_ds.data.reading.remote import RemoteError, glob_remote
from bevt_ds.data.reading.storage import Storage
from bevt_ds.errors import UserError
from bevt_ds.shards.check import check


@pytest.fixture
def stall() -> Iterator[Callable[[Path], None]]:
    """Make reading a file block, until the test is over."""
    stalled: list[Path] = []

    def replace(path: Path) -> None:
        path.unlink(missing_ok=True)
        os.mkfifo(path)
        stalled.append(path)

    yield replace
    for path in stalled:
        os.close(os.open(path, os.O_RDWR | os.O_NONBLOCK))  # whoever waits for a writer goes on, to the end of file


@pytest.fixture
def member(tmp_path: Path, shards: Path) -> Member:
    path = shutil.copy2(shards / "image-000000.tar", tmp_path / "s.tar")
    return load_shard(str(path)).member(2)


def test_stalled_read_is_named_with_shard_and_offset(member: Member, stall, caplog: pytest.LogCaptureFixture) -> None:
    with closing(Storage(DataConfig())) as patient:
        assert len(patient.read(member)) == member.size
    storage = Storage(DataConfig(read_seconds=0.4))
    stall(Path(member.path))
    began = time.monotonic()
    with pytest.raises(StorageStalled, match=r"'image-02' at byte \d+ of .*s.tar: no answer for .*=0.4 s") as caught:
        storage.read(member)
    assert time.monotonic() - began >= 0.4 and caught.value.exit_code == 5
    assert [r.levelname for r in caplog.records] == ["WARNING"] and "no answer for 0.2 s" in caplog.text
    storage.close()


def test_run_on_a_stalled_shard_ends(shards: Path, tmp_path: Path, stall, with_data) -> None:
    for path in shards.glob("image-*.tar"):
        load_shard(str(path))
        shutil.copy2(path, tmp_path / path.name)
    with Loader(with_data(images=f"{tmp_path}/image-*.tar", read_seconds=1.5)) as loader:
        next(loader)
        for path in tmp_path.glob("image-*.tar"):
            stall(path)
        with pytest.raises(StorageStalled, match="at byte .* of .*image-00000"):
            for _ in range(50):
                next(loader)
    assert loader._thread.is_alive() is False


ENDS = """
import sys, threading
from bevt_ds.config.samples import DataConfig
from bevt_ds.data.reading.members import Member
from bevt_ds.data.reading.storage import Storage
storage = Storage(DataConfig(read_seconds=0.3))
storage.read(Member(sys.argv[1], "k", "jpg", 512, 10, 0))
"""


def test_stuck_thread_does_not_keep_the_process_alive(tmp_path: Path) -> None:
    """Nor does it need a `close`: the error alone ends the program."""
    os.mkfifo(tmp_path / "s.tar")
    command = [sys.executable, "-P", "-c", ENDS, str(tmp_path / "s.tar")]
    done = subprocess.run(command, env=subprocess_env.environment(), capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and "StorageStalled" in done.stderr and "at byte 512" in done.stderr


def test_closing_the_loader_ends_a_stalled_wait(member: Member, stall) -> None:
    storage = Storage(DataConfig(read_seconds=60.0))
    stall(Path(member.path))
    raised: list[BaseException] = []

    def read() -> None:
        try:
            storage.read(member)
        except CancelledError as error:
            raised.append(error)

    readers = [threading.Thread(target=read) for _ in range(3)]
    for reader in readers:
        reader.start()
    time.sleep(0.1)
    storage.close()
    for reader in readers:
        reader.join(timeout=5)
    assert len(raised) == 3
    with pytest.raises(CancelledError):
        storage.read(member)


def test_shard_that_stalls_on_open_is_named(shards: Path, monkeypatch, released: threading.Event) -> None:
    """At the start of a run, before any sample is asked for."""
    monkeypatch.setattr("bevt_ds.data.reading.index._open_tar", lambda path: released.wait(20))
    with pytest.raises(StorageStalled, match="shard .*image-000000.tar: no answer"):
        Storage(DataConfig(read_seconds=0.2)).load_shard(str(shards / "image-000000.tar"))


@pytest.mark.parametrize("reads", [1, 5])
def test_shard_that_stalls_during_indexing_is_named_with_the_byte(member, monkeypatch, released, reads: int) -> None:
    """Anywhere between its first byte and its last, with the byte."""
    Path(member.path + SUFFIX).unlink()
    left = iter(range(reads))
    monkeypatch.setattr(
        tar_scan, "read_at", lambda *place: read_at(*place) if next(left, None) is not None else released.wait(20)
    )
    with pytest.raises(StorageStalled, match=r"shard .*s.tar at byte \d+: no answer for .*=0.2 s"):
        Storage(DataConfig(read_seconds=0.2)).load_shard(member.path)


def test_slow_indexing_that_progresses_is_allowed(member: Member, monkeypatch) -> None:
    """The deadline is for each read, not for a tar of any size."""
    Path(member.path + SUFFIX).unlink()
    monkeypatch.setattr(tar_scan, "read_at", lambda *place: time.sleep(0.05) or read_at(*place))
    began = time.monotonic()
    assert Storage(DataConfig(read_seconds=1.0)).load_shard(member.path).member(2) == member
    assert time.monotonic() - began > 1.1


@pytest.mark.parametrize(
    ("call", "pattern"), [("stat", "a.tar"), ("stat", "{a,b}.tar"), ("scandir", "*.tar"), ("scandir", "*/a.tar")]
)
def test_dead_mount_is_named_before_any_shard_is_opened(tmp_path, monkeypatch, released, call, pattern: str) -> None:
    """`os.stat` and a glob's listing block in the kernel too: here for whatever lies under one folder."""
    real, folder = getattr(os, call), tmp_path / "dead"
    folder.mkdir()
    monkeypatch.setattr(
        os, call, lambda path=".", **kw: released.wait(20) if str(folder) in str(path) else real(path, **kw)
    )
    with pytest.raises(StorageStalled, match="/dead/.*tar: no answer for data.read_seconds=0.2 s") as caught:
        Storage(DataConfig(read_seconds=0.2)).shards(f"{folder}/{pattern}", "image")
    assert caught.value.exit_code == 5


def test_run_does_not_start_on_a_dead_mount(with_data, tmp_path: Path, monkeypatch, released) -> None:
    real = os.path.exists
    monkeypatch.setattr(os.path, "exists", lambda path: released.wait(20) if "dead" in str(path) else real(path))
    with pytest.raises(StorageStalled, match="/dead.tar: no answer"):
        Loader(with_data(images=f"{tmp_path}/dead.tar", read_seconds=0.3))


def test_check_command_stops_at_stalled_storage(member: Member, monkeypatch) -> None:
    """It is no fault of the tar, and the tars after it are not tried for minutes each."""
    asked = []

    def stalled(self: Storage, path: str) -> None:
        asked.append(path)
        raise StorageStalled(f"shard {path}: no answer")

    monkeypatch.setattr(Storage, "load_shard", stalled)
    with pytest.raises(StorageStalled):
        check([member.path, "other.tar"], jobs=1)
    assert asked == [member.path]


def test_indexing_by_another_process_is_waited_for(member: Member) -> None:
    """Longer than storage may take to answer, because that one is at work."""
    Path(member.path + SUFFIX).unlink()
    storage, found = Storage(DataConfig(read_seconds=0.3)), []
    with open(member.path, "rb") as tar:
        fcntl.flock(tar, fcntl.LOCK_EX)
        waiting = threading.Thread(target=lambda: found.append(storage.load_shard(member.path)))
        waiting.start()
        waiting.join(timeout=0.8)
        assert waiting.is_alive() and not found
    waiting.join(timeout=10)
    assert found[0].member(2) == member


def test_wait_for_another_indexing_process_has_a_deadline(member: Member, monkeypatch, caplog) -> None:
    Path(member.path + SUFFIX).unlink()
    monkeypatch.setattr(index, "LONGEST_TURN", 0.2)
    with open(member.path, "rb") as tar:
        fcntl.flock(tar, fcntl.LOCK_EX)
        assert load_shard(member.path).member(2) == member
    assert "s.tar: another process holds its lock for over 0.2 s; going on without" in caplog.text


def test_stalled_cache_folder_is_named(shards: Path, tmp_path: Path, stall) -> None:
    """The cache's folder may lie on a file server: a home folder does."""
    fsspec.filesystem("memory").pipe("/stall/s.tar", (shards / "image-000000.tar").read_bytes())
    storage = Storage(DataConfig(cache_dir=str(tmp_path / "cache"), read_seconds=0.3, remote_seconds=0.2))
    first = storage.load_shard("memory://stall/s.tar").member(0)
    assert len(storage.read(first)) == first.size
    for facts in (tmp_path / "cache").glob("*[0-9a-f].json"):
        stall(facts)
    with pytest.raises(StorageStalled, match=r"cache/.*.tar: no answer for .*remote_seconds=0.5 s"):
        storage.read(first)


def test_abandoned_read_stops_when_storage_comes_back(released: threading.Event) -> None:
    """Storage that comes back finds a thread that was given up: it does not go on reading."""
    executor, ended = DeadlineExecutor(1), threading.Event()

    def work() -> None:
        released.wait(20)
        try:
            heartbeat("the next byte")
        except CancelledError:
            ended.set()

    with pytest.raises(StorageStalled):
        executor.call(work, place="the first byte", deadline=Deadline(0.2))
    released.set()
    assert ended.wait(10)


def test_pipes_and_folders_are_refused_as_shards(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "s.tar")
    with pytest.raises(UserError, match="s.tar is no regular file"):
        load_shard(str(tmp_path / "s.tar"))


def test_deadline_executor_reuses_threads_and_raises_errors() -> None:
    calls, seen = DeadlineExecutor(50), set()
    place = {"place": "x", "deadline": Deadline(5.0)}
    for i in range(50):
        assert calls.call(lambda i=i: seen.add(threading.get_ident()) or i, **place) == i
    assert len(seen) == 1
    with pytest.raises(BadSample, match="broken"):
        calls.call(lambda: (_ for _ in ()).throw(BadSample("broken")), **place)
    with pytest.raises(TimeoutError, match="the server's own"):  # not to be taken for the end of our patience
        calls.call(lambda: (_ for _ in ()).throw(TimeoutError("the server's own")), **place)
    calls.close()


def test_slow_answer_within_the_deadline_counts(monkeypatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(deadline, "WARN_AFTER", 0.1)
    slow = DeadlineExecutor(1).call(time.sleep, 0.3, place="the shard", deadline=Deadline(10.0))
    assert slow is None
    assert "the shard: no answer for 0.1 s; the run stops after 10 s" in caplog.text


def test_fsspec_that_stalls_on_connecting_is_named() -> None:
    """s3 or sftp may block before there is a file to ask for."""
    released = threading.Event()

    class Deaf(fsspec.AbstractFileSystem):
        protocol = "deaf"

        def __init__(self, **options: object) -> None:
            released.wait(20)
            super().__init__(**options)

    fsspec.register_implementation("deaf", Deaf, clobber=True)
    with pytest.raises(RemoteError, match="deaf://.*no bytes for 0.2 s"):
        glob_remote("deaf://bucket/*.tar", seconds=0.2)
    released.set()
