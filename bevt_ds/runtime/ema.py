"""A moving average of the fp32 master weights, each rank of its own part."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from bevt_ds.runtime.engine import Engine

FOLDER = "average"


class WeightAverage:
    """average <- average + weight * (master weights - average) after every step, from the weights at its start.

    As mmcv's EMAHook, which counts micro-iterations; see recipes.py. ZeRO stages 0 to 2.
    """

    def __init__(self, engine: Engine, weight: float):
        self._engine, self._weight = engine, weight
        self._averages = [part.clone() for part in engine.masters()]

    def update(self) -> None:
        """Take in the weights that a step has made."""
        torch._foreach_lerp_(self._averages, self._engine.masters(), self._weight)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The engine holds the averages inside the block, bit by bit what it held before after it. Collective."""
        with self._engine.holding(self._averages):
            yield

    def save(self, checkpoint: Path) -> None:
        """Write this rank's part into a checkpoint's folder."""
        path = self._file(checkpoint)
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({str(i): part.cpu() for i, part in enumerate(self._averages)}, path)

    def load(self, checkpoint: Path) -> None:
        """Read back what `save` wrote, with the same world size and stage."""
        saved = load_file(self._file(checkpoint))
        for i, part in enumerate(self._averages):
            part.copy_(saved[str(i)])

    def _file(self, checkpoint: Path) -> Path:
        return checkpoint / FOLDER / f"rank-{self._engine.ranks.rank:05d}.safetensors"
