"""The table and the picture of the step benchmark, from its rows."""

from __future__ import annotations

from pathlib import Path

from .common import read_rows
from .step_parts import PARTS

SETTING = ("case", "model", "batch", "pixels", "vocabulary", "tokenizer", "dtype")
COLUMNS = (
    ("ms p50 (p20-p80)", lambda row, eager: f"{row['p50_ms']:.1f} ({row['p20_ms']:.1f}-{row['p80_ms']:.1f})"),
    ("x eager", lambda row, eager: ratio(row, eager, "p50_ms")),
    ("CPU ms", lambda row, eager: number(row["cpu_ms"], ".0f")),
    ("x eager, CPU time", lambda row, eager: ratio(row, eager, "cpu_ms")),
    ("clips/s", lambda row, eager: number(row["clips_per_s"], ".2f")),
    ("images/s", lambda row, eager: number(row["images_per_s"], ".1f")),
    ("MFU of measured peak", lambda row, eager: number(row["mfu"], ".1%")),
    ("of datasheet", lambda row, eager: number(row["mfu_datasheet"], ".1%")),
    ("peak MB", lambda row, eager: number(row["peak_mb"], ".0f")),
    ("kernel launches", lambda row, eager: number(row["launches"], "d")),
    ("operators", lambda row, eager: number(row.get("operators"), "d")),
    ("data wait", lambda row, eager: number(row.get("data_wait_share"), ".1%")),
)


def number(value: float | None, form: str) -> str:
    """A number, or a dash where nothing was measured."""
    return "-" if value is None else format(value, form)


def ratio(row: dict, eager: dict | None, name: str) -> str:
    """How many times eager's cost is the row's."""
    return "-" if eager is None or "error" in eager else f"{eager[name] / row[name]:.2f}"


def newest(rows: list[dict]) -> dict[tuple, dict[str, dict]]:
    """{setting: {provider: its last row}}, of the last commit only."""
    commit = rows[-1]["provenance"]["commit"]
    tables: dict[tuple, dict[str, dict]] = {}
    for row in rows:
        if row["provenance"]["commit"] == commit:
            tables.setdefault(tuple(row[name] for name in SETTING), {})[row["provider"]] = row
    return tables


def markdown(rows: list[dict]) -> str:
    """The whole result as one page."""
    source, limits = rows[-1]["provenance"], rows[-1]["ceilings"]
    lines = ["# Step benchmark", ""]
    if "CPU" in source["device"]:
        lines += ["**These are CPU numbers.** They say nothing about the Triton kernels, which run on a GPU."]
        lines += ["Compare CPU time; where programs share the cores, the peak that MFU refers to is only a hint.", ""]
    lines += [f"{name}: {value}  " for name, value in source.items()]
    lines += [f"{name}: {value:.3g}  " for name, value in limits.items() if value is not None]
    for setting, table in newest(rows).items():
        lines += ["", f"## {', '.join(setting)}", "", *_times(table), "", *_parts(table)]
    return "\n".join(lines) + "\n"


def _times(table: dict[str, dict]) -> list[str]:
    lines = [f"| provider | {' | '.join(name for name, _ in COLUMNS)} |", "|---" * (len(COLUMNS) + 1) + "|"]
    for provider, row in table.items():
        if "error" in row:
            lines.append(f"| {provider} | failed: {row['error']} {'|' * len(COLUMNS)}")
        else:
            cells = [cell(row, table.get("eager")) for _, cell in COLUMNS]
            lines.append(f"| {provider} | {' | '.join(cells)} |")
    return lines


def _parts(table: dict[str, dict]) -> list[str]:
    lines = [f"| ms of the step | {' | '.join(PARTS)} |", "|---" * (len(PARTS) + 1) + "|"]
    for provider, row in table.items():
        if "error" not in row:
            cells = [f"{row['parts'][part]:.1f}" for part in PARTS]
            lines.append(f"| {provider} | {' | '.join(cells)} |")
    return lines


def plot(rows: list[dict], path: Path) -> None:
    """Stacked bars: the parts of each provider's step, a panel a setting."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    tables = newest(rows)
    figure, panels = pyplot.subplots(len(tables), squeeze=False, figsize=(10, 1.5 + 2.5 * len(tables)))
    colours = matplotlib.colormaps["tab20"].colors
    for axes, (setting, table) in zip(panels[:, 0], tables.items(), strict=True):
        measured = {provider: row for provider, row in table.items() if "error" not in row}
        starts = dict.fromkeys(measured, 0.0)
        for part, colour in zip(PARTS, colours, strict=False):
            widths = [max(row["parts"][part], 0.0) for row in measured.values()]
            axes.barh(list(measured), widths, left=list(starts.values()), color=colour, label=part)
            starts = {name: start + width for (name, start), width in zip(starts.items(), widths, strict=True)}
        axes.invert_yaxis()
        axes.set_title(", ".join(setting), fontsize=8)
        axes.set_xlabel("ms a step")
    panels[0, 0].legend(fontsize=6, loc="upper left", bbox_to_anchor=(1, 1))
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def write(path: Path) -> None:
    """The page and the picture beside a file of rows."""
    rows = list(read_rows(path))
    path.with_suffix(".md").write_text(markdown(rows))
    if any("error" not in row for row in rows):
        plot(rows, path.with_suffix(".png"))
    print(f"{len(rows)} rows in {path}")
