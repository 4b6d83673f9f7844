"""The public functions: resolve the provider, check what it needs, call it. Each can be differentiated once."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from . import torch_ops
from .geometry import Size3, Windows
from .once import differentiable_once
from .providers import resolve

KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
HEAD_DIMS = (16, 32)  # what the tiles are made for; BEVT's is 32


def _implementation(provider: str, x: Tensor) -> ModuleType:
    """The module whose functions run the call. Kernels load when first used: they need the package triton."""
    if resolve(provider, x.device) == "torch":
        return torch_ops
    from . import triton_ops

    if x.dtype not in KERNEL_DTYPES:
        raise TypeError(f"kernels='triton' computes in {KERNEL_DTYPES}, not {x.dtype}")
    if x.device.type == "cpu" and x.dtype == torch.bfloat16:
        raise TypeError("Triton's interpreter multiplies bfloat16 wrongly: use float32 or float16")
    return triton_ops


def _check_for_kernels(qkv: Tensor) -> None:
    if qkv.shape[-1] not in HEAD_DIMS:
        raise ValueError(f"kernels='triton' takes heads {HEAD_DIMS} wide, not {qkv.shape[-1]}: use kernels='torch'")
    if qkv.shape[1:].numel() >= 2**31:
        raise ValueError(f"a sample of qkv {tuple(qkv.shape)} has more than 2^31 values: use kernels='torch'")


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
    """Shifted-window attention with a relative position bias, on the map as the qkv layer wrote it.

    Args:
        qkv: (B, T, H, W, 3, h, d), with T, H, W multiples of the window.
        bias_table: ((2Wt-1)(2Wh-1)(2Ww-1), h), one row per offset query - key, time slowest.
        window: tokens of a window along time, height, width; at most 1024, none larger than the map.
        table_window: (Wt, Wh, Ww), the window that the table was made for; at least `window`.
        shift: tokens by which the windows are shifted: the map counts as rolled by -shift.
        mask_shift: where the last window of each axis is cut into parts that do not see each other. Equal
            to `shift` in a usual shifted block; independent because BEVT's image blocks cut without shifting.
        scale: of q k^T; d ** -0.5 if not given.
        provider: auto, triton or torch.

    Returns:
        (B, T, H, W, h * d), in the map's own order. Raises ValueError where the sizes do not fit together.
    """
    sizes = {"window": window, "table_window": table_window, "shift": shift, "mask_shift": mask_shift}
    sizes = {name: tuple(size) for name, size in sizes.items()}
    windows = Windows(tuple(qkv.shape[1:4]), **sizes)
    if tuple(bias_table.shape) != (windows.table_rows, qkv.shape[5]):
        raise ValueError(
            f"bias_table has shape {tuple(bias_table.shape)}; table_window {windows.table_window} and "
            f"{qkv.shape[5]} heads need {(windows.table_rows, qkv.shape[5])}"
        )
    module = _implementation(provider, qkv)
    if module is not torch_ops:
        _check_for_kernels(qkv)
    qkv, bias_table = differentiable_once("window_attention", qkv, bias_table)
    return module.window_attention(qkv, bias_table, **sizes, scale=scale)


def insert_mask_tokens(x: Tensor, mask_token: Tensor, mask: Tensor, provider: str = "auto") -> Tensor:
    """Replace every token of a masked cell by the mask token.

    x (B, T, H, W, C); mask_token (C,); mask bool (B, T, h, w), True = masked, whose cells cover
    (1, H/h, W/w) tokens; returns (B, T, H, W, C).
    """
    b, t, height, width, _ = x.shape
    if mask.shape[:2] != (b, t) or height % mask.shape[2] or width % mask.shape[3]:
        raise ValueError(f"mask {tuple(mask.shape)} does not divide the tokens {tuple(x.shape)}")
    implementation = _implementation(provider, x)
    x, mask_token = differentiable_once("insert_mask_tokens", x, mask_token)
    return implementation.insert_mask_tokens(x, mask_token, mask)


def gather_masked(x: Tensor, index: Tensor, provider: str = "auto") -> Tensor:
    """Rows of x (N, C) at index int64 (R,) -> (R, C). Index -1 pads and gives zeros; others are unique."""
    implementation = _implementation(provider, x)
    (x,) = differentiable_once("gather_masked", x)
    return implementation.gather_masked(x, index)


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
    implementation = _implementation(provider, h)
    h, weight, bias = differentiable_once("masked_cross_entropy", h, weight, bias)
    return implementation.masked_cross_entropy(h, weight, bias, target, tuple(segments))
