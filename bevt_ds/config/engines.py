"""What a DeepSpeed JSON asks of the launch and of the disk: nodes for ZeRO++, folders for what is offloaded."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from bevt_ds.config.schema import TrainingConfig
from bevt_ds.config.validate import unless

OFFLOADED = {"offload_optimizer": 16, "offload_param": 4}  # bytes a parameter: masters, gradients, moments; weights
GIB = 1 << 30


def ranks_a_node(environment: Mapping[str, str], world: int) -> int:
    """Ranks on each node, as torchrun or `deepspeed` says; all, where no launcher says it."""
    return int(environment.get("LOCAL_WORLD_SIZE") or environment.get("LOCAL_SIZE") or world)


def launch_problems(config: TrainingConfig, values: Mapping[str, Any], world: int, local: int) -> Iterator[str]:
    """What of a DeepSpeed JSON cannot work on so many ranks, `local` a node, or in the folders that it names."""
    zero = values.get("zero_optimization") or {}
    yield from _zeropp(zero, world, local)
    for part, folder in offload_folders(config, values).items():
        key = f"{part}.device=nvme of the DeepSpeed JSON"
        if not folder:
            yield f"{key}: name a folder on a local disk with train.offload_dir=FOLDER (or nvme_path in the JSON)."
        elif not Path(folder).is_dir():
            yield f"{key}: {folder} is no folder: make it, on a local disk of every node, or name another."
        elif not os.access(folder, os.W_OK | os.X_OK):
            yield f"{key}: {folder} cannot be written: change its owner, or name another folder."


def _zeropp(zero: Mapping[str, Any], world: int, local: int) -> Iterator[str]:
    size = zero.get("zero_hpz_partition_size", 1)
    wanted = [name for name in ("zero_quantized_weights", "zero_quantized_gradients") if zero.get(name)]
    wanted += ["zero_hpz_partition_size"] if size != 1 else []
    if not wanted:
        return
    if world == local:
        yield (
            f"{wanted[0]} of the DeepSpeed JSON: ZeRO++ saves traffic between nodes, and these {world} ranks are on one"
            " node: use --deepspeed_config zero3."
        )
    elif size != "auto":
        fits = [n for n in range(2, world + 1) if world % n == 0]
        yield from unless(
            size == 1 or size in fits,
            f"zero_hpz_partition_size={size} of the DeepSpeed JSON does not divide {world} ranks: write"
            f' {", ".join(map(str, fits))}, or "auto" for the {local} ranks of a node.',
        )


def offload_folders(config: TrainingConfig, values: Mapping[str, Any]) -> dict[str, str]:
    """Where the parts go that the JSON offloads to a disk; an empty text where nothing names it."""
    zero = values.get("zero_optimization") or {}
    parts = {part: zero.get(part) or {} for part in OFFLOADED}
    paths = {p: part.get("nvme_path") for p, part in parts.items() if part.get("device") == "nvme"}
    return {part: config.train.offload_dir if path in (None, "auto") else str(path) for part, path in paths.items()}


def room_problems(
    config: TrainingConfig, values: Mapping[str, Any], parameters: int, world: int, local: int
) -> Iterator[str]:
    """Whether what a node offloads of so many parameters fits on its disk."""
    for part, folder in offload_folders(config, values).items():
        if Path(folder).is_dir():
            needed, free = OFFLOADED[part] * parameters * local // world, shutil.disk_usage(folder).free
            yield from unless(
                free >= needed,
                f"{part} of the DeepSpeed JSON: {folder} has {free / GIB:,.1f} GiB free, and the {local} ranks of this"
                f" node offload {needed / GIB:,.1f} GiB: name a folder on a larger disk with train.offload_dir=FOLDER.",
            )
