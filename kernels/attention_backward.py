"""Windowed attention, backward: dqkv written packed, and the bias table's gradient by reduction.

Every output element is written once, by one program, in one order: no atomics, so equal inputs give
equal bits. With P the probabilities and delta = rowsum(dout * out), dS = P * (dout v^T - delta), and
dq = scale dS k, dk = scale dS^T q, dv = P^T dout, dtable[u(q) - u(k)] = sum of dS over those pairs.

A window of at most 64 tokens fits one tile: one kernel recomputes P once and gives everything. A larger
one takes a kernel stationary in the queries (dq, delta), one in the keys (dk, dv), and one that sums
dS over windows, stationary in a tile of pairs. The sums `pairs` (groups, h, N, N) are added up over
groups and folded into table rows by a last kernel.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .configs import FOLD, is_small, key_tiles, pair_groups, pair_tiles, query_tiles, small_tiles
from .geometry import Windows
from .launches import launch, launch_regions
from .tiles import (
    GEOMETRY,
    base_two,
    beyond_cuts,
    code_stride,
    coordinates,
    dot,
    load_rows,
    locate,
    region,
    store_rows,
    window_origin,
)


@triton.jit
def add_dq(
    dq, q, dout, bias_q, lse, delta, keys, start, size, qkv, codes, width, scale, grid,
    D: tl.constexpr, WRAP: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """dq of a tile of queries plus the share of the key numbers `keys`."""
    place = locate(keys, start, size, grid, WRAP)
    k = load_rows(qkv + width, place, 3 * width, D)
    v = load_rows(qkv + 2 * width, place, 3 * width, D)
    s = base_two(dot(q, tl.trans(k)), bias_q[:, None] - tl.load(codes + keys)[None, :], scale)
    p = tl.exp2(s - lse[:, None])
    if MASKED:
        p = tl.where((keys < size[0] * size[1] * size[2])[None, :], p, 0.0)
    ds = p * (dot(dout, tl.trans(v)) - delta[:, None])
    return dot(ds.to(k.dtype), k, dq)


@triton.jit(do_not_specialize=(*GEOMETRY, "heads", "splits"))
def window_attention_bwd_q_kernel(
    qkv, table, codes, out, lse, dout, dqkv, delta, stats, scale, heads, splits,
    T, H, W, WT, WH, WW, ST, SH, SW, MT, MH, MW, ROWS,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TAIL: tl.constexpr,
    WRAP: tl.constexpr,
):  # fmt: skip
    """dq into dqkv (B, T, H, W, 3, h, D), and delta for the kernels after it: in the order of the map, (B, h,
    T * H * W), and with the log-sum-exp in the order of the regions, stats (regions, h, 2, N rounded up to CODES).

    In the latter the log-sum-exp is infinite past a region's end, which makes P zero there.
    """
    grid = (T, H, W)
    pid = tl.program_id(0)
    head = pid % heads
    split = pid // heads % splits
    sample, start, size, shape = region(pid // (heads * splits), grid, (WT, WH, WW), (ST, SH, SW), (MT, MH, MW))
    tokens = size[0] * size[1] * size[2]
    whole = tokens - tokens % BLOCK_N
    width = heads * D
    qkv += sample * (T * H * W) * (3 * width) + head * D
    dqkv += sample * (T * H * W) * (3 * width) + head * D
    out += sample * (T * H * W) * width + head * D
    dout += sample * (T * H * W) * width + head * D
    lse += (sample * heads + head) * (T * H * W)
    delta += (sample * heads + head) * (T * H * W)
    table += head * ROWS + ROWS // 2
    stride = code_stride(WT * WH * WW)
    codes += shape * stride
    stats += (pid // (heads * splits) * heads + head).to(tl.int64) * 2 * stride
    for first in range(split * BLOCK_M, tokens, splits * BLOCK_M):
        rows = first + tl.arange(0, BLOCK_M)
        place = locate(rows, start, size, grid, WRAP)
        bias_q = table + tl.load(codes + rows)
        q = load_rows(qkv, place, 3 * width, D)
        do = load_rows(dout, place, width, D)
        o = load_rows(out, place, width, D)
        row_delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
        row_lse = tl.load(lse + place)
        tl.store(delta + place, row_delta, mask=rows < tokens)
        tl.store(stats + stride + rows, row_delta)
        tl.store(stats + rows, tl.where(rows < tokens, row_lse, float("inf")))
        dq = tl.zeros([BLOCK_M, D], tl.float32)
        for n in range(0, whole, BLOCK_N):
            dq = add_dq(
                dq, q, do, bias_q, row_lse, row_delta, n + tl.arange(0, BLOCK_N), start, size, qkv,
                codes, width, scale, grid, D, WRAP, False,
            )  # fmt: skip
        for n in range(whole, tokens, TAIL):
            dq = add_dq(
                dq, q, do, bias_q, row_lse, row_delta, n + tl.arange(0, TAIL), start, size, qkv,
                codes, width, scale, grid, D, WRAP, True,
            )  # fmt: skip
        store_rows(dqkv, place, 3 * width, dq * scale, rows < tokens, D)


@triton.jit
def add_dkv(
    dk, dv, k, v, code_k, queries, start, size, qkv, dout, stats, table, codes, width, scale,
    grid, D: tl.constexpr, WRAP: tl.constexpr,
):  # fmt: skip
    """dk and dv of a tile of keys plus the share of the query numbers `queries`.

    Scores are transposed, (keys, queries), so that P^T and dS^T are first operands as they stand.
    """
    place = locate(queries, start, size, grid, WRAP)
    q = load_rows(qkv, place, 3 * width, D)
    do = load_rows(dout, place, width, D)
    row_lse = tl.load(stats[0] + queries)
    row_delta = tl.load(stats[1] + queries)
    bias_k = table - code_k
    s = base_two(dot(k, tl.trans(q)), bias_k[:, None] + tl.load(codes + queries)[None, :], scale)
    p = tl.exp2(s - row_lse[None, :])
    dv = dot(p.to(do.dtype), do, dv)
    ds = p * (dot(v, tl.trans(do)) - row_delta[None, :])
    return dot(ds.to(q.dtype), q, dk), dv


@triton.jit(do_not_specialize=(*GEOMETRY, "heads", "splits"))
def window_attention_bwd_kv_kernel(
    qkv, table, codes, dout, stats, dqkv, scale, heads, splits,
    T, H, W, WT, WH, WW, ST, SH, SW, MT, MH, MW, ROWS,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TAIL: tl.constexpr,
    WRAP: tl.constexpr,
):  # fmt: skip
    """dk and dv into dqkv (B, T, H, W, 3, h, D). BLOCK_M is the tile of keys, BLOCK_N of queries."""
    grid = (T, H, W)
    pid = tl.program_id(0)
    head = pid % heads
    split = pid // heads % splits
    sample, start, size, shape = region(pid // (heads * splits), grid, (WT, WH, WW), (ST, SH, SW), (MT, MH, MW))
    tokens = size[0] * size[1] * size[2]
    whole = tokens - tokens % BLOCK_N
    width = heads * D
    qkv += sample * (T * H * W) * (3 * width) + head * D
    dqkv += sample * (T * H * W) * (3 * width) + head * D
    dout += sample * (T * H * W) * width + head * D
    table += head * ROWS + ROWS // 2
    stride = code_stride(WT * WH * WW)
    codes += shape * stride
    stats += (pid // (heads * splits) * heads + head).to(tl.int64) * 2 * stride
    stats = (stats, stats + stride)
    for first in range(split * BLOCK_M, tokens, splits * BLOCK_M):
        keys = first + tl.arange(0, BLOCK_M)
        place = locate(keys, start, size, grid, WRAP)
        code_k = tl.load(codes + keys)
        k = load_rows(qkv + width, place, 3 * width, D)
        v = load_rows(qkv + 2 * width, place, 3 * width, D)
        dk = tl.zeros([BLOCK_M, D], tl.float32)
        dv = tl.zeros([BLOCK_M, D], tl.float32)
        for n in range(0, whole, BLOCK_N):
            dk, dv = add_dkv(
                dk, dv, k, v, code_k, n + tl.arange(0, BLOCK_N), start, size, qkv, dout, stats, table,
                codes, width, scale, grid, D, WRAP,
            )  # fmt: skip
        for n in range(whole, tokens, TAIL):
            dk, dv = add_dkv(
                dk, dv, k, v, code_k, n + tl.arange(0, TAIL), start, size, qkv, dout, stats, table,
                codes, width, scale, grid, D, WRAP,
            )  # fmt: skip
        store_rows(dqkv + width, place, 3 * width, dk * scale, keys < tokens, D)
        store_rows(dqkv + 2 * width, place, 3 * width, dv, keys < tokens, D)


@triton.jit(do_not_specialize=(*GEOMETRY, "heads", "batch", "groups"))
def window_attention_bwd_pairs_kernel(
    qkv, table, codes, lse, dout, delta, pairs, scale, heads, batch, groups,
    T, H, W, WT, WH, WW, ST, SH, SW, MT, MH, MW, ROWS,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """pairs (groups, h, N, N): dS summed over every groups-th window of the batch."""
    grid, window, shift, mask_shift = (T, H, W), (WT, WH, WW), (ST, SH, SW), (MT, MH, MW)
    tokens = WT * WH * WW
    pid = tl.program_id(0)
    across = tl.cdiv(tokens, BLOCK_N)
    keys = pid % across * BLOCK_N + tl.arange(0, BLOCK_N)
    pid = pid // across
    queries = pid % tl.cdiv(tokens, BLOCK_M) * BLOCK_M + tl.arange(0, BLOCK_M)
    pid = pid // tl.cdiv(tokens, BLOCK_M)
    head, group = pid % heads, pid // heads
    width = heads * D
    bias_q = table + head * ROWS + ROWS // 2 + tl.load(codes + queries)
    code_k = tl.load(codes + keys)
    windows = batch * ((T * H * W) // tokens)
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for i in range(group, windows, groups):
        sample, origin, cuts = window_origin(i, grid, window, shift, mask_shift)
        base = qkv + sample * (T * H * W) * (3 * width) + head * D
        place_k = locate(keys, origin, window, grid, True)
        k = load_rows(base + width, place_k, 3 * width, D)
        v = load_rows(base + 2 * width, place_k, 3 * width, D)
        place_q = locate(queries, origin, window, grid, True)
        q = load_rows(base, place_q, 3 * width, D)
        do = load_rows(dout + sample * (T * H * W) * width + head * D, place_q, width, D)
        row = (sample * heads + head) * (T * H * W) + place_q
        s = base_two(dot(q, tl.trans(k)), bias_q[:, None] - code_k[None, :], scale)
        p = tl.exp2(s - tl.load(lse + row)[:, None])
        if cuts != 0:
            part_q = beyond_cuts(queries, window, mask_shift) & cuts
            part_k = beyond_cuts(keys, window, mask_shift) & cuts
            p = tl.where(part_q[:, None] == part_k[None, :], p, 0.0)
        total += p * (dot(do, tl.trans(v)) - tl.load(delta + row)[:, None])
    pairs += (group * heads + head).to(tl.int64) * tokens * tokens
    inside = (queries < tokens)[:, None] & (keys < tokens)[None, :]
    tl.store(pairs + queries[:, None] * tokens + keys[None, :], total, mask=inside)


@triton.jit(do_not_specialize=(*GEOMETRY, "heads", "batch", "groups"))
def window_attention_bwd_small_kernel(
    qkv, table, codes, out, lse, dout, dqkv, pairs, scale, heads, batch, groups,
    T, H, W, WT, WH, WW, ST, SH, SW, MT, MH, MW, ROWS,
    D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dqkv (B, T, H, W, 3, h, D) and pairs (groups, h, N, N) for windows of at most BLOCK tokens.

    Of token numbers past the window, as queries an infinite log-sum-exp makes P zero, as keys k is zero for dq.
    """
    grid, window, shift, mask_shift = (T, H, W), (WT, WH, WW), (ST, SH, SW), (MT, MH, MW)
    tokens = WT * WH * WW
    head = tl.program_id(0) % heads
    group = tl.program_id(0) // heads
    width = heads * D
    n = tl.arange(0, BLOCK)
    inside = n < tokens
    code = tl.load(codes + n)
    bias = table + head * ROWS + ROWS // 2 + code
    windows = batch * ((T * H * W) // tokens)
    total = tl.zeros([BLOCK, BLOCK], tl.float32)
    for i in range(group, windows, groups):
        sample, origin, cuts = window_origin(i, grid, window, shift, mask_shift)
        at = sample * (T * H * W)
        place = locate(n, origin, window, grid, True)
        base = qkv + at * (3 * width) + head * D
        base_out = dqkv + at * (3 * width) + head * D
        do = load_rows(dout + at * width + head * D, place, width, D)
        o = load_rows(out + at * width + head * D, place, width, D)
        delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
        row = (sample * heads + head) * (T * H * W) + place
        row_lse = tl.load(lse + row, mask=inside, other=float("inf"))
        q = load_rows(base, place, 3 * width, D)
        k = load_rows(base + width, place, 3 * width, D)
        v = load_rows(base + 2 * width, place, 3 * width, D)
        p = tl.exp2(base_two(dot(q, tl.trans(k)), bias[:, None] - code[None, :], scale) - row_lse[:, None])
        if cuts != 0:
            part = beyond_cuts(n, window, mask_shift) & cuts
            p = tl.where(part[:, None] == part[None, :], p, 0.0)
        dv = dot(tl.trans(p.to(do.dtype)), do)
        store_rows(base_out + 2 * width, place, 3 * width, dv, inside, D)
        ds = p * (dot(do, tl.trans(v)) - delta[:, None])
        total += ds
        ds = ds.to(q.dtype)
        k = tl.where(inside[:, None], k, tl.zeros_like(k))
        store_rows(base_out, place, 3 * width, dot(ds, k) * scale, inside, D)
        store_rows(base_out + width, place, 3 * width, dot(tl.trans(ds), q) * scale, inside, D)
    pairs += (group * heads + head).to(tl.int64) * tokens * tokens
    both = inside[:, None] & inside[None, :]
    tl.store(pairs + n[:, None] * tokens + n[None, :], total, mask=both)


@triton.jit(do_not_specialize=["heads", "tokens", "BT", "BH", "BW", "TT", "TH", "TW"])
def fold_pairs_kernel(
    pairs, dtable, heads, tokens, BT, BH, BW, TT, TH, TW, BLOCK: tl.constexpr, ROWS: tl.constexpr
):  # fmt: skip
    """pairs (h, N, N) of N tokens numbered in the box (BT, BH, BW) -> dtable ((2TT-1)(2TH-1)(2TW-1), h), every sum in
    a fixed order.

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
    pairs += head.to(tl.int64) * tokens * tokens
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
        total += tl.load(pairs + query[:, None] * tokens + key, mask=valid, other=0.0)
    rows = ((dt + TT - 1) * (2 * TH - 1) + dh + TH - 1) * (2 * TW - 1) + column
    tl.store(dtable + rows * heads + head, tl.sum(total, 0), mask=column < 2 * TW - 1)


def launch_fold(pairs: Tensor, bias_table: Tensor, windows: Windows) -> Tensor:
    """Gradient of the table, in its dtype, from pairs (groups, h, N, N)."""
    heads = pairs.shape[1]
    dtable = torch.empty_like(bias_table)
    t, h, w = (2 * extent - 1 for extent in windows.table_window)
    sizes = (windows.tokens, *windows.bias_box, *windows.table_window)
    grid = (t * h * triton.cdiv(w, FOLD["ROWS"]), heads)
    launch(fold_pairs_kernel, grid, pairs.sum(0), dtable, heads, *sizes, **FOLD)
    return dtable


def launch_small(
    dout: Tensor, qkv: Tensor, table: Tensor, codes: Tensor, out: Tensor, lse: Tensor, windows: Windows, scale: float
) -> tuple[Tensor, Tensor]:
    """dqkv and pairs, by the kernel for windows of one tile."""
    batch, heads, d = qkv.shape[0], qkv.shape[5], qkv.shape[6]
    groups = pair_groups(batch * windows.whole, heads)
    dqkv = torch.empty_like(qkv)
    pairs = table.new_empty((groups, heads, windows.tokens, windows.tokens))
    tensors = (qkv, table, codes, out, lse, dout, dqkv, pairs)
    sizes = (scale, heads, batch, groups, *windows.scalars)
    tile = small_tiles(windows.tokens, qkv.dtype)
    launch(window_attention_bwd_small_kernel, (groups * heads,), *tensors, *sizes, D=d, **tile)
    return dqkv, pairs


def launch_large(
    dout: Tensor, qkv: Tensor, table: Tensor, codes: Tensor, out: Tensor, lse: Tensor, windows: Windows, scale: float
) -> tuple[Tensor, Tensor]:
    """dqkv and pairs, by the kernels for windows of many tiles."""
    dqkv, delta = torch.empty_like(qkv), torch.empty_like(lse)
    stats = table.new_empty((len(qkv) * windows.regions, len(table), 2, codes.shape[1]))
    tensors = (qkv, table, codes, out, lse, dout, dqkv, delta, stats)
    launch_regions(window_attention_bwd_q_kernel, tensors, query_tiles(qkv.dtype, qkv.shape[-1]), windows, scale)
    tensors = (qkv, table, codes, dout, stats, dqkv)
    launch_regions(window_attention_bwd_kv_kernel, tensors, key_tiles(qkv.dtype, qkv.shape[-1]), windows, scale)
    return dqkv, launch_pairs(dout, qkv, table, codes, lse, delta, windows, scale)


def launch_pairs(
    dout: Tensor, qkv: Tensor, table: Tensor, codes: Tensor, lse: Tensor, delta: Tensor, windows: Windows, scale: float
) -> Tensor:
    """pairs (groups, h, N, N): dS summed over the windows of each group."""
    batch, heads, d = qkv.shape[0], qkv.shape[5], qkv.shape[6]
    tile = pair_tiles(qkv.dtype, qkv.shape[-1])
    squares = triton.cdiv(windows.tokens, tile["BLOCK_M"]) * triton.cdiv(windows.tokens, tile["BLOCK_N"])
    groups = pair_groups(batch * windows.whole, heads * squares)
    pairs = table.new_empty((groups, heads, windows.tokens, windows.tokens))
    tensors = (qkv, table, codes, lse, dout, delta, pairs)
    sizes = (scale, heads, batch, groups, *windows.scalars)
    launch(window_attention_bwd_pairs_kernel, (groups * heads * squares,), *tensors, *sizes, D=d, **tile)
    return pairs


def launch_backward(
    dout: Tensor, qkv: Tensor, table: Tensor, codes: Tensor, out: Tensor, lse: Tensor, windows: Windows, scale: float
) -> tuple[Tensor, Tensor]:
    """dqkv, packed as qkv, and pairs (groups, h, N, N); table and codes are what `prepare_kernel` makes."""
    launch_kernels = launch_small if is_small(windows.tokens, qkv.shape[-1]) else launch_large
    return launch_kernels(dout, qkv, table, codes, out, lse, windows, scale)
