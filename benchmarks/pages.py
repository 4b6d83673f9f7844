"""The page of each benchmark: what its rows mean, and which tables and plots show it. report.py writes them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from statistics import median_low
from typing import Any

from .kernels_goals import GOALS, figures, index_rows
from .pages_data import damaged_media, kept_ids, loader, reading, study, targets, tokenizers
from .pages_decode import decode, host, packing
from .pages_runs import commits, guard, soak
from .report import Columns, Page, Panel, Row, Rows, facts, fields, grouped, newest, number, source, table, timing
from .step_goals import OURS, WITH_GRAPHS, goals
from .step_parts import PARTS

ON_CPU = "**These are CPU numbers.** They say nothing about the Triton kernels, which run on a GPU."


def on_cpu(rows: Rows) -> bool:
    """Whether the rows were measured without a GPU."""
    return "CPU" in source(rows[-1])["device"]


def ceilings(row: Row) -> str:
    """The measured limits of the machine, as a list."""
    return "\n".join(f"* {name}: {limit:.3g}" for name, limit in row["ceilings"].items() if limit is not None)


# Kernels

KERNELS = """\
Made by `python -m benchmarks.kernels`. Dense: FLOPs of every pair of every window, backward 2.5 times forward;
executed: of the pairs that may attend. Roof: the least time at the measured ceilings."""


def kernels(rows: Rows) -> Page:
    """Each kernel and its rivals, forward, backward and both."""
    rows = newest(rows)
    found, reached = index_rows(rows), figures(rows)

    def speedup(row: Row) -> str:
        eager = found.get((row["op"], row["case"], row["direction"], "eager"), {}).get("p50_ms")
        return number(eager and eager / row["p50_ms"], ".2f")

    columns: Columns = {
        "case": lambda row: f"{row['op']} {row['case']}",
        **fields("direction direction s | provider provider s"),
        "ms p50 (p20-p80)": timing(".3f"),
        "TFLOP/s dense": lambda row: _teraflops(row, "dense_flops"),
        "executed": lambda row: _teraflops(row, "executed_flops"),
        "% of roof": lambda r: f"{100 * r['roof_ms'] / r['p50_ms']:.0f} ({r['roof']})" if r.get("roof_ms") else "-",
        **fields("peak MB peak_mb .0f"),
        "x eager": speedup,
    }
    parts = [KERNELS, facts(rows), ceilings(rows[-1]), table(found.values(), columns, names=3)]
    parts += [ON_CPU if on_cpu(rows) else goal_table(reached)]
    both = [row for row in found.values() if row["op"] == "window_attention" and row["direction"] == "both"]
    cases, providers = ([name for (name,) in grouped(both, field)] for field in ("case", "provider"))
    bars = {
        p: [found.get(("window_attention", case, "both", p), {}).get("p50_ms") for case in cases] for p in providers
    }
    panel = Panel("ms, forward + backward", source(rows[-1])["device"], names=cases, bars=bars, log=True)
    return Page("Kernel benchmark", parts, [panel] if both else [])


def goal_table(reached: dict[str, float | None]) -> str:
    """Goals next to what was measured."""
    columns: Columns = {
        "Swin-B, 8 clips and 64 images, by depth": lambda goal: goal[0],
        "goal": lambda goal: f"{goal[1]:g} {goal[3]}",
        "stretch": lambda goal: f"{goal[2]:g} {goal[3]}" if goal[2] else "-",
        "measured": lambda goal: number(reached[goal[0]], ".2f"),
    }
    return table(GOALS, columns, names=2)


def _teraflops(row: Row, name: str) -> str:
    return number(row[name] / row["p50_ms"] / 1e9 if row.get(name) else None, ".3g")


def tiles(rows: Rows) -> Page:
    """The fastest tiles of each attention kernel next to the ones that are shipped."""
    lines = []
    for (case, kind), group in grouped(rows, "case", "kind").items():
        shipped, best = next(row for row in group if row["base"]), min(group, key=lambda row: row["us"])
        line = {"case": case, "kind": kind, "tried": len(group), "shipped": shipped["us"], "us": best["us"]}
        line |= {"gain": 1 - best["us"] / shipped["us"], "tiles": best["tiles"].strip("{}").replace("'", "")}
        lines += [line | {"err": best["err"]}] * (len(group) > 1)
    columns = fields(
        "case case s | kernel kind s | tried tried d | shipped us shipped .1f | fastest us us .1f | gain gain .0%"
        "| fastest tiles tiles s | difference from the shipped err .2g"
    )
    names = [f"{line['case']}, {line['kind']}" for line in lines]
    bars = {name: [line[field] for line in lines] for name, field in (("shipped", "shipped"), ("fastest", "us"))}
    intro = "Each attention kernel over tiles, warps and stages. No result of any tile was wrong."
    parts = [intro, facts(rows), table(lines, columns, names=2)]
    return Page("Tiles of the attention kernels", parts, [Panel("microseconds", names=names, bars=bars)])


# The step

SETTING = ("case", "model", "batch", "pixels", "vocabulary", "tokenizer", "dtype")


def runs(rows: Rows) -> Iterator[tuple[str, dict[str, Row]]]:
    """A title, and the rows by provider, of each run of a setting; a provider that comes again begins another run."""
    for setting, found in grouped(rows, *SETTING).items():
        parts: list[dict[str, Row]] = [{}]
        for row in found:
            if row["provider"] in parts[-1]:
                parts.append({})
            parts[-1][row["provider"]] = row
        for number_of_run, run in enumerate(parts, 1):
            yield ", ".join(setting) + (f", run {number_of_run}" if len(parts) > 1 else ""), run


def step(rows: Rows) -> Page:
    """A training step's time, and its parts, by provider."""
    rows, panels = newest(rows), []
    parts = ["Made by `python -m benchmarks.step`. Compare rows of one table only: they took turns in one run."]
    parts += [f"{ON_CPU} Compare CPU time; where programs share the cores, MFU is only a hint."] * on_cpu(rows)
    parts += [facts(rows), ceilings(rows[-1])]
    parts += [step_goal_table(rows)] * (not on_cpu(rows))
    shares: Columns = fields("ms of the step provider s") | {
        p: lambda row, p=p: f"{row['parts'][p]:.1f}" for p in PARTS
    }
    for title, run in runs(rows):
        measured = {name: row for name, row in run.items() if "error" not in row}
        parts += [f"## {title}", table(run.values(), _step_columns(run)), table(measured.values(), shares)]
        bars = {p: [max(row["parts"][p], 0.0) for row in measured.values()] for p in PARTS}
        panels += [Panel("ms a step", title, names=list(measured), bars=bars, stacked=True)] * bool(measured)
    return Page("Step benchmark", parts, panels)


