"""How well a tokenizer reconstructs frames: figures, and frames next to their reconstructions."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from torch import Tensor

from bevt_ds.eval.visualize import Panel, save_grid

MOST = 16  # frames that are drawn


def sums_of(frames: Tensor, shown: Tensor) -> dict[str, Tensor]:
    """Sums over frames (N,3,v,v) and what they became: frames, squared (error), variance, each a mean over pixels.

    variance is the squared error of a frame's mean colour: what one number for each channel would reach.
    """
    frames, shown = frames.float(), shown.detach().float().clamp(0, 1)
    squared = (shown - frames).square().mean((1, 2, 3)).sum()
    variance = (frames - frames.mean((2, 3), keepdim=True)).square().mean((1, 2, 3)).sum()
    return {"frames": squared.new_tensor(len(frames)), "squared": squared, "variance": variance}


def quality(totals: Mapping[str, float]) -> dict[str, float]:
    """psnr, dB of the mean squared error, and explained: the share of the frames' variance that is not lost."""
    error = totals["squared"] / totals["frames"]
    return {
        "psnr": -10 * math.log10(max(error, 1e-10)),
        "explained": 1 - totals["squared"] / max(totals["variance"], 1e-10),
    }


def draw_reconstructions(frames: Tensor, shown: Tensor, path: Path) -> None:
    """Write frames (N,3,v,v), their reconstructions, and how far they are apart: the first MOST."""
    panels = []
    for i, pair in enumerate(zip(frames[:MOST], shown[:MOST], strict=True)):
        one, two = (np.clip(part.float().cpu().movedim(0, -1).numpy(), 0, 1) for part in pair)
        panels.append(Panel(f"frame {i}", {"input": one, "reconstruction": two, "difference": np.abs(one - two)}))
    path.parent.mkdir(exist_ok=True)
    save_grid(panels, path)
