"""`dry_run=true`: what a run would be, and everything that would stop it, as far as it shows without the run itself."""

from __future__ import annotations

import json
import math
import os
import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from bevt_ds.config.command_line import DryRun
from bevt_ds.config.engines import ranks_a_node, room_problems
from bevt_ds.config.parse import to_dict
from bevt_ds.config.recipes import is_drawn
from bevt_ds.config.schema import Config, FinetuneConfig, StreamsTrainConfig, TrainingConfig, UnlabelledConfig
from bevt_ds.config.tokenizing import TokenizerTrainingConfig
from bevt_ds.config.validate import micro_steps, missing_inputs, target_files, zero_stage
from bevt_ds.data.reading.index import index_places, read_index, tar_identity
from bevt_ds.data.reading.remote import is_remote
from bevt_ds.data.reading.shards import expand
from bevt_ds.data.tokens import contract_of, require_contract
from bevt_ds.errors import UserError
from bevt_ds.folders import weights_of
from bevt_ds.model.arch import SwinArch
from bevt_ds.model.presets import create_classifier
from bevt_ds.model.weights import fit_init
from bevt_ds.plan.compute import rates
from bevt_ds.plan.planning import GIB, make_plan, meta_model
from bevt_ds.plan.report import cost_text
from bevt_ds.plan.supply import Machines
from bevt_ds.plan.targets import maker
from bevt_ds.runtime import checkpoint, run_dir
from bevt_ds.runtime.continuing import find_start
from bevt_ds.runtime.distributed import Ranks
from bevt_ds.runtime.engine_setup import require_supported
from bevt_ds.runtime.flops import encoder_macs, training_flops
from bevt_ds.runtime.gpus import gpu_named, gpu_of
from bevt_ds.runtime.logging import expected_step_flops
from bevt_ds.runtime.tokenizer import open_teacher, open_tokenizer
from bevt_ds.train.loop import kernel_provider
from bevt_ds.train.tokenizing import load_start, make_perceptual, make_tokenizer
from bevt_ds.train.tokenizing import step_flops as tokenizing_flops

BLOCK = 512  # of a tar


class Plan(NamedTuple):
    """What is said of a run. `steps`: None where they depend on shards that cannot be counted."""

    parameters: str
    steps: int | None
    step: str  # what each takes
    micro: str
    flops: float  # of one step
    flops_of: str


class Shards(NamedTuple):
    """The shards at one key. `samples`: None where not every shard has been indexed or packed with a manifest."""

    files: int
    samples: int | None


def report_pretraining(asked: DryRun[Config]) -> tuple[str, list[str]]:
    """What a run would be, line by line, and what would stop it."""
    config = asked.config
    wanted = {} if is_drawn(config) else pretraining_shards(config)
    shards, stops = _survey(asked, wanted)
    unopened = list(_target_faults(config)) if asked.is_sound else []
    kept = {key: wanted[key] for key in shards if shards[key].files} if wanted else pretraining_shards(config)
    stops += _kept_faults(config, kept) if asked.is_sound else []
    if not asked.is_sound or unopened:
        return _settings(asked), [*stops, *unopened, *common_faults(asked)]
    model = meta_model(config)
    flops = expected_step_flops(config, model.arch)
    plan = _plan_of_streams(config, model, shards, flops, f"masked head, no recompute, no {maker(config)}")
    supply = _supply_of_streams(config, shards, plan.steps)
    stops += _room_faults(asked, model)
    stops += common_faults(asked, lambda init: fit_init(model, init, head=config.init_head))
    return _text(asked, plan, supply), stops