def step_goal_table(rows: Rows) -> str:
    """The goals of a step of Swin-B on a GPU and what these rows say of them."""
    found = goals([run for _, run in runs([row for row in rows if row["model"] == "swin_b"])])
    names = ("goal", "to reach", OURS, WITH_GRAPHS)
    return table(found, {name: lambda line, i=i: line[i] for i, name in enumerate(names)})


def _step_columns(run: dict[str, Row]) -> Columns:
    def ratio(name: str) -> Callable[[Row], str]:
        eager = run.get("eager", {}).get(name)
        return lambda row: number(eager and eager / row[name], ".2f")

    return {
        **fields("provider provider s"),
        "ms p50 (p20-p80)": timing(".1f"),
        "x eager": ratio("p50_ms"),
        **fields("CPU ms cpu_ms .0f"),
        "x eager, CPU time": ratio("cpu_ms"),
        **fields("clips/s clips_per_s .2f | images/s images_per_s .1f | MFU of measured peak mfu .1%"),
        **fields("of datasheet mfu_datasheet .1% | peak MB peak_mb .0f | kernel launches launches d"),
        **fields("launch calls launch_calls d | device idle idle_share .0%"),
        **fields("operators operators d | data wait data_wait_share .1%"),
    }


def pretraining(rows: Rows) -> Page:
    """The log of a pretraining run."""
    rows = [row | {"done": row["step"] + 1} for row in rows]
    columns = fields(
        "step done d | loss, clips loss_video .3f | loss, images loss_image .3f | accuracy, clips acc_video .1%"
        "| accuracy, images acc_image .1% | clips/s clips_per_s .1f | images/s images_per_s .0f"
        "| data wait data_wait .2% | MFU mfu .1%"
    )
    steps = [row["done"] for row in rows]
    losses = {name: (steps, [row[f"loss_{name}"] for row in rows]) for name in ("video", "image")}
    parts = [
        "The log of `bevt_ds/pretrain.py`, joint recipe, on real videos and images.",
        facts(rows),
        table(rows, columns),
    ]
    return Page("A pretraining run", parts, [Panel("step", ylabel="loss", lines=losses)])


