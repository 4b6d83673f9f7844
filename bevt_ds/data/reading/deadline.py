"""Calls that may never return: a file server that does not answer holds whoever asked it, for ever."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import CancelledError, Future, InvalidStateError
from contextlib import suppress
from typing import Any, NamedTuple, TypeVar

from bevt_ds import exit_codes
from bevt_ds.errors import UserError

WARN_AFTER = 30.0  # seconds
LOOK_EVERY = 1.0  # seconds, while a call does not ask storage for anything
CLOSING_SECONDS = 1.0  # for a read under way, when its executor is closed

T = TypeVar("T")
log = logging.getLogger(__name__)
_thread = threading.local()  # .call: what a thread of some DeadlineExecutor is working on


class StorageStalled(UserError):
    """Storage has not answered for longer than it may take."""

    exit_code = exit_codes.STORAGE_STALLED


class Deadline(NamedTuple):
    """How long storage may take to answer, and the setting that says so."""

    seconds: float
    setting: str = "data.read_seconds"


class _Waiting(NamedTuple):
    """What a call has asked storage for last. `since`: None while it asks for nothing."""

    place: object = ""  # its text is for the warning and the error
    deadline: Deadline = Deadline(0.0)
    since: float | None = None


def heartbeat(place: object) -> None:
    """Called by work that may take long, each time it asks storage for something: the waiting starts again.

    place: what is asked for, for the warning and the error. Outside a DeadlineExecutor this does nothing.
    CancelledError: no one waits for this work any more.
    """
    if (call := getattr(_thread, "call", None)) is not None:
        if call.cancelled():
            raise CancelledError
        call.waiting = call.waiting._replace(place=place, since=time.monotonic())


class Call(Future):
    """Work under way in a thread of a DeadlineExecutor. It is never marked as running, so that it can be cancelled."""

    def __init__(self, executor: DeadlineExecutor, work: Callable, arguments: tuple) -> None:
        super().__init__()
        self.executor, self.work, self.arguments, self.waiting = executor, work, arguments, _Waiting()

    def result(self, timeout: None = None) -> Any:
        """What the work returns or raises. StorageStalled: storage has not answered it in time."""
        warned = False
        while not self.done():
            place, (seconds, setting), since = self.waiting
            pause = LOOK_EVERY
            if since is not None:
                warn_after = min(WARN_AFTER, seconds / 2)
                pause = since + (seconds if warned else warn_after) - time.monotonic()
                if pause <= 0 and warned:
                    self.executor.give_up(self)
                    waited = f"{setting}={seconds:g} s"
                    raise StorageStalled(f"{place}: no answer for {waited}. Check the disk or the file server.")
                if pause <= 0:
                    log.warning("%s: no answer for %.3g s; the run stops after %g s", place, warn_after, seconds)
                    warned = True
                    continue
            with suppress(TimeoutError):
                self.exception(pause)  # which, if there is one, it returns
        return super().result()


class DeadlineExecutor:
    """Runs calls in threads of its own, so that whoever waits for one can stop waiting.

    A thread that is stuck cannot be interrupted: it is left behind, and does not keep the process from ending. Another
    takes its place. threads: the most at a time.
    """

    def __init__(self, threads: int, name: str = "read") -> None:
        self.threads, self._name, self._closed = threads, name, False
        self._calls: queue.SimpleQueue[Call | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._unfinished = 0  # calls that wait for a thread, or have one that is not stuck
        self._threads: dict[threading.Thread, Call | None] = {}

    def submit(self, work: Callable[..., T], *arguments: Any) -> Future[T]:
        """Start on `work(*arguments)`. The future's `result` raises StorageStalled where storage does not answer.

        CancelledError, from here or from the future: `close` was called.
        """
        call = Call(self, work, arguments)
        with self._lock:
            if self._closed:
                raise CancelledError
            self._calls.put(call)
            self._unfinished += 1
            if len(self._threads) < min(self._unfinished, self.threads):
                thread = threading.Thread(target=self._serve, name=self._name, daemon=True)
                self._threads[thread] = None
                thread.start()
        return call

    def call(self, work: Callable[..., T], *arguments: Any, place: object, deadline: Deadline) -> T:
        """What `work(*arguments)` returns or raises, which asks storage for `place`, until it says otherwise.

        From a thread of an executor the work is done right there: whoever waits for that thread keeps the deadline.
        StorageStalled, CancelledError: as `submit`.
        """
        if (own := getattr(_thread, "call", None)) is None:
            return self.submit(lambda: self.call(work, *arguments, place=place, deadline=deadline)).result()
        if own.cancelled():
            raise CancelledError
        own.waiting = _Waiting(place, deadline, time.monotonic())
        try:
            return work(*arguments)
        finally:
            own.waiting = _Waiting()

    def give_up(self, call: Call) -> None:
        """Wait no longer for a call that is stuck; its thread counts no more."""
        call.cancel()
        with self._lock:
            for thread in [thread for thread, its in self._threads.items() if its is call]:
                del self._threads[thread]
                self._unfinished -= 1

    def close(self) -> None:
        """End the waiting of every caller, and the threads that are not stuck."""
        with self._lock:
            self._closed = True
            threads = tuple(self._threads)
        with suppress(queue.Empty):
            while (call := self._calls.get_nowait()) is not None:
                call.cancel()
        for thread in threads:
            self._calls.put(None)
            if (call := self._threads.get(thread)) is not None:
                call.cancel()
        until = time.monotonic() + CLOSING_SECONDS
        for thread in threads:
            while thread.is_alive() and (not self._is_stuck(thread) or time.monotonic() < until):
                thread.join(0.01)

    def _is_stuck(self, thread: threading.Thread) -> bool:
        call = self._threads.get(thread)
        return call is not None and call.waiting.since is not None

    def _serve(self) -> None:
        thread = threading.current_thread()
        while (call := self._calls.get()) is not None:
            _thread.call = self._threads[thread] = call
            work, arguments = call.work, call.arguments
            del call.work, call.arguments  # which may refer to whoever holds the call: a cycle keeps memory for long
            try:
                settle, outcome = call.set_result, work(*arguments)
            except BaseException as error:  # raised again by the caller
                settle, outcome = call.set_exception, error
            with self._lock:  # before the caller has the result: its next call finds this thread free
                if thread not in self._threads:  # given up: another has taken its place
                    return
                self._threads[thread] = None
                self._unfinished -= 1
            with suppress(InvalidStateError):  # cancelled meanwhile
                settle(outcome)
            del call, work, arguments, settle, outcome, _thread.call  # a sample's bytes are not kept until the next one
