"""BEVT as the original writes it, for comparison: roll, partition, a score tensor, logits of every position.

Layouts, casts and copies are the original's; weights are ours, by the same names (`load_weights`). Patches and
windows must divide the image evenly, as they divide 224 pixels: the original's image path takes no other sizes.
Source of the facts: xyzforever/BEVT@8881b21, mmaction/models/backbones/swin_transformer_bevt.py and
mmaction/models/heads/bevt_multisource_head.py. Letters: B samples, T frames, H W tokens, C channels, N tokens of a
window, V ids.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from timm.layers import DropPath, Mlp
from torch import Tensor, nn

from bevt_ds.batch import Batch, Stream
from bevt_ds.kernels.reference import partition, relative_position_index, same_region, unpartition

from .kernels_providers import original_core, rolled
from .step_parts import part

Size3 = tuple[int, int, int]


@lru_cache(maxsize=32)
def shift_mask(grid: Size3, window: Size3, shift: Size3, device: torch.device) -> Tensor:
    """The additive mask of shifted windows, fp32 (windows, N, N): -100 where two tokens were no neighbours."""
    allowed = same_region(grid, window, shift).to(device)
    return torch.zeros(allowed.shape, device=device).masked_fill(~allowed, -100.0)


class WindowAttention(nn.Module):
    """Attention over windows that were cut out before, (B * windows, N, C) -> the same."""

    def __init__(self, dim: int, heads: int, window: Size3):
        super().__init__()
        rows = (2 * window[0] - 1) * (2 * window[1] - 1) * (2 * window[2] - 1)
        self.relative_position_bias_table = nn.Parameter(torch.zeros(rows, heads))
        self.register_buffer("index", relative_position_index(window, window), persistent=False)
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        tokens = x.shape[1]
        index = self.index[:tokens, :tokens].contiguous()
        return self.proj(original_core(self.qkv(x), self.relative_position_bias_table, index, mask, unbind=False))


class Block(nn.Module):
    """norm, roll, partition, attention, reverse, roll back; then the MLP. x (B,T,H,W,C)."""

    def __init__(self, dim: int, heads: int, window: Size3, shifted: bool, mlp_ratio: float, drop: float):
        super().__init__()
        self.window, self.shifted = window, shifted
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn = WindowAttention(dim, heads, window)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.drop_path = DropPath(drop)

    def geometry(self, grid: Size3, image: bool) -> tuple[Size3, Size3, Size3]:
        """(window, shift, shift of the mask). Images are masked in every block and shifted in one-window maps too."""
        if image:
            window = (1, *self.window[1:])
            half = (0, window[1] // 2, window[2] // 2)
            return window, half if self.shifted else (0, 0, 0), half
        window = tuple(map(min, grid, self.window))
        half = tuple(w // 2 if n > w else 0 for n, w in zip(grid, self.window, strict=True))
        shift = half if self.shifted else (0, 0, 0)
        return window, shift, shift

    def forward(self, x: Tensor, image: bool) -> Tensor:
        grid = tuple(x.shape[1:4])
        window, shift, mask_shift = self.geometry(grid, image)
        mask = shift_mask(grid, window, mask_shift, x.device) if any(mask_shift) else None
        normed = self.norm1(x)
        with part("attention"):
            if not image:
                normed = F.pad(normed, (0,) * 8)  # by nothing, which copies all the same
            windows = self.attn(partition(rolled(normed, shift, -1), window), mask)
            branch = rolled(unpartition(windows, window, grid), shift, 1)
        x = x + self.drop_path(branch)
        return x + self.drop_path(self.mlp(self.norm2(x)))


class PatchMerging(nn.Module):
    """Four neighbours by strided slices, side by side, norm, Linear."""

    def __init__(self, dim: int):
        super().__init__()
        self.norm, self.reduction = nn.LayerNorm(4 * dim), nn.Linear(4 * dim, 2 * dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        corners = [x[:, :, row::2, column::2] for column in (0, 1) for row in (0, 1)]
        return self.reduction(self.norm(torch.cat(corners, -1)))


class Stage(nn.Module):
    """Takes and gives channels-first maps, (B,C,T,H,W)."""

    def __init__(self, blocks: list[Block], downsample: nn.Module):
        super().__init__()
        self.blocks, self.downsample = nn.ModuleList(blocks), downsample

    def forward(self, x: Tensor, image: bool) -> tuple[Tensor, Tensor]:
        """(before merging, after merging)."""
        x = rearrange(x, "b c t h w -> b t h w c")
        for block in self.blocks:
            x = block(x, image)
        merged = self.downsample(x)
        return rearrange(x, "b t h w c -> b c t h w"), rearrange(merged, "b t h w c -> b c t h w")


class PatchEmbed(nn.Module):
    """A strided convolution, then the norm over channels put last and back: (B,3,[T,]H,W) -> (B,C,[T,]H,W)."""

    def __init__(self, convolution: nn.Module):
        super().__init__()
        self.proj, self.norm = convolution, nn.LayerNorm(convolution.out_channels)

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.proj(pixels)
        tokens = self.norm(x.flatten(2).transpose(1, 2))
        return tokens.transpose(1, 2).reshape(x.shape)


class Encoder(nn.Module):
    """The clips' stem, the stages and the norm that follows the decoders."""

    def __init__(self, arch: dict[str, Any]):
        super().__init__()
        dim, depths, patch = arch["embed_dim"], arch["depths"], tuple(arch["patch"])
        self.patch_embed = PatchEmbed(nn.Conv3d(3, dim, patch, patch))
        drops = iter(torch.linspace(0, arch["drop_path"], sum(depths)).tolist())
        self.layers = nn.ModuleList()
        for i, (depth, heads) in enumerate(zip(depths, arch["num_heads"], strict=True)):
            common = (dim << i, heads, tuple(arch["window"]))
            blocks = [Block(*common, j % 2 == 1, arch["mlp_ratio"], next(drops)) for j in range(depth)]
            self.layers.append(Stage(blocks, PatchMerging(dim << i) if i + 1 < len(depths) else nn.Identity()))
        self.norm = nn.LayerNorm(dim << (len(depths) - 1))

    def forward(self, x: Tensor, image: bool) -> tuple[Tensor, Tensor]:
        """The last two stages' maps."""
        maps = []
        for stage in self.layers:
            kept, x = stage(x, image)
            maps.append(kept)
        return maps[-2], maps[-1]


