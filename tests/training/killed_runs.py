"""Runs on two ranks that are killed, one after another: `python -m tests.training.killed_runs DIR NUMBER`.

Launch NUMBER continues the run in which the one before was killed, to its end, and begins the next, in which it is
killed: so a kill costs one start. The last launch also does all runs once more without a kill.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bevt_ds.config.deepspeed import read_json
from bevt_ds.config.schema import Config
from bevt_ds.runtime import commit
from bevt_ds.train.task import Setup
from tests.training.test_custom_task import WEIGHTS, Points, PointsLoader, Regression, regress, toy

STEPS, COMMIT_EVERY, LAST = 20, 4, 10  # updates of a run, between commits, and until it is killed


class Kill(NamedTuple):
    """A run, and how it ends: in a step, or while a commit is written, sealed, in place, or older ones are removed."""

    stage: int
    precision: str
    place: str
    ranks: tuple[int, ...]  # who is killed

    @property
    def name(self) -> str:
        return f"{self.stage}-{self.precision}-{self.place}"


KILLS = (
    Kill(0, "fp32", "step", (0, 1)),
    Kill(1, "fp32", "written", (1,)),
    Kill(1, "bf16", "sealed", (0,)),
    Kill(2, "fp32", "step", (1,)),
    Kill(2, "bf16", "in place", (0,)),
    Kill(3, "fp32", "written", (0,)),
    Kill(3, "bf16", "step", (0,)),
    Kill(3, "fp32", "removed", (0,)),
)
CALLS = {"sealed": "_publish", "in place": "_publish", "removed": "_prune"}  # of commit.py


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class HalvesLoader(PointsLoader):
    """Each rank's part of a step's points; the process dies before step `last`."""

    def __init__(self, setup: Setup[Config], last: int) -> None:
        super().__init__(setup.first_step, STEPS, setup.folder)
        self.ranks, self.killed_at = setup.ranks, last

    def __iter__(self) -> Iterator[Points]:
        while self.step < STEPS:
            if self.step == self.killed_at:
                die()
            self.step += 1
            points = torch.randn(16, 3, generator=torch.Generator().manual_seed(self.step))
            yield Points(points[self.ranks.rank :: self.ranks.world])


@dataclass
class Halves(Regression):
    """The regression, which may die when it has written its part of a commit."""

    killed_in_commit: bool = False

    def forward(self, batch: Points, step: int, micro_step: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        outputs = self.engine.forward(batch.inputs).float()
        loss = (outputs - batch.inputs @ WEIGHTS.T).square().sum() / 16
        return loss, {"loss": loss}

    def rest(self) -> Callable[[Path], None]:
        write, is_due = super().rest(), self.killed_in_commit and self.updates > COMMIT_EVERY

        def write_and_die(folder: Path) -> None:
            write(folder)
            if is_due:
                die()

        return write_and_die


def run(folder: Path, kill: Kill, is_killed: bool, resume: str) -> None:
    """One run, whole or until it is killed."""
    base = toy(folder)
    train = replace(base.train, steps=STEPS, precision=kill.precision, micro_clips=8, checkpoint_every=COMMIT_EVERY)
    own = is_killed and int(os.environ["RANK"]) in kill.ranks
    if own and kill.place in CALLS:
        kill_in_call(CALLS[kill.place], before=kill.place == "sealed")
    last = LAST if own and kill.place == "step" else STEPS
    task = partial(Halves, killed_in_commit=own and kill.place == "written")
    values = read_json(f"zero{kill.stage or 2}") | ({} if kill.stage else {"zero_optimization": {"stage": 0}})
    regress(replace(base, train=train, resume=resume), lambda setup: HalvesLoader(setup, last), task, values)


def kill_in_call(name: str, before: bool) -> None:
    """Die at the second commit, before or after a function of commit.py."""
    real, calls = getattr(commit, name), []

    def call(*arguments: Any) -> None:
        calls.append(name)
        if len(calls) == 2 and before:
            die()
        real(*arguments)
        if len(calls) == 2:
            die()

    setattr(commit, name, call)


def main(folder: Path, number: int) -> None:
    if number:
        run(folder / f"{number - 1}", KILLS[number - 1], is_killed=False, resume="auto")
    if number < len(KILLS):
        run(folder / f"{number}", KILLS[number], is_killed=True, resume="never")
    else:
        for kill in dict.fromkeys(kill._replace(place="whole", ranks=()) for kill in KILLS):
            run(folder / kill.name, kill, is_killed=False, resume="never")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
