"""How much arithmetic a sample costs, from the model's sizes alone, and the peak of known devices.

Counts are multiply-accumulates of matrix products and convolutions in the forward pass; training costs three times
that, and a multiply-accumulate is two FLOPs. Recomputed activations and the tokenizer are not model FLOPs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any

# Dense bf16 TFLOP/s by a substring of the device's name, from the vendors' data sheets.
PEAK_TFLOPS = {
    "H200": 989.0,
    "H100 PCIe": 756.0,
    "H100": 989.0,
    "A100": 312.0,
    "B200": 2250.0,
    "L40S": 362.0,
}


@dataclass(frozen=True)
class Sizes:
    """What the count needs to know of a model."""

    embed_dim: int
    depths: tuple[int, ...]
    window: tuple[int, int, int]
    vocab_size: int = 0  # 0: the bare encoder
    patch: tuple[int, int, int] = (2, 4, 4)

    @classmethod
    def of(cls, arch: dict[str, Any]) -> Sizes:
        """From the constructor arguments that a model keeps in `arch`."""
        return cls(**{f.name: arch[f.name] for f in fields(cls) if f.name in arch})

    @property
    def width(self) -> int:
        """Channels of the last stage."""
        return self.embed_dim * 2 ** (len(self.depths) - 1)


def backbone_macs(sizes: Sizes, pixels: tuple[int, int, int], image: bool = False) -> int:
    """Forward multiply-accumulates of stem and blocks for one input of (frames, height, width) pixels."""
    patch = (1, *sizes.patch[1:]) if image else sizes.patch
    grid = [n // p for n, p in zip(pixels, patch, strict=True)]
    width = sizes.embed_dim
    total = math.prod(grid) * math.prod(patch) * 3 * width
    for stage, depth in enumerate(sizes.depths):
        tokens = math.prod(grid)
        keys = math.prod(min(n, w) for n, w in zip(grid, sizes.window, strict=True))
        total += depth * tokens * (12 * width * width + 2 * keys * width)
        if stage < len(sizes.depths) - 1:
            grid = [grid[0], grid[1] // 2, grid[2] // 2]
            total += math.prod(grid) * 4 * width * 2 * width
            width *= 2
    return total


def clip_macs(sizes: Sizes, frames: int, side: int, masked: float) -> int:
    """One clip through backbone, video decoder and the head on `masked` output cells."""
    cells = frames // 2 * (side // 16) ** 2
    width = sizes.width
    decoder = cells // 4 * width * 4 * width + cells * (3 * width // 2) * width + cells * width * 2 * width
    return backbone_macs(sizes, (frames, side, side)) + decoder + int(masked * width * sizes.vocab_size)


def image_macs(sizes: Sizes, side: int, masked: float) -> int:
    """One image through backbone, image decoder and the head on `masked` output cells."""
    cells = (side // 16) ** 2
    width = sizes.width
    decoder = cells // 4 * width * 4 * width + cells * (3 * width // 2) * width
    return backbone_macs(sizes, (1, side, side), image=True) + decoder + int(masked * width * sizes.vocab_size)


def training_flops(macs: int) -> int:
    """FLOPs of forward and backward: 2 a multiply-accumulate, backward twice the forward."""
    return 6 * macs


def peak_flops(device_name: str) -> float | None:
    """Dense bf16 peak of a device in FLOP/s, or None where it is not known."""
    return next((1e12 * t for name, t in PEAK_TFLOPS.items() if name in device_name), None)
