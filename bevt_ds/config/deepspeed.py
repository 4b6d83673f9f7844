"""The DeepSpeed JSON and the recipe: who owns which number, and the one dict that DeepSpeed receives.

The JSON holds engine knobs and "auto". DeepSpeed does not resolve "auto" itself: `resolve` does. A number that a user
writes into the JSON replaces the recipe's default and is reported; where it contradicts a `key=value` of the command
line, that is an error that names both.
"""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

from bevt_ds.config.parse import get_value, set_value
from bevt_ds.config.schema import TrainingConfig, TrainingT
from bevt_ds.config.validate import micro_steps
from bevt_ds.errors import UserError

AUTO = "auto"
NEVER = 1 << 62  # steps
MAX_BUCKET = 200_000_000  # elements; DeepSpeed's 5e8 would reserve gigabytes for a small model
# A bucket of gradients is sent when it is full: only several of them let sending overlap with the backward pass.
BUCKETS, MAX_REDUCED = 8, 50_000_000  # at least so many, of at most so many elements

DIRECT = {  # JSON path -> the config field it stands for
    "gradient_clipping": "optim.clip_grad",
    "optimizer.params.lr": "optim.lr",
    "optimizer.params.betas": "optim.betas",
    "optimizer.params.eps": "optim.eps",
    "optimizer.params.weight_decay": "optim.weight_decay",
}
FORCED = (  # always written: `merge` has already reconciled the JSON and the config
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
    "bf16.enabled",
    "fp16.enabled",
)
ACCUMULATION = "data_types.grad_accum_dtype"
TIMER = "timers.throughput.enabled"
NUMBERS = {
    "train_batch_size": int,
    "train_micro_batch_size_per_gpu": int,
    "gradient_accumulation_steps": int,
    "gradient_clipping": float,
    "optimizer.params.lr": float,
    "optimizer.params.eps": float,
    "optimizer.params.weight_decay": float,
    "zero_optimization.stage": int,
}
OBJECTS = (
    "optimizer",
    "optimizer.params",
    "zero_optimization",
    "bf16",
    "fp16",
    "data_types",
    "checkpoint",
    "timers",
    "timers.throughput",
)
TAG_VALIDATION = ("ignore", "warn", "fail")
GUARDS = ("bf16.check_grad_overflow", "zero_optimization.compute_grad_norm")  # without them NaN gets into the weights


def shipped_jsons() -> dict[str, Path]:
    """The project's own DeepSpeed JSON by name: inside the package where it is installed, next to it in a checkout."""
    package = Path(__file__).resolve().parents[1]
    folder = next(p for p in (package / "ds_configs", package.parent / "ds_configs") if p.is_dir())
    return {path.stem: path for path in sorted(folder.glob("*.json"))}


def read_json(path: str) -> dict[str, Any]:
    """The DeepSpeed JSON file as a dict. path: a file, or the name of one of the project's own, such as zero2.

    Raises:
        UserError: no such file, not JSON, or a section that belongs to the recipe.
    """
    shipped = shipped_jsons()
    try:
        values = json.loads(Path(shipped.get(path, path)).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"--deepspeed_config {path}: no such file. The project's own go by name: {', '.join(shipped)}."
        ) from None
    except json.JSONDecodeError as error:
        raise UserError(f"--deepspeed_config {path}: not JSON ({error}).") from None
    except (IsADirectoryError, PermissionError, UnicodeDecodeError) as error:
        raise UserError(f"--deepspeed_config {path}: cannot be read ({error}).") from None
    if not isinstance(values, dict):
        raise UserError(f"--deepspeed_config {path}: expected a JSON object.")
    _check_types(path, values)
    _check_checkpoint(path, values)
    if off := [name for name in GUARDS if _lookup(values, name) is False]:
        raise UserError(f"{path}: remove {off[0]}: false; without it a step that is not finite would not be skipped.")
    if "scheduler" in values:
        raise UserError(f"{path}: remove 'scheduler'; the schedule is optim.lr, optim.warmup_steps and train.steps.")
    unknown = set(_lookup(values, "optimizer.params") or {}) - {name.rpartition(".")[2] for name in DIRECT}
    if unknown:
        raise UserError(f"{path}: optimizer.params has {', '.join(sorted(unknown))}, which our AdamW does not take.")
    kind = values.get("optimizer", {}).get("type", "AdamW")
    if kind != "AdamW":
        raise UserError(f"{path}: optimizer.type is {kind!r}; BEVT trains with AdamW.")
    return values


