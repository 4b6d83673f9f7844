"""Sessions of a GPU's decoder: kept by kind, used by one caller at a time, given up where they hang."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import CancelledError, ThreadPoolExecutor

import pytest

from bevt_ds.data.decoding.sessions import GpuRefusal, Sessions, StreamKind
from tests.loader.media import in_threads

PATIENCE, SOON = 60.0, 0.05  # seconds
KINDS = [StreamKind("h264", 16 * n, 16) for n in range(1, 5)]


class Stub:
    """A session of which only its life matters."""

    def __init__(self, closed: list[StreamKind], kind: StreamKind) -> None:
        self.close = lambda: closed.append(kind)


Kept = tuple[Sessions, list[StreamKind], list[StreamKind]]


@pytest.fixture
def kept() -> Iterator[Kept]:
    """Two sessions at most; kinds that were opened, and closed, in order."""
    opened: list[StreamKind] = []
    closed: list[StreamKind] = []
    sessions = Sessions(lambda kind: opened.append(kind) or Stub(closed, kind), 2, PATIENCE)
    yield sessions, opened, closed
    sessions.close()


def use(session: Stub) -> None:
    """Of a session nothing is asked."""


def test_sessions_are_used_again_by_kind_and_the_longest_resting_gives_way(kept: Kept) -> None:
    sessions, opened, closed = kept
    for kind in (KINDS[0], KINDS[1], KINDS[0], KINDS[2]):
        sessions.run(kind, use)
    assert opened == KINDS[:3] and closed == [KINDS[1]] and sessions.opened == 3
    both = threading.Barrier(2)
    in_threads(lambda i: sessions.run(KINDS[0], lambda session: both.wait(PATIENCE)), range(2))
    assert opened == [*KINDS[:3], KINDS[0]] and closed == [KINDS[1], KINDS[2]]
    sessions.close()
    assert len(closed) == 4


def test_callers_wait_for_sessions_and_all_get_one(kept: Kept) -> None:
    sessions, opened, closed = kept

    def some(number: int) -> None:
        for i in range(20):
            left = sessions.run(KINDS[(number + i) % 4], lambda session: len(opened) - len(closed))
            assert left <= 2

    in_threads(some, range(6))
    sessions.close()
    assert sorted(opened) == sorted(closed)


def test_session_that_cannot_be_opened_takes_no_ones_place() -> None:
    def fail(kind: StreamKind) -> Stub:
        raise GpuRefusal("no memory")

    sessions = Sessions(fail, 1, PATIENCE)
    for _ in range(3):
        with pytest.raises(GpuRefusal, match="no memory"):
            sessions.run(KINDS[0], use)


def test_session_whose_work_fails_is_closed(kept: Kept) -> None:
    sessions, opened, closed = kept

    def fail(session: Stub) -> None:
        raise GpuRefusal("broken")

    with pytest.raises(GpuRefusal, match="broken"):
        sessions.run(KINDS[0], fail)
    assert opened == closed == [KINDS[0]]
    sessions.run(KINDS[0], use)
    assert len(opened) == 2


class Hanging:
    """Sessions that hang while `released` is not set, and the threads that they have."""

    def __init__(self, most: int, seconds: float) -> None:
        self.released, self.closed, self.before = threading.Event(), [], set(threading.enumerate())
        self.sessions = Sessions(lambda kind: Stub(self.closed, kind), most, seconds)

    def hang(self, session: Stub) -> None:
        assert self.released.wait(PATIENCE)

    def threads(self) -> list[threading.Thread]:
        return [thread for thread in threading.enumerate() if thread not in self.before]

    def require_no_threads(self) -> None:
        """Behind what they are at."""
        for thread in self.threads():
            thread.join(PATIENCE)
        assert not self.threads()


def test_session_that_hangs_is_given_up_and_the_next_clip_gets_another() -> None:
    hanging = Hanging(2, SOON)
    with pytest.raises(GpuRefusal, match="not answered within 0.05 s") as refusal:
        hanging.sessions.run(KINDS[0], hanging.hang)
    (stuck,) = hanging.threads()
    hanging.sessions._seconds = PATIENCE
    hanging.sessions.run(KINDS[0], use)
    assert refusal.value.is_fault and len(hanging.threads()) == 2 and not hanging.closed
    hanging.released.set()
    stuck.join(PATIENCE)
    assert hanging.closed == [KINDS[0]], "it is closed once its call comes back"
    hanging.sessions.close()
    hanging.require_no_threads()


def test_opening_that_hangs_is_given_up_and_closed_behind_it() -> None:
    hanging = Hanging(1, SOON)
    hanging.sessions = Sessions(lambda kind: hanging.hang(None) or Stub(hanging.closed, kind), 1, SOON)
    with pytest.raises(GpuRefusal, match="not answered within 0.05 s"):
        hanging.sessions.run(KINDS[0], use)
    hanging.released.set()
    hanging.require_no_threads()
    assert hanging.closed == [KINDS[0]]


def test_where_all_sessions_hang_clips_are_refused_at_once_until_one_comes_back() -> None:
    hanging = Hanging(2, SOON)
    with ThreadPoolExecutor(4) as executor:  # two of them wait for a session
        calls = [executor.submit(hanging.sessions.run, kind, hanging.hang) for kind in KINDS]
        reasons = sorted(str(call.exception(PATIENCE)) for call in calls)
    assert [reason.split()[0] for reason in reasons] == ["it", "it", "none", "none"]
    hanging.sessions._seconds = PATIENCE
    with pytest.raises(GpuRefusal, match="none of its 2 sessions has answered"):
        hanging.sessions.run(KINDS[0], use)
    assert len(hanging.threads()) == 2
    hanging.released.set()
    hanging.require_no_threads()
    hanging.sessions.run(KINDS[0], use)
    assert len(hanging.closed) == 2
    hanging.sessions.close()


def test_closing_ends_the_waiting_for_a_call_that_hangs() -> None:
    hanging, entered = Hanging(1, PATIENCE), threading.Event()

    def enter(session: Stub) -> None:
        entered.set()
        hanging.hang(session)

    with ThreadPoolExecutor(2) as executor:
        first = executor.submit(hanging.sessions.run, KINDS[0], enter)
        assert entered.wait(PATIENCE)
        second = executor.submit(hanging.sessions.run, KINDS[0], use)
        hanging.sessions.close()
        for call in (first, second):
            assert isinstance(call.exception(PATIENCE), CancelledError)
    hanging.released.set()
    hanging.require_no_threads()
    assert hanging.closed == [KINDS[0]]
