"""Bias and GELU (by the error function) behind a product, forward and backward with the bias's gradient.

Letters as in reference.py. The product's result is kept once, without its bias, and the activation for the next
product: as much as PyTorch keeps. The bias's gradient is summed as in norms.py.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .configs import gelu_programs, gelu_tiles
from .dispatch import custom_op, with_gradient
from .launches import launch
from .partial_sums import launch_sum

HALF_ROOT = tl.constexpr(0.7071067811865476)  # 1 / sqrt(2)
DENSITY = tl.constexpr(0.3989422804014327)  # 1 / sqrt(2 pi)


@triton.jit(do_not_specialize=["rows"])
def bias_gelu_fwd_kernel(h, bias, out, rows, C: tl.constexpr, ROWS: tl.constexpr, BLOCK_C: tl.constexpr):
    """h (rows, C), bias (C,) -> out (rows, C) = gelu(h + bias)."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = (row < rows)[:, None] & (c < C)[None, :]
    at = row.to(tl.int64)[:, None] * C + c[None, :]
    u = tl.load(h + at, mask=inside, other=0.0).to(tl.float32)
    u += tl.load(bias + c, mask=c < C, other=0.0).to(tl.float32)[None, :]
    tl.store(out + at, 0.5 * u * (1 + tl.erf(u * HALF_ROOT)), mask=inside)


@triton.jit(do_not_specialize=["rows"])
def bias_gelu_bwd_kernel(dout, h, bias, dh, partial, rows, C: tl.constexpr, ROWS: tl.constexpr, BLOCK_C: tl.constexpr):
    """dh (rows, C), and partial (programs, C): dh summed over the rows of each program, before it is rounded."""
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    b = tl.load(bias + c, mask=c < C, other=0.0).to(tl.float32)[None, :]
    total = tl.zeros([ROWS, BLOCK_C], tl.float32)
    for first in range(tl.program_id(0) * ROWS, rows, tl.num_programs(0) * ROWS):
        row = first + tl.arange(0, ROWS)
        inside = (row < rows)[:, None] & (c < C)[None, :]
        at = row.to(tl.int64)[:, None] * C + c[None, :]
        u = tl.load(h + at, mask=inside, other=0.0).to(tl.float32) + b
        grad = tl.load(dout + at, mask=inside, other=0.0).to(tl.float32)
        grad *= 0.5 * (1 + tl.erf(u * HALF_ROOT)) + u * DENSITY * tl.exp(-0.5 * u * u)
        tl.store(dh + at, grad, mask=inside)
        total += grad
    tl.store(partial + tl.program_id(0) * C + c, tl.sum(total, 0), mask=c < C)


def launch_bias_gelu(h: Tensor, bias: Tensor) -> Tensor:
    """gelu(h + bias), h (..., C)."""
    rows, channels, tiles = h.shape[:-1].numel(), h.shape[-1], gelu_tiles(h.shape[-1])
    out = torch.empty_like(h)
    grid = (triton.cdiv(rows, tiles["ROWS"]), triton.cdiv(channels, tiles["BLOCK_C"]))
    launch(bias_gelu_fwd_kernel, grid, h, bias, out, rows, C=channels, **tiles)
    return out


def launch_bias_gelu_backward(dout: Tensor, h: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """dh and dbias."""
    rows, channels, tiles = h.shape[:-1].numel(), h.shape[-1], gelu_tiles(h.shape[-1])
    across = triton.cdiv(channels, tiles["BLOCK_C"])
    programs = gelu_programs(rows, across, tiles["ROWS"])
    dh, dbias = torch.empty_like(h), torch.empty_like(bias)
    partial = h.new_empty((programs, channels), dtype=torch.float32)
    launch(bias_gelu_bwd_kernel, (programs, across), dout, h, bias, dh, partial, rows, C=channels, **tiles)
    launch_sum(partial, dbias)
    return dh, dbias


def run_bias_gelu(h: Tensor, bias: Tensor) -> Tensor:
    """`launch_bias_gelu`."""
    return launch_bias_gelu(h.contiguous(), bias.contiguous())


def run_bias_gelu_backward(dout: Tensor, h: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """`launch_bias_gelu_backward`."""
    return launch_bias_gelu_backward(dout.contiguous(), h.contiguous(), bias.contiguous())


bias_gelu_op = custom_op("bias_gelu", run_bias_gelu)
bias_gelu_backward_op = custom_op("bias_gelu_backward", run_bias_gelu_backward)


@bias_gelu_op.register_fake
def _(h, bias):
    return torch.empty_like(h, memory_format=torch.contiguous_format)


@bias_gelu_backward_op.register_fake
def _(dout, h, bias):
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (h, bias))


def save_inputs(ctx, inputs, output) -> tuple[Tensor, Tensor]:
    """The product's result without bias, and the bias."""
    return inputs


def backward(run, ctx, saved, dout: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of h and bias."""
    return run(dout, *saved)


bias_gelu_once = with_gradient(
    "linear_gelu", bias_gelu_op, run_bias_gelu, bias_gelu_backward_op, run_bias_gelu_backward, save_inputs, backward
)


@register_flop_formula([torch.ops.bevt_ds.bias_gelu, torch.ops.bevt_ds.bias_gelu_backward])
def no_flops(*_, **__) -> int:
    """No products of matrices, which alone count."""
    return 0


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """`reference.linear_gelu`: the library's product, then the kernel."""
    return bias_gelu_once(F.linear(x, weight), bias)[0]
