"""Windowed attention, forward: q, k and v read in place, the bias from its table, softmax online.

Letters as in reference.py. A program owns one head of one region (a box of tokens that attend to each
other) and walks over its queries in tiles of BLOCK_M, over its keys in tiles of BLOCK_N, the remainder
in tiles of TAIL. Exponents are base 2: scores and table carry a factor log2(e).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .attention_backward import launch_backward, launch_fold
from .configs import PREPARE, forward_is_small, small_groups
from .dispatch import custom_op, with_gradient
from .geometry import Windows
from .launches import launch, launch_regions, launch_small_windows
from .tiles import (
    CODES,
    GEOMETRY,
    LOG2E,
    base_two,
    beyond_cuts,
    code_stride,
    coordinates,
    dot,
    load_rows,
    locate,
    part_size,
    part_start,
    region,
    small_bias,
    store_rows,
    window_origin,
)


@triton.jit(do_not_specialize=["heads", "ROWS", "WT", "WH", "WW", "MT", "MH", "MW", "BT", "BH", "BW", "UT", "UH"])
def prepare_kernel(
    bias_table, table, codes, heads, ROWS, WT, WH, WW, MT, MH, MW, BT, BH, BW, UT, UH, BLOCK: tl.constexpr
):  # fmt: skip
    """What every program of a call needs, in the form in which it is read.

    bias_table (ROWS, heads) of any float type -> table (heads, ROWS), fp32, times log2(e); and codes
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
        tl.store(table + head * ROWS + row, values.to(tl.float32) * LOG2E, mask=row < ROWS)
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


@triton.jit
def attend(
    state, q, bias_q, keys, start, size, qkv, codes, width, scale, grid,
    D: tl.constexpr, WRAP: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """One step of the online softmax, over the key numbers `keys`; `state` is (acc, maximum, sum)."""
    acc, high, total = state
    place = locate(keys, start, size, grid, WRAP)
    k = load_rows(qkv + width, place, 3 * width, D)
    s = base_two(dot(q, tl.trans(k)), bias_q[:, None] - tl.load(codes + keys)[None, :], scale)
    if MASKED:
        s = tl.where((keys < size[0] * size[1] * size[2])[None, :], s, float("-inf"))
    new_high = tl.maximum(high, tl.max(s, 1))
    shrink = tl.exp2(high - new_high)
    p = tl.exp2(s - new_high[:, None])
    total = total * shrink + tl.sum(p, 1)
    v = load_rows(qkv + 2 * width, place, 3 * width, D)
    acc = dot(p.to(v.dtype), v, acc * shrink[:, None])
    return acc, new_high, total


@triton.jit(do_not_specialize=(*GEOMETRY, "heads", "splits"))
def window_attention_fwd_kernel(
    qkv, table, codes, out, lse, scale, heads, splits,
    T, H, W, WT, WH, WW, ST, SH, SW, MT, MH, MW, ROWS,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TAIL: tl.constexpr,
    WRAP: tl.constexpr,
):  # fmt: skip
    """qkv (B, T, H, W, 3, h, D), table and codes of `prepare_kernel`
    -> out (B, T, H, W, h * D), lse (B, h, T * H * W)."""
    grid = (T, H, W)
    pid = tl.program_id(0)
    head = pid % heads
    split = pid // heads % splits
    sample, start, size, shape = region(pid // (heads * splits), grid, (WT, WH, WW), (ST, SH, SW), (MT, MH, MW))
    tokens = size[0] * size[1] * size[2]
    whole = tokens - tokens % BLOCK_N
    width = heads * D
    qkv += sample * (T * H * W) * (3 * width) + head * D
    out += sample * (T * H * W) * width + head * D
    lse += (sample * heads + head) * (T * H * W)
    table += head * ROWS + ROWS // 2
    codes += shape * code_stride(WT * WH * WW)
    for first in range(split * BLOCK_M, tokens, splits * BLOCK_M):
        rows = first + tl.arange(0, BLOCK_M)
        place = locate(rows, start, size, grid, WRAP)
        bias_q = table + tl.load(codes + rows)
        q = load_rows(qkv, place, 3 * width, D)
        acc = tl.zeros([BLOCK_M, D], tl.float32)
        high = tl.full([BLOCK_M], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        for n in range(0, whole, BLOCK_N):
            acc, high, total = attend(
                (acc, high, total), q, bias_q, n + tl.arange(0, BLOCK_N), start, size, qkv, codes,
                width, scale, grid, D, WRAP, False,
            )  # fmt: skip
        for n in range(whole, tokens, TAIL):
            acc, high, total = attend(
                (acc, high, total), q, bias_q, n + tl.arange(0, TAIL), start, size, qkv, codes,
                width, scale, grid, D, WRAP, True,
            )  # fmt: skip
        store_rows(out, place, width, acc / total[:, None], rows < tokens, D)
        tl.store(lse + place, high + tl.log2(total), mask=rows < tokens)


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
        s = dot(q, tl.trans(k)) * (scale * LOG2E) + bias
        if cuts != 0:
            part = beyond_cuts(n, window, mask_shift) & cuts
            s = tl.where(part[:, None] == part[None, :], s, float("-inf"))
        high = tl.max(s, 1)
        p = tl.exp2(s - high[:, None])
        total = tl.sum(p, 1)
        acc = dot(p.to(v.dtype), v) / total[:, None]
        store_rows(out + at * width + head * D, place, width, acc, inside, D)
        tl.store(lse + (sample * heads + head) * (T * H * W) + place, high + tl.log2(total), mask=inside)


def launch_prepare(bias_table: Tensor, windows: Windows) -> tuple[Tensor, Tensor]:
    """The table as the kernels read it, (h, rows) in fp32, and the codes, int32 (shapes, padded N)."""
    rows, heads = bias_table.shape
    table, codes = empty_tables(bias_table, windows)
    sizes = (heads, rows, *windows.window, *windows.mask_shift, *windows.bias_box, *windows.table_strides)
    grid = (heads * triton.cdiv(rows, PREPARE) + windows.shapes * triton.cdiv(codes.shape[1], PREPARE),)
    launch(prepare_kernel, grid, bias_table, table, codes, *sizes, BLOCK=PREPARE)
    return table, codes


def empty_tables(bias_table: Tensor, windows: Windows) -> tuple[Tensor, Tensor]:
    """Memory for the two results of `prepare_kernel`."""
    padded = triton.cdiv(windows.tokens, CODES) * CODES
    table = bias_table.new_empty((bias_table.shape[1], bias_table.shape[0]), dtype=torch.float32)
    return table, bias_table.new_empty((windows.shapes, padded), dtype=torch.int32)


def launch_forward(
    qkv: Tensor, bias_table: Tensor, windows: Windows, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """out (B, T, H, W, h * d) in qkv's dtype, the base-2 log-sum-exp (B, h, T * H * W) in fp32, and `launch_prepare`'s
    two, which the backward pass reads again."""
    out, lse = empty_outputs(qkv)
    tables = launch_prepare(bias_table, windows)
    tensors = (qkv, *tables, out, lse)
    if forward_is_small(windows.tokens, qkv.shape[-1], qkv.dtype):
        groups = small_groups(len(qkv) * windows.whole, qkv.shape[5])
        launch_small_windows(window_attention_fwd_small_kernel, "fwd_small", tensors, windows, scale, groups)
    else:
        launch_regions(window_attention_fwd_kernel, "fwd", tensors, windows, scale)
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
    dqkv, pairs = launch_backward(dout.contiguous(), qkv.contiguous(), table, codes, out, lse, windows, scale)
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
