"""Held-out figures of a run that predicts features: its loss next to that of the mean feature."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from bevt_ds.batch import Batch, Stream
from bevt_ds.eval.held_out import Summary
from bevt_ds.model.bevt import smooth_l1_sums
from bevt_ds.runtime.engine import Engine
from bevt_ds.runtime.logging import STREAMS


@dataclass(frozen=True)
class FeatureSummary(Summary):
    """Held-out figures of one stream: smooth L1 distances per masked position."""

    loss: float
    mean_loss: float  # of the mean of the same features: of a guess that ignores the input
    cells: int

    baseline: ClassVar[str] = "the loss of the mean feature, a guess that ignores the input"
    columns: ClassVar[str] = "loss   mean feature's loss     gain"

    @property
    def gain(self) -> float:
        """The share of the mean feature's loss that is gone."""
        return 1 - self.loss / max(self.mean_loss, torch.finfo(torch.float32).tiny)

    def extent(self) -> str:
        return f"{abs(self.gain):.1%}"

    def row(self) -> str:
        return f"{self.loss:10.3f}{self.mean_loss:21.3f}{self.gain:9.3f}"


def evaluate(engine: Engine, fill: Callable[[Batch], Batch], batches: Sequence[Batch]) -> dict[str, FeatureSummary]:
    """Summaries by stream over held-out micro-batches; a stream without a masked position has none.

    Collective: every rank evaluates the same batches. `fill` makes targets, twice for each batch: they are not held.
    """
    sums, rows = {name: torch.zeros(()) for name in STREAMS}, dict.fromkeys(STREAMS, 0)
    losses, constant = (dict.fromkeys(STREAMS, 0.0) for _ in range(2))
    with engine.evaluating():
        for batch in batches:
            filled = fill(batch.to(engine.ranks.device))
            metrics = engine.forward(filled).metrics
            for name, stream in streams_of(filled):
                sums[name] = sums[name] + stream.targets[stream.rows >= 0].double().sum(0).cpu()
                rows[name] += int(metrics[f"rows_{name}"])
                losses[name] += float(metrics[f"loss_{name}"])
        means = {name: (sums[name] / count).float() for name, count in rows.items() if count}
        for batch in batches:
            for name, stream in streams_of(fill(batch.to(engine.ranks.device))):
                if name in means:
                    constant[name] += constant_loss(means[name], stream)
    return {name: FeatureSummary(losses[name] / rows[name], constant[name] / rows[name], rows[name]) for name in means}


def constant_loss(guess: Tensor, stream: Stream) -> float:
    """The summed loss of guessing the same vector (D,) at every masked position."""
    guesses = guess.to(stream.targets.device).expand_as(stream.targets)
    return float(smooth_l1_sums(guesses, stream.targets, stream.rows >= 0, (len(stream.rows),)))


def streams_of(batch: Batch) -> list[tuple[str, Stream]]:
    """The streams that a batch has, by name."""
    return [(name, stream) for name in STREAMS if (stream := getattr(batch, name)) is not None]
