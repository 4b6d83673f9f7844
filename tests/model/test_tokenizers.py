"""Tokenizers: targets of masked rows, and statistics of the random projection."""

from __future__ import annotations

import math

import pytest
import torch

from bevt_ds import Batch, UserError, load_tokenizer
from bevt_ds.model.tokenizers import tokenize


class Positions:
    """A tokenizer whose id tells image, row and column: the first pixel's value times 64, plus the place."""

    vocab_size = 1 << 20

    def __init__(self):
        self.seen = 0

    def encode(self, frames):
        self.seen += len(frames)
        place = torch.arange(16).view(4, 4)
        return (frames[:, 0, 0, 0].round().long() * 64)[:, None, None] + place


def test_tokenizer_targets_of_masked_rows(make_stream):
    """Each row gets the id of its own frame and cell, and frames without a masked cell are not encoded."""
    mask = torch.zeros(2, 2, 4, 4, dtype=torch.bool)
    mask[0, 1, 2, 3] = mask[1, 0, 0, 1] = True  # frames 2, 3 of clip 0 and 0, 1 of clip 1
    view = torch.arange(8.0).view(2, 4, 1, 1, 1).expand(2, 4, 3, 32, 32)
    image_mask = torch.zeros(3, 4, 4, dtype=torch.bool)
    image_mask[2, 3, 3] = True
    image_view = torch.arange(100.0, 103.0).view(3, 1, 1, 1).expand(3, 3, 32, 32)
    batch = Batch(
        make_stream(torch.zeros(2), mask, view=view), make_stream(torch.zeros(3), image_mask, view=image_view)
    )
    tokenizer = Positions()
    filled = tokenize(tokenizer, batch)
    assert tokenizer.seen == 5
    assert filled.video.targets.tolist() == [2 * 64 + 11, 3 * 64 + 11, 4 * 64 + 1, 5 * 64 + 1, *6 * [-100]]
    assert filled.image.targets.tolist() == [102 * 64 + 15, -100, -100, -100]
    assert tokenize(tokenizer, Batch(None, batch.image)).video is None


def test_token_view_of_the_wrong_size_is_named(make_stream):
    stream = make_stream(torch.zeros(1), torch.ones(1, 4, 4, dtype=torch.bool), view=torch.rand(1, 3, 64, 64))
    with pytest.raises(UserError, match="8x8 ids an image, the mask has 4x4"):
        tokenize(load_tokenizer("random_projection", vocab_size=8), Batch(None, stream))


def textures(number: int, size: int = 64) -> torch.Tensor:
    """Drawn images (N,3,v,v) in [0,1]: coloured discs with stripes on a striped ground."""
    draw = torch.Generator().manual_seed(0)
    axis = torch.arange(size, dtype=torch.float32)
    y, x = torch.meshgrid(axis, axis, indexing="ij")

    def stripes() -> torch.Tensor:
        angle, period, phase = torch.rand(3, generator=draw).tolist()
        wave = torch.sin((x * math.cos(6.28 * angle) + y * math.sin(6.28 * angle)) / (1 + 4 * period) + 6.28 * phase)
        low, high = torch.rand(2, 3, 1, 1, generator=draw)
        return low + (high - low) * (0.5 + 0.5 * wave)

    images = []
    for _ in range(number):
        image = stripes()
        for _ in range(4):
            cx, cy, radius = (torch.rand(3, generator=draw) * torch.tensor([size, size, size / 3])).tolist()
            image = torch.where((x - cx) ** 2 + (y - cy) ** 2 < radius**2, stripes(), image)
        images.append(image)
    return torch.stack(images)


@pytest.mark.parametrize("vocab_size", [512, 8192])
def test_random_projection_spreads_ids(vocab_size):
    """The demo needs targets worth predicting: entropy of at least 3 nats, no id above 20 %."""
    ids = load_tokenizer("random_projection", vocab_size=vocab_size).encode(textures(64))
    assert ids.shape == (64, 8, 8) and ids.dtype == torch.int64
    share = ids.flatten().bincount(minlength=vocab_size) / ids.numel()
    entropy = -(share * share.clamp_min(1e-12).log()).sum()
    assert entropy > 3 and share.max() < 0.2
    assert ids.min() >= 0 and ids.max() < vocab_size


def test_random_projection_is_fixed_by_its_seed():
    images = textures(4)
    first, again, other = (
        load_tokenizer("random_projection", vocab_size=256, seed=s).encode(images) for s in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_random_projection_ignores_brightness_and_contrast():
    """A brighter or flatter image has the same ids but for ties within rounding."""
    images = textures(16)
    tokenizer = load_tokenizer("random_projection", vocab_size=256)
    same = tokenizer.encode(images) == tokenizer.encode(0.8 * images + 0.1)
    assert same.float().mean() > 0.95


def test_unknown_tokenizer_names_and_options_are_named():
    with pytest.raises(UserError, match="choose one of dalle, vq, "):
        load_tokenizer("peco")
    with pytest.raises(UserError, match="no weights"):
        load_tokenizer("random_projection", weights="file")
    with pytest.raises(UserError, match="at least two"):
        load_tokenizer("random_projection", vocab_size=1)
