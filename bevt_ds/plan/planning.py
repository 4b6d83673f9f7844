"""A plan: memory, arithmetic, traffic, input and time of a run on given machines, and what to choose."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, lru_cache
from math import ceil, gcd, log2
from typing import Any

import torch
from torch import Tensor, nn

from bevt_ds.batch import DTYPES, Batch
from bevt_ds.config.deepspeed import read_json, resolve
from bevt_ds.config.graphs import why_without_graphs
from bevt_ds.config.schema import Config, FinetuneConfig, TrainingConfig
from bevt_ds.config.validate import micro_steps, ranks_that_divide
from bevt_ds.errors import UserError
from bevt_ds.model.presets import SIZES, create_classifier, create_model
from bevt_ds.runtime.gpus import Gpu, gpu_named, gpu_of
from bevt_ds.runtime.tokenizer_graph import FRAMES

from .activations import Activations, micro_batch, trace
from .compute import Rates, arch_of, flops, rates
from .graphs import graph_bytes
from .memory import USABLE, WIDTHS, bucket_bytes, checkpoint_bytes, input_bytes, state_bytes, surface_bytes
from .supply import Machines, Supply, supply
from .targets import cost_of, maker
from .traffic import sent

LINK_SHARE = 0.75  # of a link's stated rate that collectives reach
CALL = 30e-6  # seconds that a collective takes whatever its size, and again for each doubling of the nodes
GATHERS = 15  # collectives a block and micro-step under ZeRO-3: benchmarks.scaling counts 117 for 8 blocks
BACKWARD = 2 / 3  # of a micro-step: what reducing gradients can overlap with
CLASSES = 400  # of a fine-tuned head, whose labels decide; it hardly weighs
STAGES = (1, 2, 3)
OFF = 0.1  # by how much memory may be planned wrong
CLOSE = 1.05  # times the fastest: what is not worth more sharding
GIB = 1 << 30


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank. `parts`: what is held all the time, or at each step's end; `activations`: at the end of the
    forward pass, by part of the network; `peak`: the most at once; `offloaded`: on the host instead."""

    parts: dict[str, float]
    activations: dict[str, int]
    peak: float
    offloaded: float


@dataclass(frozen=True)
class Plan:
    """One run on one set of machines; bytes and seconds. `flops` and `supply` are of all ranks, `memory` and `sent` of
    one. `settings`: what DeepSpeed is given. `seconds`: of an update, by what takes them; `step` is how long it is,
    `bound` the slowest of them.
    `steps`: None where they depend on shards."""

    config: TrainingConfig
    stage: int
    machines: Machines
    parameters: int
    micro_steps: int
    flops: dict[str, float]
    settings: Mapping[str, Any]
    sent: dict[str, float]
    seconds: dict[str, float]
    step: float
    bound: str
    supply: Supply
    checkpoint: float
    steps: int | None

    @cached_property
    def memory(self) -> Memory:
        """Of one rank; it takes a run of the network on the meta device."""
        return memory_of(self.config, self.settings, self.machines.gpus, self.micro_steps)

    @property
    def gpu_hours(self) -> float | None:
        """Of the whole run."""
        return None if self.steps is None else self.steps * self.step * self.machines.gpus / 3600


def make_plan(
    config: TrainingConfig,
    values: Mapping[str, Any],
    gpu: Gpu,
    machines: Machines,
    speed: Rates,
    samples: int | None = None,
) -> Plan:
    """The plan of a run.

    Args:
        values: the DeepSpeed JSON.
        samples: videos of an epoch, or images if there are only these; where train.epochs says how long the run is.

    Raises:
        UserError: the ranks do not divide the batch.
    """
    world, zero = machines.gpus, values.get("zero_optimization") or {}
    passes, (clips, images) = micro_steps(config, world), micro_of(config)
    parameters, largest = parameter_counts(network(config))
    local = min(world, machines.per_node)
    settings = resolve(dict(values), config, world, largest, parameters, arch_of(config.model).width, local)
    work = flops(config, clips * passes * world, images * passes * world)
    moved = sent(parameters, world, passes, WIDTHS[config.train.precision], settings.get("zero_optimization", {}))
    seconds, step = times(config, gpu, machines, speed, sum(work.values()), moved, settings, passes)
    needs = supply(config, gpu, machines, step)
    seconds |= {"decode": needs.decode_seconds, "storage": needs.storage_seconds}
    step = max(step, needs.decode_seconds, needs.storage_seconds)
    stage = zero.get("stage", 0)
    return Plan(
        config,
        stage,
        machines,
        parameters,
        passes,
        work,
        settings,
        moved,
        seconds,
        step,
        max(seconds, key=lambda name: seconds[name]),
        needs,
        checkpoint_bytes(parameters, config.train.precision, stage),
        steps_of(config, samples),
    )


