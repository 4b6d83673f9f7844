"""Where the training thread is, and since when it has not got on: told by itself, asked by the thread of heartbeat.py.

A rank whose process lives may still be stuck: in an endless loop, or in a file system that does not answer.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

PATIENCE = 5  # times the deadline, for what has no usual duration
USUAL = 10  # times its shortest duration so far, for what is done again and again
MOVED = 1 << 16  # bytes from one look to the next; the watching threads read some hundred each time
REPEATED = ("step",)


class Place:
    """One for each process. `enter` is for the training thread; the rest for whoever watches it."""

    def __init__(self) -> None:
        self.section, self.step = "start", 0
        self.entered = 0  # how often: all ranks enter the same sections in the same order
        self.since = time.monotonic()
        self._began = self.since
        self._shortest: dict[str, float] = {}
        self._bytes = 0

    def enter(self, section: str, step: int) -> None:
        """The training thread goes on to something else: "data", "step", "log", "validation", "save" or "finish"."""
        now = time.monotonic()
        self._shortest[self.section] = min(now - self._began, self._shortest.get(self.section, now - self._began))
        self.section, self.step = section, step
        self._began = self.since = now
        self.entered += 1

    def look(self, moved: int) -> None:
        """Take more than MOVED bytes since the last look for getting on; a step needs none. moved: of all its life."""
        if moved - self._bytes > MOVED and self.section not in REPEATED:
            self.since = time.monotonic()
        self._bytes = moved

    def forgive(self, seconds: float) -> None:
        """The whole process has stood still for so long, and not for its own fault: Ctrl-Z, a scheduler."""
        self.since += seconds

    def limit(self, deadline: float, waits: Mapping[str, float]) -> float:
        """Seconds after which the training thread is stuck where it is. `waits`: more for some sections."""
        if self.section in REPEATED and self.section in self._shortest:
            return max(deadline, USUAL * self._shortest[self.section])
        return max(PATIENCE * deadline, waits.get(self.section, 0.0))


PLACE = Place()


def moved_bytes() -> int:
    """What this process and those that its main thread has started have read and written, from caches and disks alike.

    A loader in a process of its own reads for this one, to which sockets and shared memory count nothing.
    """
    own, started = os.getpid(), ""
    with suppress(OSError):  # a system may not tell
        started = Path(f"/proc/{own}/task/{own}/children").read_text(encoding="ascii")
    return sum(map(_moved_bytes, [own, *map(int, started.split())]))


def _moved_bytes(process: int) -> int:
    """Of one process; 0 where it has ended, or may not be looked at."""
    with suppress(OSError):
        text = Path(f"/proc/{process}/io").read_text(encoding="ascii")
        counts = dict(line.split(": ") for line in text.splitlines())
        return int(counts["rchar"]) + int(counts["wchar"])
    return 0
