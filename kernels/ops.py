"""The public functions: resolve the provider, check what it needs, call it. Each can be differentiated once.

Kernels load when first used: they need the package triton. They refuse a second derivative themselves, see dispatch.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import torch_ops
from .configs import NORM_CHANNELS
from .geometry import Windows
from .once import differentiable_once, refuse_gradients
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


def _norm_runs_kernels(provider: str, x: Tensor, weight: Tensor) -> bool:
    """`_runs_kernels`. ValueError where rows and weight differ, or the kernels do not take rows that wide."""
    if x.shape[-1:] != weight.shape:
        raise ValueError(f"the weight has shape {tuple(weight.shape)}, the rows of {tuple(x.shape)} another")
    runs = _runs_kernels(provider, x)
    if runs and len(weight) > NORM_CHANNELS:
        raise ValueError(f"kernels='triton' normalises up to {NORM_CHANNELS} channels: use kernels='torch'")
    return runs


def _terms(op: str, x: Tensor, branch: Tensor, scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """Both terms of a residual sum in the sum's dtype. ValueError where the shapes differ, RuntimeError where the
    scale wants a gradient."""
    refuse_gradients(op, scale)
    if x.shape != branch.shape or (scale is not None and scale.shape != x.shape[:1]):
        factors = None if scale is None else tuple(scale.shape)
        raise ValueError(f"a sum of {tuple(x.shape)} and {tuple(branch.shape)}, scale {factors}")
    dtype = torch.promote_types(x.dtype, branch.dtype)
    return x.to(dtype), branch.to(dtype)


def _autocast_widens(x: Tensor) -> bool:
    """Whether autocast normalises x in fp32, as it does on a GPU and not on a CPU."""
    return x.device.type == "cuda" and x.dtype in (torch.float16, torch.bfloat16) and torch.is_autocast_enabled("cuda")


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5, provider: str = "auto") -> Tensor:
    """LayerNorm over the channels of x (..., C), with weight and bias (C,) of one dtype, in the dtype in which
    `F.layer_norm` gives it: x's, or under autocast on a GPU fp32."""
    x = x.float() if _autocast_widens(x) else x
    if _norm_runs_kernels(provider, x, weight):
        from .norms import layer_norm as run

        return run(x, weight, bias, eps)
    return torch_ops.layer_norm(*differentiable_once("layer_norm", x, weight, bias), eps)


def add_norm(
    x: Tensor,
    branch: Tensor,
    scale: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-5,
    provider: str = "auto",
) -> tuple[Tensor, Tensor]:
    """A residual sum and its LayerNorm, for blocks with the norm in front of a branch.

    Args:
        x: (B, ..., C).
        branch: (B, ..., C), what is added.
        scale: (B,), a factor of each sample's branch (drop path), or None for 1. It may want no gradient.
        weight: (C,).
        bias: (C,), of the weight's dtype.

    Returns:
        x + scale branch, and its LayerNorm, both in the sum's dtype; the latter in fp32 under autocast on a GPU.
        Raises ValueError where the shapes do not fit, RuntimeError where the scale wants a gradient.
    """
    x, branch = _terms("add_norm", x, branch, scale)
    if _autocast_widens(x):  # two dtypes, which no kernel writes at once
        total = add_scaled(x, branch, scale, provider)
        return total, layer_norm(total, weight, bias, eps, provider)
    if _norm_runs_kernels(provider, x, weight):
        from .norms import add_norm as run

        return run(x, branch, scale, weight, bias, eps)
    x, branch, weight, bias = differentiable_once("add_norm", x, branch, weight, bias)
    return torch_ops.add_norm(x, branch, scale, weight, bias, eps)


def norm_add(
    x: Tensor,
    branch: Tensor,
    scale: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-5,
    provider: str = "auto",
) -> Tensor:
    """x + scale LN(branch), for blocks with the norm behind a branch; arguments and errors as of `add_norm`."""
    x, branch = _terms("norm_add", x, branch, scale)
    x, branch = (x.float(), branch.float()) if _autocast_widens(branch) else (x, branch)
    if _norm_runs_kernels(provider, x, weight):
        from .norms import norm_add as run

        return run(x, branch, scale, weight, bias, eps)
    x, branch, weight, bias = differentiable_once("norm_add", x, branch, weight, bias)
    return torch_ops.norm_add(x, branch, scale, weight, bias, eps)


def add_scaled(x: Tensor, branch: Tensor, scale: Tensor | None, provider: str = "auto") -> Tensor:
    """The residual sum alone: x + scale branch, arguments and errors as of `add_norm`."""
    x, branch = _terms("add_scaled", x, branch, scale)
    if scale is not None and _runs_kernels(provider, x):  # without a scale PyTorch's own sum is one kernel already
        from .norms import add_scaled as run

        return run(x, branch, scale)
    return torch_ops.add_scaled(*differentiable_once("add_scaled", x, branch), scale)


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor, provider: str = "auto") -> Tensor:
    """GELU (by the error function) of a linear layer: x (..., K), weight (C, K), bias (C,) -> (..., C)."""
    if _runs_kernels(provider, x):
        from .bias_gelu import linear_gelu as run

        return run(x, weight, bias)
    return torch_ops.linear_gelu(*differentiable_once("linear_gelu", x, weight, bias))
