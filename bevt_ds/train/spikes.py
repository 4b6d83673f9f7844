"""Spikes: a micro-batch whose loss is far above those of the steps before makes its step one that is left out.

Off by default (`train.max_spike`). The loss of such a micro-batch becomes NaN before the backward pass, so that the
step is skipped on all ranks alike, by the way of one that is not finite. How far is far is measured on the last steps,
whose losses are part of a checkpoint: a run that goes on judges as if it had not stopped. Nothing here waits for the
device.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from bevt_ds.runtime.distributed import Ranks

WINDOW = 128  # steps whose losses are remembered
FEWEST = 32  # of them, before any is judged
FILE = "losses.json"  # in a checkpoint


class Spikes:
    """Judges the losses of micro-batches by those of the steps before."""

    def __init__(self, deviations: float, parts: int, ranks: Ranks, commit: Path | None = None) -> None:
        """deviations: by how many standard deviations a loss may be over the mean. parts: micro-batches of a step.

        commit: the checkpoint that the run goes on from; one of a run without this rule remembers nothing.
        """
        self._deviations, self._parts, self._ranks = deviations, parts, ranks
        saved = json.loads((commit / FILE).read_text()) if commit and (commit / FILE).is_file() else []
        rows = [[math.nan] * 2] * (WINDOW - len(saved)) + saved
        # By step, the oldest first: the mean of its micro-batches' losses, and of their squares. NaN: no step yet.
        self._window = torch.tensor(rows, dtype=torch.float64, device=ranks.device)
        self._losses: list[Tensor] = []
        self.limit = self._limit()

    def mark(self, loss: Tensor) -> Tensor:
        """A micro-batch's share of the step's loss, NaN where it is a spike."""
        self._losses.append(loss.detach().double() * self._parts)
        return loss + torch.where(self._losses[-1] > self.limit, math.nan, 0.0).to(loss.dtype)

    def after_step(self) -> None:
        """Remember the step's losses, if they are finite and none was a spike. Collective."""
        losses = torch.stack(self._losses)
        self._losses.clear()
        good = (torch.isfinite(losses) & (losses <= self.limit)).double()
        sums = self._ranks.sum(torch.stack([losses.nan_to_num().sum(), losses.nan_to_num().square().sum(), good.sum()]))
        row = sums[:2] / self._parts
        shifted = torch.cat([self._window[1:], row[None]])
        self._window = torch.where(sums[2] == self._parts, shifted, self._window)
        self.limit = self._limit()

    def _limit(self) -> Tensor:
        """The largest loss that is no spike; infinite while too few steps are known."""
        known = (~self._window[:, 0].isnan()).sum()
        mean, square = self._window.nanmean(0)
        limit = mean + self._deviations * (square - mean.square()).clamp(min=0).sqrt()
        return torch.where(known < FEWEST, math.inf, limit)

    def saved(self) -> Callable[[Path], None]:
        """What writes the losses, as they are now, into a checkpoint's folder."""
        rows = [row for row in self._window.tolist() if not math.isnan(row[0])]
        return lambda folder: (folder / FILE).write_text(json.dumps(rows))
