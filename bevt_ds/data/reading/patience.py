"""Calls that may never return: a file server that does not answer holds whoever asked it, for ever."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import CancelledError, Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, TypeVar

from bevt_ds.errors import UserError

WARN_AFTER = 30.0  # seconds

T = TypeVar("T")
log = logging.getLogger(__name__)
_thread = threading.local()  # .call: what a thread of some Patience is working on


class StorageStalled(UserError):
    """Storage has not answered for longer than it may take."""

    exit_code = 5


def asking(place: str) -> None:
    """Said by work that may take long, each time it asks storage for something: the waiting begins anew.

    place: what is asked for, for the warning and the error. Where no Patience is concerned this does nothing.
    CancelledError: nobody waits for this work any more.
    """
    if (call := getattr(_thread, "call", None)) is None:
        return
    if call.future.cancelled():
        raise CancelledError
    call.place, call.since = place, time.monotonic()


@dataclass(eq=False)
class _Call:
    """Work under way: what it has asked for last, and when."""

    work: Callable[[], Any]
    place: str
    since: float = field(default_factory=time.monotonic)
    future: Future = field(default_factory=Future)

    def answered_within(self, seconds: float) -> bool:
        """Wait for the work to end. False: it has asked for one thing for that long."""
        while (left := self.since + seconds - time.monotonic()) > 0:
            with suppress(TimeoutError):
                self.future.exception(left)  # which, if there is one, it returns
                return True
        return self.future.done()


class Patience:
    """Makes calls in threads of its own, so that the caller can stop waiting.

    A thread that is stuck cannot be interrupted: it is left behind, and does not keep the process from ending. The next
    call gets another. seconds: how long storage may take to answer. setting: where that number comes from.
    """

    def __init__(self, seconds: float, setting: str = "data.read_seconds") -> None:
        self._seconds, self._setting, self._closed, self._threads = seconds, setting, False, 0
        self._calls: queue.SimpleQueue[_Call | None] = queue.SimpleQueue()
        self._idle = threading.Semaphore(0)
        self._awaited: set[_Call] = set()

    def call(self, work: Callable[[], T], place: str) -> T:
        """What `work` returns or raises.

        place: what it asks for, until it says otherwise by `asking`; for the warning after 30 s and for the error.
        StorageStalled: that takes too long. CancelledError: `close` was called.
        """
        call = _Call(work, place)
        self._awaited.add(call)
        try:
            if self._closed:
                raise CancelledError
            if not self._idle.acquire(blocking=False):
                self._threads += 1
                threading.Thread(target=self._serve, name="read", daemon=True).start()
            self._calls.put(call)
            return self._result(call)
        finally:
            self._awaited.discard(call)

    def close(self) -> None:
        """End the waiting of every caller, and the threads that are not stuck."""
        self._closed = True
        for _ in range(self._threads):
            self._calls.put(None)
        for call in tuple(self._awaited):
            call.future.cancel()

    def _result(self, call: _Call) -> Any:
        warn_after = min(WARN_AFTER, self._seconds / 2)
        if not call.answered_within(warn_after):
            log.warning("%s: no answer for %.3g s; the run stops after %g s", call.place, warn_after, self._seconds)
            if not call.answered_within(self._seconds):
                call.future.cancel()
                waited = f"{self._setting}={self._seconds:g} s"
                raise StorageStalled(f"{call.place}: no answer for {waited}. Is that disk or file server well?")
        return call.future.result()

    def _serve(self) -> None:
        while (call := self._calls.get()) is not None:
            _thread.call = call
            _complete(call)
            del call, _thread.call  # a sample's bytes are not kept until the next one comes
            self._idle.release()


def _complete(call: _Call) -> None:
    with suppress(InvalidStateError):  # cancelled meanwhile
        try:
            call.future.set_result(call.work())
        except Exception as error:  # raised again by the caller
            call.future.set_exception(error)
