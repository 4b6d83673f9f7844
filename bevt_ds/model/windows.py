"""Geometry of one block's attention windows: pure functions of sizes, counted in tokens along (time, height, width).

Source: xyzforever/BEVT@8881b21, mmaction/models/backbones/swin_transformer_bevt.py. An image is a clip with one token
of time, so the same functions serve both.
"""

from __future__ import annotations

from math import prod
from typing import Literal, NamedTuple

Size3 = tuple[int, int, int]
WindowPolicy = Literal["official", "swin"]


class WindowGeometry(NamedTuple):
    """What the attention op needs to know about one block on one grid."""

    window: Size3  # clipped to the grid
    shift: Size3  # how far the windows are displaced
    mask_shift: Size3  # tokens on the two sides of the seam that a shift by this much makes do not attend to each other
    pad: Size3  # tokens appended to each axis, so that windows tile the grid


def block_geometry(grid: Size3, window: Size3, *, shifted: bool, policy: WindowPolicy = "swin") -> WindowGeometry:
    """The windows of a block on `grid`; every second block of a stage is `shifted`.

    An axis no longer than its window gets one window and no shift. `policy="official"` is what the original does to
    images: it masks along the seam in unshifted blocks too, and still shifts an axis exactly as long as its window.
    """
    quirk = policy == "official"
    clipped = tuple(map(min, grid, window))
    half = tuple(w // 2 if extent > w or (quirk and extent == w) else 0 for extent, w in zip(grid, window, strict=True))
    return WindowGeometry(
        window=clipped,
        shift=half if shifted else (0, 0, 0),
        mask_shift=half if shifted or quirk else (0, 0, 0),
        pad=tuple(-extent % w for extent, w in zip(grid, clipped, strict=True)),
    )


def bias_rows(window: Size3) -> int:
    """Rows of the relative position bias table: one for every offset between two tokens of a window."""
    return prod(2 * w - 1 for w in window)
