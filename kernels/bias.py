"""The relative position bias as the attention kernels read it: codes with a table to gather from, or a tile.

A gather costs the load unit of a multiprocessor some 8 clocks for 32 scores, as measured on an H200, and no memory. A
tile holds the biases of all pairs of tokens of a window in the table's own precision; it is made once a call for each
head, stays in the second-level cache, and is read 16 bytes at a time. Both give the same bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .configs import BIAS_TILE, BIAS_TILE_BYTES, PREPARE, Options, bias_tile_options
from .geometry import Windows
from .launches import architecture, launch, options_of
from .tiles import CODES, beyond_cuts, code_stride, coordinates, part_size, part_start, score_stride


@triton.jit(do_not_specialize=["heads", "ROWS", "WT", "WH", "WW", "MT", "MH", "MW", "BT", "BH", "BW", "UT", "UH"])
def prepare_kernel(
    bias_table, table, codes, heads, ROWS, WT, WH, WW, MT, MH, MW, BT, BH, BW, UT, UH, BLOCK: tl.constexpr
):  # fmt: skip
    """What every program of a call needs, in the form in which it is read.

    bias_table (ROWS, heads) of any float type -> table (heads, ROWS), fp32; and codes
    (shapes, N rounded up to CODES): the codes of the tokens of each shape that a region can have, numbered by
    part of the window along time, height, width, 3 each. A token's place for the bias is that of its number in the
    window, in the box (BT, BH, BW). The first programs do the former, the rest the latter.
    """
    blocks = tl.cdiv(ROWS, BLOCK)
    pid = tl.program_id(0)
    if pid < heads * blocks:
        head = pid // blocks
        row = pid % blocks * BLOCK + tl.arange(0, BLOCK)
        values = tl.load(bias_table + row * heads + head, mask=row < ROWS)
        tl.store(table + head * ROWS + row, values.to(tl.float32), mask=row < ROWS)
    else:
        stride = code_stride(WT * WH * WW)
        pid = pid - heads * blocks
        shape = pid // tl.cdiv(stride, BLOCK)
        n = pid % tl.cdiv(stride, BLOCK) * BLOCK + tl.arange(0, BLOCK)
        # No region has an empty part; its codes are never read, but must not divide by zero.
        size_t = tl.maximum(part_size(shape // 9, WT, MT), 1)
        size_h = tl.maximum(part_size(shape // 3 % 3, WH, MH), 1)
        size_w = tl.maximum(part_size(shape % 3, WW, MW), 1)
        t, h, w = coordinates(n, (size_t, size_h, size_w))
        t += part_start(shape // 9, WT, MT)
        h += part_start(shape // 3 % 3, WH, MH)
        w += part_start(shape % 3, WW, MW)
        t, h, w = coordinates((t * WH + h) * WW + w, (BT, BH, BW))
        tl.store(codes + shape * stride + n, t * UT + h * UH + w, mask=n < stride)


@triton.jit(do_not_specialize=["heads", "ROWS", "WT", "WH", "WW", "MT", "MH", "MW"])
def bias_tile_kernel(
    table, codes, tile, heads, ROWS, WT, WH, WW, MT, MH, MW, BLOCK: tl.constexpr, FLIPPED: tl.constexpr
):
    """table and codes of `prepare_kernel` -> tile (shapes, heads, N, N rounded up): the bias of each query (row) and
    key of a region's shape. FLIPPED: (cuts, heads, N, N rounded up), of each key (row) and query of a window, by the
    axes on which it is cut; minus infinity where a cut parts them. Columns past the last token are zeros.
    """
    tokens, head, number = WT * WH * WW, tl.program_id(1), tl.program_id(2)
    stride = score_stride(tokens)
    blocks = tl.cdiv(stride, BLOCK)
    row = tl.program_id(0) // blocks * BLOCK + tl.arange(0, BLOCK)
    column = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    last = tokens
    if not FLIPPED:
        last = part_size(number // 9, WT, MT) * part_size(number // 3 % 3, WH, MH) * part_size(number % 3, WW, MW)
        codes += number * code_stride(tokens)
    down = tl.load(codes + row, mask=row < last, other=0)[:, None]
    across = tl.load(codes + column, mask=column < last, other=0)[None, :]
    inside = (row < last)[:, None] & (column < last)[None, :]
    offset = across - down if FLIPPED else down - across
    value = tl.load(table + head * ROWS + ROWS // 2 + offset, mask=inside, other=0.0)
    if FLIPPED:
        part = beyond_cuts(row, (WT, WH, WW), (MT, MH, MW)) & number
        parted = part[:, None] != (beyond_cuts(column, (WT, WH, WW), (MT, MH, MW)) & number)[None, :]
        value = tl.where(parted & inside, float("-inf"), value)
    tile += (number * heads + head).to(tl.int64) * tokens * stride
    stored = (row < last)[:, None] & (column < stride)[None, :]
    tl.store(tile + row[:, None] * stride + column[None, :], value, mask=stored)


def launch_prepare(bias_table: Tensor, windows: Windows) -> tuple[Tensor, Tensor]:
    """The table as the kernels read it, (h, rows) in fp32, and the codes, int32 (shapes, padded N)."""
    rows, heads = bias_table.shape
    table, codes = empty_tables(bias_table, windows)
    sizes = (heads, rows, *windows.window, *windows.mask_shift, *windows.bias_box, *windows.table_strides)
    grid = (heads * triton.cdiv(rows, PREPARE) + windows.shapes * triton.cdiv(codes.shape[1], PREPARE),)
    launch(prepare_kernel, grid, bias_table, table, codes, *sizes, BLOCK=PREPARE)
    return table, codes


def tile_kinds(windows: Windows, flipped: bool) -> int:
    """How many tiles a head has: one for each shape of a region, or for each set of axes on which a window is cut."""
    cuts = sum(bit for bit, cut in zip((4, 2, 1), windows.mask_shift, strict=True) if cut)
    return cuts + 1 if flipped else windows.shapes


def launch_bias_tile(table: Tensor, codes: Tensor, windows: Windows, dtype: torch.dtype, flipped: bool) -> Tensor:
    """`bias_tile_kernel`'s tile in `dtype`."""
    heads, kinds = len(table), tile_kinds(windows, flipped)
    tile = table.new_empty((kinds, heads, windows.tokens, windows.score_stride), dtype=dtype)
    sizes = (heads, table.shape[1], *windows.window, *windows.mask_shift)
    blocks = triton.cdiv(windows.tokens, BIAS_TILE["BLOCK"]) * triton.cdiv(windows.score_stride, BIAS_TILE["BLOCK"])
    launch(bias_tile_kernel, (blocks, heads, kinds), table, codes, tile, *sizes, FLIPPED=flipped, **BIAS_TILE)
    return tile


