"""BEVT's masks: block-wise for images, a tube through time for clips. True = masked.

The generators follow mask_generator.py of xyzforever/BEVT@8881b21 (BEiT's block-wise algorithm), with an explicit
`numpy.random.Generator` where the original used Python's global one, and for any grid.

Shape letters: B samples, T frames, h w mask grid (H/16, W/16), R masked cells, F frames with a masked cell.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from bevt_ds.config.samples import MaskConfig
from bevt_ds.errors import UserError

ATTEMPTS = 10  # draws for one block before the mask is left as it is
POINTS = 256  # of a numerical integral, along each of its two axes
# shares of masks without a cell: above the first a note, above the second no run
MOST_EMPTY_UNNOTED, MOST_EMPTY = 0.001, 0.5
REFERENCE_CELLS = 14 * 14  # the grid that MaskConfig.min_block is given for
# rows are padded to a multiple of this, so that few distinct sizes reach the device
ROW_BUCKET = 256


@dataclass(frozen=True)
class RowIndex:
    """Which output positions are scored and where their ids lie (see bevt_ds.batch.Stream)."""

    rows: np.ndarray  # int64 (R,), -1 pads
    cells: np.ndarray  # int64 (R/frames_per_cell,), -1 pads
    token_rows: np.ndarray  # int64 (R,), 0 for padding


def block_mask(rng: np.random.Generator, grid: tuple[int, int], config: MaskConfig) -> np.ndarray:
    """A block-wise 2-D mask: bool (h, w) with at most `ratio` of its cells set.

    Rectangles are added until the cap is reached or `ATTEMPTS` draws in a row add nothing. While it grows, the mask is
    one Python integer with a bit a cell: a union and a count cost one operation each, which matters because every rank
    draws the masks of the whole global batch.
    """
    height, width = grid
    cap = int(config.ratio * height * width)
    min_area = config.min_block * height * width / REFERENCE_CELLS
    uniforms = _uniforms(rng)
    cells, count = 0, 0
    while count < cap:
        cells, added = _grow(cells, cap - count, min_area, config.min_aspect, grid, uniforms)
        if not added:
            break
        count += added
    raw = np.frombuffer(cells.to_bytes((height * width + 7) // 8, "little"), dtype=np.uint8)
    return np.unpackbits(raw, count=height * width, bitorder="little").astype(bool).reshape(grid)


def empty_share(grid: tuple[int, int], config: MaskConfig) -> float:
    """The expected share of block masks without a cell: of those whose first block fits in none of `ATTEMPTS` draws.

    It is that of a tube's masks too. The probability that a draw fits is summed over POINTS x POINTS values of the
    two uniform numbers that decide the block's size.
    """
    height, width = grid
    cap = int(config.ratio * height * width)
    uniform = (np.arange(POINTS) + 0.5) / POINTS
    min_area = config.min_block * height * width / REFERENCE_CELLS
    area = min_area + (cap - min_area) * uniform[:, None]
    aspect = config.min_aspect ** (1 - 2 * uniform)
    h, w = np.rint(np.sqrt(area * aspect)), np.rint(np.sqrt(area / aspect))
    fits = (h > 0) & (h < height) & (w > 0) & (w < width) & (h * w <= cap)
    return float((1 - fits.mean()) ** ATTEMPTS)


def check_empty_masks(grid: tuple[int, int], config: MaskConfig) -> list[str]:
    """A note about masks without a cell, whose samples teach nothing, if there are more than a few.

    Raises:
        UserError: most masks would be empty.
    """
    share = empty_share(grid, config)
    if share <= MOST_EMPTY_UNNOTED:
        return []
    smaller = (replace(config, min_block=cells) for cells in range(config.min_block - 1, 0, -1))
    remedies = (f"data.mask.min_block={c.min_block}" for c in smaller if empty_share(grid, c) <= MOST_EMPTY_UNNOTED)
    remedy = next(remedies, "a larger data.mask.ratio or data.mask.min_aspect")
    text = (
        f"{share:.1%} of the masks have no masked cell with data.mask.ratio={config.ratio:g} and data.mask.min_block="
        f"{config.min_block} on {grid[0]}x{grid[1]} cells, and their samples teach nothing; {remedy} helps."
    )
    if share > MOST_EMPTY:
        raise UserError(text)
    return [text]


def tube_mask(rng: np.random.Generator, grid: tuple[int, int, int], config: MaskConfig) -> np.ndarray:
    """A tube mask: bool (T/2, h, w). One 2-D mask on a run of temporal cells that may wrap around the clip's end."""
    times, height, width = grid
    shortest, longest = (int(share * times) for share in config.tube)
    length = int(rng.integers(max(shortest, 1), min(longest, times) + 1))
    start = int(rng.integers(times))
    mask = np.zeros(grid, dtype=bool)
    mask[(start + np.arange(length)) % times] = block_mask(rng, (height, width), config)
    return mask


def masked_frames(mask: np.ndarray, frames_per_cell: int) -> np.ndarray:
    """Which frames, or images, hold a masked cell and so are tokenized: bool (B, T) or (B,). mask: as `row_index`'s."""
    return np.repeat(mask.any(axis=(-2, -1)), frames_per_cell, axis=-1)


def row_index(mask: np.ndarray, frames_per_cell: int, bucket: int = ROW_BUCKET) -> RowIndex:
    """Index tensors of a micro-batch's masks.

    mask: bool (B, T/2, h, w) with `frames_per_cell` 2, or (B, h, w) with `frames_per_cell` 1 for images. bucket: a
    multiple of `frames_per_cell`.
    """
    plane = mask.shape[-2] * mask.shape[-1]
    cells = np.flatnonzero(mask)
    first_frame = cells // plane * frames_per_cell  # in (B*T,)
    frame_of_row = (first_frame[:, None] + np.arange(frames_per_cell)).reshape(-1)
    position_of_row = np.repeat(cells % plane, frames_per_cell)
    rank_of_frame = np.cumsum(masked_frames(mask, frames_per_cell)) - 1
    rows = frame_of_row * plane + position_of_row
    token_rows = rank_of_frame[frame_of_row] * plane + position_of_row
    padding = -len(rows) % bucket
    return RowIndex(
        rows=np.pad(rows, (0, padding), constant_values=-1),
        cells=np.pad(cells, (0, padding // frames_per_cell), constant_values=-1),
        token_rows=np.pad(token_rows, (0, padding)),
    )


def _uniforms(rng: np.random.Generator) -> Iterator[list[float]]:
    """Endless draws of four numbers in [0,1), made in blocks: one call for a typical mask."""
    while True:
        yield from rng.random((16, 4)).tolist()


def _grow(
    cells: int,
    allowed: int,
    min_area: float,
    min_aspect: float,
    grid: tuple[int, int],
    uniforms: Iterator[list[float]],
) -> tuple[int, int]:
    """`cells` with one more rectangle of at most `allowed` new cells, and how many it added (0: none fitted)."""
    height, width = grid
    for _ in range(ATTEMPTS):
        u_area, u_aspect, u_top, u_left = next(uniforms)
        area = min_area + (allowed - min_area) * u_area
        aspect = min_aspect ** (1 - 2 * u_aspect)  # log-uniform between min_aspect and its inverse
        h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if not (0 < h < height and 0 < w < width):
            continue
        top, left = int(u_top * (height - h + 1)), int(u_left * (width - w + 1))
        row = ((1 << w) - 1) << left
        block = sum(row << ((top + i) * width) for i in range(h))
        added = (block & ~cells).bit_count()
        if 0 < added <= allowed:
            return cells | block, added
    return cells, 0