# Scaling

KINDS = ("all_reduce", "reduce_scatter", "all_gather")
SCALING = """\
Assumptions. Weak: each rank takes one micro-batch of {micro_clips} clips and {micro_images} images a step. Strong: a
step is {most} such micro-batches, whatever the ranks. Efficiency is samples a second over ranks times those of one
rank, in the same table and stage; by CPU time, what it would be if each rank had a core to itself and never waited.
Times are of whole steps of the slowest rank: tokenizer, forward, backward, collectives and update, on noise that stays
on the device; reading shards is not in them. One machine, {model}, {precision}{place}.

Sent: bytes a rank sends a step, from the sizes of the tensors given to every collective of one step, if each is a ring:
(n-1)/n of the tensor, twice that for an all-reduce. "Paper" is what ZeRO sends by Rajbhandari et al. 2020, section 7:
for P parameters of {width} bytes and m micro-steps (n-1)/n P times 2 in stage 1, m + 1 in stage 2, 3 m in stage 3. Why
they differ is in docs/performance.md."""


def chosen(rows: Rows) -> Rows:
    """Of the last run, the launch with the median time of each (stage, ranks, micro-steps)."""
    groups = grouped([row for row in rows if row["run"] == rows[-1]["run"]], "zero", "ranks", "micro_steps")
    middle = {key: median_low(row["p50_ms"] for row in group) for key, group in groups.items()}
    return [next(row for row in groups[key] if row["p50_ms"] == middle[key]) for key in sorted(groups)]


def split(rows: Rows) -> dict[str, Rows]:
    """Rows by mode; those of the most ranks are in both."""
    most = max(row["ranks"] for row in rows)
    strong = [row for row in rows if row["ranks"] * row["micro_steps"] == most]
    return {"weak": [row for row in rows if row["micro_steps"] == 1], "strong": strong}


def rate(row: Row) -> float:
    """Micro-batches a second, over all ranks."""
    return 1000 * row["ranks"] * row["micro_steps"] / row["p50_ms"]


def cpu_rate(row: Row) -> float:
    """The same if each rank had a core to itself and never waited: by the CPU seconds of a rank, on average."""
    return row["ranks"] * row["micro_steps"] / (row["cpu_s"] / row["ranks"])


def efficiency(row: Row, rows: Rows, by: Callable[[Row], float] = rate) -> float | None:
    """Rate over ranks times the rate of one rank in the same table and stage; None where that was not measured."""
    alone = [r for r in rows if r["zero"] == row["zero"] and r["ranks"] == 1]
    return by(row) / (row["ranks"] * by(alone[0])) if alone else None


def scaling(rows: Rows) -> Page:
    """Throughput and bytes sent over ranks and ZeRO stages."""
    rows = chosen(rows)
    cpu, several = on_cpu(rows), [row for row in rows if row["ranks"] > 1]
    names = fields("ZeRO zero d | ranks ranks d | micro-steps micro_steps d")
    text = {"most": max(row["ranks"] for row in rows), "place": ", one thread a rank, gloo" if cpu else ""}
    text |= {"width": 4 if rows[0]["precision"] == "fp32" else 2}
    parts = ["Made by `python -m benchmarks.scaling`.", facts(rows)]
    for mode, group in split(rows).items():
        parts += [f"## {mode.capitalize()}", table(group, names | _times(group, cpu), names=3)]
    if several:
        parts += ["## Sent a step, MB a rank (calls)", table(several, names | _sent(), names=3)]
    panels = [_speed(rows, cpu), *([_bytes(several)] if several else [])]
    return Page("Scaling", [*parts, SCALING.format(**rows[0] | text)], panels)


