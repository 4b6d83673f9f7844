"""Runs of test_custom_task.py with NaN points in some steps: `python -m tests.training.nonfinite_runs DIR`."""

from __future__ import annotations

import json
import math
import shutil
import sys
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from unittest import mock

from bevt_ds.config.deepspeed import read_json
from bevt_ds.config.schema import Config
from bevt_ds.errors import UserError
from bevt_ds.runtime.guard import Guard
from tests.training.test_custom_task import STEPS, Points, PointsLoader, regress, toy


@dataclass(frozen=True)
class NamedPoints(Points):
    """Points with the name of their step."""

    keys: tuple[str, ...] = ()

    def to(self, device, non_blocking=False):
        return self


class SpoiltLoader(PointsLoader):
    """`wrong`, NaN say, among the points of the `bad` steps; the steps of `removed` are not there at all."""

    def __init__(self, first_step: int, bad: Collection[int], removed: Collection[int], wrong: float) -> None:
        super().__init__(first_step, 10 * STEPS, Path())  # never killed
        self.bad, self.removed, self.wrong = bad, removed, wrong

    def __iter__(self) -> Iterator[NamedPoints]:
        for step, points in zip(range(self.step, self.last), super().__iter__(), strict=False):
            if step in self.removed:
                continue
            if step in self.bad:
                points.inputs[3, 1] = self.wrong
            yield NamedPoints(points.inputs, (f"points/{step}",))


def run(
    config: Config,
    bad: Collection[int] = (),
    removed: Collection[int] = (),
    stage: int = 2,
    wrong: float = math.nan,
) -> tuple[int, str]:
    """Exit code and error of one run."""
    try:
        make_loader = lambda setup: SpoiltLoader(setup.first_step, bad, removed, wrong)  # noqa: E731
        return regress(config, make_loader, values=read_json(f"zero{stage}")), ""
    except UserError as error:
        return error.exit_code, str(error)


def with_train(config: Config, **changes: object) -> Config:
    return replace(config, train=replace(config.train, **changes))


def go_back(run_folder: Path, new: Path) -> None:
    """A run's folder as if it had been killed after the commit of step 32."""
    shutil.copytree(run_folder / "checkpoints" / "step-00000032", new / "checkpoints" / "step-00000032")
    for name in ("config.json", "log.jsonl"):
        shutil.copy(run_folder / name, new / name)


class Event:
    """Stands in for a CUDA event: what a verdict waits for."""

    waits = 0

    def synchronize(self) -> None:
        Event.waits += 1


@contextmanager
def told_late() -> Iterator[None]:
    """Inside the block no step is known to be skipped before something waits for it, as on a GPU."""
    real = Guard.after_step
    with mock.patch.object(Guard, "after_step", lambda guard: replace(real(guard), ready=Event())):
        yield


def main(folder: Path) -> None:
    some = (5, 6, 7, 15)
    ends = {"some": run(with_train(toy(folder / "some"), keep_checkpoints=9), some)}
    with told_late():
        ends["late"] = run(with_train(toy(folder / "late"), log_every=10), some)
    ends["waits"] = Event.waits
    ends["removed"] = run(with_train(toy(folder / "removed"), steps=STEPS - len(some)), removed=some)
    ends["all"] = run(toy(folder / "all"), range(20, STEPS), stage=3)
    ends["many"] = run(with_train(toy(folder / "many"), max_skipped=(5, 3)), range(20, STEPS, 2), stage=1)
    short = with_train(toy(folder / "resumed"), steps=16, max_skipped=(5, 1))
    run(short, (3,))
    ends["resumed"] = run(replace(with_train(short, steps=32), resume="auto"), (20,))
    for name, deviations in (("spike", 6.0), ("spike kept", 0.0)):
        config = with_train(toy(folder / name), max_spike=deviations)
        ends[name] = run(config, (40,), stage=3, wrong=1e4)
    go_back(folder / "spike", folder / "spike resumed")
    resumed = replace(with_train(toy(folder / "spike resumed"), max_spike=6.0), resume="auto")
    ends["spike resumed"] = run(resumed, (40,), stage=3, wrong=1e4)
    (folder / "ends.json").write_text(json.dumps(ends))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
