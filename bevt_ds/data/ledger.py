"""What a rank keeps account of: its bad samples, and where the time of its loader goes.

Bad samples are counted and written down, never hidden; too many of them end the run. Whether there are too many is
judged on the sums over all ranks, so that all of them stop at the same step; see bevt_ds.data.loader.
"""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bevt_ds import exit_codes
from bevt_ds.data.limits import BadSample
from bevt_ds.data.plan import PlanEntry, StreamId
from bevt_ds.data.reading.members import Member
from bevt_ds.data.reading.remote import redacted
from bevt_ds.disk import writing
from bevt_ds.errors import UserError

log = logging.getLogger(__name__)

LEDGER = "bad_samples.jsonl"  # in the folder of a run
ALWAYS_ALLOWED = 10  # bad samples of a stream, however few have been read
IN_A_ROW = 100  # bad samples with no good one between them: something systematic

# stage -> what would help
REMEDIES = {
    "storage": "put the shards on a faster disk, or raise data.readers",
    "demux": "raise data.workers, or pack the videos with `bevt shards pack --profile train`",
    "decode": "raise data.workers, pack the videos with `bevt shards pack --profile train`, or, in pretraining, raise"
    " data.clips_per_video",
    "augment": "raise data.threads: they augment, and decode images",
    "copy": "lower the micro-batch, or pin fewer processes to these cores",
}


class DataLimitError(UserError):
    """More bad samples than the budget allows."""

    exit_code = exit_codes.BAD_DATA


class Skips:
    """Places of the plan that were given up for a reason that may not come back: time, memory, storage.

    Known ones from a checkpoint, and those met since. Threads may share it. state: what `state` returned in the run
    that is resumed.
    """

    def __init__(self, state: dict[str, Any] | None = None) -> None:
        self._lock = threading.Lock()
        self._reasons = {tuple(place): reason for *place, reason in (state or {}).get("skips", [])}
        self._added: dict[tuple, str] = {}
        self.has_any = bool(self._reasons)

    def add(self, stream: StreamId, entry: PlanEntry, reason: str) -> None:
        added = {(int(stream), entry.step, entry.slot, entry.attempt): reason}
        self.update(added)
        with self._lock:
            self._added |= added

    def update(self, reasons: Mapping[tuple, str]) -> None:
        """Take over what `added` has returned in another process."""
        with self._lock:
            self._reasons |= reasons
            self.has_any = bool(self._reasons)

    def added(self) -> dict[tuple, str]:
        """Those met since the last call: (stream, step, slot, attempt) -> reason."""
        with self._lock:
            added, self._added = self._added, {}
        return added

    def reason(self, stream: StreamId, entry: PlanEntry) -> str | None:
        """Why this place is skipped, or None."""
        with self._lock:
            return self._reasons.get((int(stream), entry.step, entry.slot, entry.attempt))

    def state(self, step: int) -> dict[str, Any]:
        """What a checkpoint taken before `step` must hold, as JSON. Skips of earlier steps are history."""
        with self._lock:
            return {"skips": sorted([*place, reason] for place, reason in self._reasons.items() if place[1] >= step)}


def merge_states(states: list[dict[str, Any]]) -> dict[str, Any]:
    """One state from those of all ranks."""
    rows = {tuple(row) for state in states for row in state.get("skips", [])}
    decoders = next((state["decoder"] for state in states if "decoder" in state), {})
    return {"skips": [list(row) for row in sorted(rows)], "decoder": decoders}


