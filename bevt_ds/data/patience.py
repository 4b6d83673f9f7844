"""Calls that may never return: a file server that does not answer holds whoever asked it, for ever."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable
from concurrent.futures import CancelledError, Future, InvalidStateError
from contextlib import suppress
from typing import Any, TypeVar

from bevt_ds.errors import UserError

WARN_AFTER = 30.0  # seconds

T = TypeVar("T")
log = logging.getLogger(__name__)


class StorageStalled(UserError):
    """Storage has not answered for longer than it may take."""

    exit_code = 5


class Patience:
    """Makes calls in threads of its own, so that the caller can stop waiting.

    A thread that is stuck cannot be interrupted: it is left behind, and does not keep the process from ending. The next
    call gets another. seconds: how long a call may take.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds, self._closed, self._threads = seconds, False, 0
        self._calls: queue.SimpleQueue[tuple[Future, Callable[[], Any]] | None] = queue.SimpleQueue()
        self._idle = threading.Semaphore(0)
        self._awaited: set[Future] = set()

    def call(self, work: Callable[[], T], place: str) -> T:
        """What `work` returns or raises.

        place: what it reads, for the warning after 30 s and for the error. StorageStalled: it takes too long.
        CancelledError: `close` was called.
        """
        future: Future[T] = Future()
        self._awaited.add(future)
        try:
            if self._closed:
                raise CancelledError
            if not self._idle.acquire(blocking=False):
                self._threads += 1
                threading.Thread(target=self._serve, name="read", daemon=True).start()
            self._calls.put((future, work))
            return self._result(future, place)
        finally:
            self._awaited.discard(future)

    def close(self) -> None:
        """End the waiting of every caller, and the threads that are not stuck."""
        self._closed = True
        for _ in range(self._threads):
            self._calls.put(None)
        for future in tuple(self._awaited):
            future.cancel()

    def _result(self, future: Future[T], place: str) -> T:
        warn_after = min(WARN_AFTER, self._seconds / 2)
        if not _ends_within(warn_after, future):
            log.warning("%s: no answer for %.3g s; the run stops after %g s", place, warn_after, self._seconds)
            if not _ends_within(self._seconds - warn_after, future):
                raise StorageStalled(
                    f"{place}: no answer for data.read_seconds={self._seconds:g} s. Is that disk or file server well?"
                )
        return future.result()

    def _serve(self) -> None:
        while (job := self._calls.get()) is not None:
            _complete(*job)
            del job  # a sample's bytes are not kept until the next one comes
            self._idle.release()


def _complete(future: Future[T], work: Callable[[], T]) -> None:
    with suppress(InvalidStateError):  # cancelled meanwhile
        try:
            future.set_result(work())
        except Exception as error:  # raised again by the caller
            future.set_exception(error)


def _ends_within(seconds: float, future: Future) -> bool:
    try:
        future.exception(seconds)  # which, if there is one, it returns
    except TimeoutError:
        return False
    return True
