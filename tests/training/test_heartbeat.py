"""Lost ranks: dead, silent or stuck ones are named by all the others. No engine; ranks are threads or processes."""

from __future__ import annotations

import io
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stderr

import pytest

from bevt_ds.errors import UserError
from bevt_ds.exit_codes import RANK_LOST, STOPPED
from bevt_ds.launcher import Process, find
from bevt_ds.runtime import heartbeat
from bevt_ds.runtime.heartbeat import Heartbeat, kill, stacks
from bevt_ds.runtime.place import MOVED, PATIENCE, USUAL, Place, moved_bytes
from bevt_ds.runtime.roll_call import LATE, RollCall
from bevt_ds.runtime.signals import end_process
from tests.waiting import SECONDS, until

DEADLINE = 10.0


def numbers(call: RollCall, now: float) -> list[int]:
    return [one.rank for one in call.missing(now)]


def test_a_silent_rank_is_missing_after_the_deadline():
    call = RollCall(range(3), DEADLINE, 0.0)
    for second in range(1, 20):
        call.look(float(second))
        for rank in (0, 2) if second > 4 else (0, 1, 2):
            call.heard(rank, float(second), section="save", step=7)
        assert numbers(call, float(second)) == ([1] if second > 14 else [])
    (one,) = call.missing(19.0)
    assert (one.section, one.step, one.silent) == ("save", 7, True)
    assert abs(one.since - (time.time() - 15)) < 5
    assert "rank 1 has not answered since 2" in str(one) and "(15 s), in step 7, save" in str(one)


def test_a_closed_connection_is_a_death_and_a_goodbye_is_none():
    call = RollCall(range(3), DEADLINE, 0.0)
    call.left(2)
    call.closed(2)
    call.closed(-1)
    assert numbers(call, 1.0) == []
    call.closed(1)
    assert numbers(call, 1.0) == [1]
    assert "ended without a word" in str(call.missing(1.0)[0])


def test_a_pause_of_this_process_is_no_silence_of_the_others():
    call = RollCall(range(2), DEADLINE, 0.0)
    assert call.look(1.0) == 0
    assert call.look(1001.0) == 1000
    assert numbers(call, 1001.0) == []
    for second in range(1002, 1013):
        assert call.look(float(second)) == 0 < LATE
    assert numbers(call, 1012.0) == [0, 1]


@pytest.mark.parametrize(
    ("still", "entered", "expected"),
    [
        ((11.0, 1.0), (5, 5), []),  # in a save, say: one rank writes, the other waits for it
        ((11.0, 11.0), (5, 5), [0, 1]),
        ((11.0, 1.0), (6, 5), []),  # rank 0 waits for rank 1, which gets on
        ((11.0, 11.0), (6, 5), [1]),
        ((1.0, 11.0), (6, 5), [1]),
    ],
)
def test_the_rank_that_keeps_the_others_waiting_is_named(still, entered, expected):
    call = RollCall(range(2), DEADLINE, 0.0)
    for rank in range(2):
        call.heard(rank, 1.0, still=still[rank], entered=entered[rank], limit=10.0)
    found = call.missing(1.0)
    assert [one.rank for one in found] == expected
    assert all("has got no further" in str(one) and not one.silent for one in found)


@pytest.fixture
def clock(monkeypatch) -> list[float]:
    """The time that a Place sees."""
    now = [0.0]
    monkeypatch.setattr("bevt_ds.runtime.place.time.monotonic", lambda: now[0])
    return now


def test_a_step_has_the_deadline_or_a_multiple_of_its_usual_time(clock):
    place = Place()
    assert place.limit(DEADLINE, {}) == PATIENCE * DEADLINE
    place.enter("step", 0)
    assert place.limit(DEADLINE, {}) == PATIENCE * DEADLINE  # the first one compiles
    for seconds, limit in ((100.0, USUAL * 100), (4.0, USUAL * 4), (0.5, DEADLINE), (50.0, DEADLINE)):
        clock[0] += seconds
        place.enter("data", 1)
        assert place.limit(DEADLINE, {"data": 1.0}) == PATIENCE * DEADLINE
        assert place.limit(DEADLINE, {"data": 600.0}) == 600
        place.enter("step", 1)
        assert place.limit(DEADLINE, {}) == limit
    assert (place.section, place.step, place.entered) == ("step", 1, 9)


