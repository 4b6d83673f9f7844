"""Windowed attention, backward: dqkv written packed, and the bias table's gradient by reduction.

Every output element is written once, by one program, in one order: no atomics, so equal inputs give
equal bits. With P the probabilities and delta = rowsum(dout * out), dS = P * (dout v^T - delta), and
dq = scale dS k, dk = scale dS^T q, dv = P^T dout, dtable[u(q) - u(k)] = sum of dS over those pairs.

P is recomputed once. A window of at most 64 tokens fits one tile: one kernel gives everything. For larger ones a
kernel stationary in the keys gives dk and dv and leaves dS, in the precision of its products, in memory that holds a
part of the batch's windows at a time; one kernel makes dq of it, one sums it over windows. These sums, `pairs`
(groups, h, N, N), are folded into table rows by a last kernel.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from .bias import launch_bias
from .configs import FOLD, SCORES_BYTES, STATS, SUM_SCORES, backward_is_small, small_groups
from .geometry import Windows
from .launches import launch, launch_small_windows, launch_windows, options_of
from .tiles import (
    GEOMETRY,
    LOG2E,
    beyond_cuts,
    biases,
    code_stride,
    coordinates,
    dot,
    load_rows,
    locate,
    row_biases,
    scaled,
    score_stride,
    small_bias,
    store_rows,
    whole_tiles,
    window_origin,
)


@triton.jit(do_not_specialize=(*GEOMETRY, "heads"))
def window_attention_bwd_stats_kernel(
    out, lse, dout, stats, heads,
    T, H, W, WT, WH, WW, ST, SH, SW, MT, MH, MW, ROWS,
    D: tl.constexpr, BLOCK: tl.constexpr, WRAP: tl.constexpr,
):  # fmt: skip
    """Log-sum-exp and delta in the order of the windows: stats (windows, h, 2, N rounded up to CODES).

    Past a window's end the log-sum-exp is infinite, which makes P zero there.
    """
    grid, window = (T, H, W), (WT, WH, WW)
    tokens = WT * WH * WW
    stride = code_stride(tokens)
    pid = tl.program_id(0)
    head = pid % heads
    n = pid // heads % (stride // BLOCK) * BLOCK + tl.arange(0, BLOCK)
    i = pid // heads // (stride // BLOCK)
    sample, origin, _ = window_origin(i, grid, window, (ST, SH, SW), (MT, MH, MW))
    place = locate(n, origin, window, grid, WRAP)
    at = sample * (T * H * W) * (heads * D) + head * D
    o = load_rows(out + at, place, heads * D, D)
    do = load_rows(dout + at, place, heads * D, D)
    row_lse = tl.load(lse + (sample * heads + head) * (T * H * W) + place)
    stats += (i.to(tl.int64) * heads + head) * 2 * stride
    tl.store(stats + n, tl.where(n < tokens, row_lse, float("inf")))
    tl.store(stats + stride + n, tl.sum(o.to(tl.float32) * do.to(tl.float32), 1))


@triton.jit
def add_dkv(
    dk, dv, k, v, bias, bias_k, part_k, keys, queries, origin, cuts, qkv, dout, stats, codes, scores, width, scale,
    grid, window, mask_shift, D: tl.constexpr, WRAP: tl.constexpr, TILED: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """dk and dv of a tile of keys plus the share of the query numbers `queries`; their dS goes into `scores`.

    Scores are transposed, (keys, queries), so that P^T and dS^T are first operands as they stand.
    """
    tokens = window[0] * window[1] * window[2]
    stride = score_stride(tokens)
    place = locate(queries, origin, window, grid, WRAP)
    q = load_rows(qkv, place, 3 * width, D)
    do = load_rows(dout, place, width, D)
    row_lse = tl.load(stats[0] + queries)
    row_delta = tl.load(stats[1] + queries)
    s = scaled(dot(k, tl.trans(q)), biases(bias, bias_k, codes, queries, stride, -1, TILED, MASKED), scale)
    p = tl.exp2(s * LOG2E - row_lse[None, :])
    if not TILED:  # noqa: SIM102  a constant: the tile knows the cuts
        if cuts != 0:
            part_q = beyond_cuts(queries, window, mask_shift) & cuts
            p = tl.where(part_k[:, None] == part_q[None, :], p, 0.0)
    dv = dot(p.to(do.dtype), do, dv)
    ds = (p * (dot(v, tl.trans(do)) - row_delta[None, :])).to(q.dtype)
    inside = (keys < stride)[:, None]
    if MASKED:
        inside = inside & (queries < tokens)[None, :]
    tl.store(scores + queries[None, :] * stride + keys[:, None], ds, mask=inside)
    return dot(ds, q, dk), dv


@triton.jit
def keys_of_window(
    keys, origin, cuts, qkv, dqkv, bias, codes, dout, stats, scores, width, scale, grid, window, mask_shift,
    D: tl.constexpr, BLOCK_N: tl.constexpr, TAIL: tl.constexpr, WRAP: tl.constexpr, TILED: tl.constexpr,
):  # fmt: skip
    """dk, dv and dS of the key numbers `keys` of a window."""
    tokens = window[0] * window[1] * window[2]
    whole = tokens // BLOCK_N * BLOCK_N
    place = locate(keys, origin, window, grid, WRAP)
    bias_k = row_biases(bias, codes, keys, tokens, score_stride(tokens), -1, TILED)
    part_k = beyond_cuts(keys, window, mask_shift) & cuts
    k = load_rows(qkv + width, place, 3 * width, D)
    v = load_rows(qkv + 2 * width, place, 3 * width, D)
    dk = tl.zeros([keys.shape[0], D], tl.float32)
    dv = tl.zeros([keys.shape[0], D], tl.float32)
    for n in range(0, whole, BLOCK_N):
        dk, dv = add_dkv(
            dk, dv, k, v, bias, bias_k, part_k, keys, n + tl.arange(0, BLOCK_N), origin, cuts, qkv, dout, stats, codes,
            scores, width, scale, grid, window, mask_shift, D, WRAP, TILED, False,
        )  # fmt: skip
    for n in range(whole, tokens, TAIL):
        dk, dv = add_dkv(
            dk, dv, k, v, bias, bias_k, part_k, keys, n + tl.arange(0, TAIL), origin, cuts, qkv, dout, stats, codes,
            scores, width, scale, grid, window, mask_shift, D, WRAP, TILED, True,
        )  # fmt: skip
    store_rows(dqkv + width, place, 3 * width, dk * scale, keys < tokens, D)
    store_rows(dqkv + 2 * width, place, 3 * width, dv, keys < tokens, D)


@triton.jit(do_not_specialize=(*GEOMETRY, "heads", "splits", "first"))
def window_attention_bwd_kv_kernel(
    qkv, bias, codes, dout, stats, dqkv, scores, scale, heads, splits, first,
    T, H, W, WT, WH, WW, ST, SH, SW, MT, MH, MW, ROWS,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TAIL: tl.constexpr, LAST: tl.constexpr,
    WRAP: tl.constexpr, TILED: tl.constexpr,
):  # fmt: skip
    """dk and dv into dqkv (B, T, H, W, 3, h, D), and dS into scores (windows from `first` on, h, N, N rounded up), of
    which columns from N on hold nothing of use. bias: the table, or the flipped tile. BLOCK_M and LAST are tiles of
    keys, BLOCK_N of queries."""
    grid, window, mask_shift = (T, H, W), (WT, WH, WW), (MT, MH, MW)
    tokens = WT * WH * WW
    pid = tl.program_id(0)
    head = pid % heads
    split = pid // heads % splits
    i = pid // (heads * splits)
    sample, origin, cuts = window_origin(first + i, grid, window, (ST, SH, SW), mask_shift)
    width = heads * D
    qkv += sample * (T * H * W) * (3 * width) + head * D
    dqkv += sample * (T * H * W) * (3 * width) + head * D
    dout += sample * (T * H * W) * width + head * D
    if TILED:
        bias += (cuts * heads + head).to(tl.int64) * tokens * score_stride(tokens)
    else:
        bias += head * ROWS + ROWS // 2
    stride = code_stride(tokens)
    stats += ((first + i).to(tl.int64) * heads + head) * 2 * stride
    stats = (stats, stats + stride)
    scores += (i.to(tl.int64) * heads + head) * tokens * score_stride(tokens)
    whole = whole_tiles(tokens, BLOCK_M, LAST)
    for m in range(split * BLOCK_M, whole, splits * BLOCK_M):
        keys_of_window(
            m + tl.arange(0, BLOCK_M), origin, cuts, qkv, dqkv, bias, codes, dout, stats, scores, width, scale,
            grid, window, mask_shift, D, BLOCK_N, TAIL, WRAP, TILED,
        )  # fmt: skip
    if LAST > 0:  # noqa: SIM102  a constant: no tile of no rows is compiled
        if (split == splits - 1) & (whole < tokens):
            keys_of_window(
                whole + tl.arange(0, LAST), origin, cuts, qkv, dqkv, bias, codes, dout, stats, scores, width, scale,
                grid, window, mask_shift, D, BLOCK_N, TAIL, WRAP, TILED,
            )  # fmt: skip


@triton.jit
def add_dq(
    dq, queries, keys, origin, qkv, scores, width, grid, window,
    D: tl.constexpr, WRAP: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """dq of a tile of queries plus the share of the key numbers `keys`."""
    tokens = window[0] * window[1] * window[2]
    k = load_rows(qkv, locate(keys, origin, window, grid, WRAP), 3 * width, D)
    inside = (queries < tokens)[:, None]
    if MASKED:
        inside = inside & (keys < tokens)[None, :]
    ds = tl.load(scores + queries[:, None] * score_stride(tokens) + keys[None, :], mask=inside, other=0.0)
    return dot(ds, k, dq)


@triton.jit(do_not_specialize=(*GEOMETRY, "heads", "splits", "first"))
def window_attention_bwd_q_kernel(
    qkv, scores, dqkv, scale, heads, splits, first,
    T, H, W, WT, WH, WW, ST, SH, SW, MT, MH, MW, ROWS,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TAIL: tl.constexpr,
    WRAP: tl.constexpr,
):  # fmt: skip
    """dq into dqkv (B, T, H, W, 3, h, D), from the dS that `window_attention_bwd_kv_kernel` left in scores."""
    grid, window = (T, H, W), (WT, WH, WW)
    tokens = WT * WH * WW
    whole = tokens - tokens % BLOCK_N
    pid = tl.program_id(0)
    head = pid % heads
    split = pid // heads % splits
    i = pid // (heads * splits)
    sample, origin, _ = window_origin(first + i, grid, window, (ST, SH, SW), (MT, MH, MW))
    width = heads * D
    qkv += sample * (T * H * W) * (3 * width) + width + head * D  # of k
    dqkv += sample * (T * H * W) * (3 * width) + head * D
    scores += (i.to(tl.int64) * heads + head) * tokens * score_stride(tokens)
    for m in range(split * BLOCK_M, tokens, splits * BLOCK_M):
        queries = m + tl.arange(0, BLOCK_M)
        dq = tl.zeros([BLOCK_M, D], tl.float32)
        for n in range(0, whole, BLOCK_N):
            keys = n + tl.arange(0, BLOCK_N)
            dq = add_dq(dq, queries, keys, origin, qkv, scores, width, grid, window, D, WRAP, False)
        for n in range(whole, tokens, TAIL):
            keys = n + tl.arange(0, TAIL)
            dq = add_dq(dq, queries, keys, origin, qkv, scores, width, grid, window, D, WRAP, True)
        place = locate(queries, origin, window, grid, WRAP)
        store_rows(dqkv, place, 3 * width, dq * scale, queries < tokens, D)


@triton.jit(do_not_specialize=["size", "windows", "before"])
def sum_scores_kernel(scores, pairs, size, windows, before, BLOCK: tl.constexpr):
    """pairs (size * 8,) in fp32: the sum of scores (windows, size * 8) over windows, added to what is there if there
    were windows `before`."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size * 8
    total = tl.load(pairs + at, mask=at < tl.where(before > 0, size * 8, 0), other=0.0)
    for _ in range(windows):
        total += tl.load(scores + at, mask=inside, other=0.0).to(tl.float32)
        scores += size * 8
    tl.store(pairs + at, total, mask=inside)


