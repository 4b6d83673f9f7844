"""Windowed attention, forward: q, k and v read in place, the bias from its table, softmax online.

Letters as in reference.py. A program owns one head of one region (a box of tokens that attend to each
other) and walks over its queries in tiles of BLOCK_M, over its keys in tiles of BLOCK_N, the remainder
in tiles of TAIL; up to LAST queries that are left over take one tile of that height. Exponents are base 2.

The bias comes from its table, by a gather of 4 bytes a score, or from a tile (TILED): the biases of all pairs of tokens
that a region can have, made once a call for each head in the table's own precision. Both give the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .attention_backward import launch_backward, launch_fold
from .bias import empty_tables, launch_bias, launch_prepare
from .configs import forward_is_small, small_groups
from .dispatch import custom_op, with_gradient
from .geometry import Windows
from .launches import launch_regions, launch_small_windows
from .tiles import (
    GEOMETRY,
    LOG2E,
    beyond_cuts,
    biases,
    code_stride,
    dot,
    load_rows,
    locate,
    region,
    row_biases,
    scaled,
    score_stride,
    small_bias,
    store_rows,
    whole_tiles,
    window_origin,
)


@triton.jit
def attend(
    state, q, bias, bias_q, keys, start, size, qkv, codes, width, scale, grid, stride,
    D: tl.constexpr, WRAP: tl.constexpr, TILED: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """One step of the online softmax, over the key numbers `keys`; `state` is (acc, maximum, sum)."""
    acc, high, total = state
    place = locate(keys, start, size, grid, WRAP)
    k = load_rows(qkv + width, place, 3 * width, D)
    s = scaled(dot(q, tl.trans(k)), biases(bias, bias_q, codes, keys, stride, 1, TILED, MASKED), scale)
    if MASKED:
        s = tl.where((keys < size[0] * size[1] * size[2])[None, :], s, float("-inf"))
    new_high = tl.maximum(high, tl.max(s, 1))
    base = new_high * LOG2E
    shrink = tl.exp2(high * LOG2E - base)
    p = tl.exp2(s * LOG2E - base[:, None])
    total = total * shrink + tl.sum(p, 1)
    v = load_rows(qkv + 2 * width, place, 3 * width, D)
    acc = dot(p.to(v.dtype), v, acc * shrink[:, None])
    return acc, new_high, total


@triton.jit
def attend_rows(
    rows, start, size, qkv, bias, codes, out, lse, width, scale, grid, stride,
    D: tl.constexpr, BLOCK_N: tl.constexpr, TAIL: tl.constexpr, WRAP: tl.constexpr, TILED: tl.constexpr,
):  # fmt: skip
    """out and lse of the query numbers `rows` of a region."""
    tokens = size[0] * size[1] * size[2]
    whole = tokens // BLOCK_N * BLOCK_N
    place = locate(rows, start, size, grid, WRAP)
    bias_q = row_biases(bias, codes, rows, tokens, stride, 1, TILED)
    q = load_rows(qkv, place, 3 * width, D)
    acc = tl.zeros([rows.shape[0], D], tl.float32)
    high = tl.full([rows.shape[0]], float("-inf"), tl.float32)
    total = tl.zeros([rows.shape[0]], tl.float32)
    for n in range(0, whole, BLOCK_N):
        acc, high, total = attend(
            (acc, high, total), q, bias, bias_q, n + tl.arange(0, BLOCK_N), start, size, qkv, codes,
            width, scale, grid, stride, D, WRAP, TILED, False,
        )  # fmt: skip
    for n in range(whole, tokens, TAIL):
        acc, high, total = attend(
            (acc, high, total), q, bias, bias_q, n + tl.arange(0, TAIL), start, size, qkv, codes,
            width, scale, grid, stride, D, WRAP, TILED, True,
        )  # fmt: skip
    store_rows(out, place, width, acc / total[:, None], rows < tokens, D)
    tl.store(lse + place, high * LOG2E + tl.log2(total), mask=rows < tokens)


@triton.jit(do_not_specialize=(*GEOMETRY, "heads", "splits"))
def window_attention_fwd_kernel(
    qkv, bias, codes, out, lse, scale, heads, splits,
    T, H, W, WT, WH, WW, ST, SH, SW, MT, MH, MW, ROWS,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TAIL: tl.constexpr, LAST: tl.constexpr,
    WRAP: tl.constexpr, TILED: tl.constexpr,
):  # fmt: skip
    """qkv (B, T, H, W, 3, h, D), bias: the table of `prepare_kernel` or the tile of `bias_tile_kernel`, codes
    -> out (B, T, H, W, h * D), lse (B, h, T * H * W)."""
    grid = (T, H, W)
    pid = tl.program_id(0)
    head = pid % heads
    split = pid // heads % splits
    sample, start, size, shape = region(pid // (heads * splits), grid, (WT, WH, WW), (ST, SH, SW), (MT, MH, MW))
    tokens = size[0] * size[1] * size[2]
    width = heads * D
    qkv += sample * (T * H * W) * (3 * width) + head * D
    out += sample * (T * H * W) * width + head * D
    lse += (sample * heads + head) * (T * H * W)
    most = WT * WH * WW
    stride = score_stride(most)
    if TILED:
        bias += (shape * heads + head).to(tl.int64) * most * stride
    else:
        bias += head * ROWS + ROWS // 2
        codes += shape * code_stride(most)
    whole = whole_tiles(tokens, BLOCK_M, LAST)
    for first in range(split * BLOCK_M, whole, splits * BLOCK_M):
        attend_rows(
            first + tl.arange(0, BLOCK_M), start, size, qkv, bias, codes, out, lse, width, scale, grid, stride,
            D, BLOCK_N, TAIL, WRAP, TILED,
        )  # fmt: skip
    if LAST > 0:  # noqa: SIM102  a constant: no tile of no rows is compiled
        if (split == splits - 1) & (whole < tokens):
            attend_rows(
                whole + tl.arange(0, LAST), start, size, qkv, bias, codes, out, lse, width, scale, grid, stride,
                D, BLOCK_N, TAIL, WRAP, TILED,
            )  # fmt: skip


@triton.jit(do_not_specialize=(*GEOMETRY, "heads", "batch", "groups"))
def window_attention_fwd_small_kernel(
    qkv, table, codes, out, lse, scale, heads, batch, groups,
    T, H, W, WT, WH, WW, ST, SH, SW, MT, MH, MW, ROWS,
    D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """As `window_attention_fwd_kernel`, for windows of at most BLOCK tokens.

    A program walks over windows, not over regions: the parts of a cut window fill one tile together, and the bias stays
    in registers.
    """
    grid, window, shift, mask_shift = (T, H, W), (WT, WH, WW), (ST, SH, SW), (MT, MH, MW)
    tokens = WT * WH * WW
    head = tl.program_id(0) % heads
    group = tl.program_id(0) // heads
    width = heads * D
    n = tl.arange(0, BLOCK)
    inside = n < tokens
    code = tl.load(codes + n)
    bias = small_bias(table + head * ROWS + ROWS // 2, code, inside)
    windows = batch * ((T * H * W) // tokens)
    for i in range(group, windows, groups):
        sample, origin, cuts = window_origin(i, grid, window, shift, mask_shift)
        at = sample * (T * H * W)
        place = locate(n, origin, window, grid, True)
        base = qkv + at * (3 * width) + head * D
        q = load_rows(base, place, 3 * width, D)
        k = load_rows(base + width, place, 3 * width, D)
        v = load_rows(base + 2 * width, place, 3 * width, D)
        s = scaled(dot(q, tl.trans(k)), bias, scale)
        if cuts != 0:
            part = beyond_cuts(n, window, mask_shift) & cuts
            s = tl.where(part[:, None] == part[None, :], s, float("-inf"))
        high = tl.max(s, 1) * LOG2E
        p = tl.exp2(s * LOG2E - high[:, None])
        total = tl.sum(p, 1)
        acc = dot(p.to(v.dtype), v) / total[:, None]
        store_rows(out + at * width + head * D, place, width, acc, inside, D)
        tl.store(lse + (sample * heads + head) * (T * H * W) + place, high + tl.log2(total), mask=inside)


def launch_forward(
    qkv: Tensor, bias_table: Tensor, windows: Windows, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """out (B, T, H, W, h * d) in qkv's dtype, the base-2 log-sum-exp (B, h, T * H * W) in fp32, and `launch_prepare`'s
    two, which the backward pass reads again."""
    out, lse = empty_outputs(qkv)
    table, codes = tables = launch_prepare(bias_table, windows)
    if forward_is_small(windows.tokens, qkv.shape[-1], qkv.dtype):
        groups = small_groups("fwd_small", len(qkv) * windows.whole, qkv.shape[5])
        tensors = (qkv, table, codes, out, lse)
        launch_small_windows(window_attention_fwd_small_kernel, "fwd_small", tensors, windows, scale, groups)
    else:
        bias, tile = launch_bias("fwd", qkv, tables, windows, bias_table.dtype, False)
        launch_regions(window_attention_fwd_kernel, tile, (qkv, bias, codes, out, lse), windows, scale)
    return out, lse, *tables


def empty_outputs(qkv: Tensor) -> tuple[Tensor, Tensor]:
    """Memory for the two results of the forward pass."""
    b, t, h, w, _, heads, d = qkv.shape
    out = qkv.new_empty((b, t, h, w, heads * d))
    return out, qkv.new_empty((b, heads, t * h * w), dtype=torch.float32)


def run_forward(
    qkv: Tensor, bias_table: Tensor, settings: Sequence[int], scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """out, log-sum-exp, and what `prepare_kernel` makes, for `Windows.settings`; opaque to the compiler."""
    windows = Windows.of(tuple(qkv.shape[1:4]), tuple(settings))
    return launch_forward(qkv.contiguous(), bias_table.contiguous(), windows, scale)


def run_backward(
    dout: Tensor,
    qkv: Tensor,
    bias_table: Tensor,
    out: Tensor,
    lse: Tensor,
    table: Tensor,
    codes: Tensor,
    settings: Sequence[int],
    scale: float,
) -> tuple[Tensor, Tensor]:
    """dqkv and dtable."""
    windows = Windows.of(tuple(qkv.shape[1:4]), tuple(settings))
    tensors = (dout.contiguous(), qkv.contiguous(), table, codes, out, lse)
    dqkv, pairs = launch_backward(*tensors, windows, scale, bias_table.dtype)
    return dqkv, launch_fold(pairs, bias_table.contiguous(), windows)


forward_op = custom_op("window_attention", run_forward)
backward_op = custom_op("window_attention_backward", run_backward)


@forward_op.register_fake
def _(qkv, bias_table, settings, scale):
    windows = Windows.of(tuple(settings[:3]), tuple(settings))  # the tables are of no map, whose sizes may be symbols
    return *empty_outputs(qkv), *empty_tables(bias_table, windows)


@backward_op.register_fake
def _(dout, qkv, bias_table, out, lse, table, codes, settings, scale):
    return (
        torch.empty_like(qkv, memory_format=torch.contiguous_format),
        torch.empty_like(bias_table, memory_format=torch.contiguous_format),
    )


def save_for_backward(ctx, inputs, output) -> tuple[Tensor, ...]:
    """Keeps what the linear layers around the op keep anyway, plus the log-sum-exp and the small tables."""
    qkv, bias_table, ctx.settings, ctx.scale = inputs
    return qkv, bias_table, *output


def differentiate(run, ctx, saved, dout: Tensor, *_: None) -> tuple:
    """Gradients of the op's arguments; of its results only the first is differentiable."""
    return *run(dout, *saved, ctx.settings, ctx.scale), None, None


attend_once = with_gradient(
    "window_attention", forward_op, run_forward, backward_op, run_backward, save_for_backward, differentiate
)


@register_flop_formula(torch.ops.bevt_ds.window_attention)
def forward_flops(qkv, bias_table, settings, *_, **__) -> int:
    """Dense convention: two products over every pair of every window, masked or not."""
    batch, *grid, _, heads, d = qkv
    return 4 * batch * Windows.of(tuple(grid), tuple(settings)).dense_pairs * heads * d


@register_flop_formula(torch.ops.bevt_ds.window_attention_backward)
def backward_flops(dout, qkv, bias_table, out, lse, table, codes, settings, *_, **__) -> int:
    """Five products, the recomputed one included: 2.5 times the forward pass."""
    return forward_flops(qkv, bias_table, settings) * 5 // 2


def window_attention(qkv: Tensor, bias_table: Tensor, windows: Windows, scale: float) -> Tensor:
    """`reference.window_attention` by the kernels; d is 16 or 32, the dtype fp32, fp16 or bf16."""
    return attend_once(qkv, bias_table, windows.settings(), scale)[0]
