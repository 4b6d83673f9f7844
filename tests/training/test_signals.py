"""What asks a run to stop: signals and dead launchers; the first at a step's end, the second at once. No engine."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable

import pytest

from bevt_ds import launcher
from bevt_ds.exit_codes import STOPPED
from bevt_ds.launcher import Process, find
from bevt_ds.runtime.signals import CAUGHT, Stopped, StopRequest
from tests.downstream.worlds import ALONE
from tests.waiting import SECONDS, until

SLEEP = [sys.executable, "-c", "import time; time.sleep(600)"]


class Two:
    """Rank 0 of two, whose other rank says the same each time."""

    world = 2

    def __init__(self, other: str) -> None:
        self.other = other

    def sum_counts(self, counts):
        return [counts[0] + bool(self.other)]

    def gather(self, value):
        return [value, self.other]


@pytest.fixture
def ended() -> list[int]:
    """Codes with which a process would have ended at once."""
    return []


@pytest.fixture
def request_(ended) -> Callable[..., StopRequest]:
    def make(**options) -> StopRequest:
        return StopRequest(**{"watched": (), "echo": 0.0, "end": lambda code, speak: ended.append(code)} | options)

    return make


@pytest.mark.parametrize("number", CAUGHT, ids=lambda number: number.name)
def test_the_first_signal_waits_for_the_step_and_the_second_does_not(request_, ended, number):
    before = signal.getsignal(number)
    with request_() as stop, stop.training():
        assert stop.agreed(ALONE) == ""
        os.kill(os.getpid(), number)
        until(lambda: stop.reason)
        assert (stop.agreed(ALONE), ended) == (number.name, [])
        os.kill(os.getpid(), number)
        until(lambda: ended)
    assert ended == [STOPPED]
    assert signal.getsignal(number) is before


def test_a_signal_while_the_main_thread_is_in_c_code_is_heard(request_):
    """`sigtimedwait` returns only at its time limit: it waits for another signal."""
    with request_() as stop, stop.training():
        other = subprocess.Popen(["sh", "-c", f"sleep 0.2; kill -TERM {os.getpid()}"])
        signal.sigtimedwait([signal.SIGUSR2], 2)
        other.wait(SECONDS)
        until(lambda: stop.reason)


def test_before_and_after_the_steps_a_signal_ends_at_once(request_, ended):
    with request_() as stop:
        stop.ask("SIGTERM")
        assert ended == [STOPPED]
    with request_() as stop:
        with stop.training():
            pass
        stop.ask("SIGTERM")
    assert ended == [STOPPED] * 2


def test_a_launcher_that_passes_the_signal_on_is_no_second_signal(request_, ended):
    with request_(echo=1000.0) as stop, stop.training():
        stop.ask("SIGINT")
        stop.ask("SIGTERM")
        stop.ask("the end of the launcher", is_signal=False)
    assert ended == []


def test_a_commit_that_takes_longer_than_the_grace_is_not_waited_for(request_, ended):
    told = []
    with request_(grace=0.3) as stop, stop.training():
        stop.before_end = lambda: told.append(True)
        stop.ask("SIGTERM")
        assert ended == []
        until(lambda: ended)
    assert ended[0] == STOPPED and told


def test_without_a_request_grace_ends_nothing(request_, ended):
    with request_(grace=0.01) as stop, stop.training():
        time.sleep(1.2)
    assert ended == []


def test_ranks_say_whose_signal_it_was(request_):
    with request_() as stop, stop.training():
        assert stop.agreed(Two("")) == ""
        assert stop.agreed(Two("SIGHUP")) == "SIGHUP (rank 1)"
        stop.ask("SIGTERM")
        assert stop.agreed(Two("")) == "SIGTERM (rank 0)"
        assert stop.agreed(Two("SIGTERM")) == "SIGTERM"


def test_once_stopped_a_signal_adds_no_word(capsys):
    """As from a launcher that ends one rank after the other."""
    with StopRequest(watched=(), echo=0.0, end=lambda code, speak: speak()) as stop:
        with pytest.raises(Stopped), stop.training():
            stop.ask("SIGTERM")
            raise Stopped
        stop.ask("SIGINT")  # the commit is under way
        assert "stopped at once by SIGINT, after SIGTERM" in capsys.readouterr().err
        stop.stopped()
        stop.ask("SIGINT")
        assert capsys.readouterr().err == ""


def test_nohup_keeps_its_meaning(request_):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with request_():
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_the_end_of_a_launcher_is_a_request(request_, ended):
    child = subprocess.Popen(SLEEP)
    process = find(child.pid)
    with request_(watched=(process,)) as stop, stop.training():
        time.sleep(0.1)
        assert not stop.reason
        child.kill()  # not waited for: it is a zombie, and no less dead
        until(lambda: stop.reason)
        assert str(child.pid) in stop.reason
    child.wait()
    assert ended == []


def test_a_process_is_known_by_its_start_too():
    own = find(os.getpid())
    assert own.is_alive()
    assert not Process(own.pid, own.start - 1).is_alive()
    child = subprocess.Popen(SLEEP)
    process = find(child.pid)
    os.kill(child.pid, signal.SIGSTOP)
    assert process.is_alive()
    child.kill()
    child.wait()
    assert not process.is_alive()
    assert find(child.pid) is None


@pytest.mark.parametrize(
    ("rank", "parent", "above", "expected"),
    [
        (None, "bash", "sshd", []),
        ("0", "torchrun", "bash", [20]),
        ("0", "python -u -m deepspeed.launcher.launch --world_info=x", "python bin/deepspeed x.py", [20, 10]),
    ],
)
def test_launchers_are_found(monkeypatch, rank, parent, above, expected):
    monkeypatch.setattr(launcher, "_stat", lambda pid: ("S", 10, pid * 7))
    monkeypatch.setattr(launcher, "_command", lambda pid: {20: parent, 10: above}[pid])
    monkeypatch.setattr(os, "getppid", lambda: 20)
    monkeypatch.setenv("RANK", rank) if rank else monkeypatch.delenv("RANK", raising=False)
    found = launcher.launchers.__wrapped__()
    assert found == tuple(Process(pid, pid * 7) for pid in expected)


def test_a_deepspeed_command_that_has_ended_already_is_noticed(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr(launcher, "_stat", lambda pid: ("S", 1, pid * 7))
    monkeypatch.setattr(launcher, "_command", lambda pid: {1: "/sbin/init"}.get(pid, launcher.DEEPSPEED))
    monkeypatch.setattr(os, "getppid", lambda: 20)
    parent, above = launcher.launchers.__wrapped__()
    assert parent.pid == 20 and not above.is_alive()
