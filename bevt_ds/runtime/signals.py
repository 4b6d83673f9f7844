"""What asks a run to stop: a signal, or the end of the launcher that started it.

The first request is granted at the end of the step, on all ranks together, with a commit; the second, and any before
the first step and after the last, at once. Python runs a signal's handler only when the main thread is back from C
code, which may be a collective that never returns. So a thread hears of signals by a pipe instead.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Literal

from bevt_ds.exit_codes import STOPPED
from bevt_ds.launcher import Process, launchers, signals_twice
from bevt_ds.runtime.distributed import Ranks

CAUGHT = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
LOOK_EVERY = 1.0  # seconds, for launchers
ECHO = 2.0  # seconds in which a launcher may pass on the signal that has come already
LAST_WORDS = 3.0  # seconds; whoever reads what a run prints may have stopped reading


class Stopped(Exception):
    """A run stops because it was asked to. The message says by what."""


def end_process(code: int, speak: Callable[[], None]) -> None:
    """End this process at once, from any thread, after its last words, with that code also where these fail."""
    backstop = threading.Timer(LAST_WORDS, os._exit, (code,))
    backstop.daemon = True
    backstop.start()
    try:
        speak()
    finally:
        os._exit(code)


class StopRequest:
    """Listens from `with` to its end. `agreed`: whether any rank has been asked to stop.

    Args:
        grace: seconds from the request to the end, if the commit is not done by then; 0: as long as it takes.
        watched: processes whose end is a request.
        echo: seconds in which a second signal is taken for the first one, passed on by a launcher.
        kept: what is said of the run's results when the process ends at once.
        end: ends the process with a code, after a function that says why.
    """

    def __init__(
        self,
        grace: float = 0.0,
        watched: Sequence[Process] | None = None,
        echo: float | None = None,
        end: Callable[[int, Callable[[], None]], None] = end_process,
        kept: str = "the commits are whole: resume=auto continues",
    ) -> None:
        self.reason = ""  # what asked first; empty: nothing has
        self.before_end: Callable[[], None] = lambda: None  # called before the process ends at once
        self._grace, self._end, self._kept = grace, end, kept
        self._watched = launchers() if watched is None else watched
        self._echo = echo if echo is not None else ECHO * signals_twice()
        self._since = 0.0
        self._phase: Literal["starting", "training", "stopped", "ending"] = "starting"
        self._closing = False
        self._handlers: dict[signal.Signals, object] = {}

    def __enter__(self) -> StopRequest:
        self._outlet, self._inlet = socket.socketpair()
        self._inlet.setblocking(False)
        if threading.current_thread() is threading.main_thread():  # others cannot; a library's user has handlers
            self._wakeup = signal.set_wakeup_fd(self._inlet.fileno(), warn_on_full_buffer=False)
            for number in CAUGHT:
                if number == signal.SIGHUP and signal.getsignal(number) is signal.SIG_IGN:
                    continue  # nohup
                self._handlers[number] = signal.signal(number, lambda *_: None)
                signal.siginterrupt(number, False)  # libraries do not all try again what a signal interrupts
        self._thread = threading.Thread(target=self._listen, name="stop-request", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._closing = True
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        if self._handlers:
            signal.set_wakeup_fd(self._wakeup)
        self._inlet.send(b"\0")
        self._thread.join()
        self._outlet.close()
        self._inlet.close()

    @contextmanager
    def training(self) -> Iterator[None]:
        """Steps are made inside the block: a request waits for the step's end."""
        self._phase = "training"
        yield
        self._phase = "ending"

    def stopped(self) -> None:
        """The request is granted, and the commit done: whatever ends the process now has nothing to add."""
        self._phase = "stopped"

    def agreed(self, ranks: Ranks) -> str:
        """What has asked a rank to stop, if anything has, the same on every rank. Collective."""
        if not ranks.sum_counts([int(bool(self.reason))])[0]:
            return ""
        reasons = ranks.gather(self.reason)
        if len(set(reasons)) == 1:
            return reasons[0]
        return ", ".join(f"{reason} (rank {rank})" for rank, reason in enumerate(reasons) if reason)

    def check(self, ranks: Ranks) -> None:
        """To be called between the parts of work that can be given up. Collective.

        Raises:
            Stopped: a rank has been asked to stop.
        """
        if reason := self.agreed(ranks):
            raise Stopped(f"by {reason}")

    def ask(self, reason: str, is_signal: bool = True) -> None:
        """Ask for a stop. One more signal after the first, or one that comes while no steps are made, ends at once."""
        now = time.monotonic()
        if not self.reason:
            self.reason, self._since = reason, now
            if self._phase in ("starting", "ending"):
                self._end_now(f"stopped by {reason}")
        elif is_signal and now - self._since >= self._echo:
            self._end_now(f"stopped at once by {reason}, after {self.reason}")

    def _listen(self) -> None:
        ended: set[Process] = set()
        while not self._closing:
            self._look(ended)
            select.select([self._outlet], [], [], LOOK_EVERY)
            for number in self._signals():
                self.ask(signal.Signals(number).name)

    def _signals(self) -> bytes:
        try:
            return self._outlet.recv(4096, socket.MSG_DONTWAIT).replace(b"\0", b"")
        except BlockingIOError:
            return b""

    def _look(self, ended: set[Process]) -> None:
        """Whether launchers have ended, and the time is up."""
        for process in self._watched:
            if process not in ended and not process.is_alive():
                ended.add(process)
                self.ask(f"the end of the launcher (process {process.pid})", is_signal=False)
        if self.reason and self._grace and time.monotonic() - self._since >= self._grace:
            self._end_now(f"stopped by {self.reason}; no commit within train.grace_seconds={self._grace:g}")

    def _end_now(self, line: str) -> None:
        self.before_end()
        text = f"\n{line}; {self._kept}"
        self._end(STOPPED, lambda: self._phase == "stopped" or print(text, file=sys.stderr, flush=True))
