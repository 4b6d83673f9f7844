"""Windowed 3-D attention, mask tokens and the masked head, as Triton kernels and in plain PyTorch."""

from .accelerate import accelerate
from .geometry import Windows
from .launches import launch_counts, reset_launch_counts
from .ops import gather_masked, insert_mask_tokens, masked_cross_entropy, window_attention
from .providers import resolve

__all__ = [
    "Windows",
    "accelerate",
    "gather_masked",
    "insert_mask_tokens",
    "launch_counts",
    "masked_cross_entropy",
    "reset_launch_counts",
    "resolve",
    "window_attention",
]
