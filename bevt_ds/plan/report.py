"""A plan as text and as JSON."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from bevt_ds.config.schema import TrainingConfig
from bevt_ds.runtime.gpus import Gpu

from .compute import Rates
from .planning import CLOSE, GIB, Plan, micro_of, recommended, usable

COLUMNS = ("GPUs", "micro-batch", "micro-steps", "step s", "clips/s", "images/s", "bound", "GiB", "GPU-hours", "days")


def as_json(plan: Plan, gpu: Gpu, rates: Rates) -> dict[str, Any]:
    """Every number, in bytes, seconds and FLOPs."""
    clips, images = micro_of(plan.config)
    machines = plan.machines
    return {
        "recipe": plan.config.recipe,
        "backbone": plan.config.model.name,
        "gpu": gpu.name,
        "gpus": machines.gpus,
        "nodes": machines.nodes,
        "zero_stage": plan.stage,
        "checkpointing": plan.config.model.checkpointing,
        "micro_clips": clips,
        "micro_images": images,
        "micro_steps": plan.micro_steps,
        "parameters": plan.parameters,
        "flops": plan.flops,
        "memory": {"parts": plan.memory.parts, "activations": plan.memory.activations, "peak": plan.memory.peak}
        | {"offloaded": plan.memory.offloaded, "usable": usable(gpu)},
        "sent": plan.sent,
        "seconds": plan.seconds,
        "step_seconds": plan.step,
        "bound": plan.bound,
        "rates": rates.source,
        "supply": {"gpu": plan.supply.per(machines.gpus), "node": plan.supply.per(machines.nodes)},
        "checkpoint": plan.checkpoint,
        "steps": plan.steps,
        "gpu_hours": plan.gpu_hours,
    }


def as_text(plan: Plan, plans: Sequence[Plan], gpu: Gpu, rates: Rates, largest: tuple[int, int]) -> str:
    """The plan line by line; `plans` are its alternatives and `largest` the largest micro-batch that fits."""
    machines, config, memory = plan.machines, plan.config, plan.memory
    where = f"{machines.gpus:,} x {gpu.name} in {count(machines.nodes, 'node')}"
    lines = [
        ("run", f"{config.recipe}, {config.model.name}, {config.train.precision}, ZeRO stage {plan.stage}, on {where}"),
        ("parameters", f"{plan.parameters:,}"),
        ("step", f"{samples(config, 0)}: {count(plan.micro_steps, 'micro-step')} of {samples(config, 1)} a GPU"),
        ("arithmetic", f"{sum(plan.flops.values()) / 1e12:,.1f} TFLOP a step: {shares(plan.flops, 1e12, '')}"),
        ("sent a GPU", f"{shares(plan.sent, 1e9, ' GB') or 'nothing'} a step"),
        ("time", f"{plan.step:.3f} s a step, bound by {plan.bound}: {shares(plan.seconds, 1e-3, ' ms')}"),
        ("rates", rates.source),
        ("input a GPU", needs_text(plan, machines.gpus)),
        ("input a node", needs_text(plan, machines.nodes)),
        ("decoding", decoding_text(plan)),
        (
            "checkpoint",
            f"{plan.checkpoint / 1e9:,.1f} GB each; {config.train.keep_checkpoints} + 1 are on disk at once",
        ),
        ("whole run", cost_text(plan)),
        ("memory", f"{memory.peak / GIB:,.1f} GiB a GPU at most, of {usable(gpu) / GIB:,.1f} that can be used"),
        ("largest", f"micro-batch that fits: {sizes_text(largest)}"),
        ("recommended", advice_text(plans, gpu)),
    ]
    text = "\n".join(f"{name:<15}{value}" for name, value in lines)
    return f"{text}\n\nGiB a GPU, by ZeRO stage; +: with checkpointing\n\n{memory_table(plans)}"


def memory_table(plans: Sequence[Plan]) -> str:
    """A column for each plan, a row for each part of its memory. A part takes its place at some time of a step, not all
    at once: "at most" is less than their sum."""
    held = list(dict.fromkeys(part for plan in plans for part in plan.memory.parts))
    layers = list(dict.fromkeys(part for plan in plans for part in plan.memory.activations))
    rows = [["", *(f"{plan.stage}{'+' * plan.config.model.checkpointing}" for plan in plans)]]
    rows += [[part, *(gib(plan.memory.parts.get(part, 0)) for plan in plans)] for part in held]
    rows += [
        [f"activations, {part}", *(gib(plan.memory.activations.get(part, 0)) for plan in plans)] for part in layers
    ]
    if any(plan.memory.offloaded for plan in plans):
        rows.append(["on the host", *(gib(plan.memory.offloaded) for plan in plans)])
    rows.append(["at most", *(gib(plan.memory.peak) for plan in plans)])
    rows.append(["seconds a step", *(f"{plan.step:.3f}" for plan in plans)])
    return table(rows)


def gib(size: float) -> str:
    """Bytes in GiB, a dash for nothing."""
    return f"{size / GIB:,.2f}" if size else "-"


def table(rows: Sequence[Sequence[str]]) -> str:
    """Markdown whose columns are aligned; the first row has the headings, the first column the names."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        [cell.rjust(width) if i else cell.ljust(width) for i, (cell, width) in enumerate(zip(row, widths, strict=True))]
        for row in rows
    ]
    rule = ["-" * w + ":" * bool(i) for i, w in enumerate([widths[0], *(w - 1 for w in widths[1:])])]
    return "\n".join(f"| {' | '.join(line)} |" for line in [lines[0], rule, *lines[1:]])


