"""samples.png: what the network saw, what was hidden, and where its guess of the hidden token was right.

Of a tokenizer that can decode it also shows what was guessed, and the tokenizer's own reconstruction of the whole
frame, which no guess can pass. Nothing of the target enters what is shown of a guess but right or wrong: hidden cells
hold decoded guesses, and the guesses of the other cells, which the network saw, are decoded with them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from einops import repeat
from matplotlib.figure import Figure
from torch import Tensor

from bevt_ds.batch import Batch, Stream, denormalised
from bevt_ds.model.tokenizers import DecodingTokenizer, Tokenizer
from bevt_ds.runtime.engine import Engine

RIGHT, WRONG = np.array([0.13, 0.62, 0.30]), np.array([0.80, 0.15, 0.15])
HIDDEN = 0.5
SAMPLES = {"video": 2, "image": 8}
FRAMES_SHOWN, COLUMNS = 4, 8
SEEN, HIDDEN_CELLS, VERDICT = "input", "hidden cells", "green: right\nred: wrong"
NEARER = "green: nearer than\nthe mean feature"
GUESS, CEILING = "guess, decoded", "tokenizer's\nreconstruction"


@dataclass(frozen=True)
class Panel:
    """One frame in several views, each (H, W, 3) in [0, 1], by what it shows; all panels of an image have the same."""

    title: str
    views: dict[str, np.ndarray]


def draw(engine: Engine, batch: Batch, path: Path, tokenizer: Tokenizer) -> None:
    """Write the image for the first samples of a batch that already has ids as targets. Collective."""

    def panels(name: str, stream: Stream) -> list[Panel]:
        predicted = predict(engine, stream, tokenizer.vocab_size)
        return stream_panels(name, stream, predicted, SAMPLES[name], tokenizer) if engine.ranks.is_main else []

    _draw(engine, batch, path, panels)


def draw_features(engine: Engine, batch: Batch, path: Path) -> None:
    """The same of a batch whose targets are features: where a prediction is nearer than the mean of these targets."""

    def panels(name: str, stream: Stream) -> list[Panel]:
        features = engine.module.feature_head(hidden(engine, stream)).flatten(0, 1)
        marks = marked(stream, nearer(stream, features[stream.rows.clamp(min=0)]))
        return frame_panels(name, stream, marks, SAMPLES[name], NEARER) if engine.ranks.is_main else []

    _draw(engine, batch, path, panels)


def _draw(engine: Engine, batch: Batch, path: Path, panels_of: Callable[[str, Stream], list[Panel]]) -> None:
    batch = batch.cast(engine.dtype)
    panels: list[Panel] = []
    with engine.evaluating():
        for name in ("video", "image"):
            if (stream := getattr(batch, name)) is not None:
                panels += panels_of(name, stream)
    if engine.ranks.is_main:
        path.parent.mkdir(exist_ok=True)
        save_grid(panels, path)


def predict(engine: Engine, stream: Stream, vocab_size: int) -> Tensor:
    """The likeliest token id below `vocab_size` at every output position, flat (B*T*h*w,) or (B*h*w,)."""
    return engine.module.lm_head(hidden(engine, stream))[..., :vocab_size].argmax(-1).flatten()


def hidden(engine: Engine, stream: Stream) -> Tensor:
    """What the head is given at every output position: (B,T*h*w,C) or (B,h*w,C)."""
    forward = engine.module.forward_video if stream.pixels.ndim == 5 else engine.module.forward_image
    return forward(stream.pixels, stream.mask)


def nearer(stream: Stream, predicted: Tensor) -> Tensor:
    """Which rows of `predicted` (R,D) are nearer to their targets than the mean of all targets is: bool (R,)."""
    targets = stream.targets
    mean = targets[stream.rows >= 0].mean(0)
    distances = [
        F.smooth_l1_loss(x, targets, reduction="none").mean(1) for x in (predicted.float(), mean.expand_as(targets))
    ]
    return distances[0] < distances[1]


def stream_panels(name: str, stream: Stream, predicted: Tensor, samples: int, tokenizer: Tokenizer) -> list[Panel]:
    """Panels of the first samples, and what was guessed where the tokenizer decodes; see `frame_panels`."""
    marks, places = verdicts(stream, predicted), stream.view_places
    guesses = predicted.view(marks.shape)

    def decoded(b: int, t: int, image: np.ndarray) -> dict[str, np.ndarray]:
        view = stream.view[int(places[b, t]) :][:1]
        return decoded_views(image, marks[b, t], guesses[b, t], view, tokenizer)

    decodes = isinstance(tokenizer, DecodingTokenizer) and len(stream.view)  # there is none where ids were kept
    return frame_panels(name, stream, marks, samples, VERDICT, decoded if decodes else None)


def frame_panels(
    name: str,
    stream: Stream,
    marks: np.ndarray,
    samples: int,
    verdict: str,
    more: Callable[[int, int, np.ndarray], dict[str, np.ndarray]] | None = None,
) -> list[Panel]:
    """Panels of the first samples: a few frames of each clip, or one for each image.

    marks (B,T,h,w), of images (B,1,h,w): see `marked`. verdict: what its colours say. more: of sample, frame number and
    frame, its further views.
    """
    count, frames = marks.shape[:2]
    shown = np.unique(np.linspace(0, frames - 1, FRAMES_SHOWN).round().astype(int))
    panels = []
    for b in range(min(samples, count)):
        frames_seen = denormalised(stream.pixels[b])
        for t in shown:
            title = f"{name} {b}" + (f", frame {t}" if frames > 1 else "")
            views = make_views(frames_seen[t], marks[b, t], verdict)
            panels.append(Panel(title, views | (more(b, t, views[SEEN]) if more else {})))
    return panels


def verdicts(stream: Stream, predicted: Tensor) -> np.ndarray:
    """Marks of predicted ids, flat as of `predict`: a right id is right."""
    return marked(stream, predicted[stream.rows.clamp(min=0)] == stream.targets)


def marked(stream: Stream, right: Tensor) -> np.ndarray:
    """Of every output position: -1 not masked, 0 guessed wrong, 1 guessed right. right: bool (R,) of the rows.

    -> int8 (B,T,h,w), of images (B,1,h,w).
    """
    count, frames = len(stream.pixels), stream.pixels[0, 0].shape[:-2].numel()
    grid, valid = (count, frames, *stream.mask.shape[-2:]), stream.rows >= 0
    marks = torch.full(grid, -1, dtype=torch.int8, device=right.device)
    marks.view(-1)[stream.rows[valid]] = right[valid].to(torch.int8)
    return marks.cpu().numpy()


def make_views(image: np.ndarray, marks: np.ndarray, title: str = VERDICT) -> dict[str, np.ndarray]:
    """A frame (H,W,3), the frame with its hidden cells, and, as `title`, its verdicts (h,w)."""
    cells = enlarged(marks[..., None], image.shape[0])
    hidden = np.where(cells >= 0, HIDDEN, image)
    colour = np.where(cells == 1, RIGHT, WRONG)
    verdict = np.where(cells >= 0, 0.35 * image + 0.65 * colour, 0.5 * image + 0.5)
    return {SEEN: image, HIDDEN_CELLS: hidden, title: verdict}


def decoded_views(
    image: np.ndarray, marks: np.ndarray, guess: Tensor, view: Tensor, tokenizer: DecodingTokenizer
) -> dict[str, np.ndarray]:
    """What the guesses stand for, in the hidden cells of a frame (H,W,3), and what its own ids do.

    marks (h,w) as of `verdicts`; guess int64 (h,w); view (1,3,v,v): the tokenizer's view, unused where nothing is
    hidden and the reconstruction is left grey.
    """
    side = image.shape[0]
    frame = lambda ids: enlarged(tokenizer.decode(ids)[0].movedim(0, -1).float().cpu().numpy(), side)  # noqa: E731
    guessed = np.where(enlarged(marks[..., None], side) >= 0, frame(guess[None]), image)
    hidden = (marks >= 0).any()
    ceiling = frame(tokenizer.encode(view.float())) if hidden else np.full_like(image, HIDDEN)
    return {GUESS: guessed, CEILING: ceiling}


def enlarged(cells: np.ndarray, side: int) -> np.ndarray:
    """Cells (h,w,C) as squares of pixels (side,side,C)."""
    scale = side // cells.shape[0]
    return repeat(cells, "h w c -> (h a) (w b) c", a=scale, b=scale)


def save_grid(panels: list[Panel], path: Path) -> None:
    """Blocks of rows, one for each view, with a column a frame."""
    rows = list(panels[0].views)
    blocks = [panels[i : i + COLUMNS] for i in range(0, len(panels), COLUMNS)]
    size = (1.7 * min(COLUMNS, len(panels)), 1.8 * len(rows) * len(blocks))
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(len(rows) * len(blocks), min(COLUMNS, len(panels)), squeeze=False)
    for axis in grid.flat:
        axis.set_axis_off()
    for number, block in enumerate(blocks):
        _fill_block(grid[len(rows) * number :][: len(rows)], block, rows)
    figure.savefig(path, dpi=100)


def _fill_block(axes: np.ndarray, panels: list[Panel], rows: list[str]) -> None:
    for column, panel in enumerate(panels):
        for axis, row in zip(axes[:, column], rows, strict=True):
            axis.set_axis_on()
            axis.imshow(np.clip(panel.views[row], 0, 1), interpolation="nearest")
            axis.set(xticks=[], yticks=[])
        axes[0, column].set_title(panel.title, fontsize=9)
    for axis, label in zip(axes[:, 0], rows, strict=True):
        axis.set_ylabel(label, fontsize=9)
