"""FLOPs of a step by part, and the seconds that they take, from measured rows."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

from bevt_ds.config.deepspeed import shipped_jsons
from bevt_ds.config.recipes import joint_swin_b
from bevt_ds.config.samples import DataConfig
from bevt_ds.config.schema import BackboneConfig, Config, TrainingConfig
from bevt_ds.model.arch import SwinArch
from bevt_ds.model.presets import SIZES
from bevt_ds.runtime.flops import block_macs, clip_parts, encoder_macs, image_parts, peak_flops
from bevt_ds.runtime.gpus import Gpu

from .targets import cost_of, maker

NAMES = dict.fromkeys(("qkv", "proj", "mlp", "merging", "decoder"), "linears") | {"stem": "stems"}
MFU = 0.17  # where no row is at hand: about what an H200 reaches on 32 clips and 256 images, tokenizer included


def arch_of(model: BackboneConfig) -> SwinArch:
    """The preset with the run's window."""
    return SwinArch(**SIZES[model.name].arguments() | {"window": model.window})


def masked_share(data: DataConfig) -> tuple[float, float]:
    """Masked cells of an image, and frames of a clip with a masked cell, as expected from the masks' settings."""
    return data.mask.ratio * (data.size // 16) ** 2, data.frames * sum(data.mask.tube) / 2


def flops(config: TrainingConfig, clips: int, images: int = 0) -> dict[str, float]:
    """FLOPs of forward and backward pass over so many samples, by part: attention, linears, stems, head, recomputed
    (under checkpointing), and tokenizer or teacher, whose forward pass is all.

    The stems' inputs have no gradient: their backward pass costs what the forward pass does.
    """
    arch, data = arch_of(config.model), config.data
    pixels, macs = (data.frames, data.size, data.size), Counter()
    samples = [(clips, pixels, False), (images, (1, data.size, data.size), True)]
    if isinstance(config, Config):
        cells, frames = masked_share(data)
        cost = cost_of(config)
        parts = clip_parts(arch, cost.head[1], data.frames, data.size, cells * frames)
        of_image = image_parts(arch, cost.head[1], data.size, cells)
        targets = 2 * (clips * cost.clip + images * cost.image)
    else:
        parts, of_image, targets = encoder_macs(arch, pixels), Counter(), 0.0
    for count, sample in ((clips, parts), (images, of_image)):
        for name, number in sample.items():
            macs[NAMES.get(name, name)] += count * number * (4 if name == "stem" else 6)
    again = sum(count * recomputed_macs(config.model, arch, *of) for count, *of in samples)
    return dict(macs) | {"recomputed": 2.0 * again, maker(config): targets}


def recomputed_macs(model: BackboneConfig, arch: SwinArch, pixels: tuple[int, int, int], image: bool) -> int:
    """Multiply-accumulates that checkpointing adds for one sample.

    torch stops where nothing more is needed: at the last linear, unless a norm behind it keeps its input.
    """
    if not model.checkpointing:
        return 0
    whole = model.recompute == "block"
    stops = arch.norm == "pre"
    chosen = [block for stage in block_macs(arch, pixels, image) for block in stage[:: model.recompute_every]]
    parts = ("attention", "qkv", "proj", "mlp") if whole else ("attention", "qkv", "proj")
    last = (lambda block: block["mlp"] // 2) if whole else (lambda block: block["proj"])
    return sum(block[part] for block in chosen for part in parts) - stops * sum(map(last, chosen))


@dataclass(frozen=True)
class Rates:
    """How fast the arithmetic goes. `flops`: FLOP/s where the GPU is the limit; `block`: seconds of the host for each
    block of the encoder and micro-step, where the launches are, of clips or of images. `source`: which rows say so, or
    what is assumed."""

    flops: float
    block: float
    source: str


def rates(gpu: Gpu, model: str, mfu: float | None = None, folder: Path | None = None) -> Rates:
    """From the rows of `benchmarks.step` for this GPU and model, or else from those of another, as a share of the peak.

    Args:
        mfu: a share of the peak to assume instead.
        folder: of the rows; by default those of the checkout, if this is one.
    """
    rows = measured_rows(folder or shipped_jsons()["zero2"].parents[1] / "benchmarks" / "results")
    own = [row for row in rows if gpu.device in row["provenance"]["device"] and row["model"] == model] or rows
    if not own:
        return Rates((mfu or MFU) * gpu.flops, 0.0, f"assumed: {mfu or MFU:.0%} of the peak; launches cost nothing")
    small, large = (pick(row_batch(row)[0] for row in own) for pick in (min, max))
    slow, fast = ([row for row in own if row_batch(row)[0] == size] for size in (small, large))
    depth = sum(SIZES[own[0]["model"]].depths)
    block = median(row["p50_ms"] for row in slow) / 1000 / depth / 2  # these steps have clips and images
    config = joint_swin_b()
    config = replace(config, model=replace(config.model, name=own[0]["model"]))
    reached = sum(flops(config, *row_batch(fast[0])).values()) / (median(row["p50_ms"] for row in fast) / 1000)
    device, commit = own[0]["provenance"]["device"], own[0]["provenance"]["commit"]
    named = f"{own[0]['file']}, {own[0]['model']} on one {device} at {commit}: {large} clips for FLOP/s,"
    named += f" {small} for launches"
    if own is not rows:
        return Rates(mfu * gpu.flops if mfu else reached, block, f"measured: {named}")
    part = mfu or reached / peak_flops(device)
    return Rates(part * gpu.flops, block, f"assumed: {part:.0%} of the peak, as {named}")


def measured_rows(folder: Path) -> list[dict[str, Any]]:
    """Rows of whole steps of this project's code on a GPU, in bf16, with the dVAE."""
    files = sorted(folder.glob("*/step-nvidia-*.jsonl")) if folder.is_dir() else []
    rows = [
        json.loads(line) | {"file": str(file.relative_to(folder))}
        for file in files
        for line in file.read_text(encoding="utf-8").splitlines()
    ]
    wanted = {"case": "resident", "provider": "ours", "tokenizer": "dalle", "dtype": "torch.bfloat16"}
    return [row for row in rows if wanted.items() <= row.items()]


def row_batch(row: dict[str, Any]) -> tuple[int, int]:
    """Clips and images of a row's micro-batch, which says "8 clips 64 images"."""
    clips, _, images, _ = row["batch"].split()
    return int(clips), int(images)
