"""The public functions: check the shapes, resolve the provider, call it."""

from __future__ import annotations

from torch import Tensor

from . import torch_ops
from .providers import resolve
from .reference import Size3


def window_attention(
    qkv: Tensor,
    bias_table: Tensor,
    *,
    window: Size3,
    table_window: Size3,
    shift: Size3,
    mask_shift: Size3,
    scale: float | None = None,
    provider: str = "auto",
) -> Tensor:
    """Shifted-window attention with a relative position bias; see `reference.window_attention`."""
    resolve(provider, qkv.device)
    return torch_ops.window_attention(
        qkv,
        bias_table,
        window=window,
        table_window=table_window,
        shift=shift,
        mask_shift=mask_shift,
        scale=scale,
    )


def insert_mask_tokens(x: Tensor, mask_token: Tensor, mask: Tensor, provider: str = "auto") -> Tensor:
    """Replace the tokens of masked cells; see `reference.insert_mask_tokens`."""
    resolve(provider, x.device)
    return torch_ops.insert_mask_tokens(x, mask_token, mask)


def gather_masked(x: Tensor, index: Tensor, provider: str = "auto") -> Tensor:
    """Select rows, -1 gives zeros; see `reference.gather_masked`."""
    resolve(provider, x.device)
    return torch_ops.gather_masked(x, index)


def masked_cross_entropy(
    h: Tensor,
    weight: Tensor,
    bias: Tensor,
    target: Tensor,
    segments: tuple[int, ...],
    provider: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Head and loss over masked rows; see `reference.masked_cross_entropy`."""
    resolve(provider, h.device)
    return torch_ops.masked_cross_entropy(h, weight, bias, target, segments)
