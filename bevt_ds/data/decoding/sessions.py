"""Sessions of a GPU's decoder that are kept, each with a thread of its own, so that whoever waits can stop waiting.

A decoder that hangs in its driver cannot be interrupted. Its session is given up: the thread is left behind, does
not keep the process from ending, and closes the session if the call comes back after all. Until then the session
keeps its place, so that there are never more than `most`.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import CancelledError, Future, InvalidStateError
from contextlib import AbstractContextManager, suppress
from functools import partial
from typing import NamedTuple, Protocol, TypeVar

from torch import Tensor

CLOSING_SECONDS = 1.0  # for what is under way when all is closed

T = TypeVar("T")


class GpuRefusal(Exception):
    """A clip that a worker must decode. is_fault: the decoder failed; else such files are not given to it."""

    def __init__(self, reason: str, is_fault: bool = True) -> None:
        super().__init__(reason)
        self.is_fault = is_fault


class StreamKind(NamedTuple):
    """What a session can go on with without being made again."""

    codec: str  # by FFmpeg's name
    width: int
    height: int


Frames = Iterable[tuple[int, Tensor]]  # number, and uint8 (H+H/2,W), valid until the session is asked again


class Session(Protocol):
    """A decoder of one kind of stream. Raises GpuRefusal where it cannot go on; it is closed then."""

    def decode(self, packet: memoryview, number: int) -> Frames:
        """Take a packet whose frame has that number; the frames that are ready."""

    def flush(self) -> Frames:
        """The frames that are left. The next packet begins another stretch: parameter sets, then a keyframe."""

    def context(self) -> AbstractContextManager:
        """What the thread that uses its frames enters, such as a CUDA stream; at its end all has been done."""

    def close(self) -> None: ...


class Sessions:
    """At most `most` sessions, each for one caller at a time; others wait. Those that rest are kept for their kind.

    seconds: how long one may take for what it is asked. Once all is closed, callers get CancelledError.
    """

    def __init__(self, open_session: Callable[[StreamKind], Session], most: int, seconds: float) -> None:
        self._open, self._most, self._seconds = open_session, most, seconds
        self._changed, self._is_closed = threading.Condition(), False
        self._idle: list[tuple[StreamKind, _Thread]] = []  # the one that has rested longest comes first
        self._all: set[_Thread] = set()  # those that are given up too
        self.opened = 0  # since the start

    def run(self, kind: StreamKind, work: Callable[[Session], T]) -> T:
        """What `work` returns of a session of that kind, called in its thread. Where it raises, the session is closed.

        GpuRefusal: also where that takes too long, and where all sessions have been given up for that.
        """
        thread = self._taken(kind)
        try:
            result = thread.run(work, self._seconds)
        except BaseException:
            self._drop(thread)
            raise
        with self._changed:
            is_kept = not self._is_closed
            if is_kept:
                self._idle.append((kind, thread))
                self._changed.notify_all()
        if not is_kept:
            self._drop(thread)
        return result

    def close(self) -> None:
        """Close all that rest, and the others as soon as they can be; no one waits for what these are doing."""
        with self._changed:
            self._idle, self._is_closed, threads = [], True, tuple(self._all)
            self._changed.notify_all()
        for thread in threads:
            thread.cancel()
        for thread in threads:
            thread.close(CLOSING_SECONDS)

    def _taken(self, kind: StreamKind) -> _Thread:
        with self._changed:
            while (thread := self._resting(kind)) is None and not self._idle and len(self._all) >= self._most:
                if self._is_closed:
                    raise CancelledError
                if all(each.is_stuck for each in self._all):
                    raise GpuRefusal(f"none of its {self._most} sessions has answered within {self._seconds:g} s")
                self._changed.wait()
            if self._is_closed:
                raise CancelledError
            if thread is not None:
                return thread
            old = self._idle.pop(0)[1] if len(self._all) >= self._most else None
            thread = _Thread(partial(self._open, kind), self._forget)
            self._all.add(thread)
            self.opened += 1
        if old is not None:  # before the new one opens a session, which it does when it is first asked
            old.close(self._seconds)
        return thread

    def _resting(self, kind: StreamKind) -> _Thread | None:
        at = next((i for i, (of, _) in enumerate(self._idle) if of == kind), None)
        return None if at is None else self._idle.pop(at)[1]

    def _drop(self, thread: _Thread) -> None:
        thread.close(0.0 if thread.is_stuck else self._seconds)
        with self._changed:  # those that wait look whether any is left
            self._changed.notify_all()

    def _forget(self, thread: _Thread) -> None:
        with self._changed:
            self._all.discard(thread)
            self._changed.notify_all()


class _Thread:
    """A session and the thread that opens, uses and closes it. ended: called in it at its end."""

    def __init__(self, open_session: Callable[[], Session], ended: Callable[[_Thread], None]) -> None:
        self._open, self._ended, self.is_stuck = open_session, ended, False
        self._calls: queue.SimpleQueue[tuple[Callable, Future] | None] = queue.SimpleQueue()
        self._call: Future = Future()  # the latest
        self._thread = threading.Thread(target=self._serve, name="decode session", daemon=True)
        self._thread.start()

    def run(self, work: Callable[[Session], T], seconds: float) -> T:
        """What work(session) returns or raises. GpuRefusal: not within `seconds`. CancelledError: by `cancel`."""
        self._call = call = Future()
        self._calls.put((work, call))
        with suppress(TimeoutError, CancelledError):  # which `concurrent.futures.wait` would not hear of
            call.exception(seconds)
        is_late = not call.done() and call.cancel()
        self.is_stuck = call.cancelled()
        if is_late:
            raise GpuRefusal(f"it has not answered within {seconds:g} s")
        return call.result()

    def cancel(self) -> None:
        """Whoever waits for it waits no longer."""
        self._call.cancel()

    def close(self, seconds: float) -> None:
        """Close the session behind what it is doing, and wait so long for that."""
        self._calls.put(None)
        self._thread.join(seconds)

    def _serve(self) -> None:
        session: Session | None = None
        try:
            while (asked := self._calls.get()) is not None:
                work, call = asked
                try:
                    session = session or self._open()
                    settle, outcome = call.set_result, work(session)
                except BaseException as error:  # raised again by the caller
                    settle, outcome = call.set_exception, error
                with suppress(InvalidStateError):  # cancelled meanwhile
                    settle(outcome)
                del asked, work, call, settle, outcome  # frames are not kept until the next call
        finally:
            if session is not None:
                session.close()
            self._ended(self)
