"""Ranks with all that ends a run, and without what makes it slow to start, engine and model: `short_ranks.py VERB ...`.

`meet` waits for the other ranks. `walk FOLDER` does steps: RANK.json in the folder says its process and how many it
has done; RANK.committed what has stopped it.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from datetime import timedelta
from functools import partial
from itertools import count
from pathlib import Path

import torch
import torch.distributed as dist

from bevt_ds.config.command_line import run
from bevt_ds.data.reading.index import write_atomic
from bevt_ds.exit_codes import STOPPED
from bevt_ds.runtime.distributed import Ranks, choose_rendezvous
from bevt_ds.runtime.heartbeat import Heartbeat
from bevt_ds.runtime.signals import Stopped, StopRequest

PATIENCE = timedelta(seconds=240)
DEADLINE = "WALKING_DEADLINE"  # in the environment: seconds until a silent rank is missed
MEETING_DEADLINE = 0.6  # seconds; of the meeting it is five times as much


def meet() -> int:
    from bevt_ds.runtime.joining import joined  # imports DeepSpeed, which walking does not need

    with joined(StopRequest(), MEETING_DEADLINE):
        return 0


def walk(text: str) -> int:
    folder = Path(text)
    with StopRequest() as stop:
        choose_rendezvous(os.environ)
        dist.init_process_group("gloo", timeout=PATIENCE)
        ranks = Ranks(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), torch.device("cpu"), dist.group.WORLD)
        deadline = float(os.environ.get(DEADLINE, PATIENCE.total_seconds()))
        with Heartbeat(ranks, deadline) as heartbeat:
            stop.before_end = partial(heartbeat.leave, STOPPED)
            try:
                with stop.training():
                    take_steps(folder / str(ranks.rank), ranks, stop)
            except Stopped:
                stop.stopped()
                ranks.barrier()
                return STOPPED


def take_steps(place: Path, ranks: Ranks, stop: StopRequest) -> None:
    for step in count():
        time.sleep(0.05)
        write_atomic(place.with_suffix(".json"), json.dumps({"pid": os.getpid(), "steps": step}).encode())
        if reason := stop.agreed(ranks):
            place.with_suffix(".committed").write_text(reason)
            raise Stopped(f"by {reason}")


def main(argv: Sequence[str]) -> int:
    verb, *words = (word for word in argv if not word.startswith("--local_rank"))  # which deepspeed adds
    return {"meet": meet, "walk": walk}[verb](*words)


if __name__ == "__main__":
    run(main)
