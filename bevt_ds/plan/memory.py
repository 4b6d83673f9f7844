"""Bytes that a rank holds, by part, and what a checkpoint takes.

P parameters over N ranks. Source of the split by stage: Rajbhandari et al. 2020, "ZeRO", section 3; of the rest,
DeepSpeed 0.19.8.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bevt_ds.config.schema import TrainingConfig
from bevt_ds.config.validate import zero_stage

WIDTHS = {"fp32": 4, "bf16": 2, "fp16": 2}  # bytes of a parameter, and of a gradient on the wire
LIVE = 1_000_000_000  # parameters that ZeRO-3 keeps gathered: DeepSpeed's stage3_max_live_parameters
SURFACES = 20  # frames that an NVDEC session holds, in NV12
USABLE = 0.94  # of a GPU's memory: the rest is CUDA's context, NCCL's buffers and what the allocator cannot use


def state_bytes(parameters: int, precision: str, zero: Mapping[str, Any], world: int) -> dict[str, float]:
    """Weights, gradients and optimizer on a rank's GPU, and what is `offloaded` to its host; no buffers.

    `zero`: the section zero_optimization of the DeepSpeed JSON. bf16 adds gradients up in fp32. The optimizer is
    AdamW's two moments and, under ZeRO or in half precision, fp32 master weights. ZeRO-3's weights count twice: a
    rank's own part, and those that are gathered.
    """
    stage, width = zero.get("stage", 0), WIDTHS[precision]
    optimizer = 12 if stage or precision != "fp32" else 8
    sizes = {"optimizer": (optimizer, 1), "gradients": (2 if precision == "fp16" else 4, 2), "weights": (width, 3)}
    parts = {name: parameters * size / (world if stage >= first else 1) for name, (size, first) in sizes.items()}
    moved = [name for name, key in (("optimizer", "optimizer"), ("weights", "param")) if _offloads(zero, key)]
    parts["offloaded"] = sum(parts.pop(name) for name in moved) + 0.0
    if stage == 3 and world > 1:
        parts["gathered weights"] = min(parameters, zero.get("stage3_max_live_parameters", LIVE)) * width
        if (group := zero.get("zero_hpz_partition_size", 1)) > 1:
            parts["weights of the node"] = parameters * width / group
    return parts


def _offloads(zero: Mapping[str, Any], what: str) -> bool:
    return (zero.get(f"offload_{what}") or {}).get("device", "none") != "none"


def bucket_bytes(settings: Mapping[str, Any], precision: str) -> float:
    """Buffers in which gradients wait for their reduction, two where that overlaps with the backward pass.

    At stages 1 and 2 also what reducing one of them takes: a flat copy, and in bf16 that copy in fp32, from which it is
    added up (runtime/bucket_sums.py). It is no less than the gradients that have waited for their bucket, gone by then.
    `settings`: what DeepSpeed is given, with no "auto" left.
    """
    zero, width = settings.get("zero_optimization", {}), WIDTHS[precision]
    stage, copies = zero_stage(settings), 2 if zero.get("overlap_comm") else 1
    if not stage:
        return 0.0
    plain = stage == 3 or (stage == 1 and precision == "bf16")  # other optimizers of DeepSpeed's
    reducing = 0 if plain else width + 4 * (precision == "bf16")
    return zero.get("reduce_bucket_size", 0) * (copies * width + reducing) + 0.0


def input_bytes(config: TrainingConfig, clips: int, images: int) -> float:
    """Pixels of a micro-batch in fp32, as they arrive; the network's own copy is among the activations.

    Where the GPU decodes, also the next micro-batches.
    """
    data = config.data
    pixels = 12 * data.size**2 * (clips * data.frames + images)
    return pixels * (1 + data.prefetch * (data.decoder == "gpu"))


def surface_bytes(config: TrainingConfig) -> float:
    """Decoded frames that NVDEC holds, a session for each thread, for videos of 340x256; nothing where cores decode."""
    return (config.data.decoder == "gpu") * config.data.threads * SURFACES * 1.5 * 340 * 256


def checkpoint_bytes(parameters: int, precision: str, stage: int) -> float:
    """One checkpoint: the compute weights, master weights and moments (without ZeRO in fp32 only moments), and the
    fp32 weights on their own. Below stage 3 one rank writes the compute weights."""
    state = state_bytes(parameters, precision, {"stage": stage}, world=1)
    return state["weights"] + state["optimizer"] + 4.0 * parameters
