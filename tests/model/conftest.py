"""Fixtures of the model tests: where golden data lies, and micro-batches from plain tensors."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from bevt_ds import BEVT
from bevt_ds.batch import IGNORE, Batch, Stream
from tests.shared import shared_folder

COMMITTED = Path(__file__).parents[1] / "data" / "golden"


@pytest.fixture(scope="session")
def golden() -> Path:
    """The folder of the full golden set; test_golden_committed.py tests the subset that is committed."""
    return shared_folder("golden")


@pytest.fixture(scope="session")
def committed() -> Path:
    """The folder of the committed golden subset; a clone without it is broken."""
    assert COMMITTED.is_dir(), f"{COMMITTED} is missing"
    return COMMITTED


@pytest.fixture(scope="session")
def joint(golden: Path) -> dict[str, Tensor]:
    """Inputs and outputs of the original joint model."""
    return load_file(golden / "bevt_joint_small_io.safetensors")


@pytest.fixture(scope="session")
def finetune(golden: Path) -> dict[str, Tensor]:
    """Inputs and outputs of the original fine-tuning model."""
    return load_file(golden / "swin3d_finetune_small_io.safetensors")


@pytest.fixture(scope="session")
def normalised() -> Callable[..., Tensor]:
    """(uint8 - mean) / std along the channel axis 1, as the golden README defines it."""

    def apply(pixels: Tensor, mean: Tensor, std: Tensor) -> Tensor:
        shape = [1, 3] + [1] * (pixels.ndim - 2)
        return (pixels.float() - mean.view(shape)) / std.view(shape)

    return apply


@pytest.fixture(scope="session")
def make_stream() -> Callable[..., Stream]:
    """Builds a Stream as the data side does, with every masked cell's positions as rows and `pad` padding cells.

    view: of every frame, (B,T,3,v,v) or (B,3,v,v).
    """

    def build(
        pixels: Tensor,
        mask: Tensor,
        ids: Tensor | None = None,
        view: Tensor | None = None,
        keys: Tensor | None = None,
        count: int | None = None,
        pad: int = 3,
    ) -> Stream:
        frames_per_cell, plane = 2 if mask.ndim == 4 else 1, mask.shape[-2] * mask.shape[-1]
        # (planes of the mask, frames that share one, cells of it): the positions in the output
        at = torch.arange(mask.numel() * frames_per_cell).view(-1, frames_per_cell, plane)
        rows = at.movedim(1, 2)[mask.view(-1, plane)].flatten()
        frames, slot = (rows // plane).unique(return_inverse=True)
        every = torch.zeros(at.numel() // plane, 3, 0, 0) if view is None else view.flatten(0, -4)
        fill = lambda value, n, pad=pad * frames_per_cell: torch.cat([value, torch.full((pad,), n)])  # noqa: E731
        targets = None if ids is None else fill(ids.flatten()[rows].long(), IGNORE)
        return Stream(
            pixels=pixels,
            view=every[frames],
            mask=mask,
            rows=fill(rows, -1),
            cells=fill(mask.flatten().nonzero()[:, 0], -1, pad),
            token_rows=fill(slot * plane + rows % plane, 0),
            sample_keys=torch.arange(len(pixels)) if keys is None else keys,
            count=len(rows) if count is None else count,
            targets=targets,
        )

    return build


@pytest.fixture(scope="session")
def relative_error() -> Callable[[Tensor, Tensor], float]:
    """Largest difference over the reference's largest value."""
    return lambda actual, reference: ((actual - reference).abs().max() / reference.abs().max()).item()


@pytest.fixture(scope="session")
def small_bevt() -> Callable[..., BEVT]:
    """Builds a BEVT for 64-pixel images and 4 frames, fast enough for a unit test."""
    sizes = {"embed_dim": 32, "depths": (1, 2, 2, 1), "num_heads": (1, 2, 4, 8), "window": (2, 2, 2), "vocab_size": 16}
    return lambda **overrides: BEVT(**{**sizes, **overrides})


@pytest.fixture
def small_batch(make_stream: Callable[..., Stream]) -> Batch:
    """Two clips and three images of random pixels, masks and ids for `small_bevt`."""
    draw = torch.Generator().manual_seed(0)
    clip, image = (torch.randn(s, generator=draw) for s in ((2, 3, 4, 64, 64), (3, 3, 64, 64)))
    clip_mask, image_mask = (torch.rand(s, generator=draw) < 0.5 for s in ((2, 2, 4, 4), (3, 4, 4)))
    clip_ids, image_ids = (torch.randint(16, s, generator=draw) for s in ((2, 4, 4, 4), (3, 4, 4)))
    keys = torch.randint(2**62, (5,), generator=draw)
    return Batch(
        make_stream(clip, clip_mask, clip_ids, keys=keys[:2]),
        make_stream(image, image_mask, image_ids, keys=keys[2:]),
    )
