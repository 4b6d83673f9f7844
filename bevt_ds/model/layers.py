"""Layers of Video Swin and of BEVT's decoders, all channels-last.

Letters: B samples, T H W tokens along time, height and width, C channels, N heads, D channels of a head.
Convolutions whose kernel equals their stride are written as one matrix product and a reshape: same numbers, no layout
change. Every parameter is used inside its owner's forward, which is where ZeRO-3 gathers it.
Source of the semantics: xyzforever/BEVT@8881b21, mmaction/models/backbones/swin_transformer_bevt.py.
"""

from __future__ import annotations

from functools import partial
from math import prod
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import bevt_ds.kernels as ops

from .arch import NormPlace
from .windows import Size3, Windows, table_rows

Recompute = Literal["", "attention", "block"]  # what of a block the backward pass computes again
# No block draws random numbers, so that no generator's state need be kept.
again = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)


def pad_end(x: Tensor, grid: Size3) -> Tensor:
    """x (B,T,H,W,C) with zero tokens appended along T, H and W up to `grid`."""
    t, h, w = (wanted - extent for wanted, extent in zip(grid, x.shape[1:4], strict=True))
    return F.pad(x, (0, 0, 0, w, 0, h, 0, t)) if t or h or w else x


class Affine(nn.Module):
    """Weight and bias of a layer that computes more than the layer of torch whose parameters it has.

    It is no kind of that layer: what looks for an `nn.Linear` or an `nn.LayerNorm` to wrap, quantise or replace (LoRA,
    bitsandbytes, torchao) would leave out the rest of the computation.
    """

    def __init__(self, layer: nn.Linear | nn.LayerNorm, kernels: str):
        super().__init__()
        self.weight, self.bias, self.kernels = layer.weight, layer.bias, kernels

    def extra_repr(self) -> str:
        """The weight's shape."""
        return ", ".join(map(str, self.weight.shape))


class Norm(nn.LayerNorm):
    """LayerNorm over the channels."""

    def __init__(self, dim: int, kernels: str = "auto"):
        super().__init__(dim)
        self.kernels = kernels

    def forward(self, x: Tensor) -> Tensor:
        """(...,C) -> (...,C)."""
        return ops.layer_norm(x, self.weight, self.bias, self.eps, self.kernels)