def micro_of(config: TrainingConfig) -> tuple[int, int]:
    """Clips and images of a rank's forward pass."""
    sizes = {name: micro if total else 0 for name, (total, micro) in config.train.streams.items()}
    return sizes["clips"], sizes.get("images", 0)


def with_micro(config: TrainingConfig, clips: int, images: int) -> TrainingConfig:
    """The run with another micro-batch."""
    sizes = {"micro_clips": clips} | ({"micro_images": images} if isinstance(config, Config) else {})
    return replace(config, train=replace(config.train, **sizes))


def steps_of(config: TrainingConfig, samples: int | None) -> int | None:
    """Updates of the whole run, if they are known."""
    train = config.train
    if train.steps or samples is None:
        return train.steps or None
    if isinstance(config, FinetuneConfig):
        return train.epochs * (samples // train.global_clips)
    return ceil(train.epochs * samples * (1 - config.data.holdout) / (train.global_clips or train.global_images))


# The model, which every plan of a run shares


def network(config: TrainingConfig) -> TrainingConfig:
    """What of a run decides its network; the rest by default, so that results are found again."""
    names = ("model", "data", "target", "tokenizer", "teacher")
    kept = {name: getattr(config, name) for name in names if hasattr(config, name)}
    return type(config)(**kept)


def canonical(config: TrainingConfig) -> TrainingConfig:
    """What of a run decides its activations, as `network`."""
    plain = with_micro(network(config), *micro_of(config))
    return replace(plain, train=replace(plain.train, precision=config.train.precision))


def meta_model(config: TrainingConfig) -> nn.Module:
    """The model of a run, without memory; of fine-tuning with a head of CLASSES."""
    options = asdict(config.model)
    name = options.pop("name")
    with torch.device("meta"):
        if isinstance(config, FinetuneConfig):
            return create_classifier(name, CLASSES, **options)
        return create_model(name, **dict([cost_of(config).head]), **options)


@lru_cache(maxsize=64)
def parameter_counts(config: TrainingConfig) -> tuple[int, int]:
    """Parameters, and those of the largest tensor; `config` as `network` makes it."""
    numbers = [p.numel() for p in meta_model(config).parameters()]
    return sum(numbers), max(numbers)


@lru_cache(maxsize=256)
def activations(config: TrainingConfig) -> Activations:
    """Of one micro-batch; `config` as `canonical` makes it."""
    model, inputs = traced(config)
    return trace(model, *inputs)


@lru_cache(maxsize=256)
def pool_bytes(config: TrainingConfig) -> int:
    """What CUDA graphs of the encoder keep for one micro-batch; `config` as `canonical` makes it."""
    model, inputs = traced(config)
    return graph_bytes(model, *inputs)


def chunk_bytes(config: TrainingConfig) -> float:
    """What the tokenizer's graph keeps, if the run has one: what it works on of the frames of a chunk."""
    is_dalle = isinstance(config, Config) and config.target == "ids" and config.tokenizer.name == "dalle"
    return FRAMES * cost_of(config).working[1] if is_dalle else 0.0


def traced(config: TrainingConfig) -> tuple[nn.Module, tuple[Batch | Tensor, ...]]:
    """The model in training mode and a micro-batch, on the meta device."""
    model = meta_model(config).train().to(DTYPES[config.train.precision])
    return model, micro_batch(config, *micro_of(config), model.arch.get("target_dim", 0))


# Memory


def memory_of(config: TrainingConfig, settings: Mapping[str, Any], world: int, passes: int) -> Memory:
    """`settings`: what DeepSpeed is given; `passes`: micro-steps an update.

    Gradients are there next to activations where they wait for a later micro-step, and in bf16 at stage 2, which adds
    up each bucket in fp32 as it is reduced.
    """
    precision, zero = config.train.precision, settings.get("zero_optimization", {})
    parameters, _ = parameter_counts(network(config))
    clips, images = micro_of(config)
    used = activations(canonical(config))
    parts = state_bytes(parameters, precision, zero, world)
    offloaded, passing = parts.pop("offloaded"), 0
    parts["buckets"] = bucket_bytes(settings, precision)
    parts["input"] = input_bytes(config, clips, images)
    parts["decoder surfaces"] = surface_bytes(config)
    if isinstance(config, Config):
        parts[maker(config)], passing = cost_of(config).memory(clips, images)
    if getattr(config.optim, "ema", 0):
        parts["average"] = 4.0 * parameters / (world if zero.get("stage", 0) else 1)
    if not why_without_graphs(config.train.graphs, config.model, zero.get("stage", 0), "cuda", world):
        parts["graphs"] = pool_bytes(canonical(config)) + chunk_bytes(config)
    gradients = parts["gradients"]
    early = passes > 1 or (zero.get("stage", 0) == 2 and precision == "bf16")
    changing = max(used.peak + early * gradients, gradients, passing)
    return Memory(parts, used.saved, sum(parts.values()) - gradients + changing, offloaded)


def usable(gpu: Gpu) -> float:
    """Bytes of a GPU that a plan may fill."""
    return USABLE * gpu.memory


# Time


def times(
    config: TrainingConfig,
    gpu: Gpu,
    machines: Machines,
    speed: Rates,
    work: float,
    moved: Mapping[str, float],
    settings: Mapping[str, Any],
    passes: int,
) -> tuple[dict[str, float], float]:
    """Seconds of an update by what takes them, and of the whole, with data at hand.

    The host starts work ahead of the GPU: a micro-step takes as long as the slower of the two. ZeRO-3's collectives
    overlap with it; below, the reduction of gradients overlaps with the backward pass where overlap_comm says so, and
    what the update gathers does not.
    """
    zero, depth = settings.get("zero_optimization", {}), sum(SIZES[config.model.name].depths)
    stage, recomputes = zero.get("stage", 0), config.model.checkpointing and config.model.recompute == "block"
    runs = passes * sum(total > 0 for total, _ in config.train.streams.values())  # clips and images, each in turn
    launch = runs * speed.block * depth * (1 + recomputes / (3 * config.model.recompute_every))
    compute = work / machines.gpus / speed.flops
    busy = max(launch, compute)
    if machines.gpus == 1:
        return {"compute": compute, "launch": launch, "link": 0.0}, busy
    link_speed = LINK_SHARE * (gpu.link if machines.nodes == 1 else min(gpu.link, gpu.network))
    wait, reductions = CALL * (1 + log2(machines.nodes)), passes if stage > 1 else 1
    if stage == 3:
        link = sum(moved.values()) / link_speed + wait * GATHERS * depth * passes
        return {"compute": compute, "launch": launch, "link": link}, busy + max(0.0, link - busy)
    reduce = moved["all_reduce"] / link_speed + wait * reductions
    gather = moved.get("all_gather", 0.0) / link_speed + wait
    hidden = BACKWARD * busy * reductions / passes if zero.get("overlap_comm") else 0.0
    seconds = {"compute": compute, "launch": launch, "link": reduce + gather}
    return seconds, busy + gather + max(0.0, reduce - hidden)


# What to choose


def largest_micro(plan: Plan, gpu: Gpu) -> tuple[int, int]:
    """The largest micro-batch, with the run's ratio of clips to images, that fits; (0, 0) if none does."""
    clips, images = micro_of(plan.config)
    number = gcd(clips, images) if clips and images else max(clips, images)
    unit = clips // number, images // number

    def peak(n: int) -> float:
        config = with_micro(plan.config, n * unit[0], n * unit[1])
        return plan.memory.peak + _changing(config) - _changing(plan.config)

    n, tried = 2 * number, peak(2 * number)
    for _ in range(2):  # nearly a straight line; above some size logits are not kept
        slope = (tried - plan.memory.peak) / (n - number) if n != number else 0
        n = max(1, int(number + (usable(gpu) - plan.memory.peak) / max(slope, 1)))
        tried = peak(n)
    while n and tried > usable(gpu):
        n = min(n - 1, int(n * usable(gpu) / tried))
        tried = peak(n) if n else 0
    return n * unit[0], n * unit[1]


def _changing(config: TrainingConfig) -> float:
    return activations(canonical(config)).peak + input_bytes(config, *micro_of(config))


def alternatives(plan: Plan, values: Mapping[str, Any], gpu: Gpu, speed: Rates) -> list[Plan]:
    """The run under each ZeRO stage, without and with checkpointing; its own stage as its JSON has it."""
    found = []
    for stage in STAGES:
        engine = values if stage == plan.stage else read_json(f"zero{stage}")
        for checkpointing in (False, True):
            model = replace(plan.config.model, checkpointing=checkpointing)
            found.append(make_plan(replace(plan.config, model=model), engine, gpu, plan.machines, speed))
    return found


def recommended(plans: Sequence[Plan], gpu: Gpu) -> Plan | None:
    """Of those that fit the lowest stage, without checkpointing if it can be, that is about as fast as the fastest."""
    fitting = [plan for plan in plans if plan.memory.peak <= usable(gpu)]
    fast = [plan for plan in fitting if plan.step <= CLOSE * min(p.step for p in fitting)]
    return min(fast, key=lambda p: (p.stage, p.config.model.checkpointing), default=None)


def require_room(config: TrainingConfig, values: Mapping[str, Any], world: int, device: str, memory: int) -> None:
    """Refuse a run on the GPU named `device`, of so many bytes, that cannot fit even if the plan is too high by OFF.

    Raises:
        UserError: what it needs, and what fits.
    """
    gpu = replace(gpu_of(device) or gpu_named("h200"), name=device, memory=memory)
    speed = rates(gpu, config.model.name)
    plan = make_plan(config, values, gpu, Machines(world), speed)
    if plan.memory.peak * (1 - OFF) > memory:
        require_fit(plan, alternatives(plan, values, gpu, speed), gpu)


def require_fit(plan: Plan, plans: Sequence[Plan], gpu: Gpu) -> None:
    """UserError if the plan does not fit the GPU, with what would."""
    if plan.memory.peak <= usable(gpu):
        return
    clips, images = largest_micro(plan, gpu)
    sizes = [f"train.micro_{name}={n}" for name, n in (("clips", clips), ("images", images)) if n]
    advice = [f"a micro-batch of {' '.join(sizes)}"] if sizes else []
    if best := recommended(plans, gpu):
        ask = " model.checkpointing=true" * best.config.model.checkpointing
        advice.append(f"--deepspeed_config zero{best.stage}{ask}")
    least = min(plans, key=lambda p: p.memory.peak)
    remedy = " or ".join(advice) or (
        f"the least of all, ZeRO-{least.stage} with checkpointing, takes {least.memory.peak / GIB:,.1f} GiB; take more"
        " or larger GPUs, a smaller micro-batch, or offload_optimizer"
    )
    raise UserError(
        f"it does not fit: a rank needs {plan.memory.peak / GIB:,.1f} GiB, and of a {gpu.name}'s memory a run can use"
        f" {usable(gpu) / GIB:,.1f}. What fits: {remedy}."
    )


def on(config: TrainingConfig, world: int) -> TrainingConfig:
    """The run with its micro-batch, or the next smaller one that so many ranks can divide the step into.

    Raises:
        UserError: there is none; names the numbers of ranks that divide the step.
    """
    streams = [(total, micro) for total, micro in config.train.streams.values() if total]
    if world not in (ranks := ranks_that_divide(config.train.streams)):
        totals = " + ".join(f"{total:,}" for total, _ in streams)
        raise UserError(f"{world} GPUs do not divide a step of {totals} samples; {', '.join(map(str, ranks))} do.")
    wanted = max(ceil(total / (micro * world)) for total, micro in streams)
    most = max(ranks) // world  # micro-steps of one sample of the smallest stream
    passes = min(n for n in range(1, most + 1) if most % n == 0 and n >= min(wanted, most))
    sizes = {name: total // (world * passes) for name, (total, _) in config.train.streams.items()}
    return with_micro(config, sizes["clips"], sizes.get("images", 0))
