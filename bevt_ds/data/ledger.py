"""Bad samples are counted and written down, never hidden; too many of them end the run."""

from __future__ import annotations

import json
from pathlib import Path

from bevt_ds.data.index import Member
from bevt_ds.data.plan import PlanEntry, StreamId
from bevt_ds.errors import UserError

ALWAYS_ALLOWED = 10  # bad samples, however few have been read
IN_A_ROW = 100  # bad samples with no good one between them: something systematic


class DataLimitError(UserError):
    """More bad samples than the budget allows."""

    exit_code = 3


class Ledger:
    """Counts good and bad samples of one rank. `path`: JSON lines are appended there; None: counts only."""

    def __init__(self, path: Path | None, max_fraction: float) -> None:
        self.path, self.max_fraction = path, max_fraction
        self.good = self.bad = self._row = 0

    def accept(self) -> None:
        self.good += 1
        self._row = 0

    def reject(self, stream: StreamId, entry: PlanEntry, member: Member, reason: str) -> None:
        """Record a bad sample. DataLimitError: that was one too many."""
        self.bad += 1
        self._row += 1
        self._write(stream, entry, member, reason)
        allowed = max(ALWAYS_ALLOWED, self.max_fraction * (self.good + self.bad))
        if self.bad > allowed or self._row >= IN_A_ROW:
            raise DataLimitError(
                f"{self.bad} bad samples among {self.good + self.bad}, {self._row} in a row: over "
                f"data.max_bad_fraction={self.max_fraction:g}. The last: {member.key!r} in "
                f"{member.path}: {reason}. Check the shards{self._where()}"
            )

    def _where(self) -> str:
        return f"; all are listed in {self.path}" if self.path else ""

    def _write(self, stream: StreamId, entry: PlanEntry, member: Member, reason: str) -> None:
        if self.path is None:
            return
        event = {
            "stream": stream.name.lower(),
            "step": entry.step,
            "slot": entry.slot,
            "attempt": entry.attempt,
            "shard": member.path,
            "key": member.key,
            "reason": reason,
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:  # one write a line: ranks may share it
            file.write(json.dumps(event) + "\n")
