"""A moving average of the fp32 master weights, each rank of its own part."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from bevt_ds.model.tensor_file import read_tensors
from bevt_ds.runtime.engine import Engine

FOLDER = "average"


class WeightAverage:
    """average <- average + weight * (master weights - average) after every step, from the weights at its start.

    As mmcv's EMAHook, which counts micro-iterations; see recipes.py.
    """

    def __init__(self, engine: Engine, weight: float):
        self._engine, self._weight = engine, weight
        self._averages = [part.clone() for part in engine.masters()]

    def update(self) -> None:
        """Take in the weights that a step has made; a step that was left out has made none."""
        weight, masters = self._weight * (1 - self._engine.guard.skipped), self._engine.masters()
        weights = [weight] * len(masters) if isinstance(weight, torch.Tensor) else weight
        torch._foreach_lerp_(self._averages, masters, weights)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The engine holds the averages inside the block, bit by bit what it held before after it. Collective."""
        with self._engine.holding(self._averages):
            yield

    @property
    def parts(self) -> list[Tensor]:
        """This rank's part of the averages, like the engine's `masters`."""
        return self._averages

    def load_shards(self, checkpoint: Path) -> None:
        """Read what earlier versions wrote next to DeepSpeed's shards, of the same ranks and ZeRO stage."""
        saved = read_tensors(checkpoint / FOLDER / f"rank-{self._engine.ranks.rank:05d}.safetensors")
        for i, part in enumerate(self._averages):
            part.copy_(saved[str(i)])