@triton.jit(do_not_specialize=(*GEOMETRY, "heads", "batch", "groups"))
def window_attention_bwd_small_kernel(
    qkv, table, codes, lse, dout, dqkv, pairs, scale, heads, batch, groups,
    T, H, W, WT, WH, WW, ST, SH, SW, MT, MH, MW, ROWS,
    D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dqkv (B, T, H, W, 3, h, D) and pairs (groups, h, N, N) for windows of at most BLOCK tokens.

    Delta is the sum of P (dout v^T) over keys, all of which are in the tile: `out` is not read. Past the
    window P is zero.
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
    bias = tl.where(inside[:, None], bias, float("-inf"))
    total = tl.zeros([BLOCK, BLOCK], tl.float32)
    for i in range(group, windows, groups):
        sample, origin, cuts = window_origin(i, grid, window, shift, mask_shift)
        at = sample * (T * H * W)
        place = locate(n, origin, window, grid, True)
        base = qkv + at * (3 * width) + head * D
        base_out = dqkv + at * (3 * width) + head * D
        do = load_rows(dout + at * width + head * D, place, width, D)
        row = (sample * heads + head) * (T * H * W) + place
        row_lse = tl.load(lse + row)
        q = load_rows(base, place, 3 * width, D)
        k = load_rows(base + width, place, 3 * width, D)
        v = load_rows(base + 2 * width, place, 3 * width, D)
        p = tl.exp2(scaled(dot(q, tl.trans(k)), bias, scale) * LOG2E - row_lse[:, None])
        if cuts != 0:
            part = beyond_cuts(n, window, mask_shift) & cuts
            p = tl.where(part[:, None] == part[None, :], p, 0.0)
        dv = dot(tl.trans(p.to(do.dtype)), do)
        store_rows(base_out + 2 * width, place, 3 * width, dv, inside, D)
        dp = dot(do, tl.trans(v))
        ds = p * (dp - tl.sum(p * dp, 1)[:, None])
        total += ds
        ds = ds.to(q.dtype)
        store_rows(base_out, place, 3 * width, dot(ds, k) * scale, inside, D)
        store_rows(base_out + width, place, 3 * width, dot(tl.trans(ds), q) * scale, inside, D)
    pairs += (group * heads + head).to(tl.int64) * tokens * tokens
    both = inside[:, None] & inside[None, :]
    tl.store(pairs + n[:, None] * tokens + n[None, :], total, mask=both)


@triton.jit(do_not_specialize=["heads", "tokens", "stride", "BT", "BH", "BW", "TT", "TH", "TW"])
def fold_pairs_kernel(
    pairs, dtable, heads, tokens, stride, BT, BH, BW, TT, TH, TW, BLOCK: tl.constexpr, ROWS: tl.constexpr
):  # fmt: skip
    """pairs (h, N, stride) of N tokens numbered in the box (BT, BH, BW) -> dtable ((2TT-1)(2TH-1)(2TW-1), h), every
    sum in a fixed order.

    A program owns one head, one offset (dt, dh) and ROWS neighbouring offsets dw. It walks over the
    queries that have a key at (dt, dh): BLOCK at a time, neighbouring dw on neighbouring keys.
    """
    row = tl.program_id(0)
    blocks = tl.cdiv(2 * TW - 1, ROWS)
    column = row % blocks * ROWS + tl.arange(0, ROWS)
    dw = column - (TW - 1)
    dh = row // blocks % (2 * TH - 1) - (TH - 1)
    dt = row // (blocks * (2 * TH - 1)) - (TT - 1)
    head = tl.program_id(1)
    deep = tl.maximum(BT - tl.abs(dt), 0)
    down = tl.maximum(BH - tl.abs(dh), 0)
    pairs += head.to(tl.int64) * tokens * stride
    total = tl.zeros([BLOCK, ROWS], tl.float32)
    for first in range(0, deep * down * BW, BLOCK):
        t, h, w = coordinates(first + tl.arange(0, BLOCK), (deep, down, BW))
        t += tl.maximum(dt, 0)
        h += tl.maximum(dh, 0)
        query = (t * BH + h) * BW + w
        key = (((t - dt) * BH + h - dh) * BW + w)[:, None] - dw[None, :]
        key_w = w[:, None] - dw[None, :]
        valid = ((first + tl.arange(0, BLOCK) < deep * down * BW) & (query < tokens))[:, None]
        valid = valid & (key_w >= 0) & (key_w < BW) & (key < tokens)
        total += tl.load(pairs + query[:, None] * stride + key, mask=valid, other=0.0)
    rows = ((dt + TT - 1) * (2 * TH - 1) + dh + TH - 1) * (2 * TW - 1) + column
    tl.store(dtable + rows * heads + head, tl.sum(total, 0), mask=column < 2 * TW - 1)


def launch_fold(pairs: Tensor, bias_table: Tensor, windows: Windows) -> Tensor:
    """Gradient of the table, in its dtype, from pairs (groups, h, N, at least N)."""
    groups, heads, _, stride = pairs.shape
    dtable = torch.empty_like(bias_table)
    t, h, w = (2 * extent - 1 for extent in windows.table_window)
    sizes = (windows.tokens, stride, *windows.bias_box, *windows.table_window)
    grid = (t * h * triton.cdiv(w, FOLD["ROWS"]), heads)
    pairs = pairs.sum(0) if groups > 1 else pairs
    launch(fold_pairs_kernel, grid, pairs, dtable, heads, *sizes, **FOLD)
    return dtable


def launch_small(
    dout: Tensor, qkv: Tensor, table: Tensor, codes: Tensor, lse: Tensor, windows: Windows, scale: float
) -> tuple[Tensor, Tensor]:
    """dqkv and pairs, by the kernel for windows of one tile."""
    groups, heads = small_groups("bwd_small", len(qkv) * windows.whole, len(table)), len(table)
    dqkv = torch.empty_like(qkv)
    pairs = table.new_empty((groups, heads, windows.tokens, windows.tokens))
    tensors = (qkv, table, codes, lse, dout, dqkv, pairs)
    launch_small_windows(window_attention_bwd_small_kernel, "bwd_small", tensors, windows, scale, groups)
    return dqkv, pairs


def window_chunks(qkv: Tensor, windows: Windows) -> Iterator[tuple[int, int]]:
    """(first window, how many) of the parts of a batch whose dS is in memory at one time; an empty batch has one."""
    total, size = len(qkv) * windows.whole, qkv.shape[5] * windows.tokens * windows.score_stride
    parts = triton.cdiv(total, max(1, SCORES_BYTES // (size * qkv.element_size())))
    count = triton.cdiv(total, max(1, parts))
    yield from ((first, min(count, total - first)) for first in range(0, max(1, total), max(1, count)))


def launch_large(
    dout: Tensor,
    qkv: Tensor,
    table: Tensor,
    codes: Tensor,
    out: Tensor,
    lse: Tensor,
    windows: Windows,
    scale: float,
    precision: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """dqkv and pairs, by the kernels for windows of many tiles."""
    tokens, heads = windows.tokens, len(table)
    dqkv, stats = torch.empty_like(qkv), launch_stats(dout, out, lse, windows, qkv.shape[-1], codes.shape[1])
    pairs = table.new_empty((1, heads, tokens, windows.score_stride))
    bias, tile = launch_bias("bwd_kv", qkv, (table, codes), windows, precision, True)
    chunks = list(window_chunks(qkv, windows))
    scores = qkv.new_empty((chunks[0][1], *pairs.shape[1:]))
    for first, count in chunks:
        part = (windows, scale, first, count)
        launch_windows(window_attention_bwd_kv_kernel, tile, (qkv, bias, codes, dout, stats, dqkv, scores), *part)
        launch_windows(window_attention_bwd_q_kernel, options_of("bwd_q", qkv), (qkv, scores, dqkv), *part)
        grid = (triton.cdiv(pairs.numel(), SUM_SCORES["BLOCK"]),)
        launch(sum_scores_kernel, grid, scores, pairs, pairs.numel() // 8, count, first, **SUM_SCORES)
    return dqkv, pairs


def launch_stats(dout: Tensor, out: Tensor, lse: Tensor, windows: Windows, d: int, padded: int) -> Tensor:
    """stats (windows, h, 2, padded) in fp32 of heads `d` wide."""
    batch, heads = lse.shape[:2]
    stats = lse.new_empty((batch * windows.whole, heads, 2, padded))
    grid = (batch * windows.whole * heads * (padded // STATS),)
    options = {"D": d, "BLOCK": STATS, "WRAP": any(windows.shift)}
    launch(window_attention_bwd_stats_kernel, grid, out, lse, dout, stats, heads, *windows.scalars, **options)
    return stats


def launch_backward(
    dout: Tensor,
    qkv: Tensor,
    table: Tensor,
    codes: Tensor,
    out: Tensor,
    lse: Tensor,
    windows: Windows,
    scale: float,
    precision: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """dqkv, packed as qkv, and pairs (groups, h, N, N or more); table and codes are what `prepare_kernel` makes of a
    bias table in `precision`."""
    if backward_is_small(windows.tokens, qkv.shape[-1]):
        return launch_small(dout, qkv, table, codes, lse, windows, scale)
    return launch_large(dout, qkv, table, codes, out, lse, windows, scale, precision)
