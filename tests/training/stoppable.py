"""A regression that tests stop: `python -m tests.training.stoppable FOLDER [JSON of Options]`, on any number of ranks.

A file next to the run's folder holds a rank: `step-RANK` in step HELD_STEP and those after it, `save` in a commit,
`measurement` in what follows step MEASURED_STEP. A file with `.reached` behind its name says that a rank is held.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from bevt_ds.config.command_line import run
from bevt_ds.runtime.run_log import RunLog
from tests.training.test_custom_task import Line, Points, PointsLoader, Regression, regress, toy

HELD_STEP = 12
MEASURED_STEP = 5
PAUSE = 0.01  # seconds


@dataclass(frozen=True)
class Options:
    """What a test says of a run."""

    steps: int = 10**6
    resume: str = ""
    grace_seconds: float = 0.0
    rank_deadline: float = 1000.0


def hold(gate: Path) -> None:
    """Wait while there is such a file."""
    while gate.exists():
        gate.with_name(f"{gate.name}.reached").touch()
        time.sleep(PAUSE)


class HeldLine(Line):
    """Its commits can be held."""

    def __init__(self, gate: Path) -> None:
        super().__init__()
        self.gate = gate

    def save_pretrained(self, folder: Path, state: dict[str, Tensor], streams: list[str]) -> None:
        super().save_pretrained(folder, state, streams)
        hold(self.gate)


class HeldRegression(Regression):
    """Its steps can be held."""

    def forward(self, batch: Points, step: int, micro_step: int) -> tuple[Tensor, Mapping[str, Tensor]]:
        time.sleep(PAUSE)
        if step >= HELD_STEP:
            hold(self.setup.folder.parent / f"step-{self.ranks.rank}")
        return super().forward(batch, step, micro_step)

    def every_so_often(self, step: int, log: RunLog) -> None:
        if step == MEASURED_STEP:
            gate = self.setup.folder.parent / "measurement"
            while gate.exists():
                gate.with_name(f"{gate.name}.reached").touch()
                self.setup.stop.check(self.ranks)
            log.write(step, {"measured": 1.0})

    def make_up(self, step: int, log: RunLog) -> None:
        if not log.has(step, "measured"):
            self.every_so_often(step, log)


def main(folder: Path, options: Options) -> int:
    base = toy(folder)
    limits = {"grace_seconds": options.grace_seconds, "rank_deadline": options.rank_deadline}
    train = replace(base.train, global_clips=32, checkpoint_every=10, **limits)
    config = replace(base, train=train, resume=options.resume or base.resume)
    return regress(
        config,
        lambda setup: PointsLoader(setup.first_step, 10**9, setup.folder),
        HeldRegression,
        make_line=lambda setup: HeldLine(setup.folder.parent / "save"),
        steps=options.steps,
        free={f"train.{name}" for name in limits},
    )


if __name__ == "__main__":
    run(lambda argv: main(Path(argv[0]), Options(**json.loads(argv[1]))))
