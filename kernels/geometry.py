"""The geometry of shifted windows: what the kernels, their launchers and the FLOP counts agree on.

A mask shift cuts the last window of an axis in two, and tokens attend only within their part. So a map
is a grid of boxes, the *regions*, and attention runs in each of them with no mask at all.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from math import prod
from typing import Self

Size3 = tuple[int, int, int]

MAX_TOKENS = 1024  # of a window; the kernels' division by multiplication is exact up to here


def table_rows(window: Size3) -> int:
    """Rows of the bias table for `window`: one for each offset between two of its tokens."""
    t, h, w = window
    return (2 * t - 1) * (2 * h - 1) * (2 * w - 1)


@dataclass(frozen=True)
class Windows:
    """Attention windows on a map of tokens, all sizes in tokens along (time, height, width).

    ValueError where the sizes do not fit together.
    """

    grid: Size3  # the map, in multiples of the window
    window: Size3
    table_window: Size3  # the window that the bias table was made for, at least `window`
    shift: Size3  # of the windows: the map counts as rolled by -shift
    mask_shift: Size3  # where the last window of each axis is cut into parts that do not see each other
    # A token's row in the bias table follows its number in the window, counted in a window as wide as the table's,
    # instead of its place: what the original does, and another bias where the window is narrower than the table's.
    bias_by_number: bool = False

    def __post_init__(self) -> None:
        for name in ("grid", "window", "table_window", "shift", "mask_shift"):
            if len(getattr(self, name)) != 3:
                raise ValueError(f"{name}={getattr(self, name)} must have 3 entries: time, height, width")
        for axis in range(3):
            self._check_axis(axis)
        if prod(self.bias_box) > MAX_TOKENS:
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

    @property  # as the others not kept: torch.compile traces them, and cannot trace a cached property
    def tokens(self) -> int:
        """Tokens of a whole window, N."""
        return prod(self.window)

    @property
    def score_stride(self) -> int:
        """Length of a row of dS in memory, as `tiles.score_stride`."""
        return -(-self.tokens // 8) * 8

    @property
    def bias_box(self) -> Size3:
        """The box of tokens in which a token's number in the window gives its place for the bias."""
        if not self.bias_by_number:
            return self.window
        _, height, width = self.table_window
        return -(-self.tokens // (height * width)), height, width

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
        return table_rows(self.table_window)

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

    def settings(self) -> list[int]:
        """All but the grid, as an operator of torch takes it."""
        return [*self.window, *self.table_window, *self.shift, *self.mask_shift, int(self.bias_by_number)]

    @classmethod
    @lru_cache(maxsize=256)
    def of(cls, grid: Size3, settings: tuple[int, ...]) -> Self:
        """The inverse of `settings`; kept, as every call of an operator asks for it."""
        window, table_window, shift, mask_shift = (tuple(settings[i : i + 3]) for i in range(0, 12, 3))
        return cls(grid, window, table_window, shift, mask_shift, bool(settings[12]))

    @cached_property
    def scalars(self) -> tuple[int, ...]:
        """The kernels' geometry arguments, in the order of `tiles.GEOMETRY`."""
        return (*self.grid, *self.window, *self.shift, *self.mask_shift, self.table_rows)
