"""Waiting for what other threads and processes do, however slow the machine."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Protocol

SECONDS = 240  # for one small run on a slow machine


class Process(Protocol):
    """A process, and the file of what it has said."""

    output: Path

    def poll(self) -> int | None: ...


def until(holds: Callable[[], object], alive: Iterable[Process] = (), told: Callable[[], str] = str) -> None:
    """Wait until it holds. An error after SECONDS, or once one of `alive` has ended; it shows what they, or it, say."""
    end, alive = time.monotonic() + SECONDS, list(alive)
    while not holds():
        assert time.monotonic() < end and all(process.poll() is None for process in alive), "\n".join(
            [told(), *(process.output.read_text() for process in alive)]
        )
        time.sleep(0.01)