def count(number: int, noun: str) -> str:
    """`1 node`, `8 nodes`."""
    return f"{number:,} {noun}" + "s" * (number != 1)


def sizes_text(sizes: Sequence[int]) -> str:
    """`74 clips + 592 images`, of the streams that the run has; `none` where not one sample fits."""
    texts = [f"{n:,} {name}" for n, name in zip(sizes, ("clips", "images"), strict=True) if n]
    return " + ".join(texts) or "none"


def samples(config: TrainingConfig, part: int) -> str:
    """What a step takes over all ranks (`part` 0), or a rank's forward pass (1)."""
    return " + ".join(f"{sizes[part]:,} {name}" for name, sizes in config.train.streams.items() if sizes[0])


def shares(parts: Mapping[str, float], unit: float, name: str) -> str:
    """`weights 0.2 GiB, optimizer 1.2 GiB`: what is not 0 in a unit of that many."""
    return ", ".join(f"{part} {value / unit:,.2f}{name}" for part, value in parts.items() if value / unit >= 0.005)


def needs_text(plan: Plan, parts: int) -> str:
    """What one of so many equal parts needs a second."""
    needs = plan.supply.per(parts)
    texts = [f"{needs['clips']:,.1f} clips/s ({needs['frames']:,.0f} frames/s decoded)"] * bool(needs["clips"])
    texts += [f"{needs['images']:,.1f} images/s"] * bool(needs["images"])
    return ", ".join([*texts, f"{needs['read'] / 1e6:,.1f} MB/s from storage"])


def decoding_text(plan: Plan) -> str:
    """Whether the input keeps up."""
    parts = {plan.supply.decoder: "decode", f"storage of {plan.machines.storage / 1e9:g} GB/s": "storage"}
    texts = []
    for name, key in parts.items():
        share = plan.seconds[key] / plan.step
        texts.append(f"{name}: {'too slow, ' * (plan.bound == key)}busy {share:.0%} of a step")
    return ", ".join(texts)


def cost_text(plan: Plan) -> str:
    """GPU-hours and days."""
    if plan.steps is None or plan.gpu_hours is None:
        return "not known: its steps depend on the shards; --samples N says how many an epoch has"
    days = plan.steps * plan.step / 86400
    return f"{plan.steps:,} steps, {days:,.1f} days, {plan.gpu_hours:,.0f} GPU-hours"


def advice_text(plans: Sequence[Plan], gpu: Gpu) -> str:
    """The stage and checkpointing to choose, and why."""
    best = recommended(plans, gpu)
    if best is None:
        return "no ZeRO stage fits this micro-batch, with or without checkpointing"
    fitting = sum(plan.memory.peak <= usable(gpu) for plan in plans)
    how, part = "with" if best.config.model.checkpointing else "without", f"{CLOSE - 1:.0%}"
    return (
        f"ZeRO-{best.stage} {how} checkpointing, {best.step:.3f} s a step: of the {fitting} of {len(plans)} that fit"
        f" the lowest stage within {part} of the fastest"
    )


def what_if(plans: Iterable[Plan]) -> str:
    """One line for each plan, in columns; Markdown."""
    return table([COLUMNS, *(cells(plan) for plan in plans)])


def cells(plan: Plan) -> tuple[str, ...]:
    """A plan as a row under COLUMNS."""
    totals = {name: total for name, (total, _) in plan.config.train.streams.items()}
    rates = (f"{totals.get(name, 0) / plan.step:,.0f}" for name in ("clips", "images"))
    hours = "?" if plan.gpu_hours is None else f"{plan.gpu_hours:,.0f}"
    days = "?" if plan.steps is None else f"{plan.steps * plan.step / 86400:,.1f}"
    micro, memory = " + ".join(f"{n}" for n in micro_of(plan.config) if n), f"{plan.memory.peak / GIB:,.1f}"
    step = f"{plan.step:.3f}"
    return (f"{plan.machines.gpus:,}", micro, str(plan.micro_steps), step, *rates, plan.bound, memory, hours, days)
