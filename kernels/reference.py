"""Every op of this package in plain PyTorch: the definition of correct, for tests only.

Nothing here is fast or thrifty. Each function rolls, partitions, indexes and masks in the order in which the papers
describe it, in the dtype of its inputs, and autograd gives the gradients.

Shape letters: B samples, T H W tokens along time, height, width; (t, h, w) an index within a window; N tokens of a
window, h heads, d their width, C = h * d, R rows, V vocabulary, S segments.
"""

from __future__ import annotations

from itertools import product
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor

from .geometry import Size3, Windows


def relative_position_index(window: Size3, table_window: Size3, by_number: bool = False) -> Tensor:
    """Row of the bias table for every (query, key) pair of a window, int64 (N, N).

    The table of `table_window` (Wt, Wh, Ww) has one row per offset query - key, time slowest. A window smaller than
    the table's uses the rows of the offsets that occur in it; `by_number` those of the first N tokens of a window of
    the table's size, as the original does.
    """
    if by_number:
        tokens = prod(window)
        return relative_position_index(table_window, table_window)[:tokens, :tokens]
    coordinates = torch.stack(torch.meshgrid(*(torch.arange(n) for n in window), indexing="ij"), dim=-1).reshape(-1, 3)
    offset = coordinates[:, None] - coordinates[None]
    index = torch.zeros(offset.shape[:2], dtype=torch.int64)
    for axis, extent in enumerate(table_window):
        index = index * (2 * extent - 1) + offset[..., axis] + extent - 1
    return index


