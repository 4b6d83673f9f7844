"""Page and plot from the rows that the scaling benchmark wrote."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from statistics import median_low

TIMES = ("ZeRO", "ranks", "micro-steps", "ms a step, p50 (p20-p80)", "clips/s", "images/s", "efficiency", "by CPU time")
TIMES += ("CPU s a step, all ranks", "optimizer MB a rank", "peak MB")
BYTES = (*TIMES[:3], "all-reduce", "reduce-scatter", "all-gather", "other", "sent", "paper", "sent / paper")
KINDS = ("all_reduce", "reduce_scatter", "all_gather")
ASSUMPTIONS = """\
Assumptions. Weak: each rank takes one micro-batch of {clips} clips and {images} images a step. Strong: a step is {most}
such micro-batches, whatever the ranks. Efficiency is samples a second over ranks times those of one rank, in the same
table and stage; by CPU time, what it would be if each rank had a core to itself and never waited. Times are of whole
steps of the slowest rank: tokenizer, forward, backward, collectives and update, on noise that stays on the device;
reading shards is not in them. One machine, {model}, {precision}{place}.

Sent: bytes a rank sends a step, from the sizes of the tensors given to every collective of one step, if each is a ring:
(n-1)/n of the tensor, twice that for an all-reduce. "Paper" is what ZeRO sends by Rajbhandari et al. 2020, section 7:
for P parameters of {width} bytes and m micro-steps (n-1)/n P times 2 in stage 1, m + 1 in stage 2, 3 m in stage 3. Why
they differ is in docs/performance.md.
"""


def chosen(rows: list[dict]) -> list[dict]:
    """Of the last run, the launch with the median time of each (stage, ranks, micro-steps)."""
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        if row["run"] == rows[-1]["run"]:
            groups.setdefault((row["zero"], row["ranks"], row["micro_steps"]), []).append(row)
    middle = {key: median_low(row["p50_ms"] for row in group) for key, group in groups.items()}
    return [next(r for r in groups[key] if r["p50_ms"] == middle[key]) for key in sorted(groups)]


def split(rows: list[dict]) -> dict[str, list[dict]]:
    """Rows by mode; those of the most ranks are in both."""
    most = max(row["ranks"] for row in rows)
    strong = [row for row in rows if row["ranks"] * row["micro_steps"] == most]
    return {"weak": [row for row in rows if row["micro_steps"] == 1], "strong": strong}


def on_cpu(row: dict) -> bool:
    """Where CPU time is what a step takes."""
    return "CPU" in row["provenance"]["device"]


def rate(row: dict) -> float:
    """Micro-batches a second, over all ranks."""
    return 1000 * row["ranks"] * row["micro_steps"] / row["p50_ms"]


def cpu_rate(row: dict) -> float:
    """The same if each rank had a core to itself and never waited: by the CPU seconds of a rank, on average."""
    return row["ranks"] * row["micro_steps"] / (row["cpu_s"] / row["ranks"])


def efficiency(row: dict, rows: list[dict], by: Callable[[dict], float] = rate) -> float | None:
    """Rate over ranks times the rate of one rank in the same table and stage; None where that was not measured."""
    alone = [r for r in rows if r["zero"] == row["zero"] and r["ranks"] == 1]
    return by(row) / (row["ranks"] * by(alone[0])) if alone else None


def heading(names: tuple[str, ...]) -> list[str]:
    """The first two lines of a table."""
    return [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]


def time_line(row: dict, rows: list[dict]) -> str:
    """One line of a table of times."""
    peak = row["peak_mb"]
    shares = [efficiency(row, rows, rate), efficiency(row, rows, cpu_rate) if on_cpu(row) else None]
    cells = [row["zero"], row["ranks"], row["micro_steps"]]
    cells += [f"{row['p50_ms']:.0f} ({row['p20_ms']:.0f}-{row['p80_ms']:.0f})"]
    cells += [f"{row['clips_per_s']:.2f}", f"{row['images_per_s']:.1f}"]
    cells += ["-" if share is None else f"{share:.0%}" for share in shares]
    cells += [f"{row['cpu_s']:.2f}", f"{row['optimizer_mb']:.1f}", "-" if peak is None else f"{peak:.0f}"]
    return f"| {' | '.join(map(str, cells))} |"


def traffic_line(row: dict) -> str:
    """One line of the table of bytes; calls in brackets."""
    sent, calls = row["sent_by_kind"], row["calls"]
    by_kind = [f"{sent[kind]:.2f} ({calls[kind]})" if kind in sent else "-" for kind in KINDS]
    other = sum(size for kind, size in sent.items() if kind not in KINDS)
    cells = [row["zero"], row["ranks"], row["micro_steps"], *by_kind, f"{other:.2f}", f"{row['sent_mb']:.2f}"]
    cells += [f"{row['expected_mb']:.2f}", f"{row['sent_mb'] / row['expected_mb']:.2f}"]
    return f"| {' | '.join(map(str, cells))} |"


def markdown(rows: list[dict]) -> str:
    """The whole result as one page."""
    rows = chosen(rows)
    first, source = rows[0], rows[0]["provenance"]
    facts = {"clips": first["micro_clips"], "images": first["micro_images"], "model": first["model"]}
    facts |= {"most": max(row["ranks"] for row in rows), "precision": first["precision"]}
    facts |= {"width": 4 if first["precision"] == "fp32" else 2}
    facts |= {"place": ", one thread a rank, gloo" if on_cpu(first) else ""}
    lines = ["# Scaling", "", "Made by `python -m benchmarks.scaling`.", ""]
    lines += [f"{name}: {value}  " for name, value in source.items()]
    lines += [f"load of the machine: {min(r['load'] for r in rows):.1f} to {max(r['load'] for r in rows):.1f}", ""]
    for mode, group in split(rows).items():
        lines += [f"## {mode.capitalize()}", ""]
        lines += [*heading(TIMES), *(time_line(row, group) for row in group), ""]
    lines += ["## Sent a step, MB a rank (calls)", ""]
    lines += [*heading(BYTES), *(traffic_line(row) for row in rows if row["ranks"] > 1), ""]
    return "\n".join(lines) + f"\n{ASSUMPTIONS.format(**facts)}"


def write(rows: list[dict], path: Path) -> None:
    """The page and the plot beside the rows."""
    path.with_suffix(".md").write_text(markdown(rows))
    plot(chosen(rows), path.with_suffix(".png"))


def plot(rows: list[dict], path: Path) -> None:
    """Throughput over ranks, and bytes beside the paper's."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (speed, bytes_) = pyplot.subplots(1, 2, figsize=(10, 4))
    most = max(row["ranks"] for row in rows)
    speed.plot([1, most], [1, most], color="0.7", label="ideal")
    for mode, group in split(rows).items():
        for stage in sorted({row["zero"] for row in group}):
            line = [row for row in group if row["zero"] == stage]
            gain = [efficiency(row, group, cpu_rate if on_cpu(row) else rate) for row in line]
            if None not in gain:
                points = [share * row["ranks"] for share, row in zip(gain, line, strict=True)]
                style = {"color": f"C{stage}", "marker": "o", "linestyle": "-" if mode == "weak" else "--"}
                speed.plot([row["ranks"] for row in line], points, label=f"{mode}, ZeRO {stage}", **style)
    speed.set_xticks(sorted({row["ranks"] for row in rows}))
    kind = " by CPU time" if on_cpu(rows[0]) else ""
    speed.set(xlabel="ranks", ylabel=f"samples a second{kind}, 1 rank = 1", title=rows[0]["provenance"]["device"])
    speed.legend(fontsize=7)
    _plot_bytes(bytes_, [row for row in rows if row["ranks"] > 1])
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _plot_bytes(axes: object, rows: list[dict]) -> None:
    below = [0.0] * len(rows)
    for kind in sorted({kind for row in rows for kind in row["sent_by_kind"]}):
        heights = [row["sent_by_kind"].get(kind, 0.0) for row in rows]
        axes.bar(range(len(rows)), heights, bottom=below, label=kind.replace("_", "-"))
        below = [a + b for a, b in zip(below, heights, strict=True)]
    axes.scatter(range(len(rows)), [row["expected_mb"] for row in rows], color="k", marker="_", s=300, label="paper")
    names = [f"ZeRO {row['zero']}\n{row['ranks']} ranks\nx{row['micro_steps']}" for row in rows]
    axes.set_xticks(range(len(rows)), names, fontsize=7)
    axes.set(ylabel="MB sent a step and rank, as rings")
    axes.margins(y=0.3)
    axes.legend(fontsize=7, ncols=2, loc="upper left")
