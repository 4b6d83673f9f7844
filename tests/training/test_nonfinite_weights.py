"""Weights that are not finite are neither committed nor exported, whoever trains them. No engine."""

from __future__ import annotations

import math
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bevt_ds.errors import NonFiniteError
from bevt_ds.exit_codes import NON_FINITE
from bevt_ds.runtime.run_log import RunLog
from bevt_ds.train import finetuning
from bevt_ds.train.finetuning import Finetuning, read_scores, record_validation
from bevt_ds.train.loop import save_checkpoint
from tests.downstream.worlds import ALONE

GOOD, BAD = torch.ones(2), torch.tensor([1.0, math.nan])


class Module:
    @staticmethod
    def save_pretrained(folder: Path, state: dict, streams: list[str]) -> None:
        folder.mkdir()
        torch.save(state, folder / "weights.pt")


class Average:
    """A moving average with these weights, which the engine holds while it is applied."""

    def __init__(self, engine: SimpleNamespace, weights: torch.Tensor) -> None:
        self.engine, self.parts = engine, [weights]

    @contextmanager
    def applied(self):
        before, self.engine.held = self.engine.held, self.parts[0]
        yield
        self.engine.held = before


def make_task(folder: Path, weights: torch.Tensor, average: torch.Tensor | None = None) -> Finetuning:
    """A task on an engine that looks at what it is given, as the real one does, and has nothing else."""
    engine = SimpleNamespace(held=weights, module=Module, stage=2)
    engine.weights = lambda: {"a": torch.zeros(2), "head": engine.held}
    engine.is_finite = lambda **more: all(
        bool(torch.isfinite(t).all()) for t in [engine.held, *(part for parts in more.values() for part in parts)]
    )
    setup = SimpleNamespace(folder=folder, ranks=ALONE)
    return Finetuning(setup, None, engine, 9, 0.0, Average(engine, average) if average is not None else None, None)


@pytest.mark.parametrize(("weights", "average"), [(BAD, None), (GOOD, BAD)], ids=["weights", "average"])
def test_best_weights_that_are_not_finite_are_not_kept(tmp_path, monkeypatch, weights, average):
    """Those that were the best before stay, and the run ends with the code for it."""
    monkeypatch.setattr(finetuning, "validate", lambda task: {"top1": next(scores), "videos": 4})
    scores, best = iter((0.5, 0.75, 0.75)), tmp_path / "best"
    with RunLog(tmp_path, ALONE, 0, ()) as log:
        record_validation(make_task(tmp_path, GOOD), log, 1)
        with pytest.raises(
            NonFiniteError, match="after step 2 head of the weights are not finite: not exported"
        ) as bad:
            record_validation(make_task(tmp_path, weights, average), log, 2)
        assert bad.value.exit_code == NON_FINITE
        assert read_scores(best)["step"] == 1 and torch.equal(torch.load(best / "weights.pt")["head"], GOOD)
        record_validation(make_task(tmp_path, BAD, GOOD), log, 3)  # what is exported is the average
    assert read_scores(best)["step"] == 3 and torch.equal(torch.load(best / "weights.pt")["head"], GOOD)


@pytest.mark.parametrize(
    ("weights", "average", "loss", "part"),
    [(BAD, None, 1.0, "weights or optimizer"), (GOOD, BAD, 1.0, "weights or optimizer"), (GOOD, GOOD, math.inf, "inf")],
    ids=["weights", "average", "loss"],
)
def test_nothing_that_is_not_finite_is_committed(tmp_path, weights, average, loss, part):
    """The commit does not begin: the engine of the test has no more that it could be asked for."""
    with pytest.raises(NonFiniteError, match=part):
        save_checkpoint(make_task(tmp_path, weights, average), 3, loss)
    with pytest.raises(AttributeError, match="commits"):
        save_checkpoint(make_task(tmp_path, GOOD, GOOD), 3, 1.0)