class VideoDecoder(nn.Module):
    """Transposed convolutions around the Linear over both stages."""

    def __init__(self, dim: int, frames: int):
        super().__init__()
        self.upsample = nn.ConvTranspose3d(dim, dim, (1, 2, 2), (1, 2, 2))
        self.reduce = nn.Linear(dim + dim // 2, dim)
        self.unfold = nn.ConvTranspose3d(dim, dim, (frames, 1, 1), (frames, 1, 1))

    def forward(self, fine: Tensor, coarse: Tensor) -> Tensor:
        """(B,C/2,t,h,w), (B,C,t,h/2,w/2) -> (B, T*h*w, C)."""
        x = torch.cat([fine, self.upsample(coarse)], 1)
        x = self.reduce(rearrange(x, "b c t h w -> b t h w c"))
        return rearrange(self.unfold(rearrange(x, "b t h w c -> b c t h w")), "b c t h w -> b (t h w) c")


class ImageDecoder(nn.Module):
    """The same without time."""

    def __init__(self, dim: int):
        super().__init__()
        self.upsample = nn.ConvTranspose2d(dim, dim, 2, 2)
        self.reduce = nn.Linear(dim + dim // 2, dim)

    def forward(self, fine: Tensor, coarse: Tensor) -> Tensor:
        """(B,C/2,1,h,w), (B,C,1,h/2,w/2) -> (B, h*w, C)."""
        x = torch.cat([fine.squeeze(2), self.upsample(coarse.squeeze(2))], 1)
        return self.reduce(rearrange(x, "b c h w -> b (h w) c"))


class EagerBEVT(nn.Module):
    """The joint model. `arch` is what a BEVT of ours keeps in `arch`; its images are masked as the original's are."""

    def __init__(self, arch: dict[str, Any]):
        super().__init__()
        dim, patch = arch["embed_dim"], tuple(arch["patch"])
        self.encoder = Encoder(arch)
        wide = self.encoder.norm.normalized_shape[0]
        self.image_embed = PatchEmbed(nn.Conv2d(3, dim, patch[1:], patch[1:]))
        self.mask_token = nn.ParameterDict({"token": nn.Parameter(torch.zeros(1, 1, dim))})
        self.video_decoder, self.image_decoder = VideoDecoder(wide, patch[0]), ImageDecoder(wide)
        self.lm_head = nn.Linear(wide, arch["vocab_size"])

    def load_weights(self, state: dict[str, Tensor]) -> None:
        """Copy a BEVT's state dict; what it keeps as matrices becomes convolution kernels."""
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                parameter.copy_(state[name].view_as(parameter))

    def forward(self, batch: Batch, ids: list[Tensor]) -> Tensor:
        """Sum of the streams' losses; `ids` int64 hold every position's target: (B,T,h,w) of clips, (B,h,w) of images.

        A stream's loss is the mean over its masked positions. As in the original, all positions are classified first.
        """
        streams = [("video", batch.video), ("image", batch.image)]
        present = [(name, stream) for name, stream in streams if stream is not None]
        losses = [self._loss(name, stream, target) for (name, stream), target in zip(present, ids, strict=True)]
        return sum(losses)

    def _loss(self, name: str, stream: Stream, ids: Tensor) -> Tensor:
        positions = stream.mask
        if name == "video":
            positions = positions.repeat_interleave(ids.shape[1] // positions.shape[1], 1)
            features = self.video_decoder(*self._encode(self.encoder.patch_embed(stream.pixels), stream.mask, False))
        else:
            tokens = self.image_embed(stream.pixels).unsqueeze(2)
            features = self.image_decoder(*self._encode(tokens, stream.mask.unsqueeze(1), True))
        logits = self.lm_head(self.encoder.norm(features))
        with part("head and loss"):
            chosen, target = logits[positions.flatten(1)], ids[positions]
            (chosen.argmax(-1) == target).float().mean()  # the accuracy that the original logs
            return F.cross_entropy(chosen, target)

    def _encode(self, tokens: Tensor, mask: Tensor, image: bool) -> tuple[Tensor, Tensor]:
        """Mask tokens into (B,C,t,H,W) by products, as the original, and through the stages."""
        with part("stems"):
            weight = F.interpolate(mask.float(), tokens.shape[-2:], mode="nearest").unsqueeze(1).type_as(tokens)
            token = self.mask_token["token"].view(1, -1, 1, 1, 1)
            tokens = tokens * (1 - weight) + token * weight
        return self.encoder(tokens, image)


class TorchvisionEncoder(Encoder):
    """torchvision's Video Swin between our stems and decoders; its images are windows clipped to one token of time."""

    def __init__(self, arch: dict[str, Any]):
        from torchvision.models.video.swin_transformer import SwinTransformer3d

        super().__init__(arch | {"depths": (0,) * len(arch["depths"])})
        theirs = SwinTransformer3d(
            patch_size=list(arch["patch"]),
            embed_dim=arch["embed_dim"],
            depths=list(arch["depths"]),
            num_heads=list(arch["num_heads"]),
            window_size=list(arch["window"]),
            mlp_ratio=arch["mlp_ratio"],
            stochastic_depth_prob=arch["drop_path"],
        )
        self.layers = theirs.features  # stage, merging, stage, merging, ..., stage

    def forward(self, x: Tensor, image: bool) -> tuple[Tensor, Tensor]:
        maps = [rearrange(x, "b c t h w -> b t h w c")]
        for layer in self.layers:
            maps.append(layer(maps[-1]))
        return tuple(rearrange(maps[i], "b t h w c -> b c t h w") for i in (-3, -1))
