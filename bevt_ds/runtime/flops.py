"""How much arithmetic a sample costs, from the model's sizes alone, and the peak of known devices.

Counts are multiply-accumulates of matrix products and convolutions in the forward pass; training costs three times
that, and a multiply-accumulate is two FLOPs. Recomputed activations and the tokenizer are not model FLOPs.
"""

from __future__ import annotations

from collections import Counter
from math import prod

from bevt_ds.model.arch import SwinArch
from bevt_ds.runtime.gpus import gpu_of

Pixels = tuple[int, int, int]


def block_macs(arch: SwinArch, pixels: Pixels, image: bool = False) -> list[list[Counter[str]]]:
    """Of one block of each stage and its parts: `attention`, the products over pairs of tokens; `qkv` and `proj`,
    the linears around it; `mlp`. Padding tokens count where they are computed: in front of the attention."""
    grid, stages = _grid(arch, pixels, image), []
    for stage, depth in enumerate(arch.depths):
        width, tokens = arch.embed_dim << stage, prod(grid)
        windows = tuple(map(min, grid, arch.window))
        padded = prod(extent + -extent % w for extent, w in zip(grid, windows, strict=True))
        block = Counter(
            attention=2 * padded * prod(windows) * width,
            qkv=3 * width * width * padded,
            proj=width * width * tokens,
            mlp=2 * tokens * width * int(width * arch.mlp_ratio),
        )
        stages.append([block] * depth)
        grid = [grid[0], -(-grid[1] // 2), -(-grid[2] // 2)]
    return stages


def _grid(arch: SwinArch, pixels: Pixels, image: bool) -> list[int]:
    """Tokens behind the stem."""
    return [-(-n // p) for n, p in zip(pixels, _patch(arch, image), strict=True)]


def _patch(arch: SwinArch, image: bool) -> Pixels:
    return (1, *arch.patch[1:]) if image else arch.patch


def encoder_macs(arch: SwinArch, pixels: Pixels, image: bool = False) -> Counter[str]:
    """Forward multiply-accumulates of one input of (frames, height, width) pixels, by part: those of `block_macs`, the
    `stem` and the `merging`."""
    grid = _grid(arch, pixels, image)
    total = Counter(stem=prod(grid) * prod(_patch(arch, image)) * 3 * arch.embed_dim)
    for stage, blocks in enumerate(block_macs(arch, pixels, image)):
        total += sum(blocks, Counter())
        grid = [grid[0], -(-grid[1] // 2), -(-grid[2] // 2)]
        if stage < len(arch.depths) - 1:
            total["merging"] += prod(grid) * 8 * (arch.embed_dim << stage) ** 2
    return total


def clip_parts(arch: SwinArch, vocabulary: int, frames: int, side: int, masked: float) -> Counter[str]:
    """One clip by part: `encoder_macs`, the `decoder` and the `head` on `masked` output positions, which go in pairs.

    The decoder gathers masked cells behind its upsampling: what is not masked costs nothing from there on.
    """
    width, coarse = arch.width, frames // arch.patch[0] * (side // 32) ** 2
    decoder = coarse * 4 * width**2 + masked / 2 * (3 * width // 2) * width + masked * width**2
    own = Counter(decoder=int(decoder), head=int(masked * width * vocabulary))
    return encoder_macs(arch, (frames, side, side)) + own


def image_parts(arch: SwinArch, vocabulary: int, side: int, masked: float) -> Counter[str]:
    """One image by part, as `clip_parts`."""
    width = arch.width
    decoder = (side // 32) ** 2 * 4 * width**2 + masked * (3 * width // 2) * width
    own = Counter(decoder=int(decoder), head=int(masked * width * vocabulary))
    return encoder_macs(arch, (1, side, side), image=True) + own


def training_flops(macs: int) -> int:
    """FLOPs of forward and backward: 2 a multiply-accumulate, backward twice the forward."""
    return 6 * macs


def peak_flops(device_name: str) -> float | None:
    """Dense bf16 peak of a device in FLOP/s, or None where it is not known."""
    gpu = gpu_of(device_name)
    return gpu and gpu.flops
