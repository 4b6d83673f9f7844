"""The `triton` provider: the functions of torch_ops.py, by the kernels. Importing it needs triton."""

from .attention import window_attention
from .head_loss import masked_cross_entropy
from .mask_tokens import gather_masked, insert_mask_tokens

__all__ = ["gather_masked", "insert_mask_tokens", "masked_cross_entropy", "window_attention"]
