"""samples.png: what the network saw, what was hidden, and where its guess of the hidden token was right.

Nothing of the target enters the image but right or wrong, so it cannot leak the answer.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from einops import repeat
from matplotlib.figure import Figure
from torch import Tensor

from bevt_ds.batch import Batch, Stream, denormalised
from bevt_ds.runtime.engine import Engine

RIGHT, WRONG = np.array([0.13, 0.62, 0.30]), np.array([0.80, 0.15, 0.15])
HIDDEN = 0.5
SAMPLES = {"video": 2, "image": 8}
FRAMES_SHOWN, COLUMNS = 4, 8
ROWS = ("input", "hidden cells", "green: right\nred: wrong")


@dataclass(frozen=True)
class Panel:
    """One frame in three views, each (H, W, 3) in [0, 1]."""

    title: str
    seen: np.ndarray
    hidden: np.ndarray
    verdict: np.ndarray


def draw(engine: Engine, batch: Batch, path: Path) -> None:
    """Write the image for the first samples of a batch that already has targets. Collective."""
    batch = batch.cast(engine.dtype)
    panels: list[Panel] = []
    with engine.evaluating():
        for name in ("video", "image"):
            stream = getattr(batch, name)
            if stream is not None:
                predicted = predict(engine, stream)
                if engine.ranks.is_main:
                    panels += stream_panels(name, stream, predicted, SAMPLES[name])
    if engine.ranks.is_main:
        path.parent.mkdir(exist_ok=True)
        save_grid(panels, path)


def predict(engine: Engine, stream: Stream) -> Tensor:
    """The likeliest token id at every output position, flat (B*T*h*w,) or (B*h*w,)."""
    model = engine.module
    forward = model.forward_video if stream.pixels.ndim == 5 else model.forward_image
    return model.lm_head(forward(stream.pixels, stream.mask)).argmax(-1).flatten()


def stream_panels(name: str, stream: Stream, predicted: Tensor, samples: int) -> list[Panel]:
    """Panels of the first samples: a few frames of each clip, or one for each image."""
    count, frames = len(stream.pixels), stream.pixels[0, 0].shape[:-2].numel()
    marks = verdicts(stream, predicted).reshape(count, frames, *stream.mask.shape[-2:])
    panels = []
    for b in range(min(samples, count)):
        frames_seen = denormalised(stream.pixels[b])
        shown = np.unique(np.linspace(0, frames - 1, FRAMES_SHOWN).round().astype(int))
        for t in shown:
            title = f"{name} {b}" + (f", frame {t}" if frames > 1 else "")
            panels.append(make_panel(title, frames_seen[t], marks[b, t]))
    return panels


def verdicts(stream: Stream, predicted: Tensor) -> np.ndarray:
    """Per output position: -1 not masked, 0 guessed wrong, 1 guessed right; flat."""
    marks = torch.full((predicted.numel(),), -1, dtype=torch.int8, device=predicted.device)
    valid = stream.rows >= 0
    rows = stream.rows[valid]
    marks[rows] = (predicted[rows] == stream.targets[valid]).to(torch.int8)
    return marks.cpu().numpy()


def make_panel(title: str, image: np.ndarray, marks: np.ndarray) -> Panel:
    """Three views of one frame from its image (H,W,3) and its verdicts (h,w)."""
    scale = image.shape[0] // marks.shape[0]
    cells = repeat(marks, "h w -> (h a) (w b) 1", a=scale, b=scale)
    hidden = np.where(cells >= 0, HIDDEN, image)
    colour = np.where(cells == 1, RIGHT, WRONG)
    verdict = np.where(cells >= 0, 0.35 * image + 0.65 * colour, 0.5 * image + 0.5)
    return Panel(title, image, hidden, verdict)


def save_grid(panels: list[Panel], path: Path) -> None:
    """Blocks of three rows (input, hidden cells, verdict), each with a column a frame."""
    blocks = [panels[i : i + COLUMNS] for i in range(0, len(panels), COLUMNS)]
    size = (1.7 * min(COLUMNS, len(panels)), 5.4 * len(blocks))
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(3 * len(blocks), min(COLUMNS, len(panels)), squeeze=False)
    for axis in grid.flat:
        axis.set_axis_off()
    for number, block in enumerate(blocks):
        _fill_block(grid[3 * number : 3 * number + 3], block)
    figure.savefig(path, dpi=100)


def _fill_block(axes: np.ndarray, panels: list[Panel]) -> None:
    for column, panel in enumerate(panels):
        for axis, image in zip(axes[:, column], (panel.seen, panel.hidden, panel.verdict), strict=True):
            axis.set_axis_on()
            axis.imshow(np.clip(image, 0, 1), interpolation="nearest")
            axis.set(xticks=[], yticks=[])
        axes[0, column].set_title(panel.title, fontsize=9)
    for axis, label in zip(axes[:, 0], ROWS, strict=True):
        axis.set_ylabel(label, fontsize=9)
