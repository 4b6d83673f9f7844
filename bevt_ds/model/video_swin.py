"""Video Swin transformer (Liu et al. 2021): windowed attention over clips; an image is a clip with one token of time.

Letters: B samples, T' H' W' tokens, C channels of the first stage, L blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol

import torch
from einops import rearrange, repeat
from torch import Tensor, nn

import bevt_ds.kernels as ops

from .arch import SwinArch
from .drop_path import residual_scales
from .inputs import CLIPS, IMAGES, look_at_values, require_keys, require_pixels
from .layers import Block, Norm, PatchEmbed, PatchMerging, Recompute, again
from .weights import PretrainedMixin
from .windows import WindowPolicy, block_windows


class Stage(nn.Module):
    """Blocks at one resolution, then (but for the last stage) the merging that leads to the next."""

    def __init__(self, arch: SwinArch, number: int, kernels: str):
        super().__init__()
        self.window, self.small, self.kernels = arch.window, arch.small_windows, kernels
        dim, heads = arch.embed_dim << number, arch.num_heads[number]
        self.blocks = nn.ModuleList(
            Block(dim, heads, arch.window, arch.mlp_ratio, kernels, arch.norm) for _ in range(arch.depths[number])
        )
        self.downsample = nn.Identity() if number + 1 == len(arch.depths) else PatchMerging(dim, kernels)

    def forward(
        self,
        x: Tensor,
        policy: WindowPolicy,
        scales: Sequence[Tensor | None],
        recompute: Recompute = "",
        every: int = 1,
    ) -> Tensor:
        """(B,T',H',W',C) -> the same shape, before merging; `scales` holds a (2,B) per block.

        The backward pass computes `recompute` again, of each `every`-th block. What such a block keeps is one map, so
        the sum in front of it is made here; else the block's first norm makes it.
        """
        branch = branch_scale = None
        for index, (block, scale) in enumerate(zip(self.blocks, scales, strict=True)):
            shifted = index % 2 == 1
            windows = block_windows(tuple(x.shape[1:4]), self.window, shifted=shifted, policy=policy, small=self.small)
            part = "" if index % every else recompute
            if part and branch is not None:
                x, branch = ops.add_scaled(x, branch, branch_scale, self.kernels), None
            run = partial(again, block) if part == "block" else block
            x, branch = run(x, windows, scale, part, (branch, branch_scale))
            branch_scale = None if scale is None else scale[1]
        return x if branch is None else ops.add_scaled(x, branch, branch_scale, self.kernels)


def compile_blocks(model: nn.Module, **options: Any) -> None:
    """torch.compile each block of `model` in place, one graph a shape; `options` are torch.compile's.

    Blocks are the unit because they repeat: those of one stage share their graphs, but the first, which no sum waits
    for. A model needs one for every stage, stream and kind of window, in training and in evaluation, which is more than
    torch's limit of 8.
    """
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
    for module in model.modules():
        if isinstance(module, Block):
            module.compile(dynamic=False, **options)


class Replay(Protocol):
    """Runs function(*inputs), whose parameters are those of `module`, in another way with the same results."""

    def __call__(
        self, name: str, function: Callable[..., Sequence[Tensor]], inputs: Sequence[Tensor], module: nn.Module
    ) -> Sequence[Tensor]: ...


class VideoSwin(PretrainedMixin, nn.Module):
    """The encoder: patches, four stages of window attention, LayerNorm.

    `sizes` are the fields of SwinArch. Any clip size works: patches, windows and merging pad with zeros at the end, as
    in the original. `checkpointing` recomputes blocks in the backward pass: `recompute` of them ("block", or
    "attention" alone), of every `recompute_every`-th block of a stage. `compile` puts each block through torch.compile;
    `kernels` is auto, triton or torch.
    """

    def __init__(
        self,
        *,
        checkpointing: bool = False,
        recompute: Recompute = "block",
        recompute_every: int = 1,
        compile: bool = False,
        kernels: str = "auto",
        **sizes: Any,
    ):
        super().__init__()
        arch = SwinArch.from_arguments(sizes)
        self.arch = arch.arguments()
        self.depths, self.drop_path = arch.depths, arch.drop_path
        self.checkpointing, self.recompute, self.recompute_every = checkpointing, recompute, recompute_every
        self.patch_embed = PatchEmbed(arch.patch, arch.embed_dim, kernels=kernels)
        self.layers = nn.ModuleList(Stage(arch, number, kernels) for number in range(len(arch.depths)))
        self.norm = Norm(arch.width, kernels)
        self.replay: Replay | None = None  # how training runs the stages, if not as they are written
        self.init_weights()
        if compile:
            compile_blocks(self)

    def encode(self, tokens: Tensor, policy: WindowPolicy = "swin", sample_keys: Tensor | None = None) -> list[Tensor]:
        """Tokens (B,T',H',W',C) -> every stage's output before merging, channels last.

        In training mode drop-path follows `sample_keys` (int64 (B,)); without them it draws keys from torch's own
        generator, once per call. In evaluation mode nothing is dropped.
        """
        scales = self._residual_scales(tokens, sample_keys)
        recompute = self.recompute if self.checkpointing and torch.is_grad_enabled() else ""
        outputs, first = [], 0
        for stage, depth in zip(self.layers, self.depths, strict=True):
            outputs.append(stage(tokens, policy, scales[first : first + depth], recompute, self.recompute_every))
            tokens = stage.downsample(outputs[-1])
            first += depth
        return outputs

    def last_stages(
        self, number: int, tokens: Tensor, policy: WindowPolicy = "swin", sample_keys: Tensor | None = None
    ) -> Sequence[Tensor]:
        """The last `number` outputs of `encode`; in training with keys by `replay`, where there is one."""
        if self.replay is None or sample_keys is None or not self.training or not torch.is_grad_enabled():
            return self.encode(tokens, policy, sample_keys)[-number:]
        run = lambda tokens, keys: self.encode(tokens, policy, keys)[-number:]  # noqa: E731
        return self.replay(f"the encoder ({policy} windows)", run, (tokens, sample_keys), self.layers)

    def forward_intermediates(self, clip: Tensor, sample_keys: Tensor | None = None) -> tuple[Tensor, list[Tensor]]:
        """A clip (B,3,T,H,W) -> (the last stage's output after the norm, every stage's before merging and norm).

        All are channels first: (B,C_i,T',H'_i,W'_i).

        Raises UserError for other shapes, types or ranges: see `inputs`.
        """
        self._require_clips(clip, sample_keys)
        outputs = self.encode(self.patch_embed(clip), sample_keys=sample_keys)
        features = self.norm(outputs[-1])
        first = lambda x: rearrange(x, "b t h w c -> b c t h w")  # noqa: E731
        return first(features), [first(x) for x in outputs]

    def forward_features(self, clip: Tensor, sample_keys: Tensor | None = None) -> Tensor:
        """A clip (B,3,T,H,W), normalised -> (B,8C,T',H',W') after the last norm. Raises as `forward_intermediates`."""
        self._require_clips(clip, sample_keys)
        (last,) = self.last_stages(1, self.patch_embed(clip), sample_keys=sample_keys)
        return rearrange(self.norm(last), "b t h w c -> b c t h w")

    def _require_clips(self, clip: Tensor, sample_keys: Tensor | None) -> None:
        """UserError unless they are what the network takes."""
        require_pixels(clip, CLIPS)
        require_keys(sample_keys, len(clip))
        look_at_values(clip, CLIPS, self)

    def forward(self, clip: Tensor, sample_keys: Tensor | None = None) -> Tensor:
        """`forward_features`."""
        return self.forward_features(clip, sample_keys)

    def features_of(self, pixels: Tensor, stem: PatchEmbed | None = None, policy: WindowPolicy = "swin") -> Tensor:
        """Clips (B,3,T,H,W) -> (B,C,T',H',W') as `forward_features`; images (B,3,H,W) -> (B,C,1,H',W').

        Images: see `stages_of`.
        """
        return rearrange(self.norm(self.stages_of(pixels, stem, policy)[-1]), "b t h w c -> b c t h w")

    def stages_of(self, pixels: Tensor, stem: PatchEmbed | None = None, policy: WindowPolicy = "swin") -> list[Tensor]:
        """Clips (B,3,T,H,W) or images (B,3,H,W) -> every stage's output before merging and norm, (B,T',H',W',C_i).

        Images, whose T' is 1, go through the `stem` of their own, with `policy` as windows, where there is one; else as
        still clips. Raises UserError as `forward_intermediates`.
        """
        if pixels.ndim == 4 and stem is not None:
            require_pixels(pixels, IMAGES)
            return self.encode(stem(pixels.unsqueeze(2)), policy)
        if pixels.ndim == 4:
            pixels = repeat(pixels, "b c h w -> b c t h w", t=self.arch["patch"][0])
        require_pixels(pixels, CLIPS)
        look_at_values(pixels, CLIPS, self)
        return self.encode(self.patch_embed(pixels))

    def _residual_scales(self, tokens: Tensor, keys: Tensor | None) -> Sequence[Tensor | None]:
        blocks = sum(self.depths)
        if not self.training or self.drop_path == 0:
            return [None] * blocks
        if keys is None:
            keys = torch.randint(2**63 - 1, (len(tokens),), device=tokens.device)
        return residual_scales(keys, self.drop_path, blocks)
