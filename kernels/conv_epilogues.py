"""What surrounds the convolutions of a frozen network, on channels-last maps: pixels in, bias, ReLU, residual, pooling.

Letters: N images, C channels, H W pixels; a map (N, C, H, W) lies in memory as rows (N * H * W, C). Nothing here has a
gradient, so arguments that want one are refused. Every step is rounded to the map's dtype as PyTorch's separate
operators round it, so results are the same bit for bit.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .configs import EPILOGUE_PIXELS, epilogue_tiles
from .dispatch import custom_op, without_gradient
from .launches import launch

COLOURS = tl.constexpr(3)


@triton.jit(do_not_specialize=["rows", "pixels"])
def scale_pixels_kernel(frames, out, scale, shift, rows, pixels, C: tl.constexpr, ROWS: tl.constexpr):
    """frames (N, 3, pixels) fp32 -> out (rows = N * pixels, C): scale frames + shift, and zeros from channel 3 on."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    c = tl.arange(0, C)
    colour = (row < rows)[:, None] & (c < COLOURS)[None, :]
    at = (row // pixels * (3 * pixels) + row % pixels)[:, None] + c[None, :] * pixels
    value = tl.load(frames + at, mask=colour, other=0.0) * scale
    value = tl.where((c < COLOURS)[None, :], value + shift, 0.0)
    tl.store(out + row[:, None] * C + c[None, :], value, mask=(row < rows)[:, None])


@triton.jit(do_not_specialize=["rows"])
def bias_relu_kernel(h, bias, out, rows, C: tl.constexpr, ROWS: tl.constexpr, BLOCK_C: tl.constexpr):
    """h (rows, C), bias (C,) -> out (rows, C) = relu(h + bias)."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = (row < rows)[:, None] & (c < C)[None, :]
    at = row[:, None] * C + c[None, :]
    u = tl.load(h + at, mask=inside, other=0.0).to(tl.float32)
    u += tl.load(bias + c, mask=c < C, other=0.0).to(tl.float32)[None, :]
    tl.store(out + at, tl.maximum(u, 0.0, tl.PropagateNan.ALL), mask=inside)


@triton.jit
def residual_sum(x, x_bias, branch, bias, gain, at, inside, BIASED: tl.constexpr):
    """(x + x_bias) + gain (branch + bias) at some addresses, each sum rounded to x's dtype, as fp32."""
    kind = x.dtype.element_ty
    added = tl.load(branch + at, mask=inside, other=0.0).to(tl.float32) + bias
    added = (added.to(kind).to(tl.float32) * gain).to(kind).to(tl.float32)
    path = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    if BIASED:
        path = (path + x_bias).to(kind).to(tl.float32)
    return (path + added).to(kind).to(tl.float32)


@triton.jit(do_not_specialize=["rows", "height", "width"])
def residual_relu_kernel(
    x, x_bias, branch, bias, total, active, gain, rows, height, width,
    C: tl.constexpr, ROWS: tl.constexpr, BLOCK_C: tl.constexpr, BIASED: tl.constexpr, POOL: tl.constexpr,
):  # fmt: skip
    """x, branch (N, POOL height, POOL width, C) -> total (rows = N height width, C), the sum's largest value of each
    POOL x POOL pixels, and active, its ReLU."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = (row < rows)[:, None] & (c < C)[None, :]
    b = tl.load(bias + c, mask=c < C, other=0.0).to(tl.float32)[None, :]
    xb = tl.load(x_bias + c, mask=c < C, other=0.0).to(tl.float32)[None, :]
    corner = (row // width * (POOL * POOL) * width + row % width * POOL)[:, None] * C + c[None, :]
    best = residual_sum(x, xb, branch, b, gain, corner, inside, BIASED)
    for i in tl.static_range(1, POOL * POOL):
        at = corner + (i // POOL * (POOL * width) + i % POOL) * C
        best = tl.maximum(best, residual_sum(x, xb, branch, b, gain, at, inside, BIASED), tl.PropagateNan.ALL)
    out = row[:, None] * C + c[None, :]
    tl.store(total + out, best, mask=inside)
    tl.store(active + out, tl.maximum(best, 0.0, tl.PropagateNan.ALL), mask=inside)


def _empty(x: Tensor, sizes: tuple[int, int, int, int], dtype: torch.dtype) -> Tensor:
    """Memory of a channels-last map (N, C, H, W)."""
    n, c, h, w = sizes
    return x.new_empty((n, h, w, c), dtype=dtype).permute(0, 3, 1, 2)


def launch_scale_pixels(frames: Tensor, scale: float, shift: float, channels: int, half: bool) -> Tensor:
    """scale frames + shift as a map of `channels`, a power of two from 4 on, in fp16 or fp32."""
    n, _, height, width = frames.shape
    out = empty_pixels(frames, channels, half)
    rows = n * height * width
    grid = (triton.cdiv(rows, EPILOGUE_PIXELS),)
    tile = {"C": channels, "ROWS": EPILOGUE_PIXELS, "num_warps": 4, "enable_fp_fusion": False}
    launch(scale_pixels_kernel, grid, frames, out, scale, shift, rows, height * width, **tile)
    return out


def launch_bias_relu(h: Tensor, bias: Tensor) -> Tensor:
    """relu(h + bias), h (N, C, H, W) channels last."""
    n, channels, height, width = h.shape
    rows, tiles = n * height * width, epilogue_tiles(channels)
    out = _empty(h, h.shape, h.dtype)
    grid = (triton.cdiv(rows, tiles["ROWS"]), triton.cdiv(channels, tiles["BLOCK_C"]))
    launch(bias_relu_kernel, grid, h, bias, out, rows, C=channels, **tiles)
    return out


def launch_residual_relu(
    x: Tensor, x_bias: Tensor | None, branch: Tensor, bias: Tensor, gain: float, pool: int
) -> tuple[Tensor, Tensor]:
    """The sum, pooled, and its ReLU; maps (N, C, H, W) channels last."""
    total, active = empty_sums(x, pool)
    n, channels, height, width = total.shape
    rows, tiles = n * height * width, epilogue_tiles(channels)
    grid = (triton.cdiv(rows, tiles["ROWS"]), triton.cdiv(channels, tiles["BLOCK_C"]))
    launch(
        residual_relu_kernel, grid,
        x, bias if x_bias is None else x_bias, branch, bias, total, active, gain, rows, height, width,
        C=channels, **tiles, BIASED=x_bias is not None, POOL=pool,
    )  # fmt: skip
    return total, active


def empty_pixels(frames: Tensor, channels: int, half: bool) -> Tensor:
    """Memory for `launch_scale_pixels`."""
    n, _, height, width = frames.shape
    return _empty(frames, (n, channels, height, width), torch.float16 if half else torch.float32)


def empty_sums(x: Tensor, pool: int) -> tuple[Tensor, Tensor]:
    """Memory for `launch_residual_relu`."""
    n, channels, height, width = x.shape
    sizes = (n, channels, height // pool, width // pool)
    return _empty(x, sizes, x.dtype), _empty(x, sizes, x.dtype)


def _last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def run_scale_pixels(frames: Tensor, scale: float, shift: float, channels: int, half: bool) -> Tensor:
    """`reference.scale_pixels`."""
    return launch_scale_pixels(frames.float().contiguous(), scale, shift, channels, half)


def run_bias_relu(h: Tensor, bias: Tensor) -> Tensor:
    """`reference.bias_relu`."""
    return launch_bias_relu(_last(h), bias.contiguous())


def run_residual_relu(
    x: Tensor, x_bias: Tensor | None, branch: Tensor, bias: Tensor, gain: float, pool: int
) -> tuple[Tensor, Tensor]:
    """`reference.residual_relu`."""
    x_bias = None if x_bias is None else x_bias.contiguous()
    return launch_residual_relu(_last(x), x_bias, _last(branch), bias.contiguous(), gain, pool)


scale_pixels_op = custom_op("scale_pixels", run_scale_pixels)
bias_relu_op = custom_op("bias_relu", run_bias_relu)
residual_relu_op = custom_op("residual_relu", run_residual_relu)


@scale_pixels_op.register_fake
def _(frames, scale, shift, channels, half):
    return empty_pixels(frames, channels, half)


@bias_relu_op.register_fake
def _(h, bias):
    return _empty(h, h.shape, h.dtype)


@residual_relu_op.register_fake
def _(x, x_bias, branch, bias, gain, pool):
    return empty_sums(x, pool)


@register_flop_formula([torch.ops.bevt_ds.scale_pixels, torch.ops.bevt_ds.bias_relu, torch.ops.bevt_ds.residual_relu])
def no_flops(*_, **__) -> int:
    """No products of matrices, which alone count."""
    return 0


scale_pixels = without_gradient("scale_pixels", run_scale_pixels, scale_pixels_op)
bias_relu = without_gradient("bias_relu", run_bias_relu, bias_relu_op)
residual_relu = without_gradient("residual_relu", run_residual_relu, residual_relu_op)
