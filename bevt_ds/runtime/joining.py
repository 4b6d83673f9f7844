"""The ranks of a program, together from its start to its end: they hear of signals, and of one another."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial

from bevt_ds.exit_codes import RANK_LOST, STOPPED
from bevt_ds.runtime.distributed import Ranks
from bevt_ds.runtime.engine_setup import start_ranks
from bevt_ds.runtime.heartbeat import Heartbeat
from bevt_ds.runtime.place import PATIENCE
from bevt_ds.runtime.signals import StopRequest

UNWATCHED = {"start": float("inf")}  # for a program that does not say where it is


@contextmanager
def joined(
    stop: StopRequest, deadline: float = 120.0, waits: Mapping[str, float] | None = UNWATCHED
) -> Iterator[tuple[Ranks, StopRequest]]:
    """Join the ranks and watch over them; deadline, waits: see `Heartbeat`. UserError: see `start_ranks`."""
    with stop:
        with meeting_within(PATIENCE * deadline):
            ranks = start_ranks()
        with Heartbeat(ranks, deadline, waits) as heartbeat:
            stop.before_end = partial(heartbeat.leave, STOPPED)
            yield ranks, stop


@contextmanager
def meeting_within(seconds: float) -> Iterator[None]:
    """A block in which the ranks meet; the process ends, with the code for a lost rank, if that takes longer.

    Before they have met, no rank can know of another that was killed, and torch would wait for half an hour.
    """

    def end() -> None:
        names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
        rank, world, address, port = (os.environ.get(name, "?") for name in names)
        line = f"error: rank {rank} has waited {seconds:.0f} s for all of {world} ranks to meet at {address}:{port}"
        print(f"\n{line}: one has ended, or was not started.", file=sys.stderr, flush=True)
        os._exit(RANK_LOST)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


@contextmanager
def joined_to_measure() -> Iterator[Ranks]:
    """`joined`, for a program that is not resumed: any signal ends it at once."""
    with joined(StopRequest(kept="results are written at the end only")) as (ranks, _):
        yield ranks