class SumNorm(Affine):
    """The norm in front of a branch, and the residual sum in front of the norm: one pass over memory."""

    def __init__(self, dim: int, kernels: str):
        super().__init__(nn.LayerNorm(dim), kernels)

    def forward(self, x: Tensor, branch: Tensor | None = None, scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x, branch (B,...,C), scale (B,) -> x + scale branch, or x without a branch; and its norm."""
        if branch is None:
            return x, ops.layer_norm(x, self.weight, self.bias, provider=self.kernels)
        return ops.add_norm(x, branch, scale, self.weight, self.bias, provider=self.kernels)


class BranchNorm(Affine):
    """The norm behind a residual branch, and the sum behind the norm. Its initialisation is its own too."""

    def __init__(self, dim: int, kernels: str):
        super().__init__(nn.LayerNorm(dim), kernels)

    def forward(self, x: Tensor, branch: Tensor, scale: Tensor | None = None) -> Tensor:
        """x, branch (B,...,C), scale (B,) -> x + scale norm(branch)."""
        return ops.norm_add(x, branch, scale, self.weight, self.bias, provider=self.kernels)


class LinearGelu(Affine):
    """Linear, then GELU (by the error function)."""

    def __init__(self, dim: int, hidden: int, kernels: str):
        super().__init__(nn.Linear(dim, hidden), kernels)

    def forward(self, x: Tensor) -> Tensor:
        """(...,C) -> (...,hidden)."""
        return ops.linear_gelu(x, self.weight, self.bias, self.kernels)


class Mlp(nn.Module):
    """Linear, GELU, Linear."""

    def __init__(self, dim: int, hidden: int, kernels: str):
        super().__init__()
        self.fc1, self.fc2 = LinearGelu(dim, hidden, kernels), nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(...,C) -> (...,C)."""
        return self.fc2(self.fc1(x))


class PatchProjection(nn.Linear):
    """The stem's convolution as a Linear over flattened patches: a class of its own because its initialisation is."""


class PatchEmbed(nn.Module):
    """Non-overlapping patches to tokens, then LayerNorm. Pixels that a whole patch lacks are zeros at the end."""

    def __init__(self, patch: Size3, dim: int, channels: int = 3, kernels: str = "auto"):
        super().__init__()
        self.patch = patch
        self.proj = PatchProjection(channels * prod(patch), dim)  # columns: channel, time, row, column of the patch
        self.norm = Norm(dim, kernels)

    def forward(self, pixels: Tensor) -> Tensor:
        """(B,3,T,H,W) pixels -> (B,T',H',W',C) tokens in the parameters' dtype."""
        pad = [-extent % p for extent, p in zip(pixels.shape[2:], self.patch, strict=True)]
        if any(pad):
            pixels = F.pad(pixels, (0, pad[2], 0, pad[1], 0, pad[0]))
        pt, ph, pw = self.patch
        patches = rearrange(
            pixels.to(self.proj.weight.dtype),
            "b c (t pt) (h ph) (w pw) -> b t h w (c pt ph pw)",
            pt=pt,
            ph=ph,
            pw=pw,
        )
        return self.norm(self.proj(patches))


class PatchMerging(nn.Module):
    """Halve height and width, double the channels: 2x2 neighbours side by side, LayerNorm, Linear."""

    def __init__(self, dim: int, kernels: str = "auto"):
        super().__init__()
        self.norm = Norm(4 * dim, kernels)
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B,T,H,W,C) -> (B,T,ceil(H/2),ceil(W/2),2C). Odd sizes get a row or column of zeros."""
        _, t, h, w, _ = x.shape
        x = pad_end(x, (t, h + h % 2, w + w % 2))
        # Column-major order of the four neighbours: (even,even), (odd,even), (even,odd), (odd,odd) as (row, column).
        x = rearrange(x, "b t (h ph) (w pw) c -> b t h w (pw ph c)", ph=2, pw=2)
        return self.reduction(self.norm(x))


class Upsample(nn.Module):
    """Transposed convolution with kernel = stride = `scale`: each token becomes prod(scale) tokens."""

    def __init__(self, dim: int, scale: Size3):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(dim, dim, *scale))  # (in, out, t, h, w), as nn.ConvTranspose3d
        self.bias = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        """(B,T,H,W,C) -> (B,T*t,H*h,W*w,C)."""
        t, h, w = self.weight.shape[2:]
        taps = rearrange(self.weight, "i o t h w -> (t h w o) i")
        x = F.linear(x, taps, self.bias.repeat(t * h * w))
        return rearrange(x, "b T H W (t h w c) -> b (T t) (H h) (W w) c", t=t, h=h, w=w)


class MaskToken(nn.Module):
    """The learned token that stands in for masked ones, shared by both streams."""

    def __init__(self, dim: int, kernels: str):
        super().__init__()
        self.kernels = kernels
        self.token = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """Replace tokens of x (B,T,H,W,C) where mask (B,T,h,w) is True; a cell covers (1, H/h, W/w) tokens."""
        return ops.insert_mask_tokens(x.contiguous(), self.token, mask.bool(), provider=self.kernels)


class LMHead(Affine):
    """The classifier over token ids. With targets it gives losses, and logits need never exist as a whole."""

    def __init__(self, dim: int, vocab_size: int, kernels: str):
        super().__init__(nn.Linear(dim, vocab_size), kernels)

    def forward(
        self, x: Tensor, targets: Tensor | None = None, segments: tuple[int, ...] = ()
    ) -> Tensor | tuple[Tensor, Tensor]:
        """(...,C) -> logits (...,V), or with targets int64 (R,): sums over each segment of the rows x (R,C).

        The sums are the cross-entropy (S,) in fp32 and the number of right answers (S,) int64; a target of -100 is
        ignored. `segments` are row counts that sum to R.
        """
        if targets is None:
            return F.linear(x, self.weight, self.bias)
        return ops.masked_cross_entropy(x, self.weight, self.bias, targets, segments, provider=self.kernels)


class WindowAttention(nn.Module):
    """Multi-head self-attention in windows, with a learned bias for every offset between two tokens."""

    def __init__(self, dim: int, num_heads: int, window: Size3, kernels: str):
        super().__init__()
        self.num_heads, self.kernels = num_heads, kernels
        self.relative_position_bias_table = nn.Parameter(torch.zeros(table_rows(window), num_heads))
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, windows: Windows) -> Tensor:
        """(B,T,H,W,C) -> (B,T,H,W,C). Padding tokens are zeros before qkv and take part as keys, as in the original."""
        _, t, h, w, _ = x.shape
        qkv = self.qkv(pad_end(x, windows.grid)).unflatten(-1, (3, self.num_heads, -1))  # (B,T,H,W,3,N,D)
        x = ops.window_attention(qkv, self.relative_position_bias_table, windows, provider=self.kernels)
        return self.proj(x[:, :t, :h, :w])


class Block(nn.Module):
    """Transformer block: windowed attention, then MLP, each on a residual branch with a LayerNorm.

    `norm`: in front of the branch ("pre"), or behind it ("post", Liu et al. 2022, "Swin Transformer V2", section 3.2).
    Branches with the latter begin at 0, as in microsoft/Swin-Transformer, so that a new block is the identity.
    """

    def __init__(
        self, dim: int, num_heads: int, window: Size3, mlp_ratio: float, kernels: str, norm: NormPlace = "pre"
    ):
        super().__init__()
        self.norm = norm
        make_norm = BranchNorm if norm == "post" else SumNorm
        self.norm1 = make_norm(dim, kernels)
        self.attn = WindowAttention(dim, num_heads, window, kernels)
        self.norm2 = make_norm(dim, kernels)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), kernels)

    def forward(
        self,
        x: Tensor,
        windows: Windows,
        scales: Tensor | None = None,
        recompute: Recompute = "",
        pending: tuple[Tensor | None, Tensor | None] = (None, None),
    ) -> tuple[Tensor, Tensor | None]:
        """(B,T,H,W,C) -> the same shape and what is still to be added to it, of that shape too, or None.

        A sum is made by the norm that follows: `pending` is what to add to x first, and its scale (B,). What is
        returned is to be scaled by the second of `scales` (2,B), which multiply the two branches per sample.

        `recompute`: "attention" keeps nothing of that branch but its input; "block" is the caller's.
        """
        attn_scale, mlp_scale = (None, None) if scales is None else scales
        attend = again if recompute == "attention" else lambda run, *inputs: run(*inputs)
        if self.norm == "post":
            x = attend(self._attention_and_norm, x, windows, attn_scale)
            return self.norm2(x, self.mlp(x), mlp_scale), None
        x, branch = attend(self._norm_and_attention, x, windows, *pending)
        x, normed = self.norm2(x, branch, attn_scale)
        return x, self.mlp(normed)

    def _attention_and_norm(self, x: Tensor, windows: Windows, scale: Tensor | None) -> Tensor:
        return self.norm1(x, self.attn(x, windows), scale)

    def _norm_and_attention(
        self, x: Tensor, windows: Windows, branch: Tensor | None, scale: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        x, normed = self.norm1(x, branch, scale)
        return x, self.attn(normed, windows)


@torch.no_grad()
def draw_parameters(module: nn.Module, generator: torch.Generator | None = None) -> None:
    """Initialise the parameters that `module` itself has, not its children's, as the original does.

    generator: None: torch's own. Linear layers, bias tables and the mask token: normal of std 0.02; biases 0; norms
    1 and 0. What the original writes as convolutions keeps torch's default for those: uniform within 1/sqrt(fan-in),
    where the fan-in of a transposed convolution counts its outputs. Norms behind a branch begin with weight 0.
    """
    match module:
        case PatchProjection():
            _init_uniform(module, module.in_features, generator)
        case Upsample():
            _init_uniform(module, module.weight[0].numel(), generator)
        case nn.Linear() | LinearGelu() | LMHead():
            _init_normal(module.weight, generator)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        case BranchNorm():
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)
        case nn.LayerNorm() | SumNorm():
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
        case WindowAttention():
            _init_normal(module.relative_position_bias_table, generator)
        case MaskToken():
            _init_normal(module.token, generator)


def _init_normal(weight: Tensor, generator: torch.Generator | None) -> None:
    # The original truncates at +-2, which is 100 standard deviations: it never cuts. Plain normal numbers are the same
    # in all versions of torch, those of trunc_normal_ are not.
    nn.init.normal_(weight, std=0.02, generator=generator)


def _init_uniform(layer: nn.Module, fan_in: int, generator: torch.Generator | None) -> None:
    bound = fan_in**-0.5
    nn.init.uniform_(layer.weight, -bound, bound, generator=generator)
    nn.init.uniform_(layer.bias, -bound, bound, generator=generator)
