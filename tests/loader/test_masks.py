"""Masks: the original's statistics, any grid, index tensors of masked cells, empty masks."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bevt_ds.config.recipes import PRETRAINING, get_recipe
from bevt_ds.config.samples import MaskConfig
from bevt_ds.config.schema import Config
from bevt_ds.data.loader import Loader, eval_batches
from bevt_ds.data.masks import block_mask, check_empty_masks, empty_share, masked_frames, row_index, tube_mask
from bevt_ds.errors import UserError
from bevt_ds.rng import Use, generator
from tests.shared import shared_folder

DRAWS = 20_000
# Both sides are samples: over 196 cells an honest pair was seen to differ by 4.5 standard errors.
Z = 6.0
ORIGINAL = json.loads((Path(__file__).parents[1] / "data" / "mask_stats.json").read_text())


def test_committed_mask_statistics_equal_the_full_file() -> None:
    full = json.loads((shared_folder("golden") / "mask_stats.json").read_text())
    assert ORIGINAL["block"]["cell_probability"] == full["image"]["cell_probability"]
    assert ORIGINAL["tube"]["length_histogram"] == full["video"]["tube_length_histogram"]
    assert ORIGINAL["tube"]["fraction_mean"] == full["video"]["clip_fraction_mean"]


def rng(i: int) -> np.random.Generator:
    return generator(0, Use.MASK, 0, 0, i)


@pytest.fixture(scope="module")
def blocks() -> np.ndarray:
    return np.stack([block_mask(rng(i), (14, 14), MaskConfig()) for i in range(DRAWS)])


@pytest.fixture(scope="module")
def tubes() -> np.ndarray:
    return np.stack([tube_mask(rng(i), (8, 14, 14), MaskConfig()) for i in range(DRAWS)])


def z_of_shares(ours: np.ndarray, theirs: np.ndarray, draws: int = DRAWS) -> np.ndarray:
    """Standard score of the difference of two shares, each from `draws` draws."""
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    pooled = (ours + theirs) / 2
    return (ours - theirs) / np.sqrt(2 * pooled * (1 - pooled) / draws)


def test_block_mask_statistics_equal_the_original(blocks: np.ndarray) -> None:
    theirs = ORIGINAL["block"]
    counts = blocks.sum(axis=(1, 2))
    assert np.abs(z_of_shares(blocks.mean(0), theirs["cell_probability"])).max() < Z
    assert abs(z_of_shares((counts == 98).mean(), theirs["share_at_cap"])) < Z
    assert abs(counts.mean() - theirs["count_mean"]) < Z * theirs["count_std"] * np.sqrt(2 / DRAWS)
    assert counts.max() == 98


def test_tube_mask_statistics_equal_the_original(tubes: np.ndarray) -> None:
    theirs = ORIGINAL["tube"]
    lengths = tubes.any(axis=(2, 3)).sum(axis=1)
    shares = np.asarray(list(theirs["length_histogram"].values())) / DRAWS
    assert np.abs(z_of_shares([(lengths == n).mean() for n in range(4, 9)], shares)).max() < Z
    fraction = tubes.mean(axis=(1, 2, 3))
    error = theirs["fraction_std"] * np.sqrt(2 / DRAWS)
    assert abs(fraction.mean() - theirs["fraction_mean"]) < Z * error
    assert np.abs(tubes.mean(axis=(0, 2, 3)) - theirs["time_cell_fraction"]).max() < Z * error * 2


def test_tube_mask_is_one_block_over_a_circular_run_of_frames(tubes: np.ndarray) -> None:
    wrapped = 0
    for mask in tubes[:500]:
        present = mask.any(axis=(1, 2))
        changes = int((present != np.roll(present, 1)).sum())
        assert changes == (0 if present.all() else 2)
        assert (mask[present] == mask[present][0]).all()
        wrapped += present[0] and present[-1] and not present.all()
    assert wrapped > 0


@settings(max_examples=60, deadline=None)
@given(
    grid=st.tuples(st.integers(2, 20), st.integers(2, 20)),
    ratio=st.floats(0.05, 0.9),
    key=st.integers(0, 1000),
)
def test_mask_of_any_grid_stays_under_its_cap(grid: tuple[int, int], ratio: float, key: int) -> None:
    config = replace(MaskConfig(), ratio=ratio)
    mask = block_mask(rng(key), grid, config)
    assert mask.shape == grid and mask.dtype == bool
    assert mask.sum() <= int(ratio * grid[0] * grid[1])
    np.testing.assert_array_equal(mask, block_mask(rng(key), grid, config))


def test_smallest_mask_block_scales_with_the_grid() -> None:
    counts = [block_mask(rng(i), (8, 8), MaskConfig()).sum() for i in range(200)]
    assert max(counts) == 32
    assert np.mean(counts) > 31  # with blocks of 16 cells, as on 14x14, it could seldom reach its cap


@pytest.mark.parametrize("clip", [True, False])
def test_row_index_points_at_masked_cells(clip: bool) -> None:
    if clip:
        mask = np.stack([tube_mask(rng(i), (4, 3, 5), MaskConfig(ratio=0.5)) for i in range(3)])
    else:
        mask = np.stack([block_mask(rng(i), (3, 5), MaskConfig(ratio=0.5)) for i in range(7)])
    repeat = 2 if clip else 1
    output = np.repeat(mask, 2, axis=1) if clip else mask
    per_frame = output.reshape(-1, 15)
    ids = np.arange(per_frame.size).reshape(per_frame.shape)  # an id that tells its place
    index = row_index(mask, repeat, bucket=32)
    frame, position = np.divmod(np.flatnonzero(output), 15)
    by_cell = np.lexsort((frame % repeat, position, frame // repeat))  # the last key comes first

    real = index.rows >= 0
    assert len(index.rows) % 32 == 0 and len(index.rows) - real.sum() < 32
    np.testing.assert_array_equal(index.rows[real], np.flatnonzero(output)[by_cell])
    np.testing.assert_array_equal(index.cells[real[::repeat]], np.flatnonzero(mask))
    assert len(index.cells) * repeat == len(index.rows) and (index.cells[~real[::repeat]] == -1).all()
    frames = masked_frames(mask, repeat)
    assert frames.shape == output.shape[:-2]
    np.testing.assert_array_equal(frames.reshape(-1), per_frame.any(axis=1))
    tokens = ids[frames.reshape(-1)].reshape(-1)[index.token_rows]
    np.testing.assert_array_equal(tokens[real], index.rows[real])
    assert (index.token_rows[~real] == 0).all()
    assert {a.dtype for a in vars(index).values()} == {np.dtype(np.int64)}


# Masks without a cell


@pytest.mark.parametrize(
    ("grid", "config"),
    [
        ((14, 14), MaskConfig(ratio=0.05)),
        ((14, 14), MaskConfig(ratio=0.03)),
        ((7, 9), MaskConfig(ratio=0.9, min_aspect=0.01)),
        ((2, 2), MaskConfig()),
        ((14, 14), MaskConfig()),
    ],
)
def test_predicted_share_of_empty_masks_equals_drawn_share(grid: tuple[int, int], config: MaskConfig) -> None:
    draws, share = 3000, empty_share(grid, config)
    drawn = np.mean([not block_mask(rng(i), grid, config).any() for i in range(draws)])
    assert abs(drawn - share) <= Z * np.sqrt(share * (1 - share) / draws) + 0.002


def test_many_empty_masks_are_warned_of_and_most_are_refused() -> None:
    (note,) = check_empty_masks((14, 14), MaskConfig(ratio=0.05))
    assert "29.9% of the masks" in note
    assert "data.mask.ratio=0.05 and data.mask.min_block=16 on 14x14 cells" in note
    assert "data.mask.min_block=9 helps" in note
    assert check_empty_masks((14, 14), MaskConfig(ratio=0.05, min_block=9)) == []
    with pytest.raises(UserError, match=r"62\.6% of the masks have no masked cell.*min_block=5"):
        check_empty_masks((14, 14), MaskConfig(ratio=0.03))


@pytest.mark.parametrize("name", PRETRAINING)
def test_recipes_have_no_empty_masks(name: str) -> None:
    data = get_recipe(name).data
    assert check_empty_masks((data.size // 16,) * 2, data.mask) == []


def test_batches_without_a_masked_cell_are_delivered(config: Config) -> None:
    """Every second mask or so is empty: some micro-batches hold no masked cell, and are delivered."""
    config = replace(config, data=replace(config.data, mask=MaskConfig(ratio=0.07, min_block=1000)))
    with Loader(config) as loader:
        batches = [next(loader), *eval_batches(config)]
    for stream in (s for batch in batches for s in (batch.video, batch.image)):
        assert (len(stream.rows), len(stream.cells), stream.view.shape[0], stream.count) == (0, 0, 0, 0)
        assert not stream.mask.any()
