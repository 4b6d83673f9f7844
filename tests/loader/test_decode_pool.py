"""The pool of decode workers: results, imports, deadlines, and replacement of killed or hanging workers."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from itertools import count
from pathlib import Path

import numpy as np
import pytest

from bevt_ds.data.decoding import pool as pool_module
from bevt_ds.data.decoding import subprocess_env
from bevt_ds.data.decoding.pool import MOST_RESIDENT, READY, CannotStart, DecodePool, DecodeWorker, cpu_seconds
from bevt_ds.data.limits import BadSample, Limits
from bevt_ds.data.plan import clip_frames
from bevt_ds.data.reading.index import load_shard
from bevt_ds.data.reading.members import read_member
from bevt_ds.errors import UserError
from bevt_ds.launcher import find
from tests.loader.media import decode_clip, pooled_clips
from tests.waiting import until

Load = Callable[[], bytes]
CLIP = ([(0.3, 0.0)], 8, 2)


def at_once(pool: DecodePool, member: Load, count: int) -> list[np.ndarray]:
    """The same clip, decoded in as many threads."""
    with ThreadPoolExecutor(count) as threads:
        return list(threads.map(lambda _: pooled_clips(pool, member(), *CLIP), range(count)))


@pytest.fixture
def member(shards: Path) -> Load:
    """How to read a clip of 20 frames."""
    return partial(read_member, load_shard(str(shards / "video-000000.tar")).member(1))


@pytest.fixture
def pool() -> Iterator[DecodePool]:
    pool = DecodePool(workers=2, seconds=20.0, limits=Limits())
    yield pool
    pool.close()


@pytest.fixture
def expected(member: Load) -> np.ndarray:
    return decode_clip(member(), lambda total: clip_frames(0.3, total, 8, 2), Limits())[None]


def test_decode_workers_equal_in_process_decoding(pool: DecodePool, member: Load, expected: np.ndarray) -> None:
    for clip in at_once(pool, member, 5):
        np.testing.assert_array_equal(clip, expected)
    assert pool.describe(member())["frames"] == 20


def test_several_clips_from_one_decode_equal_single_decodes(pool: DecodePool, member: Load) -> None:
    """The phase too: what tells the clips of a video apart."""
    positions = [(0.3, 0.0), (0.3, 0.9), (0.8, 0.6)]
    clips = pooled_clips(pool, member(), positions, 8, 2)
    for clip, (start, phase) in zip(clips, positions, strict=True):
        alone = decode_clip(member(), lambda total, s=start, p=phase: clip_frames(s, total, 8, 2, p))
        np.testing.assert_array_equal(clip, alone)
    assert not np.array_equal(clips[0], clips[1])


def test_decode_worker_imports_neither_torch_nor_dali() -> None:
    code = (
        "import sys, json, bevt_ds.data.decoding.worker; "
        "print(json.dumps([m for m in ('torch', 'nvidia.dali', 'deepspeed', 'webdataset') if m in sys.modules]))"
    )
    command = [*subprocess_env.command("x")[:-2], "-c", code]
    output = subprocess.run(command, env=subprocess_env.environment(), capture_output=True, check=True).stdout
    assert json.loads(output) == []


def test_killed_worker_is_replaced_and_its_sample_decoded_again(pool, member, expected) -> None:
    first = set(pool.pids)
    for pid in first:
        os.kill(pid, signal.SIGKILL)
    for clip in at_once(pool, member, 4):
        np.testing.assert_array_equal(clip, expected)
    assert len(pool.pids) == 2 and not first & set(pool.pids)


def test_worker_killed_during_a_sample_is_replaced(member: Load, expected: np.ndarray) -> None:
    pool = DecodePool(workers=1, seconds=20.0, limits=Limits())
    try:
        pooled_clips(pool, member(), *CLIP)  # started up
        (victim,) = pool.pids
        os.kill(victim, signal.SIGSTOP)
        timer = threading.Timer(0.2, os.kill, (victim, signal.SIGKILL))
        timer.start()
        np.testing.assert_array_equal(pooled_clips(pool, member(), *CLIP), expected)
    finally:
        timer.cancel()
        pool.close()


def test_sample_of_a_hanging_worker_goes_to_a_new_one_d19(pool, member, expected, monkeypatch) -> None:
    """D19: also where the others hang too. The first attempt has 0.3 s, a process that starts has more."""
    at_once(pool, member, 8)  # both have started
    stuck, real = set(pool.pids), pool._replaced

    def patient(worker: DecodeWorker) -> DecodeWorker:
        pool._seconds = 20.0
        return real(worker)

    monkeypatch.setattr(pool, "_replaced", patient)
    for pid in stuck:
        os.kill(pid, signal.SIGSTOP)
    pool._seconds = 0.3
    np.testing.assert_array_equal(pooled_clips(pool, member(), *CLIP), expected)
    assert len(stuck - set(pool.pids)) == 1
    pool._seconds = 0.3
    for clip in at_once(pool, member, 4):
        np.testing.assert_array_equal(clip, expected)
    assert len(pool.pids) == 2 and not stuck & set(pool.pids)


def test_sample_that_always_hangs_is_bad_after_two_deadlines(member: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    program = f"import os, time; os.write(1, {READY!r}); time.sleep(60)"
    monkeypatch.setattr(subprocess_env, "command", lambda *_: [sys.executable, "-c", program])
    pool = DecodePool(workers=1, seconds=0.3, limits=Limits())
    began = time.monotonic()
    with pytest.raises(BadSample, match=r"not decoded within 0.3 s \(2 attempts\)") as caught:
        pooled_clips(pool, member(), *CLIP)
    assert caught.value.transient and time.monotonic() - began > 0.6
    pool.close()


def test_worker_over_its_memory_limit_is_replaced_d23(pool, member, expected, monkeypatch) -> None:
    """D23: its answer still counts; the next sample gets a fresh process. Below the bound no one is replaced."""
    first = set(pool.pids)
    with pool.clips(member(), *CLIP) as decoded:
        resident = decoded.reply["resident"]
    pooled_clips(pool, member(), *CLIP)
    assert 1 << 20 < resident < MOST_RESIDENT and set(pool.pids) == first
    monkeypatch.setattr("bevt_ds.data.decoding.pool.MOST_RESIDENT", 1 << 20)
    for _ in range(4):
        np.testing.assert_array_equal(pooled_clips(pool, member(), *CLIP), expected)
    assert len(pool.pids) == 2 and not first & set(pool.pids)


def test_bad_sample_does_not_kill_its_worker(pool: DecodePool, member: Load) -> None:
    before = set(pool.pids)
    with pytest.raises(BadSample, match="cut"):
        pooled_clips(pool, member()[:-1000], *CLIP)
    assert set(pool.pids) == before


def test_workers_that_cannot_start_end_the_run(member: Load, monkeypatch) -> None:
    program = "raise ImportError('no such library')"
    monkeypatch.setattr(subprocess_env, "command", lambda *_: [sys.executable, "-c", program])
    pool = DecodePool(workers=1, seconds=20.0, limits=Limits())
    with pytest.raises(UserError, match="^decode workers cannot start: ImportError: no such library. `bevt doctor`"):
        pool.describe(member())
    pool.close()


def test_worker_that_computes_is_waited_for(member: Load, monkeypatch) -> None:
    """However little an overloaded machine lets it: here its start takes many times START_SECONDS."""
    monkeypatch.setattr(pool_module, "START_SECONDS", 0.001)
    monkeypatch.setattr(pool_module, "cpu_seconds", partial(next, count(1e-9, 1e-9)))
    pool = DecodePool(workers=1, seconds=600.0, limits=Limits())
    assert pool.describe(member())["width"] > 0
    pool.close()


@pytest.mark.parametrize(
    ("computed", "message"),
    [
        ((0.5, 0.5), "got no further for 0.75 s. Is the disk"),
        ((0.5, 1e9), "computed for more than 0.75 s and is not ready. `python -X importtime"),
    ],
    ids=["it waits", "it computes for ever"],
)
def test_worker_that_is_never_ready_ends_the_run(member: Load, monkeypatch, computed: tuple, message: str) -> None:
    monkeypatch.setattr(subprocess_env, "command", lambda *_: [sys.executable, "-c", "input()"])
    monkeypatch.setattr(pool_module, "START_SECONDS", 0.75)
    monkeypatch.setattr(pool_module, "cpu_seconds", partial(next, iter(computed)))
    pool = DecodePool(workers=1, seconds=600.0, limits=Limits())
    with pytest.raises(CannotStart, match=f"process {pool.pids[0]} {message}"):
        pool.describe(member())
    pool.close()


def test_what_a_process_has_computed() -> None:
    before = cpu_seconds(os.getpid())
    while cpu_seconds(os.getpid()) == before:
        pass  # until the system's clock has counted it
    with subprocess.Popen([sys.executable, "-c", ""]) as ended:
        ended.wait()
    assert cpu_seconds(os.getpid()) > before >= 0 == cpu_seconds(ended.pid)


def test_closing_the_pool_ends_every_worker(member: Load, is_alive: Callable[[int], bool]) -> None:
    pool = DecodePool(workers=2, seconds=20.0, limits=Limits())
    pids = pool.pids
    with ThreadPoolExecutor(20) as threads:
        waiting = [threads.submit(pooled_clips, pool, member(), *CLIP) for _ in range(20)]
        pool.close()
    assert not any(is_alive(pid) for pid in pids)
    assert all(isinstance(clip.exception(), CancelledError | None) for clip in waiting)
    with pytest.raises(CancelledError):
        pool.describe(member())


def test_workers_end_when_their_parent_is_killed(member: Load, is_alive: Callable[[int], bool]) -> None:
    code = (
        "import os, signal, sys; from bevt_ds.data.decoding.pool import DecodePool; "
        "from bevt_ds.data.limits import Limits; "
        "print(*DecodePool(2, 20.0, Limits()).pids, flush=True); os.kill(os.getpid(), signal.SIGKILL)"
    )
    command = [*subprocess_env.command("x")[:-2], "-c", code]
    result = subprocess.run(command, env=subprocess_env.environment(), capture_output=True, text=True)
    pids = [int(word) for word in result.stdout.split()]
    assert len(pids) == 2
    until(lambda: not any(map(is_alive, pids)))


def test_a_worker_ignores_what_a_launcher_sends_to_all(member: Load) -> None:
    worker = DecodeWorker()
    try:
        request = {"work": "describe", "kind": "video", "limits": asdict(Limits())}
        assert worker.ask(request, member(), 20.0)[0]["frames"] == 20
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
            os.kill(worker.pid, number)
        assert worker.ask(request, member(), 20.0)[0]["frames"] == 20
    finally:
        worker.close()


def test_a_busy_worker_ends_with_its_parent() -> None:
    """One that waits for work has its pipe closed; one that decodes must look for itself."""
    wait = "import time; print(flush=True); time.sleep(600)"
    work = f"from bevt_ds.data.decoding.subprocess_env import begin_watch; begin_watch(); {wait}"
    start = (
        f"child = subprocess.Popen([sys.executable, '-c', {work!r}], stdout=subprocess.PIPE); child.stdout.readline()"
    )
    code = f"import subprocess, sys, time; {start}; print(child.pid, flush=True); time.sleep(600)"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as parent:
        child = find(int(parent.stdout.readline()))
        assert child.is_alive()
        parent.kill()
    until(lambda: not child.is_alive())
