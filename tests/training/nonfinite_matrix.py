"""One step in three is not finite, at every stage and precision: `python -m tests.training.nonfinite_matrix DIR`.

The network of engine_matrix is trained for three steps, the second with a NaN or an infinity in the pixels, the loss or
the gradient of one rank's micro-step; and by another engine without that step. Rank 0 writes DIR/rows.jsonl.
"""

from __future__ import annotations

import json
import math
import sys
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bevt_ds.runtime.engine import Engine
from bevt_ds.runtime.engine_setup import start_ranks
from bevt_ds.runtime.guard import Verdict
from tests.training.engine_matrix import SAMPLES, TYPES, make_config, make_engine, sample_batch
from tests.training.host_reads import HostReads

SITES = ("pixels", "loss", "gradient")
ACCUMULATION = 2


class BadGradient(torch.autograd.Function):
    """Nothing forward, an infinite gradient backward."""

    @staticmethod
    def forward(context: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Tensor:
        return gradient * math.inf


def step(engine: Engine, number: int, site: str = "", place: tuple[int, int] = (0, 0)) -> Verdict:
    """One step; what is at `site` is not finite at place (rank, micro-step)."""
    ranks = engine.ranks
    inputs, targets = (t.chunk(ACCUMULATION * ranks.world) for t in sample_batch(number))
    for micro_step in range(ACCUMULATION):
        own = micro_step * ranks.world + ranks.rank
        here = site if (ranks.rank, micro_step) == place else ""
        x = inputs[own].clone()
        if here == "pixels":
            x[1, 2] = math.nan
        output = engine.forward(x).float()
        if here == "gradient":
            output = BadGradient.apply(output)
        loss = (output - targets[own]).square().sum() / SAMPLES
        engine.backward(loss.detach() * math.inf + 0 * loss if here == "loss" else loss)
        verdict = engine.step(number)
    return verdict


def state(engine: Engine) -> list[Tensor]:
    """All that training changes on this rank: its pieces of weights and moments, the count of updates, the model."""
    saved = engine.snapshot()
    shown = [p.detach().clone() for p in engine.module.parameters()] if engine.stage < 3 else []
    return [*saved.tensors.values(), torch.tensor(saved.counters["updates"]), *shown]


def spoil(engine: Engine, part: str) -> bool:
    """Whether the engine takes itself for finite with a NaN in one number of the last rank. Collective."""
    master, own = next(iter(engine.ds.optimizer.state.items()))
    tensor = (master.data if part == "weights" else own[part]).view(-1)
    before = tensor[:1].clone()
    if engine.ranks.rank == engine.ranks.world - 1:
        tensor[0] = math.nan
    finite = engine.is_finite()
    tensor[:1] = before
    return finite


def measure(stage: int, precision: str) -> list[dict[str, Any]]:
    """A row for each site. Collective."""
    ranks = start_ranks()
    build = lambda: make_engine(stage, False, ranks, make_config(precision, ACCUMULATION, ranks))  # noqa: E731
    plain, rows = build(), []
    step(plain, 0)
    with HostReads() as reads:
        step(plain, 2)
    expected = state(plain)
    for i, site in enumerate(SITES):
        engine = build()
        verdicts = [step(engine, 0), step(engine, 1, site, ((i + 1) % ranks.world, i % ACCUMULATION))]
        norms, grad_norm = verdicts[1].norms(), engine.grad_norm()
        engine.count_skipped()
        verdicts.append(step(engine, 2))
        got = state(engine)
        equal = len(got) == len(expected) and all(map(torch.equal, got, expected))
        row = {
            "stage": stage,
            "precision": precision,
            "site": site,
            "reads": sorted(reads.places),
            "skipped": [verdict.is_skipped() for verdict in verdicts],
            "equal": ranks.all_hold(equal),
            "tensors": len(got),
            "finite": engine.is_finite(),
            "counted": engine.skipped_steps,
            "grad_norm": math.isfinite(grad_norm),
            "later": math.isfinite(engine.grad_norm()),
            "norms": sorted(name for name, norm in norms.items() if not math.isfinite(norm)),
            "may save spoilt": [spoil(engine, part) for part in ("exp_avg", "exp_avg_sq", "weights")],
        }
        rows.append(row)
    return rows


def main(folder: Path) -> None:
    """Every case; rank 0 writes the rows."""
    ranks = start_ranks()
    for stage, precision in product((0, 1, 2, 3), TYPES):
        if (stage, precision) == (0, "bf16"):
            continue  # refused before the start
        for row in measure(stage, precision):
            if ranks.is_main:
                with (folder / "rows.jsonl").open("a") as file:
                    file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
