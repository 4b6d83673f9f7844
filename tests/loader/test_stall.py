"""D24, local: a disk or file server that does not answer ends the run with its name, and holds nobody for ever.

A FIFO that nobody writes to blocks whoever opens it, in the kernel, as a dead file server does.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError
from pathlib import Path

import fsspec
import pytest

from bevt_ds.config import DataConfig
from bevt_ds.data import child, patience
from bevt_ds.data.index import load_shard
from bevt_ds.data.limits import BadSample
from bevt_ds.data.loader import Loader
from bevt_ds.data.members import Member
from bevt_ds.data.patience import Patience, StorageStalled
from bevt_ds.data.remote import RemoteError, glob_remote
from bevt_ds.data.storage import Storage
from bevt_ds.data.timing import StageTimes
from bevt_ds.errors import UserError


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


def test_a_stalled_read_is_named_with_its_place(member: Member, stall, caplog: pytest.LogCaptureFixture) -> None:
    storage = Storage(DataConfig(read_seconds=0.4))
    assert len(storage.read(member, StageTimes())) == member.size
    stall(Path(member.path))
    began = time.monotonic()
    with pytest.raises(StorageStalled, match=r"'image-02' at byte \d+ of .*s.tar: no answer for .*=0.4 s") as caught:
        storage.read(member, StageTimes())
    assert 0.4 <= time.monotonic() - began < 3 and caught.value.exit_code == 5
    assert [r.levelname for r in caplog.records] == ["WARNING"] and "no answer for 0.2 s" in caplog.text
    storage.close()


def test_a_run_on_a_stalled_shard_ends(shards: Path, tmp_path: Path, stall, with_data) -> None:
    for path in shards.glob("image-*.tar"):
        load_shard(str(path))
        shutil.copy2(path, tmp_path / path.name)
    with Loader(with_data(images=f"{tmp_path}/image-*.tar", read_seconds=0.5)) as loader:
        next(loader)
        for path in tmp_path.glob("image-*.tar"):
            stall(path)
        began = time.monotonic()
        with pytest.raises(StorageStalled, match="at byte .* of .*image-00000"):
            for _ in range(50):
                next(loader)
        assert time.monotonic() - began < 20
    assert loader._thread.is_alive() is False


ENDS = """
import sys, threading
from bevt_ds.config import DataConfig
from bevt_ds.data.members import Member
from bevt_ds.data.storage import Storage
from bevt_ds.data.timing import StageTimes
storage = Storage(DataConfig(read_seconds=0.3))
storage.read(Member(sys.argv[1], "k", "jpg", 512, 10, 0), StageTimes())
"""


def test_a_stuck_thread_does_not_keep_the_process(tmp_path: Path) -> None:
    """Nor does it need a `close`: the error alone ends the program."""
    os.mkfifo(tmp_path / "s.tar")
    command = [sys.executable, "-P", "-c", ENDS, str(tmp_path / "s.tar")]
    done = subprocess.run(command, env=child.environment(), capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and "StorageStalled" in done.stderr and "at byte 512" in done.stderr


def test_closing_ends_the_waiting(member: Member, stall) -> None:
    storage = Storage(DataConfig(read_seconds=60.0))
    stall(Path(member.path))
    raised: list[BaseException] = []

    def read() -> None:
        try:
            storage.read(member, StageTimes())
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
        storage.read(member, StageTimes())


def test_a_shard_that_stalls_when_it_is_opened(shards: Path, monkeypatch) -> None:
    """At the start of a run, before any sample is asked for."""
    released = threading.Event()
    monkeypatch.setattr("bevt_ds.data.index._open_tar", lambda path: released.wait(20))
    with pytest.raises(StorageStalled, match="shard .*image-000000.tar: no answer"):
        Storage(DataConfig(read_seconds=0.2)).load_shard(str(shards / "image-000000.tar"))
    released.set()


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "s.tar")
    with pytest.raises(UserError, match="s.tar is no regular file"):
        load_shard(str(tmp_path / "s.tar"))


def test_threads_are_used_again_and_errors_come_through() -> None:
    calls, seen = Patience(5.0), set()
    for i in range(50):
        assert calls.call(lambda i=i: seen.add(threading.get_ident()) or i, "x") == i
    assert len(seen) == 1
    with pytest.raises(BadSample, match="broken"):
        calls.call(lambda: (_ for _ in ()).throw(BadSample("broken")), "x")
    with pytest.raises(TimeoutError, match="the server's own"):  # not to be taken for the end of our patience
        calls.call(lambda: (_ for _ in ()).throw(TimeoutError("the server's own")), "x")
    calls.close()


def test_a_slow_answer_counts(monkeypatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(patience, "WARN_AFTER", 0.1)
    assert Patience(10.0).call(lambda: time.sleep(0.3) or "late", "the shard") == "late"
    assert "the shard: no answer for 0.1 s; the run stops after 10 s" in caplog.text


def test_a_remote_file_system_that_stalls_while_connecting() -> None:
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
