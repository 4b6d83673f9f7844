"""Windowed 3-D attention, norms, GELU, mask tokens and the masked head, as Triton kernels and in plain PyTorch."""

from .accelerate import accelerate
from .geometry import Windows
from .launches import launch_counts, reset_launch_counts
from .ops import (
    add_norm,
    add_scaled,
    gather_masked,
    insert_mask_tokens,
    layer_norm,
    linear_gelu,
    masked_cross_entropy,
    norm_add,
    window_attention,
)
from .providers import resolve

__all__ = [
    "Windows",
    "accelerate",
    "add_norm",
    "add_scaled",
    "gather_masked",
    "insert_mask_tokens",
    "launch_counts",
    "layer_norm",
    "linear_gelu",
    "masked_cross_entropy",
    "norm_add",
    "reset_launch_counts",
    "resolve",
    "window_attention",
]
