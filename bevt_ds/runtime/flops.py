"""How much arithmetic a sample costs, from the model's sizes alone, and the peak of known devices.

Counts are multiply-accumulates of matrix products and convolutions in the forward pass; training costs three times
that, and a multiply-accumulate is two FLOPs. Recomputed activations and the tokenizer are not model FLOPs.
"""

from __future__ import annotations

import math

from bevt_ds.model.arch import SwinArch

# Dense bf16 TFLOP/s by a substring of the device's name, from the vendors' data sheets.
PEAK_TFLOPS = {
    "H200": 989.0,
    "H100 PCIe": 756.0,
    "H100": 989.0,
    "A100": 312.0,
    "B200": 2250.0,
    "L40S": 362.0,
}


def backbone_macs(arch: SwinArch, pixels: tuple[int, int, int], image: bool = False) -> int:
    """Forward multiply-accumulates of stem and blocks for one input of (frames, height, width) pixels."""
    patch = (1, *arch.patch[1:]) if image else arch.patch
    grid = [n // p for n, p in zip(pixels, patch, strict=True)]
    width = arch.embed_dim
    total = math.prod(grid) * math.prod(patch) * 3 * width
    for stage, depth in enumerate(arch.depths):
        tokens = math.prod(grid)
        keys = math.prod(min(n, w) for n, w in zip(grid, arch.window, strict=True))
        total += depth * tokens * (12 * width * width + 2 * keys * width)
        if stage < len(arch.depths) - 1:
            grid = [grid[0], grid[1] // 2, grid[2] // 2]
            total += math.prod(grid) * 4 * width * 2 * width
            width *= 2
    return total


def clip_macs(arch: SwinArch, vocabulary: int, frames: int, side: int, masked: float) -> int:
    """One clip through backbone, video decoder and the head on `masked` output cells."""
    cells = frames // 2 * (side // 16) ** 2
    width = arch.width
    decoder = cells // 4 * width * 4 * width + cells * (3 * width // 2) * width + cells * width * 2 * width
    return backbone_macs(arch, (frames, side, side)) + decoder + int(masked * width * vocabulary)


def image_macs(arch: SwinArch, vocabulary: int, side: int, masked: float) -> int:
    """One image through backbone, image decoder and the head on `masked` output cells."""
    cells = (side // 16) ** 2
    width = arch.width
    decoder = cells // 4 * width * 4 * width + cells * (3 * width // 2) * width
    return backbone_macs(arch, (1, side, side), image=True) + decoder + int(masked * width * vocabulary)


def training_flops(macs: int) -> int:
    """FLOPs of forward and backward: 2 a multiply-accumulate, backward twice the forward."""
    return 6 * macs


def peak_flops(device_name: str) -> float | None:
    """Dense bf16 peak of a device in FLOP/s, or None where it is not known."""
    return next((1e12 * t for name, t in PEAK_TFLOPS.items() if name in device_name), None)
