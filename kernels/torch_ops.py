"""The `torch` provider: the ops in PyTorch's own fused operators, for CPUs and as the fallback on a GPU.

Shape letters as in reference.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .geometry import Size3, Windows

IGNORE = -100  # the target of a padding row


# Tensors made in inference mode could not be saved for a later backward pass.
@lru_cache(maxsize=64)
@torch.inference_mode(False)
def _bias_rows(windows: Windows, device: torch.device) -> Tensor:
    """Row of the bias table for every (query, key) pair of a window, int64 (N * N,).

    A token at (t, h, w) has the code u = t * UT + h * UH + w, and the pair's row is u(query) - u(key) + middle.
    """
    box = windows.bias_box
    number = torch.arange(windows.tokens)
    t, h, w = number // (box[1] * box[2]), number // box[2] % box[1], number % box[2]
    strides = windows.table_strides
    codes = t * strides[0] + h * strides[1] + w
    return (codes[:, None] - codes + windows.table_rows // 2).flatten().to(device)


@lru_cache(maxsize=64)
@torch.inference_mode(False)
def _mask(windows: Windows, device: torch.device) -> Tensor:
    """Minus infinity for every pair of tokens in different regions, else 0: fp32 (windows, N, N)."""
    region = torch.zeros(1, 1, 1, dtype=torch.int64)
    for extent, size, shift in zip(windows.grid, windows.window, windows.mask_shift, strict=True):
        place = torch.arange(extent)
        last, behind = place >= extent - size, place >= extent - shift
        region = region[..., None] * 3 + (last.long() + behind if shift else torch.zeros_like(place))
    region = _partition(region.reshape(1, *windows.grid), windows.window)
    same = region[:, :, None] == region[:, None, :]
    return torch.zeros(same.shape).masked_fill(~same, float("-inf")).to(device)


def _partition(x: Tensor, window: Size3) -> Tensor:
    """(B, T, H, W, ...) -> (B * windows, N, ...), windows and their tokens in raster order."""
    for axis, size in ((3, window[2]), (2, window[1]), (1, window[0])):
        x = x.unflatten(axis, (x.shape[axis] // size, size))
    rest = range(7, x.ndim)
    return x.permute(0, 1, 3, 5, 2, 4, 6, *rest).flatten(4, 6).flatten(0, 3)


def _to_map(x: Tensor, windows: Windows) -> Tensor:
    """The inverse: (B * windows, N, C) -> (B, T, H, W, C)."""
    batch = len(x) // windows.whole
    x = x.view(batch, *windows.counts, *windows.window, x.shape[-1])
    return x.permute(0, 1, 4, 2, 5, 3, 6, 7).reshape(batch, *windows.grid, x.shape[-1])


class _BiasedAttention(torch.autograd.Function):
    """softmax(scale q k^T + bias) v, written out.

    On a CPU scaled_dot_product_attention leaves its fused kernel when the bias wants a gradient, and then works in
    float32; this takes two thirds of its time in float32 and half of it in bfloat16.
    """

    @staticmethod
    def forward(ctx, qkv: Tensor, bias: Tensor, scale: float) -> Tensor:
        """qkv (3, B * windows, h, N, d), bias (1 or windows, h, N, N) -> (B * windows, h, N, d)."""
        q, k, v = qkv
        scores = (q @ k.transpose(-1, -2)).mul_(scale)
        scores.unflatten(0, (-1, len(bias))).add_(bias)
        p = scores.softmax(-1)
        out = p @ v
        ctx.save_for_backward(qkv, p, out)
        ctx.scale, ctx.windows = scale, len(bias)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dout: Tensor) -> tuple[Tensor, Tensor, None]:
        qkv, p, out = ctx.saved_tensors
        q, k, v = qkv
        delta = (dout * out).sum(-1, keepdim=True)
        ds = (dout @ v.transpose(-1, -2)).sub_(delta).mul_(p)
        dqkv = torch.empty_like(qkv)
        torch.matmul(ds, k, out=dqkv[0]).mul_(ctx.scale)
        torch.matmul(ds.transpose(-1, -2), q, out=dqkv[1]).mul_(ctx.scale)
        torch.matmul(p.transpose(-1, -2), dout, out=dqkv[2])
        return dqkv, ds.unflatten(0, (-1, ctx.windows)).sum(0), None


def _attend(qkv: Tensor, bias: Tensor, scale: float) -> Tensor:
    """What is fastest on the device, for the shapes of `_BiasedAttention`; in the type of qkv, under autocast too."""
    device = qkv.device.type
    if device != "meta" and torch.is_autocast_enabled(device):  # meta has none, for which torch raises
        with torch.autocast(device, enabled=False):
            return _attend(qkv, bias, scale)
    if device == "cpu":
        return _BiasedAttention.apply(qkv, bias, scale)
    bias = bias.repeat(qkv.shape[1] // len(bias), 1, 1, 1) if len(bias) > 1 else bias.expand(qkv.shape[1], -1, -1, -1)
    return F.scaled_dot_product_attention(*qkv, attn_mask=bias, scale=scale)


def _roll(x: Tensor, shift: Sequence[int]) -> Tensor:
    """x (B,T,H,W,...) rolled along T, H, W; torch copies once for every axis it is given, shifted or not."""
    axes = [axis for axis in range(3) if shift[axis]]
    return torch.roll(x, [shift[axis] for axis in axes], [1 + axis for axis in axes]) if axes else x


def window_attention(qkv: Tensor, bias_table: Tensor, windows: Windows, scale: float) -> Tensor:
    """`reference.window_attention` with bias and mask added once for all samples."""
    heads, tokens = qkv.shape[5], windows.tokens
    qkv = _roll(qkv, [-s for s in windows.shift])
    # (B * windows, N, 3, h, d) -> (3, B * windows, h, N, d)
    qkv = _partition(qkv, windows.window).permute(2, 0, 3, 1, 4).contiguous()
    rows = bias_table.index_select(0, _bias_rows(windows, qkv.device))
    bias = rows.view(tokens, tokens, heads).permute(2, 0, 1).to(qkv.dtype)[None]
    if any(windows.mask_shift):
        bias = bias + _mask(windows, qkv.device).to(qkv.dtype)[:, None]
    out = _attend(qkv, bias.contiguous(), scale)
    return _roll(_to_map(out.transpose(1, 2).flatten(2), windows), windows.shift)


def insert_mask_tokens(x: Tensor, mask_token: Tensor, mask: Tensor) -> Tensor:
    """`reference.insert_mask_tokens`: one select, no arithmetic on x."""
    h, w = mask.shape[2:]
    cells = x.unflatten(3, (w, -1)).unflatten(2, (h, -1))
    masked = mask[:, :, :, None, :, None, None]
    return torch.where(masked, mask_token.to(x.dtype), cells).flatten(4, 5).flatten(2, 3)


class _GatherRows(torch.autograd.Function):
    """Row gather whose backward is a plain scatter: real indices are unique, padding lands in a spare row."""

    @staticmethod
    def forward(ctx, x: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.rows = len(x)
        if not len(x):
            return x.new_zeros((len(index), x.shape[1]))
        # Not in place: torch 2.11 compiles a function whose result was changed in place to a wrong gradient.
        return x.index_select(0, index.clamp_min(0)).masked_fill((index < 0)[:, None], 0)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        (index,) = ctx.saved_tensors
        spare = torch.where(index < 0, ctx.rows, index)
        return grad.new_zeros(ctx.rows + 1, grad.shape[1]).index_copy_(0, spare, grad)[: ctx.rows], None


def gather_masked(x: Tensor, index: Tensor) -> Tensor:
    """`reference.gather_masked`."""
    return _GatherRows.apply(x, index)


def masked_cross_entropy(
    h: Tensor, weight: Tensor, bias: Tensor, target: Tensor, segments: tuple[int, ...]
) -> tuple[Tensor, Tensor]:
    """`reference.masked_cross_entropy`."""
    logits = F.linear(h, weight, bias)
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    known = (target >= 0) & (target < len(weight))
    losses = F.cross_entropy(wide, torch.where(known, target, IGNORE), ignore_index=IGNORE, reduction="none")
    losses = losses.masked_fill(~known & (target != IGNORE), float("nan"))
    hits = (logits.argmax(-1) == target) & known
    sums = torch.stack([part.sum() for part in losses.split(segments)])
    return sums, torch.stack([part.sum() for part in hits.split(segments)])


def add_scaled(x: Tensor, branch: Tensor, scale: Tensor | None) -> Tensor:
    """`reference.add_scaled`."""
    if scale is not None:
        branch = branch * scale.to(branch.dtype).view(-1, *[1] * (branch.ndim - 1))
    return x + branch


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """`reference.layer_norm`; under autocast, which would widen it, in x's dtype as well."""
    return F.layer_norm(x, weight.shape, weight, bias, eps).to(x.dtype)


def add_norm(
    x: Tensor, branch: Tensor, scale: Tensor | None, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """`reference.add_norm`."""
    total = add_scaled(x, branch, scale)
    return total, layer_norm(total, weight, bias, eps)


def norm_add(x: Tensor, branch: Tensor, scale: Tensor | None, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """`reference.norm_add`."""
    return add_scaled(x, layer_norm(branch, weight, bias, eps), scale)


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """`reference.linear_gelu`."""
    return F.gelu(F.linear(x, weight, bias))