def report_finetuning(asked: DryRun[FinetuneConfig]) -> tuple[str, list[str]]:
    """The same for fine-tuning, whose head has as many classes as the shards, whose labels are not read."""
    config, data, train = asked.config, asked.config.data, asked.config.train
    wanted = {"data.train": (data.train, "video"), "data.val": (data.val, "video")}
    shards, stops = _survey(asked, {key: each for key, each in wanted.items() if each[0]})
    if data.classes and not Path(data.classes).is_file():
        stops.append(f"data.classes={data.classes}: no such file.")
    if not asked.is_sound:
        return _settings(asked), [*stops, *common_faults(asked)]
    options = asdict(config.model)
    with torch.device("meta"):
        model = create_classifier(options.pop("name"), 1, **options)
    arch, head = SwinArch.of(model.arch), SwinArch.of(model.arch).width + 1
    videos = shards["data.train"].samples if "data.train" in shards else None
    steps = train.steps or (None if videos is None else train.epochs * (videos // train.global_clips))
    if steps == 0:
        stops.append(f"data.train: {videos} videos are less than a step of train.global_clips={train.global_clips}.")
    plan = Plan(
        f"{_parameters(model) - head:,} + {head:,} for each class",
        steps,
        f"{train.global_clips} clips",
        f"{train.micro_clips} clips",
        training_flops(train.global_clips * encoder_macs(arch, (data.frames, data.size, data.size)).total()),
        "no recompute",
    )
    supply = _supply(shards, {"data.train": train.global_clips}, steps)
    if steps is None:
        supply.append(f"epochs         {train.epochs}, each of (training videos // {train.global_clips}) steps")
    if not data.val:
        supply.append("validation     none: data.val is empty")
    stops += [*_room_faults(asked, model), *common_faults(asked, lambda init: fit_init(model, init))]
    return _text(asked, plan, supply), stops


def report_tokenizing(asked: DryRun[TokenizerTrainingConfig]) -> tuple[str, list[str]]:
    """The same for the training of a tokenizer."""
    config = asked.config
    shards, stops = _survey(asked, {} if is_drawn(config) else unlabelled_shards(config))
    if not asked.is_sound:
        return _settings(asked), [*stops, *common_faults(asked)]
    model = make_tokenizer(config.model)
    plan = _plan_of_streams(config, model, shards, tokenizing_flops(config), "no perceptual network")
    supply = _supply_of_streams(config, shards, plan.steps)
    stops += [*_fault(lambda: make_perceptual(config)), *_room_faults(asked, model)]
    stops += common_faults(asked, lambda init: load_start(config, init))
    return _text(asked, plan, supply), stops


def _plan_of_streams(
    config: UnlabelledConfig, model: nn.Module, shards: Mapping[str, Shards], flops: float, flops_of: str
) -> Plan:
    train, parameters = config.train, f"{_parameters(model):,}"
    steps = train.steps or _steps_of_epochs(config, shards)
    return Plan(parameters, steps, _batch(train, 0), _batch(train, 1), flops, flops_of)


def _supply_of_streams(config: UnlabelledConfig, shards: Mapping[str, Shards], steps: int | None) -> list[str]:
    data, train = config.data, config.train
    reads = {"data.videos": train.global_clips / data.clips_per_video, "data.images": train.global_images}
    lines = ["shards         drawn by the run itself"] if is_drawn(config) else _supply(shards, reads, steps)
    if not train.steps:
        lines.append(f"epochs         {train.epochs}, of all but about {data.holdout:.1%} that is held out")
    return lines


def pretraining_shards(config: Config) -> dict[str, tuple[str, str]]:
    """The shards that a pretraining run reads: patterns and kind of sample, by key."""
    probe = config.probe
    labelled = {"probe.train": probe.train, "probe.val": probe.val} if probe.every else {}
    return unlabelled_shards(config) | {key: (patterns, "video") for key, patterns in labelled.items() if patterns}


def unlabelled_shards(config: UnlabelledConfig) -> dict[str, tuple[str, str]]:
    """The shards of a training without labels: patterns and kind of sample, by key."""
    data, train = config.data, config.train
    wanted = {
        "data.videos": (data.videos, "video", train.global_clips),
        "data.images": (data.images, "image", train.global_images),
        "data.eval_videos": (data.eval_videos, "video", train.global_clips),
        "data.eval_images": (data.eval_images, "image", train.global_images),
    }
    return {key: (patterns, kind) for key, (patterns, kind, used) in wanted.items() if patterns and used}


def _survey(asked: DryRun, wanted: Mapping[str, tuple[str, str]]) -> tuple[dict[str, Shards], list[str]]:
    """The shards at each wanted key, and what of inputs and batch would stop the run."""
    config, found = asked.config, []
    shards = {key: _shards_at(key, patterns, kind, config, found) for key, (patterns, kind) in wanted.items()}
    return shards, [*missing_inputs(config), *_batch_faults(asked), *found]


def _shards_at(key: str, patterns: str, kind: str, config: TrainingConfig, found: list[str]) -> Shards:
    """Count shards and samples from their indexes and manifests, and add what cannot be read to `found`."""
    try:
        paths = expand(patterns, config.data.allow_pipe)
    except UserError as error:
        found.append(f"{key}: {error}")
        return Shards(0, None)
    counts: list[int | None] = []
    for path in paths:
        try:
            counts.append(None if is_remote(path) else _samples_in(Path(path), kind))
        except (OSError, tarfile.HeaderError, UserError) as error:
            found.append(f"{key}: {path} is not a readable tar file ({getattr(error, 'strerror', None) or error}).")
    return Shards(len(paths), None if None in counts else sum(counts))


def _samples_in(path: Path, kind: str) -> int | None:
    """Samples of a local shard, from its index or its manifest. OSError, HeaderError: it cannot be read."""
    with path.open("rb") as tar:
        tarfile.TarInfo.frombuf(tar.read(BLOCK), "utf-8", "surrogateescape")
        identity = tar_identity(tar)
    for place in index_places(str(path)):
        stored = read_index(place, str(path))
        if stored and stored[1] == identity:
            if not (samples := len(stored[0].only(kind))):
                raise UserError(f"it holds no {kind}")
            return samples
    for manifest in path.parent.glob("*-manifest.json"):
        with suppress(OSError, ValueError, KeyError, TypeError):  # `bevt shards check` is for those
            for shard in json.loads(manifest.read_text(encoding="utf-8"))["shards"]:
                if (shard["name"], shard["bytes"]) == (path.name, identity["size"]):
                    return int(shard["samples"])
    return None


def common_faults(asked: DryRun, load: Callable[[Path], object] | None = None) -> Iterator[str]:
    """What of device, output folder, resume and starting weights would stop a run of any kind.

    `load` fits weights to the run's model; None: they are not looked at.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config, alone = asked.config, Ranks(0, 1, device)
    yield from _fault(lambda: require_supported(config, device, asked.values))
    yield from _fault(lambda: kernel_provider(config, alone))
    folder = run_dir.folder_of(config)
    yield from _fault(lambda: run_dir.require_fit(folder, replace(config, output_dir=str(folder))))
    yield from _fault(lambda: run_dir.require_writable(folder))
    starts: list[Any] = []
    yield from _fault(lambda: starts.append(find_start(config, folder, alone)))
    if start := next(iter(starts), None):
        now = replace(start[1], world=asked.world, stage=zero_stage(asked.values), config=config)
        yield from _fault(lambda: checkpoint.check_continues(start[1], now, start[0]))
    elif config.init_from and Path(config.init_from).exists():
        if load is None:
            return
        yield from _fault(lambda: load(weights_of(config.init_from, "init_from")))
    elif config.init_from and config.resume != "never":
        yield f"init_from={config.init_from}: no such file or folder, and there is nothing to continue."


def _batch_faults(asked: DryRun) -> list[str]:
    has_batch = any(n for n, _ in asked.config.train.streams.values())
    return _fault(lambda: micro_steps(asked.config, asked.world)) if has_batch else []


def _room_faults(asked: DryRun, model: nn.Module) -> list[str]:
    """What disks have too little room for, of what is offloaded to them."""
    local = ranks_a_node(os.environ, asked.world)
    return list(room_problems(asked.config, asked.values, _parameters(model), asked.world, local))


def _target_faults(config: Config) -> Iterator[str]:
    """What keeps tokenizer or teacher from being opened, but for files that are not there, which are said elsewhere."""
    if not list(target_files(config)):
        ids = config.target == "ids"
        yield from _fault(lambda: open_tokenizer(config.tokenizer) if ids else open_teacher(config))


def _kept_faults(config: Config, shards: Mapping[str, tuple[str, str]]) -> Iterator[str]:
    """What is wrong with the ids that a run is to read, of each kind the first; shards are not looked into."""
    for key, (patterns, kind) in shards.items():
        if config.tokens and key in ("data.videos", "data.images"):
            yield from _fault(partial(_require_kept, config, patterns, kind))


def _require_kept(config: Config, patterns: str, kind: str) -> None:
    contract = contract_of(config, kind)
    for path in expand(patterns, config.data.allow_pipe):
        require_contract(config.tokens, path, kind, contract)


def _fault(check: Callable[[], object]) -> list[str]:
    """What a check raises for the user, if it does."""
    try:
        check()
    except UserError as error:
        return [str(error)]
    return []


def _supply(shards: Mapping[str, Shards], reads: Mapping[str, float], steps: int | None) -> list[str]:
    """A line for each key; `reads` are the samples that a step takes of it."""
    lines = []
    for key, (files, samples) in shards.items():
        if not files:
            continue
        count = "samples not counted yet (no index, no manifest)" if samples is None else f"{samples:,} samples"
        known = samples and steps and key in reads
        epochs = f", {steps * reads[key] / samples:,.2f} epochs" if known else ""
        lines.append(f"{key:<14} {count} in {files:,} shards{epochs}")
    return lines


def _settings(asked: DryRun) -> str:
    return "\n".join([json.dumps(to_dict(asked.config), indent=1), *asked.notes])


def _text(asked: DryRun, plan: Plan, supply: Sequence[str]) -> str:
    config, world = asked.config, asked.world
    whole = "" if plan.steps is None else f", {plan.steps * plan.flops / 1e15:,.2f} PFLOP in all"
    steps = "not known" if plan.steps is None else f"{plan.steps:,}"
    faulty = bool(_batch_faults(asked))
    passes = "?" if faulty else micro_steps(config, world)
    lines = [
        _settings(asked),
        f"output         {run_dir.folder_of(config)}/",
        f"parameters     {plan.parameters}",
        *supply,
        f"steps          {steps}, each of {plan.step}",
        f"{f'on {world} rank' + 's' * (world > 1):<15}{passes} forward passes a step of {plan.micro}",
        *([] if faulty or isinstance(config, TokenizerTrainingConfig) else _outlook(asked, plan.steps)),
        f"arithmetic     {plan.flops / 1e12:,.2f} TFLOP a step ({plan.flops_of}){whole}",
    ]
    return "\n".join(lines)


def _outlook(asked: DryRun, steps: int | None) -> list[str]:
    """Memory and time as `bevt plan` has them, on this machine's GPU, or on an H200 where there is none."""
    config, device = asked.config, torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    gpu = gpu_of(device) or gpu_named("h200")
    run = replace(config, train=replace(config.train, steps=steps or 0))
    plan = make_plan(run, asked.values, gpu, Machines(asked.world), rates(gpu, config.model.name))
    return [
        f"memory         {plan.memory.peak / GIB:,.2f} GiB a rank at most, on a GPU ({config.train.precision}, ZeRO"
        f" stage {plan.stage})",
        f"cost           {plan.step:.3f} s a step on {gpu.name}, bound by {plan.bound}: {cost_text(plan)} (bevt plan"
        " has more)",
    ]


def _batch(train: StreamsTrainConfig, part: int) -> str:
    """What a step takes over all ranks (`part` 0), or a rank's forward pass (1), of the streams that are trained."""
    return " + ".join(f"{sizes[part]:,} {name}" for name, sizes in train.streams.items() if sizes[0])


def _steps_of_epochs(config: UnlabelledConfig, shards: Mapping[str, Shards]) -> int | None:
    """About how many: which samples are held out shows when the shards are read."""
    data, train = config.data, config.train
    key, batch = ("data.videos", train.global_clips / data.clips_per_video)
    if not train.global_clips:
        key, batch = "data.images", train.global_images
    samples = shards[key].samples if key in shards else None
    return None if samples is None or not batch else math.ceil(train.epochs * samples * (1 - data.holdout) / batch)


def _parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())