def partition(x: Tensor, window: Size3) -> Tensor:
    """(B, T, H, W, ...) -> (B * windows, N, ...), windows in raster order."""
    b, t, h, w, *rest = x.shape
    wt, wh, ww = window
    x = x.reshape(b, t // wt, wt, h // wh, wh, w // ww, ww, *rest)
    x = x.movedim((2, 4, 6), (4, 5, 6))
    return x.reshape(-1, wt * wh * ww, *rest)


def unpartition(x: Tensor, window: Size3, grid: Size3) -> Tensor:
    """Inverse of `partition`: (B * windows, N, ...) -> (B, T, H, W, ...) for `grid` = (T, H, W)."""
    counts = [extent // size for extent, size in zip(grid, window, strict=True)]
    x = x.reshape(-1, *counts, *window, *x.shape[2:])
    x = x.movedim((4, 5, 6), (2, 4, 6))
    return x.reshape(-1, *grid, *x.shape[7:])


def same_region(grid: Size3, window: Size3, mask_shift: Size3) -> Tensor:
    """Which pairs of a window may attend to each other, bool (windows, N, N).

    Per axis of extent L, window w and mask shift s, the positions after the roll fall into the regions [0, L-w),
    [L-w, L-s) and [L-s, L); an axis with s = 0 is one region.
    """
    region = torch.zeros(1, *grid, dtype=torch.int64)
    parts = []
    for extent, size, shift in zip(grid, window, mask_shift, strict=True):
        edges = [0, extent - size, extent - shift, extent] if shift else [0, extent]
        parts.append([slice(a, b) for a, b in zip(edges, edges[1:], strict=False)])
    for number, box in enumerate(product(*parts)):
        region[(0, *box)] = number
    region = partition(region[..., None], window)[..., 0]
    return region[:, :, None] == region[:, None, :]


def window_attention(qkv: Tensor, bias_table: Tensor, windows: Windows, scale: float | None = None) -> Tensor:
    """Softmax attention inside windows of a rolled map, with a relative position bias from a table.

    qkv (B, T, H, W, 3, h, d), bias_table ((2Wt-1)(2Wh-1)(2Ww-1), h); returns (B, T, H, W, h * d).
    """
    grid, window, d = windows.grid, windows.window, qkv.shape[-1]
    rolled = torch.roll(qkv, [-s for s in windows.shift], dims=(1, 2, 3))
    q, k, v = partition(rolled, window).permute(2, 0, 3, 1, 4)  # (B * windows, h, N, d) each
    scores = (q * (d**-0.5 if scale is None else scale)) @ k.transpose(-1, -2)
    index = relative_position_index(window, windows.table_window, windows.bias_by_number).to(qkv.device)
    scores = scores + bias_table[index].permute(2, 0, 1).to(scores.dtype)
    allowed = same_region(grid, window, windows.mask_shift).to(qkv.device)
    allowed = allowed.repeat(qkv.shape[0], 1, 1)[:, None]
    out = scores.masked_fill(~allowed, float("-inf")).softmax(-1) @ v
    out = unpartition(out.transpose(1, 2).flatten(2), window, grid)
    return torch.roll(out, list(windows.shift), dims=(1, 2, 3))


def cell_mask(mask: Tensor, grid: Size3) -> Tensor:
    """The mask of cells (B, T, h, w) at token resolution (B, T, H, W): each cell covers (1, H/h, W/w) tokens."""
    for axis in (2, 3):
        mask = mask.repeat_interleave(grid[axis - 1] // mask.shape[axis], dim=axis)
    return mask


def insert_mask_tokens(x: Tensor, mask_token: Tensor, mask: Tensor) -> Tensor:
    """x (B, T, H, W, C) with every token of a masked cell replaced by `mask_token` (C,)."""
    masked = cell_mask(mask, tuple(x.shape[1:4]))[..., None]
    return torch.where(masked, mask_token.to(x.dtype), x)


def gather_masked(x: Tensor, index: Tensor) -> Tensor:
    """Rows of x (N, C) at index (R,); an index of -1 gives a zero row."""
    with_zeros = torch.cat([x, x.new_zeros((1, x.shape[1]))])
    return with_zeros[torch.where(index < 0, len(x), index)]


def masked_cross_entropy(
    h: Tensor, weight: Tensor, bias: Tensor, target: Tensor, segments: tuple[int, ...]
) -> tuple[Tensor, Tensor]:
    """Summed cross-entropy and top-1 hits of each segment of rows; rows whose target is -100 count for nothing.

    Any other target outside the vocabulary makes its segment's sum NaN, and its row gets no gradient.

    h (R, C), weight (V, C), bias (V,), target int64 (R,), segments: row counts that sum to R. Returns the sums
    (S,) in at least fp32 and the hits int64 (S,).
    """
    logits = F.linear(h, weight, bias)
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    padding = target == -100
    wrong = ((target < 0) | (target >= len(weight))) & ~padding
    losses = wide.logsumexp(-1) - wide.gather(-1, target.clamp(0, len(weight) - 1)[:, None])[:, 0]
    losses = torch.where(padding | wrong, wide.new_zeros(()), losses)
    losses = torch.where(wrong, float("nan"), losses)
    hits = logits.argmax(-1) == target
    loss_sums = torch.stack([part.sum() for part in losses.split(segments)])
    return loss_sums, torch.stack([part.sum() for part in hits.split(segments)])


def add_scaled(x: Tensor, branch: Tensor, scale: Tensor | None) -> Tensor:
    """x + branch, both (B, ..., C), the branch times its sample's factor in scale (B,), which has no gradient."""
    if scale is None:
        return x + branch
    factor = scale.detach().to(branch.dtype).reshape(-1, *[1] * (branch.ndim - 1))
    return x + branch * factor


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """x (..., C) less its mean, over its standard deviation, times weight (C,) plus bias (C,)."""
    centred = x - x.mean(-1, keepdim=True)
    variance = centred.square().mean(-1, keepdim=True)
    return centred / (variance + eps).sqrt() * weight + bias


def add_norm(
    x: Tensor, branch: Tensor, scale: Tensor | None, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """The residual sum, and its LayerNorm."""
    total = add_scaled(x, branch, scale)
    return total, layer_norm(total, weight, bias, eps)


def norm_add(x: Tensor, branch: Tensor, scale: Tensor | None, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """The residual sum with the branch's LayerNorm in place of the branch."""
    return add_scaled(x, layer_norm(branch, weight, bias, eps), scale)


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """u Phi(u) of u = x W^T + b, with Phi the normal distribution: x (..., K), weight (C, K), bias (C,)."""
    u = x @ weight.t() + bias
    return u * (0.5 * (1 + torch.erf(u * 0.5**0.5)))


def scale_pixels(frames: Tensor, scale: float, shift: float, channels: int, half: bool) -> Tensor:
    """scale frames + shift, frames (N, 3, H, W) fp32, with channels of zeros behind: (N, channels, H, W)."""
    scaled = F.pad(scale * frames + shift, (0, 0, 0, 0, 0, channels - 3))
    return scaled.half() if half else scaled


def bias_relu(h: Tensor, bias: Tensor) -> Tensor:
    """relu(h + bias), h (N, C, H, W), bias (C,)."""
    return (h + bias[:, None, None]).relu()


def residual_relu(
    x: Tensor, x_bias: Tensor | None, branch: Tensor, bias: Tensor, gain: float, pool: int
) -> tuple[Tensor, Tensor]:
    """(x + x_bias) + gain (branch + bias), the largest of each pool x pool pixels, and the ReLU of that.

    x, branch (N, C, H, W), biases (C,) or for x None; H and W are multiples of `pool`.
    """
    path = x if x_bias is None else x + x_bias[:, None, None]
    total = path + gain * (branch + bias[:, None, None])
    total = F.max_pool2d(total, pool) if pool > 1 else total
    return total, total.relu()
