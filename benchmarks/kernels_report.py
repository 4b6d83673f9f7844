"""Markdown, plots and verdicts from the rows that the kernel benchmark wrote."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

# the goals on an H200, bf16, Swin-B, 8 clips, blocks weighted by depth
TARGETS = (
    ("forward + backward against eager", 5.0, "x"),
    ("forward + backward against the best of compile, sdpa, flex", 2.0, "x"),
    ("forward", 170.0, "TFLOP/s"),
    ("backward", 120.0, "TFLOP/s"),
)
RIVALS = ("compile", "sdpa", "flex")


def index_rows(rows: list[dict]) -> dict[tuple[str, str, str], dict]:
    """Rows by (case, direction, provider); a later row replaces an earlier one."""
    return {(row["case"], row["direction"], row["provider"]): row for row in rows}


def rival(table: dict, case: str, direction: str) -> float | None:
    """Best time of the competitors, None where any of them failed: then there is no best."""
    times = [table.get((case, direction, name), {}).get("p50_ms") for name in RIVALS]
    return None if None in times else min(times)


def weighted(rows: list[dict]) -> dict[str, float | None]:
    """The figures of TARGETS over the video blocks of Swin-B at 8 clips; None where a part is missing."""
    table = index_rows(rows)
    cases = {row["case"]: row for row in rows if row["op"] == "window_attention" and row["case"].startswith("b-")}
    cases = {name: row for name, row in cases.items() if " 8 video 8x7x7" in name}
    sums: dict[str, float] = defaultdict(float)
    missing = set()
    for name, row in cases.items():
        for direction in ("forward", "backward", "both"):
            times = {"eager": table.get((name, direction, "eager"), {}).get("p50_ms")}
            times["ours"] = table.get((name, direction, "bevt_ds"), {}).get("p50_ms")
            times["rival"] = rival(table, name, direction)
            for who, value in times.items():
                if value is None:
                    missing.add((who, direction))
                else:
                    sums[who, direction] += row["blocks"] * value
            flops = table.get((name, direction, "bevt_ds"), {}).get("dense_flops", 0.0)
            sums["flops", direction] += row["blocks"] * flops

    def ratio(over: tuple[str, str], under: tuple[str, str], factor: float = 1.0) -> float | None:
        if not cases or {over, under} & missing or not sums[under]:
            return None
        return factor * sums[over] / sums[under]

    figures = (
        ratio(("eager", "both"), ("ours", "both")),
        ratio(("rival", "both"), ("ours", "both")),
        ratio(("flops", "forward"), ("ours", "forward"), 1e-9),
        ratio(("flops", "backward"), ("ours", "backward"), 1e-9),
    )
    return {name: figure for (name, _, _), figure in zip(TARGETS, figures, strict=True)}


def cell(value: float | None, form: str = ".3f") -> str:
    """A number, or a dash."""
    return "-" if value is None else format(value, form)


def markdown(rows: list[dict]) -> str:
    """The whole result as one page."""
    source = rows[-1]["provenance"]
    lines = ["# Kernel benchmark", ""]
    if "CPU" in source["device"]:
        lines += ["**These are CPU numbers.** They say nothing about the Triton kernels, which run on a GPU.", ""]
    lines += [f"{name}: {value}  " for name, value in source.items()]
    lines += [f"{name}: {cell(value, '.3g')}  " for name, value in rows[-1]["ceilings"].items()]
    lines += [
        "",
        "| case | direction | provider | ms p50 (p20-p80) | TFLOP/s dense | executed | % of roof | peak MB | x eager |",
    ]
    lines += ["|---|---|---|---|---|---|---|---|---|"]
    lines += [table_line(row, index_rows(rows)) for row in index_rows(rows).values()]
    if "CPU" not in source["device"]:
        lines += ["", "| Swin-B, 8 clips, by depth | target | measured |", "|---|---|---|"]
        figures = weighted(rows)
        lines += [f"| {name} | {goal} {unit} | {cell(figures[name], '.2f')} |" for name, goal, unit in TARGETS]
    return "\n".join(lines) + "\n"


def table_line(row: dict, table: dict) -> str:
    """One row of the table; a provider that failed says why."""
    head = f"| {row['op']} {row['case']} | {row['direction']} | {row['provider']} |"
    if "error" in row:
        return f"{head} failed: {row['error']} | | | | | |"
    eager = table.get((row["case"], row["direction"], "eager"), {}).get("p50_ms")
    speedup = None if eager is None else eager / row["p50_ms"]
    roof = f"{100 * row['roof_ms'] / row['p50_ms']:.0f} ({row['roof']})" if row.get("roof_ms") else "-"
    rates = [row[key] / row["p50_ms"] / 1e9 if row.get(key) else None for key in ("dense_flops", "executed_flops")]
    times = f"{row['p50_ms']:.3f} ({row['p20_ms']:.3f}-{row['p80_ms']:.3f})"
    cells = [times, *(cell(rate, ".3g") for rate in rates), roof, cell(row["peak_mb"], ".0f"), cell(speedup, ".2f")]
    return f"{head} {' | '.join(cells)} |"


def plot(rows: list[dict], path: Path) -> None:
    """Bars: forward + backward of each case by provider."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    table = index_rows([row for row in rows if row["op"] == "window_attention" and row["direction"] == "both"])
    cases = list(dict.fromkeys(case for case, _, _ in table))
    providers = list(dict.fromkeys(provider for _, _, provider in table))
    figure, axes = pyplot.subplots(figsize=(max(6, 1.2 * len(cases)), 4))
    for i, provider in enumerate(providers):
        heights = [table.get((case, "both", provider), {}).get("p50_ms", 0) for case in cases]
        axes.bar(
            [x + 0.8 * i / len(providers) for x in range(len(cases))], heights, 0.8 / len(providers), label=provider
        )
    axes.set_xticks(range(len(cases)), cases, rotation=60, ha="right", fontsize=7)
    axes.set(yscale="log", ylabel="ms, forward + backward", title=rows[-1]["provenance"]["device"])
    axes.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