def empty_tables(bias_table: Tensor, windows: Windows) -> tuple[Tensor, Tensor]:
    """Memory for the two results of `prepare_kernel`."""
    padded = triton.cdiv(windows.tokens, CODES) * CODES
    table = bias_table.new_empty((bias_table.shape[1], bias_table.shape[0]), dtype=torch.float32)
    return table, bias_table.new_empty((windows.shapes, padded), dtype=torch.int32)


def launch_bias(
    kernel: str, qkv: Tensor, tables: tuple[Tensor, Tensor], windows: Windows, dtype: torch.dtype, flipped: bool
) -> tuple[Tensor, Options]:
    """What an attention kernel reads its biases from, and its launch options: a tile where the architecture has tiled
    options, the table's `dtype` is that of the activations and the tile is no larger than BIAS_TILE_BYTES."""
    table, codes = tables
    width = qkv.shape[-1]
    size = tile_kinds(windows, flipped) * len(table) * windows.tokens * windows.score_stride * dtype.itemsize
    tiled = bias_tile_options(architecture(qkv.device), kernel, qkv.dtype, width)
    if tiled is None or dtype != qkv.dtype or size > BIAS_TILE_BYTES:
        return table, options_of(kernel, qkv)
    return launch_bias_tile(table, codes, windows, dtype, flipped), {"D": width, **tiled}
