"""The ranks of a program, together from its start to its end: they hear of signals, and of one another."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial

from bevt_ds.exit_codes import STOPPED
from bevt_ds.runtime.distributed import Ranks
from bevt_ds.runtime.engine import start_ranks
from bevt_ds.runtime.heartbeat import Heartbeat
from bevt_ds.runtime.signals import StopRequest

UNWATCHED = {"start": float("inf")}  # for a program that does not say where it is


@contextmanager
def joined(
    stop: StopRequest, deadline: float = 120.0, waits: Mapping[str, float] | None = UNWATCHED
) -> Iterator[tuple[Ranks, StopRequest]]:
    """Join the ranks and watch over them; deadline, waits: see `Heartbeat`. UserError: see `start_ranks`."""
    with stop:
        ranks = start_ranks()
        with Heartbeat(ranks, deadline, waits) as heartbeat:
            stop.before_end = partial(heartbeat.leave, STOPPED)
            yield ranks, stop


@contextmanager
def joined_to_measure() -> Iterator[Ranks]:
    """`joined`, for a program that is not resumed: any signal ends it at once."""
    with joined(StopRequest(kept="results are written at the end only")) as (ranks, _):
        yield ranks
