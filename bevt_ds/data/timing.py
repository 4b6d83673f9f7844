"""Where the loader's time goes, by stage, so that the one that holds up the training can be named."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

# stage -> what would help
REMEDIES = {
    "storage": "put the shards on a faster disk, or raise data.readers",
    "demux": "raise data.workers, or pack the videos with `bevt shards pack --profile train`",
    "decode": "raise data.workers, pack the videos with `bevt shards pack --profile train`, or, in pretraining, raise"
    " data.clips_per_video",
    "augment": "raise data.threads: they augment, and decode images",
    "copy": "lower the micro-batch, or pin fewer processes to these cores",
}


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
