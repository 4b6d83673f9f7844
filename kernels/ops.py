"""The public functions: resolve the provider, check what it needs, call it. Each can be differentiated once.

Kernels load when first used: they need the package triton. They refuse a second derivative themselves, see dispatch.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import torch_ops
from .geometry import Windows
from .once import differentiable_once
from .providers import resolve

KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
HEAD_DIMS = (16, 32, 64)  # what the tiles are made for; BEVT's is 32


def _runs_kernels(provider: str, x: Tensor) -> bool:
    """Whether the kernels run a call on x. TypeError where they are to and do not compute in its dtype."""
    if resolve(provider, x.device) == "torch":
        return False
    if x.dtype not in KERNEL_DTYPES:
        raise TypeError(f"kernels='triton' computes in {KERNEL_DTYPES}, not {x.dtype}")
    if x.device.type == "cpu" and x.dtype == torch.bfloat16:
        raise TypeError("Triton's interpreter multiplies bfloat16 wrongly: use float32 or float16")
    return True


def _check_for_kernels(qkv: Tensor) -> None:
    if qkv.shape[-1] not in HEAD_DIMS:
        raise ValueError(f"kernels='triton' takes heads {HEAD_DIMS} wide, not {qkv.shape[-1]}: use kernels='torch'")
    if qkv.shape[1:].numel() >= 2**31:
        raise ValueError(f"a sample of qkv {tuple(qkv.shape)} has more than 2^31 values: use kernels='torch'")


def window_attention(
    qkv: Tensor, bias_table: Tensor, windows: Windows, scale: float | None = None, provider: str = "auto"
) -> Tensor:
    """Shifted-window attention with a relative position bias, on the map as the qkv layer wrote it.

    Args:
        qkv: (B, T, H, W, 3, h, d), with (T, H, W) the grid of `windows`.
        bias_table: ((2Wt-1)(2Wh-1)(2Ww-1), h) for the table window (Wt, Wh, Ww) of `windows`, one row per offset
            query - key, time slowest.
        windows: which tokens attend to each other.
        scale: of q k^T; d ** -0.5 if not given.
        provider: auto, triton or torch.

    Returns:
        (B, T, H, W, h * d), in the map's own order. Raises ValueError where the shapes do not fit the windows.
    """
    if tuple(qkv.shape[1:4]) != windows.grid:
        raise ValueError(f"qkv has a map of {tuple(qkv.shape[1:4])} tokens, the windows are of one of {windows.grid}")
    if tuple(bias_table.shape) != (windows.table_rows, qkv.shape[5]):
        raise ValueError(
            f"bias_table has shape {tuple(bias_table.shape)}; table_window {windows.table_window} and "
            f"{qkv.shape[5]} heads need {(windows.table_rows, qkv.shape[5])}"
        )
    scale = qkv.shape[-1] ** -0.5 if scale is None else scale
    if _runs_kernels(provider, qkv):
        _check_for_kernels(qkv)
        from .attention import window_attention as run

        return run(qkv, bias_table, windows, scale)
    return torch_ops.window_attention(*differentiable_once("window_attention", qkv, bias_table), windows, scale)


def insert_mask_tokens(x: Tensor, mask_token: Tensor, mask: Tensor, provider: str = "auto") -> Tensor:
    """Replace every token of a masked cell by the mask token.

    x (B, T, H, W, C); mask_token (C,); mask bool (B, T, h, w), True = masked, whose cells cover
    (1, H/h, W/w) tokens; returns (B, T, H, W, C).
    """
    b, t, height, width, _ = x.shape
    if mask.shape[:2] != (b, t) or height % mask.shape[2] or width % mask.shape[3]:
        raise ValueError(f"mask {tuple(mask.shape)} does not divide the tokens {tuple(x.shape)}")
    if _runs_kernels(provider, x):
        from .mask_tokens import insert_mask_tokens as run

        return run(x, mask_token, mask)
    return torch_ops.insert_mask_tokens(*differentiable_once("insert_mask_tokens", x, mask_token), mask)


def gather_masked(x: Tensor, index: Tensor, provider: str = "auto") -> Tensor:
    """Rows of x (N, C) at index int64 (R,) -> (R, C). Index -1 pads and gives zeros; others are unique."""
    if _runs_kernels(provider, x):
        from .mask_tokens import gather_masked as run

        return run(x, index)
    return torch_ops.gather_masked(*differentiable_once("gather_masked", x), index)


def masked_cross_entropy(
    h: Tensor,
    weight: Tensor,
    bias: Tensor,
    target: Tensor,
    segments: tuple[int, ...],
    provider: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Linear layer and cross-entropy over rows, summed per segment.

    h (R, C); weight (V, C); bias (V,); target int64 (R,), -100 for padding rows; segments: row counts that
    sum to R, such as (rows of clips, rows of images). Returns loss sums (S,) fp32 and top-1 hits (S,) int64.

    A target outside [0, V) other than -100 makes its segment's loss NaN and has no gradient; raising an error would
    mean waiting for the device.
    """
    if sum(segments) != h.shape[0]:
        raise ValueError(f"segments {tuple(segments)} do not sum to the {h.shape[0]} rows")
    if _runs_kernels(provider, h):
        from .head_loss import masked_cross_entropy as run

        return run(h, weight, bias, target, tuple(segments))
    tensors = differentiable_once("masked_cross_entropy", h, weight, bias)
    return torch_ops.masked_cross_entropy(*tensors, target, tuple(segments))
