"""Which of several decoders takes the next clip, by their measured rates, so that none of them idles.

Each decoder is a lane that works on so many clips at a time. A clip goes to the lane that is expected to finish it
first: its seconds a clip, times the clips in front of each of its places. What a clip is does not depend on that, and
its pixels do not where the decoders give the same; only the time does.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

from bevt_ds.data.decoding.sessions import GpuRefusal

log = logging.getLogger(__name__)
T = TypeVar("T")

_WEIGHT = 0.1  # of the newest clip in a lane's mean
_FAULTS = 20  # in a row, after which a lane gets no more clips
_TRY_AGAIN = 100  # clips after which a lane that was too slow for any gets one, for it may have become faster


@dataclass
class _Lane:
    places: int
    seconds: float = 0.0  # a clip, in one place; 0: not known yet
    given: int = 0  # clips that are in it or wait for a place
    passed_over: int = 0  # clips that others have got since its last
    done: int = 0
    faults: int = 0  # in a row
    free: threading.Semaphore = field(init=False)

    def __post_init__(self) -> None:
        self.free = threading.Semaphore(self.places)

    @property
    def rate(self) -> float:
        """Clips a second of all its places; 0: not known yet."""
        return self.places / self.seconds if self.seconds else 0.0


class Split:
    """Does clips in lanes; threads may share it. places: how many clips each lane works on at a time."""

    def __init__(self, places: Mapping[str, int], clock: Callable[[], float] = time.perf_counter) -> None:
        self._lanes, self._clock, self._lock = {name: _Lane(n) for name, n in places.items()}, clock, threading.Lock()

    def run(self, works: Mapping[str, Callable[[], T]]) -> T | None:
        """What the work of the chosen lane returns. None: it has refused the clip, or no lane is left.

        works: by the lanes' names. Waits for a place in the lane. Raises what the work raises, GpuRefusal apart.
        """
        if (name := self._chosen()) is None:
            return None
        lane = self._lanes[name]
        try:
            with lane.free:
                began = self._clock()
                result = works[name]()
                self._finished(lane, self._clock() - began)
                return result
        except GpuRefusal as refusal:
            self._refused(name, refusal)
            return None
        finally:
            with self._lock:
                lane.given -= 1

    def rates(self) -> dict[str, float]:
        """Clips a second of each lane; 0: not known yet."""
        with self._lock:
            return {name: lane.rate for name, lane in self._lanes.items()}

    def done(self) -> dict[str, int]:
        """Clips that each lane has done."""
        with self._lock:
            return {name: lane.done for name, lane in self._lanes.items()}

    def given(self) -> dict[str, int]:
        """Clips that are in each lane now, or wait for a place in it."""
        with self._lock:
            return {name: lane.given for name, lane in self._lanes.items()}

    def report(self) -> str:
        """What each lane has done, and how fast it is."""
        rates, done = self.rates(), self.done()
        total = max(sum(done.values()), 1)
        parts = (f"{name} {done[name] / total:.0%} at {rates[name]:.1f} clips/s" for name in done)
        return f"of {total} clips were decoded by {', '.join(parts)}"

    def _chosen(self) -> str | None:
        """The lane that would finish one more clip first. One that is not measured counts as the faster one."""
        with self._lock:
            able = {name: lane for name, lane in self._lanes.items() if lane.faults < _FAULTS}
            known = [lane.seconds for lane in able.values() if lane.seconds]

            def finish(name: str) -> tuple[float, bool]:
                lane = able[name]
                if lane.passed_over >= _TRY_AGAIN:
                    return 0.0, False
                seconds = lane.seconds or min(known, default=1.0)
                return seconds * max((lane.given + 1) / lane.places, 1.0), lane.seconds > 0

            best = min(able, key=finish, default=None)
            for name, lane in able.items():
                lane.passed_over = 0 if name == best else lane.passed_over + 1
                lane.given += name == best
            return best

    def _finished(self, lane: _Lane, seconds: float) -> None:
        with self._lock:
            if lane.done >= lane.places:  # the first open sessions and start processes
                lane.seconds = (1 - _WEIGHT) * lane.seconds + _WEIGHT * seconds if lane.seconds else seconds
            lane.done, lane.faults = lane.done + 1, 0
            total = sum(each.done for each in self._lanes.values())
        if total >= 100 and str(total).rstrip("0") == "1":  # 100, 1000, ...
            log.info(self.report())

    def _refused(self, name: str, refusal: GpuRefusal) -> None:
        """Files that are not for a lane are no fault of it."""
        if not refusal.is_fault:
            return
        with self._lock:
            lane = self._lanes[name]
            lane.faults += 1
            faults = lane.faults
        if faults == 1:
            log.warning("a clip goes from %s to a worker: %s", name, refusal)
        elif faults == _FAULTS:
            log.warning(
                "%s decodes no more: it has failed %d times in a row, the last time with: %s", name, faults, refusal
            )