def merge(config: TrainingT, explicit: set[str], values: dict[str, Any], world: int) -> tuple[TrainingT, list[str]]:
    """The config with the numbers of the JSON, and a line for each that it changed.

    Args:
        config: recipe and command line together.
        explicit: keys that the command line gave.
        values: the JSON.
        world: number of ranks.

    Raises:
        UserError: the JSON contradicts an explicit key, or its batch sizes do not fit the recipe's.
    """
    wanted: dict[str, tuple[str, Any]] = {}  # config key -> (JSON path, value)
    for path, key in DIRECT.items():
        value = _lookup(values, path)
        if value not in (None, AUTO):
            wanted[key] = (path, tuple(value) if isinstance(value, list) else value)
    precision = _json_precision(values, config.train.precision)
    if precision:
        wanted["train.precision"] = precision
    wanted |= _json_batch(config, values, world)
    lines = []
    for key, (path, value) in wanted.items():
        old = get_value(config, key)
        if old == value:
            continue
        if key in explicit:
            raise UserError(
                f"{key}={old} on the command line, but {path} of the DeepSpeed JSON means {key}={value}:"
                f' drop one of them, or set it to "auto" in the JSON.'
            )
        config = set_value(config, key, value)
        lines.append(f"{key}: {old} -> {value} ({path} of the DeepSpeed JSON)")
    return config, lines