def test_bytes_written_are_progress_but_of_a_step(clock):
    place = Place()
    place.enter("save", 3)
    clock[0] = 5.0
    place.look(MOVED)
    place.look(2 * MOVED)  # what the threads that look read themselves adds up
    assert place.since == 0
    place.look(3 * MOVED + 1)
    assert place.since == 5
    clock[0] = 9.0
    place.look(3 * MOVED + 2)
    place.forgive(1.0)
    assert place.since == 6
    place.enter("step", 4)
    clock[0] = 20.0
    place.look(10 * MOVED)
    assert place.since == 9


def test_what_a_process_of_its_own_reads_for_this_one_is_progress():
    """As a loader that has one, while the training thread waits for its answer."""
    code = "import sys; open('/dev/zero', 'rb').read(1 << 20); print('read', flush=True); sys.stdin.read()"
    before = moved_bytes()
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as reader:
        assert reader.stdout.readline() == b"read\n"
        assert moved_bytes() - before > 1 << 20
        reader.stdin.close()


class ThreadRank:
    """A rank that is a thread, with the collectives that a heartbeat needs."""

    def __init__(self, rank: int, world: int, values: dict, barrier: threading.Barrier) -> None:
        self.rank, self.world, self.is_main = rank, world, rank == 0
        self._values, self._barrier = values, barrier

    def gather(self, value):
        self._values[self.rank] = value
        self._barrier.wait(SECONDS)
        values = [self._values[rank] for rank in range(self.world)]
        self._barrier.wait(SECONDS)
        return values

    def broadcast(self, value):
        return self.gather(value)[0]


class Crew:
    """Heartbeats of so many ranks, begun together; `ended`: code and last words of those that end their process."""

    def __init__(self, world: int, deadline: float) -> None:
        values, barrier, self.ended, self.lock = {}, threading.Barrier(world), {}, threading.Lock()
        self.beats = [
            Heartbeat(ThreadRank(rank, world, values, barrier), deadline, place=Place(), end=self.end(rank))
            for rank in range(world)
        ]
        with ThreadPoolExecutor(world) as threads:
            list(threads.map(Heartbeat.__enter__, self.beats))

    def end(self, rank: int) -> Callable:
        def end(code: int, speak: Callable[[], None]) -> None:
            with self.lock, redirect_stderr(io.StringIO()) as words:
                speak()
            self.ended[rank] = code, words.getvalue()

        return end

    def leave(self) -> None:
        for beat in self.beats:
            beat.__exit__(None, None, None)


@pytest.fixture
def killed(monkeypatch) -> list[int]:
    """Process numbers that would have been killed; here all ranks have the same."""
    numbers = []
    monkeypatch.setattr(heartbeat, "kill", lambda process: numbers.append(process.pid))
    return numbers


@pytest.fixture
def crew(monkeypatch, killed) -> Iterator[Callable[..., Crew]]:
    """Makes crews that beat fast."""
    made = []
    monkeypatch.setattr(heartbeat, "BEAT", 0.05)
    monkeypatch.setattr(heartbeat, "LOOK", 0.02)
    monkeypatch.setattr(heartbeat, "OTHERS_END", 0.2)
    monkeypatch.setattr(heartbeat, "SETTLE", 0.2)

    def make(world: int, deadline: float = 1000.0) -> Crew:
        made.append(Crew(world, deadline))
        return made[-1]

    yield make
    for one in made:
        one.leave()


def silence(beat: Heartbeat) -> None:
    """As if its process were stopped: it says nothing and hears nothing, and its connections stay."""
    beat._beat = lambda now: None
    beat._listen = lambda link: time.sleep(0.05)


def test_ranks_that_leave_one_by_one_are_not_missed(crew):
    three = crew(3)
    for beat in three.beats[::-1]:
        time.sleep(0.2)
        beat.__exit__(None, None, None)
    assert three.ended == {}


@pytest.mark.parametrize("dead", [0, 2])
def test_a_death_is_noticed_at_once_and_named_by_all(crew, dead):
    three = crew(3)
    beat = three.beats[dead]
    beat._leaving.set()  # without a word
    beat._thread.join()
    beat._close()
    until(lambda: len(three.ended) == 2)
    assert dead not in three.ended
    for code, words in three.ended.values():
        assert code == RANK_LOST
        assert f"error: rank {dead} has ended without a word" in words
        assert "Thread 0x" in words and "test_heartbeat.py" in words


