"""The tables and the figure of docs/scaling.md, from the model of `bevt plan`: 8 to 1,024 GPUs, ZeRO 1 to 3.

    python -m benchmarks.scaling_plan                                   # docs/scaling.md and docs/scaling.svg again
    python -m benchmarks.scaling_plan --backbones swin_t --out /tmp     # one backbone, into another folder

Weak: every GPU takes WEAK samples a step. Strong: the GPUs share a step of STRONG samples, in micro-batches of at most
MOST clips. The page's prose is written by hand; what stands between its marks is written by this command. No GPU is
needed: three minutes on a CPU.
"""

from __future__ import annotations

import argparse
import io
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import groupby
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from bevt_ds.config.deepspeed import read_json
from bevt_ds.config.recipes import PRETRAINING, joint_swin_b
from bevt_ds.plan import planning, supply
from bevt_ds.plan.compute import Rates, rates, row_batch
from bevt_ds.plan.memory import USABLE, WIDTHS
from bevt_ds.plan.planning import GIB, STAGES, Plan, make_plan, with_micro
from bevt_ds.plan.report import as_text, table
from bevt_ds.plan.supply import Machines
from bevt_ds.plan.traffic import sent
from bevt_ds.runtime.gpus import gpu_named

from .common import RESULTS, read_rows

DOCS = Path(__file__).parents[1] / "docs"
GPUS = tuple(8 << n for n in range(8))
BACKBONES = ("swin_t", "swin_s", "swin_b", "swin_l", "swin_h", "swin_g")
ADDS = 0.1  # of a step: what the link must add to be named next to a bound
WEAK, STRONG, MOST = (8, 64), (1024, 8192), 32
LARGE = {"swin_h": 64, "swin_g": 64}  # GPUs of the whole plans on the page
H200 = gpu_named("h200")
SHAPES = {"launch": "o", "compute": "s", "link": "^", "decode": "D", "storage": "X"}


@dataclass(frozen=True)
class Point:
    """One plan of the page. `efficiency`: clips/s a GPU over those on the fewest GPUs, in the same stage."""

    plan: Plan
    efficiency: float

    @property
    def waiting(self) -> float:
        """The share of a step that the link adds to what else bounds it."""
        others = [seconds for name, seconds in self.plan.seconds.items() if name != "link"]
        return max(0.0, self.plan.step - max(others)) / self.plan.step

    @property
    def bound(self) -> str:
        """The plan's, and the link where it adds much."""
        added = self.waiting >= ADDS and self.plan.bound != "link"
        return self.plan.bound + " + link" * added

    @property
    def cell(self) -> str:
        return f"{clips_per_s(self.plan):,.0f} ({self.efficiency:.0%}) {self.bound}"


def clips_per_s(plan: Plan) -> float:
    """Of all GPUs, waits for the input included."""
    return plan.config.train.global_clips / plan.step


Points = dict[tuple[str, int], list[Point]]  # by way of scaling and ZeRO stage; one for each of GPUS


@cache
def speed_of(backbone: str) -> Rates:
    """The rates that the page takes for a backbone."""
    return rates(H200, backbone)