class Ledger:
    """Good and bad samples of one stream on one rank. `path`: JSON lines are appended there; None: counts only."""

    def __init__(self, stream: StreamId, path: Path | None, skips: Skips) -> None:
        self.stream, self.kind, self.path, self.skips = stream, stream.kind, path, skips
        self.good = self.bad = self._row = 0

    def accept(self, samples: int) -> None:
        """Count good samples."""
        self.good, self._row = self.good + samples, 0

    def end_row(self) -> None:
        """A sample is good, as far as is known: bad ones before it and after it are not in a row."""
        self._row = 0

    def reject(self, entry: PlanEntry, member: Member, bad: BadSample, substitute: Member | None = None) -> None:
        """Record a bad sample; the first that is listed is also logged as a warning.

        substitute: what takes its place, and so may be seen more often than once in an epoch; None: nothing does.
        DataLimitError: it is one of very many in a row.
        """
        self.bad += 1
        self._row += 1
        if self.bad == 1 and self.path is not None:
            place = member.key, redacted(member.path)
            log.warning("%r in %s cannot be used: %s. All such samples are listed in %s", *place, bad, self.path)
        if bad.transient:
            self.skips.add(self.stream, entry, str(bad))
        self._write(entry, member, str(bad), substitute)
        if self._row >= IN_A_ROW:
            raise DataLimitError(
                f"{self._row} bad {self.stream.kind} samples in a row. The last: {member.key!r} in"
                f" {redacted(member.path)}: {bad}. {_hint(self.path)}"
            )

    def _write(self, entry: PlanEntry, member: Member, reason: str, substitute: Member | None) -> None:
        if self.path is None:
            return
        event = {
            "stream": self.stream.name.lower(),
            "step": entry.step,
            "slot": entry.slot,
            "attempt": entry.attempt,
            "shard": redacted(member.path),
            "key": member.key,
            "reason": reason,
        }
        if substitute is not None:
            event |= {"substitute_shard": redacted(substitute.path), "substitute": substitute.key}
        with writing(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("ab+") as file:  # one write a line: ranks may share it
                whole = file.tell() == 0 or os.pread(file.fileno(), 1, file.tell() - 1) == b"\n"
                file.write(("" if whole else "\n").encode() + json.dumps(event).encode() + b"\n")


def require_few_bad(kind: str, good: int, bad: int, max_fraction: float, path: Path | None) -> None:
    """DataLimitError: the bad samples of a stream, summed over ranks, are over the budget."""
    if bad > max(ALWAYS_ALLOWED, max_fraction * (good + bad)):
        raise DataLimitError(
            f"{bad} bad samples among {good + bad} {kind}s: over data.max_bad_fraction={max_fraction:g}. {_hint(path)}"
        )


def _hint(path: Path | None) -> str:
    where = f"All are listed in {path}; " if path else ""
    return f"{where}`bevt shards check` finds them beforehand."


class StageTimes:
    """Seconds of work by stage, added up by many threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._seconds = dict.fromkeys(REMEDIES, 0.0)
        self.decoded_frames = 0  # by the CPU's workers, since the start

    def add(self, stage: str, seconds: float, frames: int = 0) -> None:
        """Count work that is done, and the frames that were decoded for it."""
        with self._lock:
            self._seconds[stage] += seconds
            self.decoded_frames += frames

    @contextmanager
    def measured(self, stage: str, lanes: int = 1) -> Iterator[None]:
        """Adds the time that the block takes, in which so many threads work."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.add(stage, lanes * (time.perf_counter() - began))

    def take(self) -> dict[str, float]:
        """The sums since the last call."""
        with self._lock:
            taken, self._seconds = self._seconds, dict.fromkeys(REMEDIES, 0.0)
        return taken


def bottleneck(seconds: Mapping[str, float], lanes: Mapping[str, int]) -> str:
    """One line: the stage that is busiest, and what would help.

    seconds: of work by stage. lanes: how many threads or processes share a stage's work.
    """
    busy = {stage: total / lanes[stage] for stage, total in seconds.items()}
    worst = max(busy, key=busy.__getitem__)
    shares = ", ".join(f"{stage} {value:.2f} s" for stage, value in busy.items())
    return f"the data's bottleneck is {worst} (busy: {shares}): {REMEDIES[worst]}"
