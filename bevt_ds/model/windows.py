"""The attention windows of a block: a pure function of sizes, counted in tokens along (time, height, width).

Source: xyzforever/BEVT@8881b21, mmaction/models/backbones/swin_transformer_bevt.py. An image is a clip with one token
of time, so the same function serves both.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Literal

from bevt_ds.kernels.geometry import Size3, Windows, table_rows

__all__ = ["Size3", "SmallWindows", "WindowPolicy", "Windows", "block_windows", "table_rows"]

WindowPolicy = Literal["official", "swin"]
SmallWindows = Literal["exact", "official"]


@lru_cache(maxsize=1024)
def block_windows(
    grid: Size3, window: Size3, *, shifted: bool, policy: WindowPolicy = "swin", small: SmallWindows = "exact"
) -> Windows:
    """The windows of a block on `grid`, which is padded to a multiple of them; every second block is `shifted`.

    An axis no longer than its window gets one window and no shift. `policy="official"` is what the original does to
    images: it masks along the seam in unshifted blocks too, and still shifts an axis exactly as long as its window.
    `small` is about windows clipped in height or width: "exact" gives each pair of tokens the bias of its offset,
    "official" that of the pair with the same numbers in a whole window, as the original and torchvision do.
    """
    quirk = policy == "official"
    clipped = tuple(map(min, grid, window))
    half = tuple(w // 2 if extent > w or (quirk and extent == w) else 0 for extent, w in zip(grid, window, strict=True))
    return Windows(
        grid=tuple(extent + -extent % w for extent, w in zip(grid, clipped, strict=True)),
        window=clipped,
        table_window=window,
        shift=half if shifted else (0, 0, 0),
        mask_shift=half if shifted or quirk else (0, 0, 0),
        bias_by_number=small == "official" and clipped[1:] != window[1:],
    )
