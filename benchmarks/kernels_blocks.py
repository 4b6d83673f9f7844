"""Blocks of other libraries as users have them: in eager mode, compiled, and with `accelerate`.

A block is a whole one, its linear layers, norms and MLP with it, at the sizes of Swin-B's third stage (second in MONAI,
whose heads are made for volumes), on random weights.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from bevt_ds.kernels import accelerate

from .kernels_providers import Job, leaf


@dataclass(frozen=True)
class BlockCase:
    """One block of a library, shifted."""

    name: str
    library: str
    side: int  # of the map
    window: int
    heads: int  # 32 wide
    batch: int
    frames: int = 1

    @property
    def width(self) -> int:
        """Channels."""
        return 32 * self.heads


def torchvision_block(case: BlockCase) -> nn.Module:
    """Of swin_b."""
    from torchvision.models.swin_transformer import SwinTransformerBlock

    return SwinTransformerBlock(case.width, case.heads, [case.window] * 2, [case.window // 2] * 2)


def torchvision_v2_block(case: BlockCase) -> nn.Module:
    """Of swin_v2_b."""
    from torchvision.models.swin_transformer import SwinTransformerBlockV2

    return SwinTransformerBlockV2(case.width, case.heads, [case.window] * 2, [case.window // 2] * 2)


def torchvision_clip_block(case: BlockCase) -> nn.Module:
    """Of swin3d_b."""
    from torchvision.models.swin_transformer import SwinTransformerBlock
    from torchvision.models.video.swin_transformer import ShiftedWindowAttention3d

    window, shift = [case.frames, case.window, case.window], [0, case.window // 2, case.window // 2]
    return SwinTransformerBlock(case.width, case.heads, window, shift, attn_layer=ShiftedWindowAttention3d)


def timm_block(case: BlockCase) -> nn.Module:
    """Of swin_base."""
    from timm.models.swin_transformer import SwinTransformerBlock

    sizes = {"num_heads": case.heads, "window_size": case.window, "shift_size": case.window // 2}
    return SwinTransformerBlock(case.width, (case.side, case.side), **sizes)


class HuggingFaceBlock(nn.Module):
    """Transformers' layer on a map in place of a sequence."""

    def __init__(self, case: BlockCase) -> None:
        """Its configuration wants a whole model's."""
        from transformers import SwinConfig
        from transformers.models.swin.modeling_swin import SwinLayer

        super().__init__()
        self.size = (case.side, case.side)
        config = SwinConfig(embed_dim=case.width, num_heads=[case.heads], depths=[1], window_size=case.window)
        config._attn_implementation = "sdpa"
        self.layer = SwinLayer(config, case.width, self.size, case.heads, shift_size=case.window // 2)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, H, W, C) -> the same."""
        return self.layer(x.flatten(1, 2), self.size)[0].unflatten(1, self.size)


class MonaiBlock(nn.Module):
    """SwinUNETR's block with the mask that its stage makes."""

    def __init__(self, case: BlockCase) -> None:
        """Volumes: `frames` deep."""
        from monai.networks.nets.swin_unetr import SwinTransformerBlock, compute_mask

        super().__init__()
        window, shift = (case.window,) * 3, (case.window // 2,) * 3
        self.block = SwinTransformerBlock(case.width, case.heads, window, shift)
        self.register_buffer("mask", compute_mask([case.frames, case.side, case.side], window, shift, "cpu"))

    def forward(self, x: Tensor) -> Tensor:
        """x (B, D, H, W, C) -> the same."""
        return self.block(x, self.mask)


BUILDERS: dict[str, Callable[[BlockCase], nn.Module]] = {
    "torchvision swin": torchvision_block,
    "torchvision swin_v2": torchvision_v2_block,
    "torchvision swin3d": torchvision_clip_block,
    "timm swin": timm_block,
    "transformers swin": HuggingFaceBlock,
    "monai swin_unetr": MonaiBlock,
}
MODES = ("eager", "compile", "accelerated")


def block_job(case: BlockCase, mode: str, provider: str, device: str, dtype: torch.dtype) -> Job:
    """A block's forward and backward pass, all parameters in it; ValueError where there is nothing to accelerate."""
    torch.manual_seed(0)
    block = BUILDERS[case.library](case).to(device)
    shape = (case.batch, *([case.frames] if case.frames > 1 else []), case.side, case.side, case.width)
    x = leaf(*shape, device=device, dtype=torch.float32)
    if mode == "accelerated" and not (report := accelerate(block, provider)).replaced:
        raise ValueError(f"accelerate left the block: {report.left}")
    call = torch.compile(block, dynamic=False) if mode == "compile" else block

    def run() -> tuple[Tensor]:
        with torch.autocast(device, dtype, enabled=dtype != torch.float32):
            return (call(x),)

    return Job(run, (x, *(p for p in block.parameters() if p.requires_grad)))


def block_cases(device: str) -> list[BlockCase]:
    """Swin-B's sizes on a GPU; the smallest that pad, shift and cut on a CPU."""
    clips = {"torchvision swin3d": (8, 8), "monai swin_unetr": (2, 14)}
    cases = []
    for library in BUILDERS:
        batch, frames = clips.get(library, (64, 1))
        if device == "cuda":
            cases.append(BlockCase(f"{library} block", library, 14, 7, 16, batch, frames))
        else:
            cases.append(BlockCase(f"{library} block", library, 4, 2, 1, 1, 4 if frames > 1 else 1))
    return cases


def block_jobs(device: str) -> Iterator[tuple[str, BlockCase, str, Callable[..., Job]]]:
    """(op, case, provider's name, maker of the job); a CPU compiles nothing."""
    provider = "triton" if device == "cuda" else "torch"
    for case in block_cases(device):
        for mode in MODES if device == "cuda" else ("eager", "accelerated"):
            name = {"accelerated": "bevt_ds"}.get(mode, mode)
            yield "accelerate", case, name, partial(make_block, mode=mode, provider=provider)


def make_block(case: BlockCase, device: str, dtype: torch.dtype, mode: str, provider: str) -> Job:
    """`block_job`, as the benchmark calls its makers."""
    return block_job(case, mode, provider, device, dtype)


def check_block(case: BlockCase, device: str, dtype: torch.dtype, provider: str) -> None:
    """Raises unless the accelerated block gives what the block gives, to the rounding of the precision."""
    block = BUILDERS[case.library](case).to(device).eval()
    fast = copy.deepcopy(block)
    accelerate(fast, provider)
    shape = (1, *([case.frames] if case.frames > 1 else []), case.side, case.side, case.width)
    x = torch.randn(shape, device=device)
    with torch.no_grad(), torch.autocast(device, dtype, enabled=dtype != torch.float32):
        torch.testing.assert_close(fast(x), block(x), rtol=0, atol=100 * torch.finfo(dtype).eps)
