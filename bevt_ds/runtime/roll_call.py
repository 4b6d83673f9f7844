"""Which ranks are missing: those whose connection has closed, are silent for too long, or do not get on."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

LATE = 5.0  # seconds from one look to the next, after which all of it is taken for a pause of this very process


@dataclass
class Sign:
    """The last that was heard of a rank. `at`: when, on the clock of the one who heard it."""

    at: float
    section: str = "start"
    step: int = 0
    entered: int = 0  # sections, see place.py
    still: float = 0.0  # seconds that its training thread has not got on
    limit: float = float("inf")  # that it may do without
    closed: bool = False


@dataclass(frozen=True)
class Missing:
    """A rank that is lost, and since when (seconds of the epoch)."""

    rank: int
    why: str
    since: float
    section: str
    step: int
    silent: bool  # its process is frozen or gone

    def __str__(self) -> str:
        clock = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self.since))
        seconds = time.time() - self.since
        return f"rank {self.rank} {self.why} since {clock} ({seconds:.0f} s), in step {self.step}, {self.section}"

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


class RollCall:
    """What one process knows of the ranks that it hears. Times are of time.monotonic()."""

    def __init__(self, ranks: Iterable[int], deadline: float, now: float) -> None:
        self._deadline, self._looked = deadline, now
        self._signs = {rank: Sign(now) for rank in ranks}

    def heard(self, rank: int, now: float, **place: Any) -> None:
        """A sign of a rank, with the fields of `Sign` that it told."""
        if rank in self._signs:
            self._signs[rank] = Sign(now, **place)

    def left(self, rank: int) -> None:
        """A rank has said that it ends: nothing more is expected of it."""
        self._signs.pop(rank, None)

    def closed(self, rank: int) -> None:
        """A rank's connection has ended without a word: so has its process."""
        if rank in self._signs:
            self._signs[rank].closed = True

    def look(self, now: float) -> float:
        """To be called every second or so; returns how long this process itself was stopped, if it was."""
        pause, self._looked = now - self._looked, now
        if pause < LATE:
            return 0.0
        for sign in self._signs.values():
            sign.at += pause
        return pause

    def missing(self, now: float) -> list[Missing]:
        """Ranks that are lost now; if there are none, those that keep all others from getting on."""
        silent = [rank for rank, sign in self._signs.items() if sign.closed or now - sign.at > self._deadline]
        if silent:
            return [self._missing(rank, now) for rank in silent]
        behind = min((sign.entered for sign in self._signs.values()), default=0)
        last = {rank: sign for rank, sign in self._signs.items() if sign.entered == behind}
        if all(sign.still > sign.limit for sign in last.values()):
            return [self._missing(rank, now) for rank in last]
        return []

    def _missing(self, rank: int, now: float) -> Missing:
        sign = self._signs[rank]
        why, seconds, silent = "has not answered", now - sign.at, True
        if sign.closed:
            why = "has ended without a word and has not been heard"
        elif seconds <= self._deadline:
            why, seconds, silent = "has got no further", sign.still, False
        return Missing(rank, why, time.time() - seconds, sign.section, sign.step, silent)
