"""Mask tokens put into a token map, and masked rows taken out of a feature map.

Letters as in reference.py. Both ops only move bytes. Row indices come from the host with a fixed
count, so nothing here searches a mask or waits for the device.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .configs import PROGRAMS
from .dispatch import custom_op, with_gradient
from .launches import launch

BLOCK_ROWS = 16


@triton.jit
def is_masked(mask, n, H, W, h, w):
    """Whether the cell of tokens n of the flattened (B * T, H, W) map is masked, for mask (B * T, h, w)."""
    column = n % W // (W // w)
    line = n // W % H // (H // h)
    return tl.load(mask + (n // (H * W) * h + line) * w + column) != 0


@triton.jit(do_not_specialize=["tokens", "H", "W", "h", "w"])
def insert_fwd_kernel(
    x, token, mask, out, tokens, H, W, h, w, C: tl.constexpr, ROWS: tl.constexpr, BLOCK_C: tl.constexpr
):
    """x (tokens, C), token (C,), mask uint8 (B * T, h, w) -> out (tokens, C). Masked rows of x are not read."""
    n = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = (n < tokens)[:, None] & (c < C)[None, :]
    masked = is_masked(mask, tl.minimum(n, tokens - 1), H, W, h, w)[:, None]
    at = n[:, None] * C + c[None, :]
    kept = tl.load(x + at, mask=inside & ~masked, other=0.0)
    inserted = tl.load(token + c, mask=c < C, other=0.0).to(kept.dtype)
    tl.store(out + at, tl.where(masked, inserted[None, :], kept), mask=inside)


@triton.jit(do_not_specialize=["tokens", "H", "W", "h", "w"])
def insert_bwd_kernel(
    dout, mask, dx, partial, tokens, H, W, h, w, C: tl.constexpr, ROWS: tl.constexpr, BLOCK_C: tl.constexpr
):
    """dx (tokens, C), and partial (programs, C): dout summed over the masked tokens of each program."""
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    total = tl.zeros([ROWS, BLOCK_C], tl.float32)
    for first in range(tl.program_id(0) * ROWS, tokens, tl.num_programs(0) * ROWS):
        n = tl.cast(first, tl.int64) + tl.arange(0, ROWS)
        inside = (n < tokens)[:, None] & (c < C)[None, :]
        masked = is_masked(mask, tl.minimum(n, tokens - 1), H, W, h, w)[:, None]
        at = n[:, None] * C + c[None, :]
        grad = tl.load(dout + at, mask=inside, other=0.0)
        zero = tl.zeros_like(grad)
        tl.store(dx + at, tl.where(masked, zero, grad), mask=inside)
        total += tl.where(masked, grad, zero).to(tl.float32)
    tl.store(partial + tl.program_id(0) * C + c, tl.sum(total, 0), mask=c < C)


@triton.jit(do_not_specialize=["rows"])
def gather_kernel(x, index, out, rows, C: tl.constexpr, ROWS: tl.constexpr, BLOCK_C: tl.constexpr):
    """out (rows, C) = x[index], zeros where index is negative."""
    r = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = (r < rows)[:, None] & (c < C)[None, :]
    source = tl.load(index + r, mask=r < rows, other=-1)
    real = inside & (source >= 0)[:, None]
    values = tl.load(x + source[:, None] * C + c[None, :], mask=real, other=0.0)
    tl.store(out + r[:, None] * C + c[None, :], values, mask=inside)


@triton.jit(do_not_specialize=["rows"])
def scatter_kernel(dout, index, dx, rows, C: tl.constexpr, ROWS: tl.constexpr, BLOCK_C: tl.constexpr):
    """dx[index] = dout (rows, C) where index is not negative; real indices are unique."""
    r = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    target = tl.load(index + r, mask=r < rows, other=-1)
    real = (target >= 0)[:, None] & (c < C)[None, :]
    values = tl.load(dout + r[:, None] * C + c[None, :], mask=real)
    tl.store(dx + target[:, None] * C + c[None, :], values, mask=real)


def blocks(rows: int, channels: int) -> tuple[tuple[int, int], dict[str, int]]:
    """Launch grid over (rows, channels) and tile, about 16 KB of 16-bit values, of this file's kernels."""
    width = min(512, triton.next_power_of_2(channels))
    grid = (triton.cdiv(rows, BLOCK_ROWS), triton.cdiv(channels, width))
    return grid, {"C": channels, "ROWS": BLOCK_ROWS, "BLOCK_C": width}


def launch_insert(x: Tensor, mask_token: Tensor, mask: Tensor) -> Tensor:
    """x (B, T, H, W, C) with the masked tokens replaced."""
    tokens, sizes = x.shape[:-1].numel(), (*x.shape[2:4], *mask.shape[2:])
    grid, tile = blocks(tokens, x.shape[-1])
    out = torch.empty_like(x)
    mask = mask.view(torch.uint8)
    launch(insert_fwd_kernel, grid, x, mask_token, mask, out, tokens, *sizes, **tile)
    return out


