"""Residual sum and LayerNorm in one pass over the rows, forward and backward.

Letters as in reference.py. A program takes whole rows of C channels, so mean and variance are exact (two passes over
registers). `x + scale branch` is rounded to the rows' dtype before it is normalised: that is what the residual goes
on with, and what the backward pass reads. Gradients of weight and bias are summed by every program over its rows,
then by one more kernel over the programs: no atomics, one order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .configs import norm_programs, norm_tiles
from .dispatch import custom_op, with_gradient
from .launches import launch
from .partial_sums import launch_sum


@triton.jit
def row_scale(scale, row, rows, per_sample, SCALED: tl.constexpr):
    """The factor of each row's branch, (rows, 1) fp32: that of its sample, or 1."""
    if SCALED:
        factor = tl.load(scale + row // per_sample, mask=row < rows, other=0.0).to(tl.float32)
    else:
        factor = tl.full(row.shape, 1.0, tl.float32)
    return factor[:, None]


@triton.jit(do_not_specialize=["rows", "per_sample"])
def add_norm_fwd_kernel(
    x, branch, scale, weight, bias, total, normed, stats, rows, per_sample, eps,
    C: tl.constexpr, ROWS: tl.constexpr, BLOCK_C: tl.constexpr,
    ADD: tl.constexpr, SCALED: tl.constexpr, POST: tl.constexpr,
):  # fmt: skip
    """x, branch (rows, C) -> total, normed (rows, C), stats (2, rows): mean and 1 / standard deviation.

    ADD alone: total = x + scale branch, normed = LN(total). With POST: total = x + scale LN(branch), no normed. Without
    ADD: normed = LN(x).
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    c = tl.arange(0, BLOCK_C)
    inside = (row < rows)[:, None] & (c < C)[None, :]
    at = row.to(tl.int64)[:, None] * C + c[None, :]
    value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    factor = row_scale(scale, row, rows, per_sample, SCALED)
    residual = value
    if ADD:
        value = tl.load(branch + at, mask=inside, other=0.0).to(tl.float32)
    if ADD and not POST:
        rounded = (residual + factor * value).to(total.dtype.element_ty)
        tl.store(total + at, rounded, mask=inside)
        value = rounded.to(tl.float32)
    mean = tl.sum(value, 1) / C
    centred = tl.where((c < C)[None, :], value - mean[:, None], 0.0)
    inverse = 1 / tl.sqrt(tl.sum(centred * centred, 1) / C + eps)
    w = tl.load(weight + c, mask=c < C, other=0.0).to(tl.float32)
    b = tl.load(bias + c, mask=c < C, other=0.0).to(tl.float32)
    out = centred * inverse[:, None] * w[None, :] + b[None, :]
    if POST:
        tl.store(total + at, residual + factor * out, mask=inside)
    else:
        tl.store(normed + at, out, mask=inside)
    tl.store(stats + row, mean, mask=row < rows)
    tl.store(stats + rows + row, inverse, mask=row < rows)


@triton.jit(do_not_specialize=["rows", "per_sample"])
def add_norm_bwd_kernel(
    dtotal, dnormed, value, scale, weight, stats, dvalue, dbranch, partial, rows, per_sample,
    C: tl.constexpr, ROWS: tl.constexpr, BLOCK_C: tl.constexpr,
    ADD: tl.constexpr, SCALED: tl.constexpr, POST: tl.constexpr,
):  # fmt: skip
    """value (rows, C), what was normalised -> its gradient, dbranch (if SCALED and not POST), partial
    (programs, 2, C): the gradients of weight and bias from the rows of each program."""
    c = tl.arange(0, BLOCK_C)
    w = tl.load(weight + c, mask=c < C, other=0.0).to(tl.float32)[None, :]
    dweight = tl.zeros([ROWS, BLOCK_C], tl.float32)
    dbias = tl.zeros([ROWS, BLOCK_C], tl.float32)
    for first in range(tl.program_id(0) * ROWS, rows, tl.num_programs(0) * ROWS):
        row = first + tl.arange(0, ROWS)
        inside = (row < rows)[:, None] & (c < C)[None, :]
        at = row.to(tl.int64)[:, None] * C + c[None, :]
        factor = row_scale(scale, row, rows, per_sample, SCALED)
        v = tl.load(value + at, mask=inside, other=0.0).to(tl.float32)
        mean = tl.load(stats + row, mask=row < rows, other=0.0)[:, None]
        inverse = tl.load(stats + rows + row, mask=row < rows, other=0.0)[:, None]
        normal = tl.where((c < C)[None, :], (v - mean) * inverse, 0.0)
        if POST:
            dout = factor * tl.load(dtotal + at, mask=inside, other=0.0).to(tl.float32)
        else:
            dout = tl.load(dnormed + at, mask=inside, other=0.0).to(tl.float32)
        g = dout * w
        along_mean = tl.sum(g, 1)[:, None] / C
        along_normal = tl.sum(g * normal, 1)[:, None] / C
        grad = (g - along_mean - normal * along_normal) * inverse
        if ADD and not POST:
            grad += tl.load(dtotal + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(dvalue + at, grad, mask=inside)
        if SCALED and not POST:
            tl.store(dbranch + at, factor * grad, mask=inside)
        dweight += dout * normal
        dbias += dout
    partial += tl.program_id(0) * (2 * C)
    tl.store(partial + c, tl.sum(dweight, 0), mask=c < C)
    tl.store(partial + C + c, tl.sum(dbias, 0), mask=c < C)


@triton.jit(do_not_specialize=["rows", "per_sample"])
def add_scaled_kernel(
    x, branch, scale, out, rows, per_sample,
    C: tl.constexpr, ROWS: tl.constexpr, BLOCK_C: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    """out (rows, C) = x + scale branch, or scale branch without ADD: its own backward pass."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    c = tl.arange(0, BLOCK_C)
    inside = (row < rows)[:, None] & (c < C)[None, :]
    at = row.to(tl.int64)[:, None] * C + c[None, :]
    value = tl.load(branch + at, mask=inside, other=0.0).to(tl.float32)
    value *= row_scale(scale, row, rows, per_sample, True)
    if ADD:
        value += tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + at, value, mask=inside)


