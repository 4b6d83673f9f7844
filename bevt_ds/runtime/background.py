"""Commits in the background: training waits for a copy in the memory of the host, not for the disk."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import nullcontext, suppress
from types import TracebackType

from bevt_ds.disk import DiskError
from bevt_ds.errors import UserError
from bevt_ds.runtime.distributed import Ranks


class Commits:
    """The commits of a run, one at a time. Leaving its block waits for the last one.

    They agree over a process group of their own, next to the training's collectives. What goes wrong is raised in the
    training's thread, on all ranks after the same step.
    """

    def __init__(self, ranks: Ranks) -> None:
        self._ranks, self._apart = ranks, ranks.apart()
        self._running: Future[None] | None = None
        self._figures: dict[str, float] = {}
        self._began = self._stall = 0.0

    def begin(self) -> None:
        """Turn to a commit: from here to `start`, training waits. Collective.

        Raises:
            DiskError: the commit before could not be written.
        """
        self._began = time.perf_counter()
        self.wait()

    def start(self, work: Callable[[Ranks], object]) -> None:
        """Go on with a commit in the background. Collective; after `begin`."""
        self._running = future = Future()
        self._stall = time.perf_counter() - self._began
        threading.Thread(target=self._do, args=(work, future, self._began), name="commit", daemon=True).start()

    def _do(self, work: Callable[[Ranks], object], future: Future[None], began: float) -> None:
        try:
            work(self._apart)
        except BaseException as error:  # raised again in the training's thread
            future.set_exception(error)
        else:
            self._figures = {"commit_seconds": time.perf_counter() - began, "commit_stall": self._stall}
            future.set_result(None)

    def poll(self) -> None:
        """See what has become of the commit that is under way, if there is one. After every step. Collective.

        Raises:
            DiskError: it could not be written.
        """
        if self._running and self._ranks.all_hold(self._running.done()):
            self.wait()

    def wait(self) -> None:
        """Wait for the end of the commit that is under way, if there is one. Collective. DiskError: see `poll`."""
        running, self._running = self._running, None
        if running:
            running.result()

    def figures(self) -> dict[str, float]:
        """Of the last commit, once: seconds that it took, and that training waited for it."""
        figures, self._figures = self._figures, {}
        return figures

    def __enter__(self) -> Commits:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        with suppress(DiskError) if isinstance(error, UserError) else nullcontext():  # the first cause is said
            self.wait()