def planned(backbone: str, way: str, gpus: int, stage: int) -> Plan:
    """One plan: the recipe's network and data, with the batch of this page."""
    config = PRETRAINING[f"joint_{backbone}"]()
    clips, images = STRONG if way == "strong" else (WEAK[0] * gpus, WEAK[1] * gpus)
    micro = min(MOST, clips // gpus) if way == "strong" else WEAK[0]
    train = replace(config.train, global_clips=clips, global_images=images)
    config = with_micro(replace(config, train=train), micro, micro * images // clips)
    return make_plan(config, read_json(f"zero{stage}"), H200, Machines(gpus), speed_of(backbone))


def points_of(backbone: str) -> Points:
    """All plans of a backbone."""
    found: Points = {}
    for way in ("weak", "strong"):
        for stage in STAGES:
            plans = [planned(backbone, way, gpus, stage) for gpus in GPUS]
            each = [clips_per_s(plan) / plan.machines.gpus for plan in plans]
            found[way, stage] = [Point(plan, rate / each[0]) for plan, rate in zip(plans, each, strict=True)]
    return found


# The page's blocks


def tables(backbone: str, points: Points) -> str:
    """Weak and strong scaling of a backbone: clips/s, efficiency and bound of each stage, and memory."""
    plans = [points["weak", stage][0].plan for stage in STAGES]
    how = "with" if plans[0].config.model.checkpointing else "without"
    memory = ", ".join(f"{plan.memory.peak / GIB:,.1f}" for plan in plans)
    head = (
        f"{plans[0].parameters / 1e6:,.0f} M parameters, {how} checkpointing; {memory} GiB a GPU with ZeRO-1, 2, 3 on"
    )
    head += f" 8 GPUs and {WEAK[0]} clips and {WEAK[1]} images each. Rates {speed_of(backbone).source}."
    return "\n\n".join([head, *(_table(way, points) for way in ("weak", "strong"))])


def _table(way: str, points: Points) -> str:
    rows = [[way, "a GPU", *(f"ZeRO-{stage}" for stage in STAGES)]]
    for i, gpus in enumerate(GPUS):
        row = [points[way, stage][i] for stage in STAGES]
        train, passes = row[0].plan.config.train, row[0].plan.micro_steps
        micro = f"{train.micro_clips} + {train.micro_images}" + f", {passes} times" * (passes > 1)
        rows.append([f"{gpus:,}", micro, *(point.cell for point in row)])
    return table(rows)


def bounds(all_points: dict[str, Points]) -> str:
    """Where each bound lies: a row for each backbone, and for each stage that differs."""
    rows = [["", "ZeRO", "weak", "strong"]]
    for backbone, points in all_points.items():
        cells = [(ranges(points["weak", stage]), ranges(points["strong", stage])) for stage in STAGES]
        for alike in dict.fromkeys(cells):
            stages = ", ".join(str(stage) for stage, cell in zip(STAGES, cells, strict=True) if cell == alike)
            rows.append([backbone, stages, *alike])
    return table(rows)


def ranges(points: Sequence[Point]) -> str:
    """`launch 8 to 512, storage 1,024`: the bound, by the number of GPUs."""
    runs = [list(run) for _, run in groupby(points, key=lambda point: point.bound)]
    ends = [(run[0].bound, run[0].plan.machines.gpus, run[-1].plan.machines.gpus) for run in runs]
    return ", ".join(f"{bound} {first:,}" + f" to {last:,}" * (first != last) for bound, first, last in ends)


def measured() -> str:
    """What was measured next to what the plan says of it: steps and memory on one H200, bytes on two CPU ranks."""
    rows = [["one H200, Swin-B, ZeRO-2", "ms, measured", "ms, plan", "GB, measured", "GB, plan", "plan / measured"]]
    for row in read_rows(RESULTS / "h200" / "step-nvidia-h200.jsonl"):
        if (row["case"], row["provider"], row["tokenizer"]) == ("resident", "ours", "dalle"):
            plan = of_row(*row_batch(row))
            times = f"{row['p50_ms']:.0f}", f"{1000 * plan.step:.0f}"
            bytes_of = row["peak_mb"] / 1e3, plan.memory.peak / 1e9
            share = f"{bytes_of[1] / bytes_of[0]:.2f}"
            rows.append([row["batch"], *times, *(f"{size:.1f}" for size in bytes_of), share])
    return f"{table(rows)}\n\n{table(_ranks())}"


def of_row(clips: int, images: int) -> Plan:
    """The plan of a step that was measured on one GPU, with its data at hand."""
    base = joint_swin_b()
    config = replace(base, train=replace(base.train, global_clips=clips, global_images=images))
    machines = Machines(1, cores=10**6, storage=1e15)
    return make_plan(with_micro(config, clips, images), read_json("zero2"), H200, machines, speed_of("swin_b"))


def _ranks() -> list[list[str]]:
    rows = [["2 CPU ranks, tiny", "micro-steps", "MB sent, counted", "MB, plan", "efficiency, wall", "by CPU time"]]
    found = list(read_rows(RESULTS / "scaling-cpu-x86-64.jsonl"))
    one = {row["zero"]: row for row in found if (row["ranks"], row["micro_steps"]) == (1, 1)}
    for row in (row for row in found if row["ranks"] == 2):
        zero = {"stage": row["zero"]}
        plan = sum(sent(row["parameters"], 2, row["micro_steps"], WIDTHS[row["precision"]], zero).values()) / 1e6
        alone = one[row["zero"]]
        wall = row["clips_per_s"] / 2 / alone["clips_per_s"]
        cpu = 2 * alone["cpu_s"] / row["cpu_s"]
        sizes = f"{row['sent_mb']:.2f}", f"{plan:.2f}"
        rows.append([f"ZeRO-{row['zero']}", str(row["micro_steps"]), *sizes, f"{wall:.0%}", f"{cpu:.0%}"])
    return rows


def assumptions() -> str:
    """The model's constants, from the code that uses them."""
    machines = Machines(1)
    lines = [
        f"8 {H200.name.upper()} a node, {H200.link / 1e9:.0f} GB/s between the GPUs of a node and"
        f" {H200.network / 1e9:.0f} GB/s a GPU between nodes, of which collectives reach {planning.LINK_SHARE:.0%}"
        " (assumed, not measured); every collective is a ring over all GPUs",
        f"a collective takes {planning.CALL * 1e6:.0f} us whatever its size, and as much again for each doubling of the"
        f" nodes (assumed); ZeRO-3 calls {planning.GATHERS} a block and micro-step (counted on CPU ranks)",
        "with ZeRO-1 and ZeRO-2 reducing overlaps with"
        f" {planning.BACKWARD:.0%} of the last micro-step (the backward pass); ZeRO-3's gathers overlap with all of it."
        " This is the best case: what overlaps on GPUs has not been measured",
        "FLOP/s are those of the measured row of 32 clips and 256 images, at every micro-batch; launches are those of 8"
        " clips and 64 images, in proportion to the blocks. A micro-step takes the larger of the two. Another host"
        " launches at another speed: the same step took 251 and 330 ms in two processes",
        f"{machines.cores} cores a GPU decode {supply.CORES / supply.CLIP_CORE_SECONDS[False]:.0f} clips/s or"
        f" {supply.CORES / supply.IMAGE_CORE_SECONDS:,.0f} images/s, and do nothing else",
        f"all nodes read {machines.storage / 1e9:.0f} GB/s together: {machines.clip_bytes / 1e3:.0f} kB a video and"
        f" {machines.image_bytes / 1e3:.0f} kB an image. A cache on each node moves this bound",
        f"{USABLE:.0%} of a GPU's memory can be used; checkpoints, logging and stragglers cost no time",
    ]
    return "\n".join(f"* {line}." for line in lines)


def whole_plan(backbone: str, gpus: int) -> str:
    """The command and what it prints, of a recipe for a large backbone."""
    config, values = PRETRAINING[f"joint_{backbone}"](), read_json("zero3")
    plan = make_plan(config, values, H200, Machines(gpus), speed_of(backbone))
    others = planning.alternatives(plan, values, H200, speed_of(backbone))
    text = as_text(plan, others, H200, speed_of(backbone), planning.largest_micro(plan, H200))
    command = f"bevt plan recipe={config.recipe} --deepspeed_config zero3 --gpu {H200.name} --gpus {gpus}"
    return f"```\n$ {command}\n\n{text}\n```"


def filled(page: str, name: str, text: str) -> str:
    """The page with the block of that name replaced. Raises ValueError where it has none."""
    mark = rf"(<!-- {name}: python -m benchmarks\.scaling_plan -->\n).*?(\n<!-- end -->)"
    result, count = re.subn(mark, lambda found: f"{found[1]}\n{text}\n{found[2]}", page, flags=re.DOTALL)
    if count != 1:
        raise ValueError(f"the page has {count} blocks named {name}")
    return result


# The figure


def draw(all_points: dict[str, Points], path: Path) -> None:
    """Clips/s over GPUs: weak above strong, a column for each stage, a line for each backbone, a mark for the bound.

    Coordinates of a tenth of a point, and no indentation, keep the file small.
    """
    style = {"svg.fonttype": "none", "svg.hashsalt": "scaling", "font.size": 8, "axes.spines.top": False}
    with matplotlib.rc_context(style | {"axes.spines.right": False}):
        figure = Figure(figsize=(9, 5.4), layout="constrained")
        grid = figure.subplots(2, 3, sharex=True, sharey="row")
        for row, way in zip(grid, ("weak", "strong"), strict=True):
            for axes, stage in zip(row, STAGES, strict=True):
                for i, (backbone, points) in enumerate(all_points.items()):
                    _line(axes, backbone, points[way, stage], f"C{i}")
                axes.set_title(f"{way}, ZeRO-{stage}", fontsize=9)
                axes.set_xscale("log", base=2)
                axes.set_yscale("log")
                axes.minorticks_off()
                axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
                axes.set_xticks(GPUS, [f"{n}" for n in GPUS])
                axes.grid(alpha=0.25, linewidth=0.5)
            row[0].set_ylabel("clips/s")
        for axes in grid[1]:
            axes.set_xlabel("GPUs")
        figure.legend(*_legend(grid[0, 0], all_points), loc="outside lower center", ncols=6, frameon=False)
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    short = re.sub(r' (?:d|x|y)="[^"]*"', lambda found: re.sub(r"(\.\d)\d+", r"\1", found[0]), text.getvalue())
    path.write_text(re.sub(r"\n +", "\n", short), encoding="utf-8")


def _line(axes: Axes, label: str, points: Iterable[Point], colour: str) -> None:
    places = [(point.plan.machines.gpus, clips_per_s(point.plan), point.plan.bound) for point in points]
    axes.plot([x for x, _, _ in places], [y for _, y, _ in places], color=colour, linewidth=1, label=label)
    for bound, shape in SHAPES.items():
        chosen = [(x, y) for x, y, name in places if name == bound]
        if chosen:
            axes.plot(*zip(*chosen, strict=True), shape, color=colour, markersize=4)


def _legend(axes: Axes, all_points: dict[str, Points]) -> tuple[list, list[str]]:
    lines = [line for line in axes.lines if line.get_label() in all_points]
    plans = [point.plan for points in all_points.values() for line in points.values() for point in line]
    used = [name for name in SHAPES if any(plan.bound == name for plan in plans)]
    marks = [Line2D([], [], color="grey", marker=SHAPES[name], linestyle="", markersize=4) for name in used]
    return lines + marks, [*all_points, *(f"bound: {name}" for name in used)]


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    names = lambda text: text.split(",")  # noqa: E731
    parser.add_argument("--backbones", type=names, default=list(BACKBONES), help="default: all")
    parser.add_argument("--out", type=Path, default=DOCS, help="folder of scaling.md and scaling.svg")
    options = parser.parse_args(argv)
    all_points = {backbone: points_of(backbone) for backbone in options.backbones}
    page = (DOCS / "scaling.md").read_text(encoding="utf-8")
    blocks: dict[str, Callable[[], str]] = {"assumptions": assumptions, "measured": measured}
    blocks |= {"bounds": lambda: bounds(all_points)}
    blocks |= {name: lambda name=name: tables(name, all_points[name]) for name in options.backbones}
    blocks |= {
        f"plan of {name}": lambda name=name: whole_plan(name, LARGE[name]) for name in LARGE if name in all_points
    }
    for name, text in blocks.items():
        page = filled(page, name, text())
    (options.out / "scaling.md").write_text(page, encoding="utf-8")
    draw(all_points, options.out / "scaling.svg")
    print(options.out / "scaling.md")


if __name__ == "__main__":
    main()