def launch_insert_backward(dout: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """dx (B, T, H, W, C) and dtoken (C,) in fp32, summed in a fixed order."""
    tokens, sizes = dout.shape[:-1].numel(), (*dout.shape[2:4], *mask.shape[2:])
    (programs, across), tile = blocks(tokens, dout.shape[-1])
    programs = min(PROGRAMS, programs)
    dx = torch.empty_like(dout)
    partial = dout.new_empty((programs, dout.shape[-1]), dtype=torch.float32)
    mask = mask.view(torch.uint8)
    launch(insert_bwd_kernel, (programs, across), dout, mask, dx, partial, tokens, *sizes, **tile)
    return dx, partial.sum(0)


def launch_gather(x: Tensor, index: Tensor) -> Tensor:
    """Rows of x (N, C) at index (R,)."""
    grid, tile = blocks(len(index), x.shape[1])
    out = x.new_empty((len(index), x.shape[1]))
    launch(gather_kernel, grid, x, index, out, len(index), **tile)
    return out


def launch_scatter(dout: Tensor, index: Tensor, count: int) -> Tensor:
    """(count, C) of zeros with row index[r] set to dout[r]."""
    grid, tile = blocks(len(index), dout.shape[1])
    dx = dout.new_zeros((count, dout.shape[1]))
    launch(scatter_kernel, grid, dout, index, dx, len(index), **tile)
    return dx


def run_insert(x: Tensor, mask_token: Tensor, mask: Tensor) -> Tensor:
    """`reference.insert_mask_tokens`."""
    return launch_insert(x.contiguous(), mask_token.contiguous(), mask.contiguous())


def run_insert_backward(dout: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """dx, and dtoken in fp32."""
    return launch_insert_backward(dout.contiguous(), mask.contiguous())


def run_gather(x: Tensor, index: Tensor) -> Tensor:
    """`reference.gather_masked`."""
    return launch_gather(x.contiguous(), index.contiguous())


def run_scatter(dout: Tensor, index: Tensor, count: int) -> Tensor:
    """The gather's transpose."""
    return launch_scatter(dout.contiguous(), index.contiguous(), count)


insert_op = custom_op("insert_mask_tokens", run_insert)
insert_backward_op = custom_op("insert_mask_tokens_backward", run_insert_backward)
gather_op = custom_op("gather_masked", run_gather)
scatter_op = custom_op("scatter_masked", run_scatter)


@insert_op.register_fake
def _(x, mask_token, mask):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@insert_backward_op.register_fake
def _(dout, mask):
    dx = torch.empty_like(dout, memory_format=torch.contiguous_format)
    return dx, dout.new_empty(dout.shape[-1], dtype=torch.float32)


@gather_op.register_fake
def _(x, index):
    return x.new_empty((index.shape[0], x.shape[1]))


@scatter_op.register_fake
def _(dout, index, count):
    return dout.new_empty((count, dout.shape[1]))


def save_mask(ctx, inputs, output) -> tuple[Tensor]:
    """The mask, and the dtype of the token's gradient."""
    _, mask_token, mask = inputs
    ctx.token_dtype = mask_token.dtype
    return (mask,)


def insert_backward(run, ctx, saved, dout: Tensor) -> tuple:
    """Gradients of x, mask_token, mask."""
    dx, dtoken = run(dout, *saved)
    return dx, dtoken.to(ctx.token_dtype), None


def save_index(ctx, inputs, output) -> tuple[Tensor]:
    """The index, and how many rows x has."""
    x, index = inputs
    ctx.count = x.shape[0]
    return (index,)


def gather_backward(run, ctx, saved, dout: Tensor) -> tuple:
    """Gradients of x and index."""
    return run(dout, *saved, ctx.count), None


insert_once = with_gradient(
    "insert_mask_tokens", insert_op, run_insert, insert_backward_op, run_insert_backward, save_mask, insert_backward
)
gather_once = with_gradient(
    "gather_masked", gather_op, run_gather, scatter_op, run_scatter, save_index, gather_backward
)


@register_flop_formula(
    [
        torch.ops.bevt_ds.insert_mask_tokens,
        torch.ops.bevt_ds.insert_mask_tokens_backward,
        torch.ops.bevt_ds.gather_masked,
        torch.ops.bevt_ds.scatter_masked,
    ]
)
def no_flops(*_, **__) -> int:
    """These ops move bytes and multiply nothing."""
    return 0


def insert_mask_tokens(x: Tensor, mask_token: Tensor, mask: Tensor) -> Tensor:
    """`reference.insert_mask_tokens` by the kernels."""
    return insert_once(x, mask_token, mask)[0]


def gather_masked(x: Tensor, index: Tensor) -> Tensor:
    """`reference.gather_masked` by the kernels."""
    return gather_once(x, index)[0]
