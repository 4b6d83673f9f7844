"""The geometry of shifted windows: what the kernels, their launchers and the FLOP counts agree on.

A mask shift cuts the last window of an axis in two, and tokens attend only within their part. So a map
is a grid of boxes, the *regions*, and attention runs in each of them with no mask at all.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

Size3 = tuple[int, int, int]

MAX_TOKENS = 1024  # of a window; the kernels' division by multiplication is exact up to here


@dataclass(frozen=True)
class Windows:
    """A token map (T, H, W), its windows, the window that its bias table was made for, and the shifts."""

    grid: Size3
    window: Size3
    table_window: Size3
    shift: Size3
    mask_shift: Size3

    def __post_init__(self) -> None:
        for name in ("grid", "window", "table_window", "shift", "mask_shift"):
            if len(getattr(self, name)) != 3:
                raise ValueError(f"{name}={getattr(self, name)} must have 3 entries: time, height, width")
        for axis in range(3):
            self._check_axis(axis)
        if self.tokens > MAX_TOKENS:
            raise ValueError(f"window {self.window} has {self.tokens} tokens; at most {MAX_TOKENS}")

    def _check_axis(self, axis: int) -> None:
        extent, size, widest = self.grid[axis], self.window[axis], self.table_window[axis]
        if not 1 <= size <= widest:
            raise ValueError(f"window {self.window} does not fit the bias table of {self.table_window}")
        if extent < size or extent % size:
            raise ValueError(f"the map {self.grid} is not a multiple of the window {self.window}: pad it")
        for name in ("shift", "mask_shift"):
            if not 0 <= getattr(self, name)[axis] < size:
                raise ValueError(f"{name} {getattr(self, name)} must be within [0, {self.window})")

    @property
    def tokens(self) -> int:
        """Tokens of a whole window, N."""
        return prod(self.window)

    @property
    def counts(self) -> Size3:
        """Windows along each axis."""
        return tuple(e // w for e, w in zip(self.grid, self.window, strict=True))

    @property
    def whole(self) -> int:
        """Windows of one sample."""
        return prod(self.counts)

    @property
    def regions(self) -> int:
        """Boxes of tokens that attend to each other, in one sample."""
        return prod(n + (m > 0) for n, m in zip(self.counts, self.mask_shift, strict=True))

    @property
    def shapes(self) -> int:
        """Rows of the kernels' table of codes: 3 parts for each axis from the first one that is cut."""
        return next((3 ** (3 - axis) for axis in range(3) if self.mask_shift[axis]), 1)

    @property
    def wraps(self) -> bool:
        """Whether a region can straddle the edge over which the shift rolls the map."""
        return any(s and s != m for s, m in zip(self.shift, self.mask_shift, strict=True))

    @property
    def table_strides(self) -> tuple[int, int]:
        """Rows of the table between neighbouring time offsets, and between neighbouring height offsets."""
        _, height, width = self.table_window
        return (2 * height - 1) * (2 * width - 1), 2 * width - 1

    @property
    def table_rows(self) -> int:
        """Offsets in the table; the zero offset is the middle row."""
        t, h, w = self.table_window
        return (2 * t - 1) * (2 * h - 1) * (2 * w - 1)

    @property
    def dense_pairs(self) -> int:
        """Query-key pairs of one sample and head if every window attended in full."""
        return prod(self.grid) * self.tokens

    @property
    def pairs(self) -> int:
        """Query-key pairs of one sample and head within regions: the sum of squares factors by axis."""
        return prod(
            (n - (m > 0)) * w * w + (m > 0) * (m * m + (w - m) * (w - m))
            for n, w, m in zip(self.counts, self.window, self.mask_shift, strict=True)
        )

    def scalars(self) -> tuple[int, ...]:
        """The kernels' geometry arguments, in the order of `tiles.GEOMETRY`."""
        return (*self.grid, *self.window, *self.shift, *self.mask_shift, self.table_rows)