def resolve(
    values: dict[str, Any],
    config: TrainingConfig,
    world: int,
    largest: int,
    total: int,
    width: int,
    local: int | None = None,
) -> dict[str, Any]:
    """The dict for `deepspeed.initialize`: every "auto" replaced; the optimizer section is ours and left out.

    Args:
        values: the JSON.
        config: the merged config.
        world: number of ranks.
        largest, total: elements of the largest parameter, and of all.
        width: channels of the last stage.
        local: ranks on each node; None: all are on one.

    Raises:
        UserError: an "auto" at a place this project does not know.
    """
    train, steps = config.train, micro_steps(config, world)
    micro = sum(total for total, _ in train.streams.values()) // (world * steps)
    gathered = even(max(largest, min(total, MAX_BUCKET)))
    reduced = even(max(largest, min(total // BUCKETS, MAX_REDUCED)))
    whole = max(largest, total // 2)  # ZeRO-3: so much of the model is whole on a rank, at most, beyond what is in use
    known = {
        "train_batch_size": micro * world * steps,
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": steps,
        "gradient_clipping": config.optim.clip_grad,
        "bf16.enabled": train.precision == "bf16",
        "fp16.enabled": train.precision == "fp16",
        "steps_per_print": NEVER,  # the project logs by itself
        "zero_optimization.overlap_comm": world > 1,
        "zero_optimization.reduce_bucket_size": reduced,
        "zero_optimization.allgather_bucket_size": gathered,
        "zero_optimization.stage3_prefetch_bucket_size": int(0.9 * width * width),
        "zero_optimization.stage3_param_persistence_threshold": 10 * width,
        "zero_optimization.stage3_max_live_parameters": whole,
        "zero_optimization.stage3_max_reuse_distance": whole,
        "zero_optimization.zero_hpz_partition_size": local or world,
        "zero_optimization.offload_optimizer.nvme_path": train.offload_dir,
        "zero_optimization.offload_param.nvme_path": train.offload_dir,
    }
    result = {name: value for name, value in deepcopy(values).items() if name != "optimizer"}
    for path in _auto_paths(result):
        if path not in known:
            raise UserError(
                f'"{path}": "auto" in the DeepSpeed JSON is not a value this project can fill in: write it.'
            )
        _assign(result, path, known[path])
    for path in FORCED:
        _assign(result, path, known[path])
    if _lookup(result, TIMER) is None:
        _assign(result, TIMER, False)  # it makes the host wait for the device in front of every forward pass
    if train.precision == "bf16" and _lookup(result, ACCUMULATION) is None:
        _assign(result, ACCUMULATION, "fp32")  # DeepSpeed's default would add micro-steps up in bf16
    return result


def even(size: int) -> int:
    """The size of a bucket, of which DeepSpeed refuses an odd one."""
    return size + size % 2


def _check_checkpoint(path: str, values: dict[str, Any]) -> None:
    """What the `checkpoint` section may say. Other writers and layouts are not whole when a commit is sealed."""
    section = values.get("checkpoint") or {}
    if refused := set(section) - {"tag_validation", "checkpoint_serialization"}:
        raise UserError(
            f"{path}: remove checkpoint.{min(refused)}; checkpoints are the project's own files."
            " The keys that may stay are tag_validation and checkpoint_serialization, which decide nothing."
        )
    if str(section.get("tag_validation", "warn")).lower() not in TAG_VALIDATION:
        raise UserError(f"{path}: checkpoint.tag_validation must be one of {', '.join(TAG_VALIDATION)}.")
    if not isinstance(section.get("checkpoint_serialization", True), bool):
        raise UserError(f"{path}: checkpoint.checkpoint_serialization must be true (zip files) or false (torch's old).")


def _json_precision(values: dict[str, Any], wanted: str) -> tuple[str, str] | None:
    """Where the JSON decides the precision, its path and the precision that it means."""
    states = {name: _lookup(values, f"{name}.enabled") for name in ("bf16", "fp16")}
    on = [name for name, state in states.items() if state is True]
    if len(on) == 2:
        raise UserError("the DeepSpeed JSON enables both bf16 and fp16: enable one.")
    if on:
        return f"{on[0]}.enabled", on[0]
    return (f"{wanted}.enabled", "fp32") if states.get(wanted) is False else None


def _json_batch(config: TrainingConfig, values: dict[str, Any], world: int) -> dict[str, tuple[str, Any]]:
    """DeepSpeed counts samples of all streams together; the recipe's ratio of clips to images is kept."""
    wanted: dict[str, tuple[str, Any]] = {}
    streams = config.train.streams
    global_keys, micro_keys = ([f"train.{size}_{name}" for name in streams] for size in ("global", "micro"))
    totals = [total for total, _ in streams.values()]
    number = values.get("train_batch_size", AUTO)
    if number != AUTO:
        totals = _split("train_batch_size", number, totals)
        wanted |= {key: ("train_batch_size", v) for key, v in zip(global_keys, totals, strict=True)}
    number = values.get("train_micro_batch_size_per_gpu", AUTO)
    if number != AUTO:
        parts = _split("train_micro_batch_size_per_gpu", number, totals)
        wanted |= {k: ("train_micro_batch_size_per_gpu", v) for k, v in zip(micro_keys, parts, strict=True)}
    number = values.get("gradient_accumulation_steps", AUTO)
    if number != AUTO:
        for key, total in zip(micro_keys, totals, strict=True):
            if total % (number * world):
                raise UserError(
                    f"gradient_accumulation_steps={number} of the DeepSpeed JSON: {total} samples a step do not divide"
                    f" by {number} x {world} ranks."
                )
            micro = total // (number * world)
            if key in wanted and wanted[key][1] != micro:
                raise UserError(
                    f"{wanted[key][0]} and gradient_accumulation_steps={number} of the DeepSpeed JSON do not fit a step"
                    f' of {sum(totals)} samples on {world} ranks: set one of them to "auto".'
                )
            wanted[key] = ("gradient_accumulation_steps", micro)
    return wanted


def _split(path: str, number: int, ratio: list[int]) -> list[int]:
    whole = sum(ratio)
    if any(number * part % whole for part in ratio):
        raise UserError(
            f"{path}={number} of the DeepSpeed JSON does not split into clips and images as {ratio[0]}:{ratio[1]}:"
            ' write "auto" there and set train.global_clips, train.global_images, train.micro_clips and'
            " train.micro_images."
        )
    return [number * part // whole for part in ratio]


def _check_types(path: str, values: dict[str, Any]) -> None:
    for name in OBJECTS:
        if not isinstance(_lookup(values, name) or {}, dict):
            raise UserError(f"{path}: {name} must be an object.")
    for name, kind in NUMBERS.items():
        value = _lookup(values, name)
        if value in (None, AUTO):
            continue
        if isinstance(value, bool) or not isinstance(value, int if kind is int else (int, float)):
            raise UserError(f'{path}: {name} must be a number or "auto", not {value!r}.')
        if kind is int and value < 1 and name != "zero_optimization.stage":
            raise UserError(f"{path}: {name}={value} must be at least 1.")


def _lookup(values: dict[str, Any], path: str) -> Any:
    for name in path.split("."):
        if not isinstance(values, dict):
            return None
        values = values.get(name)
    return values


def _assign(values: dict[str, Any], path: str, value: Any) -> None:
    *parents, last = path.split(".")
    for name in parents:
        values = values.setdefault(name, {})
    values[last] = value


def _auto_paths(values: dict[str, Any], prefix: str = "") -> list[str]:
    paths = []
    for name, value in values.items():
        if isinstance(value, dict):
            paths += _auto_paths(value, f"{prefix}{name}.")
        elif value == AUTO:
            paths.append(prefix + name)
    return paths