def _times(group: Rows, cpu: bool) -> Columns:
    return {
        "ms a step, p50 (p20-p80)": timing(".0f"),
        **fields("clips/s clips_per_s .2f | images/s images_per_s .1f"),
        "efficiency": lambda row: number(efficiency(row, group), ".0%"),
        "by CPU time": lambda row: number(efficiency(row, group, cpu_rate) if cpu else None, ".0%"),
        **fields("CPU s a step, all ranks cpu_s .2f | optimizer MB a rank optimizer_mb .1f | peak MB peak_mb .0f"),
    }


def _sent() -> Columns:
    def kind(name: str) -> Callable[[Row], str]:
        return lambda r: f"{r['sent_by_kind'][name]:.2f} ({r['calls'][name]})" if name in r["sent_by_kind"] else "-"

    return {
        **{name.replace("_", "-"): kind(name) for name in KINDS},
        "other": lambda r: f"{sum(size for name, size in r['sent_by_kind'].items() if name not in KINDS):.2f}",
        **fields("sent sent_mb .2f | paper expected_mb .2f"),
        "sent / paper": lambda r: f"{r['sent_mb'] / r['expected_mb']:.2f}",
    }


def _speed(rows: Rows, cpu: bool) -> Panel:
    """Throughput over ranks."""
    most, by = max(row["ranks"] for row in rows), cpu_rate if cpu else rate
    lines: dict[str, Any] = {"ideal": ([1, most], [1, most])}
    for mode, group in split(rows).items():
        for (stage,), line in grouped(group, "zero").items():
            points = [(row["ranks"], efficiency(row, group, by)) for row in line]
            if all(gain is not None for _, gain in points):
                lines[f"{mode}, ZeRO {stage}"] = [n for n, _ in points], [n * gain for n, gain in points]
    label = f"samples a second{' by CPU time' if cpu else ''}, 1 rank = 1"
    return Panel("ranks", source(rows[0])["device"], label, lines=lines)


def _bytes(rows: Rows) -> Panel:
    """What each collective sends, next to the paper's sum."""
    kinds = sorted({kind for row in rows for kind in row["sent_by_kind"]})
    bars = {kind.replace("_", "-"): [row["sent_by_kind"].get(kind, 0.0) for row in rows] for kind in kinds}
    names = [f"ZeRO {row['zero']}, {row['ranks']} ranks, x{row['micro_steps']}" for row in rows]
    paper = {"paper": [row["expected_mb"] for row in rows]}
    return Panel("MB sent a step and rank, as rings", names=names, bars=bars, marks=paper, stacked=True)


# Checkpointing


def checkpointing(rows: Rows) -> Page:
    """What each way of recomputing costs and saves."""
    rows = newest(rows)
    whole = rows[0]["saved_mb"]
    columns = {
        **fields("recomputed recompute s | CPU s, median cpu_s .2f | cost cpu_ratio .3f"),
        "lowest to highest": lambda row: f"{row['cpu_ratio_low']:.3f} to {row['cpu_ratio_high']:.3f}",
        **fields("FLOPs, plan flops_ratio .3f | saved MB saved_mb .1f"),
        "saved": lambda row: f"{row['saved_mb'] / whole:.0%}",
    }
    text = "Cost: CPU seconds of a forward and backward pass over those without recomputing, in the same round; median"
    text += f" of {rows[0]['rounds']} rounds. {rows[0]['model']}, {rows[0]['batch']}, fp32."
    return Page(
        "Checkpointing", ["Made by `python -m benchmarks.checkpointing`.", facts(rows), text, table(rows, columns)]
    )


PAGES: dict[str, Callable[[Rows], Page]] = {  # how the name of a file of rows begins
    "attention-tiles": tiles,
    "checkpointing": checkpointing,
    "commits": commits,
    "decode": decode,
    "guard": guard,
    "host": host,
    "kept-ids": kept_ids,
    "kernels": kernels,
    "loader": loader,
    "loader_fuzz": damaged_media,
    "packing": packing,
    "pretrain": pretraining,
    "reading": reading,
    "scaling": scaling,
    "soak": soak,
    "step": step,
    "study": study,
    "targets": targets,
    "tokenizers": tokenizers,
}
