"""How this package starts its own helper processes, and how these end with it."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import bevt_ds

LOOK_EVERY = 1.0  # seconds
# Those that ask to stop: a terminal or launcher sends them to all processes, and the parent decides.
_ASKING = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)


def command(module: str, *arguments: str) -> list[str]:
    """Run `module` as a program with this interpreter; the working folder is not searched for modules."""
    return [sys.executable, "-P", "-m", module, *arguments]


def environment() -> dict[str, str]:
    """The environment in which a child finds the very copy of the package that is running now."""
    root = str(Path(bevt_ds.__file__).parents[1])
    paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}


@contextmanager
def deaf_at_first() -> Iterator[None]:
    """What the block starts does not hear signals that ask to stop; it must call `ignore_signals`.

    Without that, one which comes while Python starts would end it.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _ASKING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def ignore_signals() -> None:
    """Those that ask to stop."""
    for number in _ASKING:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _ASKING)


def begin_watch() -> None:
    """From now on, end this process when its parent dies, whatever it is at."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(LOOK_EVERY)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()
