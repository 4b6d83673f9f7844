"""Sums of what the programs of a kernel left behind: the second stage of gradients that every row adds to."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .configs import SUM
from .launches import launch


@triton.jit(do_not_specialize=["parts", "columns"])
def sum_partials_kernel(partial, out, parts, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """partial (parts, columns) fp32 -> out (columns,) of any float type, in one order."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for first in range(0, parts, ROWS):
        row = first + tl.arange(0, ROWS)
        inside = (row < parts)[:, None] & (column < columns)[None, :]
        total += tl.load(partial + row[:, None] * columns + column[None, :], mask=inside, other=0.0)
    tl.store(out + column, tl.sum(total, 0), mask=column < columns)


def launch_sum(partial: Tensor, out: Tensor) -> None:
    """out, of as many values as a row of partial (P, K) has, becomes the sum of the rows."""
    parts, columns = partial.shape
    grid = (triton.cdiv(columns, SUM["COLUMNS"]),)
    launch(sum_partials_kernel, grid, partial, out, parts, columns, **SUM)