@pytest.mark.parametrize("frozen", [0, 1])
def test_a_frozen_rank_is_named_by_all_others_and_killed(crew, killed, frozen):
    three = crew(3, deadline=3.0)
    silence(three.beats[frozen])
    until(lambda: len(three.ended) == 2)
    assert frozen not in three.ended
    assert all(code == RANK_LOST and f"rank {frozen} has not answered" in words for code, words in three.ended.values())
    assert killed and set(killed) == {os.getpid()}


def test_a_stuck_rank_is_named_by_all_and_shows_its_own_stacks(crew, killed):
    two = crew(2)
    two.beats[0]._place.enter("save", 4)
    two.beats[1]._place.limit = lambda *_: 0.1
    until(lambda: len(two.ended) == 2)
    assert all("rank 1 has got no further" in words and "in step 0, start" in words for _, words in two.ended.values())
    assert killed == []


def test_a_rank_that_stops_at_once_takes_the_others_along(crew):
    three = crew(3)
    three.beats[1].leave(STOPPED)
    until(lambda: len(three.ended) == 2)
    assert {code for code, _ in three.ended.values()} == {STOPPED}
    assert "rank 1 has ended with exit code 75" in three.ended[2][1]


def test_a_rank_that_fails_takes_the_others_along_with_its_code(crew):
    three = crew(3)
    error = UserError("the disk is full")
    three.beats[2].__exit__(UserError, error, None)
    until(lambda: len(three.ended) == 2)
    assert {code for code, _ in three.ended.values()} == {UserError.exit_code}


def test_all_ranks_may_fail_by_themselves(crew):
    two = crew(2)
    with ThreadPoolExecutor(2) as threads:
        list(threads.map(lambda beat: beat.__exit__(UserError, UserError("the same for all"), None), two.beats))
    assert two.ended == {}


def test_an_error_of_a_collective_waits_for_what_has_caused_it(crew):
    """torch's message does not say which rank; the heartbeat does, and ends the process before the traceback."""
    two = crew(2)
    two.beats[1]._leaving.set()
    two.beats[1]._thread.join()
    threading.Timer(0.05, two.beats[1]._links[0].connection.close).start()
    two.beats[0].__exit__(RuntimeError, RuntimeError("Connection closed by peer"), None)
    assert two.ended[0][0] == RANK_LOST


def test_a_strangers_connection_is_none_of_the_ranks():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        place = listener.getsockname()
        for text in (b"GET / HTTP/1.1\r\n\r\n", b"guess 1\n", b"token\n", b"token x\n", b"1" * 70000, b""):
            with socket.create_connection(place) as stranger:
                stranger.sendall(text)
                stranger.shutdown(socket.SHUT_WR)
                assert heartbeat._accept(listener, "token") is None
        with socket.create_connection(place) as rank:
            rank.sendall(b"token 3\n")
            link = heartbeat._accept(listener, "token")
            assert link.rank == 3 and link.is_open
            link.connection.close()


def test_a_rank_alone_has_no_heartbeat():
    alone = ThreadRank(0, 1, {}, threading.Barrier(1))
    with Heartbeat(alone, DEADLINE):
        assert "heartbeat" not in {thread.name for thread in threading.enumerate()}


def test_a_frozen_process_can_be_killed_and_only_the_one_that_was_meant():
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    process = find(child.pid)
    os.kill(child.pid, signal.SIGSTOP)
    kill(process._replace(start=process.start - 1))
    assert child.poll() is None
    kill(process)
    assert child.wait(SECONDS) == -signal.SIGKILL
    kill(process)


def test_a_process_that_ends_just_before_it_is_killed_is_no_error(monkeypatch):
    child = subprocess.Popen([sys.executable, "-c", "pass"])
    process = find(child.pid)
    child.wait(SECONDS)
    monkeypatch.setattr(Process, "is_alive", lambda process: True)
    kill(process)


def test_a_process_ends_with_its_code_also_where_its_last_words_fail(monkeypatch):
    codes: list[int] = []
    monkeypatch.setattr(os, "_exit", codes.append)

    def speak() -> None:
        raise OSError("no one reads")

    with pytest.raises(OSError, match="no one reads"):
        end_process(RANK_LOST, speak)
    assert codes == [RANK_LOST]


def test_stacks_show_every_thread():
    done = threading.Event()

    def a_function_that_waits() -> None:
        done.wait(SECONDS)

    thread = threading.Thread(target=a_function_that_waits)
    thread.start()
    text = stacks()
    done.set()
    thread.join()
    assert "a_function_that_waits" in text and "test_stacks_show_every_thread" in text