def _sizes(x: Tensor, scale: Tensor | None) -> tuple[int, int]:
    """(rows, rows of a sample); the latter is 1 where nothing is scaled."""
    rows = x.shape[:-1].numel()
    return rows, max(1, rows // max(1, len(scale))) if scale is not None else 1


def _contiguous(*tensors: Tensor | None) -> Iterator[Tensor | None]:
    return (None if tensor is None else tensor.contiguous() for tensor in tensors)


def launch_add_norm(
    x: Tensor, branch: Tensor | None, scale: Tensor | None, weight: Tensor, bias: Tensor, eps: float, post: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """total, normed and stats of `add_norm_fwd_kernel`; what a case does not have is empty."""
    x, branch, scale, weight, bias = _contiguous(x, branch, scale, weight, bias)
    rows, per_sample = _sizes(x, scale)
    total, normed, stats = empty_outputs(x, branch, post)
    tiles = norm_tiles(x.shape[-1])
    case = {"ADD": branch is not None, "SCALED": scale is not None, "POST": post}
    grid = (triton.cdiv(rows, tiles["ROWS"]),)
    launch(
        add_norm_fwd_kernel, grid,
        x, x if branch is None else branch, stats if scale is None else scale, weight, bias, total, normed, stats,
        rows, per_sample, eps, C=x.shape[-1], **tiles, **case,
    )  # fmt: skip
    return total, normed, stats


def launch_add_norm_backward(
    dtotal: Tensor | None,
    dnormed: Tensor | None,
    value: Tensor,
    scale: Tensor | None,
    weight: Tensor,
    stats: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of what was normalised, of the branch (empty where it is the same or unscaled), and of weight and
    bias as one (2, C). Without `dnormed` the norm was behind the branch; without `dtotal` nothing was added."""
    dtotal, dnormed, value, scale, weight = _contiguous(dtotal, dnormed, value, scale, weight)
    (rows, per_sample), channels, tiles = _sizes(value, scale), value.shape[-1], norm_tiles(value.shape[-1])
    programs = norm_programs(rows, tiles["ROWS"])
    case = {"ADD": dtotal is not None, "SCALED": scale is not None, "POST": dnormed is None}
    dvalue, dbranch, dparameters = empty_gradients(value, scale, weight, dnormed is None)
    partial = value.new_empty((programs, 2 * channels), dtype=torch.float32)
    launch(
        add_norm_bwd_kernel, (programs,),
        dnormed if dtotal is None else dtotal, dtotal if dnormed is None else dnormed, value,
        stats if scale is None else scale, weight, stats, dvalue, dbranch, partial,
        rows, per_sample, C=channels, **tiles, **case,
    )  # fmt: skip
    launch_sum(partial, dparameters)
    return dvalue, dbranch, dparameters


def launch_add_scaled(x: Tensor | None, branch: Tensor, scale: Tensor) -> Tensor:
    """x + scale branch, or without x the latter alone: the branch's gradient, from that of the sum."""
    x, branch, scale = _contiguous(x, branch, scale)
    (rows, per_sample), tiles = _sizes(branch, scale), norm_tiles(branch.shape[-1])
    out = torch.empty_like(branch)
    grid = (triton.cdiv(rows, tiles["ROWS"]),)
    tensors = (branch if x is None else x, branch, scale, out)
    launch(add_scaled_kernel, grid, *tensors, rows, per_sample, C=branch.shape[-1], **tiles, ADD=x is not None)
    return out


def empty_outputs(x: Tensor, branch: Tensor | None, post: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Memory for total, normed and stats."""
    total = torch.empty_like(x, memory_format=torch.contiguous_format) if branch is not None else x.new_empty(0)
    normed = x.new_empty(0) if post else torch.empty_like(x, memory_format=torch.contiguous_format)
    return total, normed, x.new_empty((2, x.shape[:-1].numel()), dtype=torch.float32)


def empty_gradients(value: Tensor, scale: Tensor | None, weight: Tensor, post: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Memory for the gradients of what was normalised, the branch, and weight and bias."""
    dvalue = torch.empty_like(value, memory_format=torch.contiguous_format)
    dbranch = value.new_empty(0) if scale is None or post else torch.empty_like(dvalue)
    return dvalue, dbranch, weight.new_empty((2, len(weight)))


add_norm_backward_op = custom_op("add_norm_backward", launch_add_norm_backward)
add_scaled_op = custom_op("add_scaled", launch_add_scaled)


@add_norm_backward_op.register_fake
def _(dtotal, dnormed, value, scale, weight, stats):
    return empty_gradients(value, scale, weight, dnormed is None)


@add_scaled_op.register_fake
def _(x, branch, scale):
    return torch.empty_like(branch, memory_format=torch.contiguous_format)


def save_norm(ctx, inputs, output) -> tuple[Tensor | None, ...]:
    """What was normalised, which the residual or the layer in front keeps anyway, and two numbers a row."""
    x, branch, scale, weight, _, _, ctx.post = inputs
    total, _, stats = output
    ctx.adds = branch is not None
    value = x if branch is None else branch if ctx.post else total
    return value, scale, weight, stats


def norm_backward(run, ctx, saved, dtotal: Tensor | None, dnormed: Tensor | None, _dstats: None) -> tuple:
    """Gradients of the arguments; a result that was not used has a gradient of None."""
    value = saved[0]
    dtotal = torch.zeros_like(value) if ctx.adds and dtotal is None else dtotal
    dnormed = torch.zeros_like(value) if not ctx.post and dnormed is None else dnormed
    incoming = (dtotal if ctx.adds else None, None if ctx.post else dnormed)
    dvalue, dscaled, (dweight, dbias) = run(*incoming, *saved)
    dx, dbranch = (dtotal, dvalue) if ctx.post else (dvalue, dvalue if saved[1] is None else dscaled)
    return dx, dbranch if ctx.adds else None, None, dweight, dbias, None, None


def save_scale(ctx, inputs, output) -> tuple[Tensor]:
    """The scale: the gradients need nothing else."""
    return (inputs[2],)


def scaled_backward(run, ctx, saved, dout: Tensor) -> tuple:
    """Gradients of x, branch, scale."""
    return dout, run(None, dout, *saved), None


def norm_op(name: str) -> tuple[Any, Callable[..., tuple[Tensor, ...]]]:
    """The operator behind a public function, and what to call. They differ in their arguments and their name."""
    op = custom_op(name, launch_add_norm)
    op.register_fake(lambda x, branch, scale, weight, bias, eps, post: empty_outputs(x, branch, post))
    return op, with_gradient(
        name, op, launch_add_norm, add_norm_backward_op, launch_add_norm_backward, save_norm, norm_backward
    )


layer_norm_op, layer_norm_once = norm_op("layer_norm")
add_norm_op, add_norm_once = norm_op("add_norm")
norm_add_op, norm_add_once = norm_op("norm_add")
add_scaled_once = with_gradient(
    "add_scaled", add_scaled_op, launch_add_scaled, add_scaled_op, launch_add_scaled, save_scale, scaled_backward
)


@register_flop_formula(
    [
        torch.ops.bevt_ds.layer_norm,
        torch.ops.bevt_ds.add_norm,
        torch.ops.bevt_ds.norm_add,
        torch.ops.bevt_ds.add_norm_backward,
        torch.ops.bevt_ds.add_scaled,
    ]
)
def no_flops(*_, **__) -> int:
    """No products of matrices, which alone count."""
    return 0


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """`reference.layer_norm` by the kernels."""
    return layer_norm_once(x, None, None, weight, bias, eps, False)[1]


def add_norm(
    x: Tensor, branch: Tensor, scale: Tensor | None, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """`reference.add_norm` by the kernels."""
    return add_norm_once(x, branch, scale, weight, bias, eps, False)[:2]


def norm_add(x: Tensor, branch: Tensor, scale: Tensor | None, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """`reference.norm_add` by the kernels."""
    return norm_add_once(x, branch, scale, weight, bias, eps, True)[0]


def add_scaled(x: Tensor, branch: Tensor, scale: Tensor) -> Tensor:
    """`reference.add_scaled` by the kernel."""
    return add_scaled_once(x, branch, scale)[0]
