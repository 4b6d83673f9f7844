"""The `torch` provider: the ops in PyTorch's own fused operators, for CPUs and as the fallback on a GPU.

Shape letters as in reference.py.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from . import reference
from .geometry import Size3


@lru_cache(maxsize=64)
def _index(window: Size3, table_window: Size3, device: torch.device) -> Tensor:
    return reference.relative_position_index(window, table_window).flatten().to(device)


@lru_cache(maxsize=64)
def _mask(grid: Size3, window: Size3, mask_shift: Size3, device: torch.device) -> Tensor:
    allowed = reference.same_region(grid, window, mask_shift)
    return torch.zeros(allowed.shape).masked_fill(~allowed, float("-inf")).to(device)


def window_attention(
    qkv: Tensor,
    bias_table: Tensor,
    *,
    window: Size3,
    table_window: Size3,
    shift: Size3,
    mask_shift: Size3,
    scale: float | None = None,
) -> Tensor:
    """`reference.window_attention` through scaled_dot_product_attention."""
    grid, heads = tuple(qkv.shape[1:4]), qkv.shape[5]
    tokens = window[0] * window[1] * window[2]
    if any(shift):
        qkv = torch.roll(qkv, [-s for s in shift], dims=(1, 2, 3))
    q, k, v = reference.partition(qkv, window).permute(2, 0, 3, 1, 4)  # (B * windows, h, N, d) each
    rows = bias_table.index_select(0, _index(window, table_window, qkv.device))
    bias = rows.view(tokens, tokens, heads).permute(2, 0, 1).to(qkv.dtype)[None]
    if any(mask_shift):
        mask = _mask(grid, window, mask_shift, qkv.device).to(qkv.dtype)
        bias = (bias + mask[:, None]).repeat(qkv.shape[0], 1, 1, 1)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias.expand(len(q), -1, -1, -1), scale=scale)
    out = reference.unpartition(out.transpose(1, 2).flatten(2), window, grid)
    return torch.roll(out, list(shift), dims=(1, 2, 3)) if any(shift) else out


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
        return x.index_select(0, index.clamp_min(0)).masked_fill_((index < 0)[:, None], 0)

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
    losses = F.cross_entropy(logits.float(), target, ignore_index=-100, reduction="none")
    hits = (logits.argmax(-1) == target) & (target != -100)
    sums = torch.stack([part.sum() for part in losses.split(segments)])
    return sums, torch.stack([part.sum() for part in hits.split(segments)])
