"""A custom training task (linear regression) on the same loop: logs, checkpoints, exact resume."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bevt_ds.config.deepspeed import read_json
from bevt_ds.config.recipes import demo
from bevt_ds.config.schema import Config
from bevt_ds.runtime.engine import Engine
from bevt_ds.train.loop import run_training
from bevt_ds.train.task import Setup, Task
from tests.training.processes import start_python, wait_for

WEIGHTS = torch.tensor([[2.0, -1.0, 0.5]])
STEPS = 48


@dataclass(frozen=True)
class Points:
    """A micro-batch of the toy: inputs (B,3)."""

    inputs: Tensor

    def to(self, device, non_blocking=False):
        return Points(self.inputs.to(device))

    def cast(self, dtype):
        return Points(self.inputs.to(dtype))


class PointsLoader:
    """Serves as a loader: the points of a step are a function of its number."""

    fingerprint, bad_samples = "points", 0

    def __init__(self, first_step: int, last: int, commits: Path) -> None:
        self.step, self.last, self.commits = first_step, last, commits

    def __iter__(self) -> Iterator[Points]:
        while self.step < self.last:
            self.step += 1
            yield Points(torch.randn(16, 3, generator=torch.Generator().manual_seed(self.step)))
        while self.last < STEPS and not any(self.commits.glob("step-*")):  # written in the background
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGKILL)

    def state(self):
        return {}

    def wait_seconds(self):
        return 0.0

    def bottleneck(self):
        return ""


class Line(nn.Module):
    """What the loop needs of a model: `forward`, and `save_pretrained`."""

    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Linear(3, 1, bias=False)
        nn.init.zeros_(self.line.weight)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.line(inputs)

    def save_pretrained(self, folder: Path, state: dict[str, Tensor], streams: list[str]) -> None:
        folder.mkdir()
        torch.save(state, folder / "line.pt")


@dataclass
class Regression(Task[Config, Points]):
    """Least squares; counts its updates, to have a part of its own in a checkpoint."""

    updates: int = 0

    def forward(self, batch: Points, step: int, micro_step: int) -> tuple[Tensor, Mapping[str, Tensor]]:
        loss = (self.engine.forward(batch.inputs) - batch.inputs @ WEIGHTS.T).square().mean()
        return loss, {"loss": loss}

    def metrics(self, totals: Mapping[str, float], step: int) -> dict[str, float]:
        return {"loss": totals["loss"]}

    def after_step(self) -> None:
        self.updates += 1

    def rest(self) -> Callable[[Path], None]:
        text = json.dumps(self.updates)
        return lambda folder: (folder / "updates.json").write_text(text)

    def load(self, folder: Path) -> None:
        self.updates = json.loads((folder / "updates.json").read_text())

    def finish(self, batches: Iterator[Points]) -> str | None:
        (self.setup.folder / "updates.json").write_text(json.dumps(self.updates))
        weight = torch.load(self.setup.folder / "weights" / "line.pt")["line.weight"]
        return None if torch.allclose(weight, WEIGHTS, atol=0.5) else "the line is off"


def toy(folder: Path) -> Config:
    """A step a log line, three commits."""
    base = demo()
    train = replace(
        base.train, steps=STEPS, global_clips=16, micro_clips=16, global_images=0, log_every=1, checkpoint_every=16
    )
    optim = replace(base.optim, lr=0.2, warmup_steps=0, weight_decay=0.0)
    return replace(base, train=train, optim=optim, output_dir=str(folder))


def regress(
    config: Config,
    make_loader: Callable[[Setup[Config]], PointsLoader],
    task: Callable[..., Regression] = Regression,
    values: Mapping[str, Any] | None = None,
    make_line: Callable[[Setup[Config]], Line] = lambda setup: Line(),
    steps: int = 0,
    free: Collection[str] = (),
) -> int:
    """Train; the exit code. values: of DeepSpeed's JSON, zero2 if none; free: settings that a command line has given.

    steps: of the task alone, so that another number is no other configuration; 0: those of the configuration.
    """

    def make_engine(setup: Setup[Config], config: Config) -> Engine:
        model = make_line(setup)
        groups = [{"params": list(model.parameters()), "weight_decay": 0.0}]
        return Engine(model, config, setup.ds_values, setup.ranks, 3, groups, lambda step: config.optim.lr)

    @contextmanager
    def open_task(setup: Setup[Config]) -> Iterator[Regression]:
        loader = make_loader(setup)
        engine, _ = setup.begin_engine(partial(make_engine, setup), loader.fingerprint)
        yield task(setup, loader, engine, steps or config.train.steps, 0.0)

    return run_training(config, values or read_json("zero2"), [], open_task, free)


def lines(folder: Path) -> list[tuple]:
    text = (folder / "log.jsonl").read_text()
    return [(line["step"], line["loss"], line["grad_norm"]) for line in map(json.loads, text.splitlines())]


def started(folder: Path, **changes: object) -> tuple[int, str]:
    """The regression in a process of its own: DeepSpeed's groups live as long as theirs. changes: see `main`.

    Returns exit code and output.
    """
    (rank,) = start_python(["-m", "tests.training.test_custom_task", str(folder), json.dumps(changes)], world=1)
    (output,) = wait_for([rank])
    return rank.returncode, output


def test_custom_task_resumes_exactly_after_a_kill(tmp_path):
    whole, run = tmp_path / "whole", tmp_path / "run"
    code, output = started(whole)
    assert code == 0, output
    code, output = started(run, last=20)
    assert code == -signal.SIGKILL, output
    assert len(lines(run)) == 20
    assert [path.name for path in (run / "checkpoints").glob("step-*")] == ["step-00000016"]
    code, output = started(run, resume="auto")
    assert code == 0, output
    assert "continuing from step 16" in output
    assert lines(run) == lines(whole)
    told = [json.loads(line) for line in (whole / "log.jsonl").read_text().splitlines()]
    told = [line for line in told if "commit_seconds" in line]
    assert told and all(0 < line["commit_stall"] <= line["commit_seconds"] for line in told)
    assert len(lines(run)) == STEPS
    assert json.loads((run / "updates.json").read_text()) == STEPS


def test_task_that_has_not_learned_is_exit_code_1(tmp_path):
    code, output = started(tmp_path / "run", lr=1e-4)
    assert code == 1, output
    assert output.endswith("not learned: the line is off\n")


def main(folder: Path, last: int = STEPS, resume: str = "", lr: float = 0.2) -> int:
    """The process kills itself when it has done `last` steps and asks for the next batch."""
    base = toy(folder)
    config = replace(base, resume=resume or base.resume, optim=replace(base.optim, lr=lr))
    return regress(config, lambda setup: PointsLoader(setup.first_step, last, setup.folder / "checkpoints"))


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), **json.loads(sys.argv[2])))
