"""What looking along time is worth without motion: `python -m benchmarks.study_baseline`.

For each position that the study's masks hide: how often the same position of the nearest visible frame has the same id.
A model with a higher masked accuracy has learned where things move.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F

from benchmarks.study_data import CLIP, label_of
from benchmarks.study_motion import render_action
from bevt_ds.config.samples import MaskConfig
from bevt_ds.data.masks import tube_mask
from bevt_ds.model.tokenizers import load_tokenizer
from bevt_ds.rng import Use, generator

PATCH = 16  # pixels
CLIPS = 640
MASKS = MaskConfig(ratio=0.75, min_block=16, tube=(0.25, 0.5))


def copied(ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Whether copying is right, for each masked position: ids int (T,h,w), mask bool (T,h,w) -> bool (R,)."""
    times, rows, columns = np.nonzero(mask)
    distance = np.abs(np.arange(len(ids))[:, None] - times)
    nearest = np.where(mask[:, rows, columns], len(ids), distance).argmin(0)
    return ids[nearest, rows, columns] == ids[times, rows, columns]


def copy_accuracy() -> float:
    """Over drawn clips and masks that are always the same."""
    tokenizer, right = load_tokenizer("random_projection", vocab_size=32), []
    grid = (CLIP.frames // 2, CLIP.height // PATCH, CLIP.width // PATCH)
    for i in range(CLIPS):
        rng = generator(0, Use.SYNTHETIC, 5, i)
        frames = torch.from_numpy(render_action(rng, label_of(i), CLIP)).permute(0, 3, 1, 2).float() / 255
        ids = tokenizer.encode(F.avg_pool2d(frames, 2)).numpy()
        right.append(copied(ids, np.repeat(tube_mask(rng, grid, MASKS), 2, axis=0)))
    return float(np.concatenate(right).mean())


if __name__ == "__main__":
    print(f"copying the nearest visible frame is right for {copy_accuracy():.1%} of the masked positions")
