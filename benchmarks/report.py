"""Turns a file of rows into a Markdown page and a plot. Every benchmark describes its page in pages.py; this writes it.

python -m benchmarks.report                      # every committed page and plot again, from the committed rows
python -m benchmarks.report results/FILE.jsonl   # of one file
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from .common import RESULTS, read_rows
from .compare import FAILED

PROVENANCE = "provenance.json"  # next to rows that have no provenance of their own
FACTS = ("commit", "date", "device", "clocks", "driver", "cpu", "cores", "threads", "load", "python", "torch", "triton")
FACTS += ("deepspeed", "av", "nvidia-dali-cuda130", "torchvision", "torchcodec")
NAN = float("nan")

Row = dict[str, Any]
Rows = list[Row]
Columns = Mapping[str, Callable[[Any], str]]  # heading -> what a row has there


@dataclass(frozen=True)
class Panel:
    """One plot: horizontal bars, or lines over x.

    bars: series -> a value for each of `names`, None where there is none. spread: series -> (low, high) of each bar.
    marks: series -> a value for each of `names`, as a stroke. lines: series -> (x, y). levels: label -> a constant.
    """

    xlabel: str
    title: str = ""
    ylabel: str = ""
    names: Sequence[str] = ()
    bars: Mapping[str, Sequence[float | None]] = field(default_factory=dict)
    spread: Mapping[str, Sequence[tuple[float, float]]] = field(default_factory=dict)
    marks: Mapping[str, Sequence[float]] = field(default_factory=dict)
    lines: Mapping[str, tuple[Sequence[float], Sequence[float]]] = field(default_factory=dict)
    levels: Mapping[str, float] = field(default_factory=dict)
    stacked: bool = False
    log: bool = False


@dataclass(frozen=True)
class Page:
    """What a benchmark makes of its rows: paragraphs and tables in order, and the panels of its plot."""

    title: str
    parts: Sequence[str]
    panels: Sequence[Panel] = ()

    def markdown(self) -> str:
        """The file's text."""
        return "\n\n".join([f"# {self.title}", *(part for part in self.parts if part)]) + "\n"


def number(value: float | str | None, form: str) -> str:
    """A number or a word, or a dash where nothing was measured."""
    return "-" if value is None else format(value, form)


def fields(text: str) -> Columns:
    """Columns from `heading field format` parts between bars, such as "clips/s clips_per_s .2f | case case s"."""
    return {heading.strip(): _field(*rest) for heading, *rest in (part.rsplit(None, 2) for part in text.split("|"))}


def _field(name: str, form: str) -> Callable[[Row], str]:
    return lambda row: number(row.get(name), form)


def timing(form: str) -> Callable[[Row], str]:
    """A column: median with the 20th and 80th percentile."""
    return lambda row: "{:{f}} ({:{f}}-{:{f}})".format(*(row[f"p{q}_ms"] for q in (50, 20, 80)), f=form)


def spread(values: Sequence[float | None], form: str) -> str:
    """Median, lowest and highest."""
    if None in values:
        return "not counted"
    return f"{median(values):{form}} ({min(values):{form}} to {max(values):{form}})"


def table(rows: Iterable[Any], columns: Columns, names: int = 1) -> str:
    """Markdown; of no rows, nothing. Columns in which no row has anything are left out.

    names: how many of the first columns name a row; of one that failed, the others give the reason.
    """
    lines: list[list[str]] = []
    for row in rows:
        reason = next((row[key] for key in FAILED if key in row), None) if isinstance(row, dict) else None
        cells = [cell(row) for cell in list(columns.values())[: names if reason else None]]
        lines.append([*cells, f"not measured: {reason}", *[""] * (len(columns) - names - 1)] if reason else cells)
    kept = [i for i in range(len(columns)) if i < names or any(line[i] not in ("", "-") for line in lines)]
    if not lines:
        return ""
    heads = [list(columns), ["---"] * len(columns)]
    lines = [[cell.replace("|", "\\|") for cell in line] for line in lines]  # as in the progress bar of a failed run
    return "\n".join(f"| {' | '.join(line[i] for i in kept)} |" for line in [*heads, *lines]).replace("| --- ", "|---")


def source(row: Row) -> Row:
    """A row's provenance, which is the row itself or a field of it."""
    return row.get("provenance", row)


def newest(rows: Rows) -> Rows:
    """Those of the last row's commit."""
    return [row for row in rows if source(row).get("commit") == source(rows[-1]).get("commit")]


def grouped(rows: Rows, *names: str) -> dict[tuple, Rows]:
    """Rows by the values of these fields, in order of appearance."""
    groups: dict[tuple, Rows] = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in names), []).append(row)
    return groups


def facts(rows: Rows) -> str:
    """A list of where and with what the rows were measured."""
    known = [{"load": row.get("load"), **source(row)} for row in rows]
    lines = []
    for name in FACTS:
        seen = sorted({found[name] for found in known if found.get(name) is not None})
        form = ".1f" if name == "load" else ""
        if seen:
            ends = [format(end, form) for end in dict.fromkeys((seen[0], seen[-1]))]
            lines.append(f"* {name}: {' to '.join(ends)}")
    return "\n".join(lines)


def draw(panels: Sequence[Panel], path: Path) -> None:
    """The panels below each other as a PNG."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    heights = [max(2.6, 0.9 + 0.2 * len(p.names) * (1 if p.stacked else max(1, len(p.bars)) ** 0.7)) for p in panels]
    figure, axes = pyplot.subplots(
        len(panels), figsize=(10, sum(heights)), height_ratios=heights, layout="constrained", squeeze=False
    )
    for place, panel in zip(axes[:, 0], panels, strict=True):
        (_draw_bars if panel.names else _draw_lines)(place, panel)
        for label, level in panel.levels.items():
            (place.axvline if panel.names else place.axhline)(level, color="0.3", linestyle=":", label=label)
        place.set_xlabel(panel.xlabel)
        place.set_title(panel.title, fontsize=9)
        if place.get_legend_handles_labels()[1]:
            place.legend(fontsize=7, frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    figure.savefig(path, dpi=90)
    pyplot.close(figure)


def _draw_bars(axes: Any, panel: Panel) -> None:
    import matplotlib

    height = 0.8 / (1 if panel.stacked else len(panel.bars))
    ends, colours = [0.0] * len(panel.names), matplotlib.colormaps["tab20" if len(panel.bars) > 10 else "tab10"].colors
    for i, (label, values) in enumerate(panel.bars.items()):
        lengths = [NAN if v is None else v for v in values]
        places = [j + (0 if panel.stacked else (i + 0.5) * height - 0.4) for j in range(len(panel.names))]
        error = [_distances(lengths, side) for side in zip(*panel.spread[label], strict=True)] if panel.spread else None
        bars = axes.barh(
            places, lengths, height, left=ends if panel.stacked else None, xerr=error, label=label, color=colours[i]
        )
        if panel.stacked:
            ends = [a + b for a, b in zip(ends, lengths, strict=True)]
        elif not error:
            axes.bar_label(bars, fmt="%.3g", fontsize=6, padding=2)
    for label, values in panel.marks.items():
        axes.scatter(values, range(len(panel.names)), color="k", marker="|", s=300, label=label)
    axes.set_yticks(range(len(panel.names)), panel.names, fontsize=7)
    axes.margins(y=0.01)
    axes.invert_yaxis()
    if panel.log:
        axes.set_xscale("log")


def _distances(lengths: Sequence[float], ends: Sequence[float]) -> list[float]:
    return [abs(length - end) for length, end in zip(lengths, ends, strict=True)]


def _draw_lines(axes: Any, panel: Panel) -> None:
    for label, (x, y) in panel.lines.items():
        axes.plot(x, y, marker="." if len(x) < 50 else "", label=label)
    axes.set_ylabel(panel.ylabel, fontsize=8)
    axes.set_ylim(0, 1.1 * axes.dataLim.ymax)


def load(path: Path) -> Rows:
    """The rows of a file; where they have no provenance, that of the folder's file for them.

    Raises:
        ValueError: there are no rows, or nothing says where they are from.
    """
    rows = list(read_rows(path))
    if not rows:
        raise ValueError(f"{path}: holds no rows")
    if "commit" not in source(rows[0]):
        stated = path.with_name(PROVENANCE)
        if not stated.exists():
            raise ValueError(f"{path}: rows without a commit, and there is no {stated}")
        rows = [{**row, "provenance": json.loads(stated.read_text())} for row in rows]
    return rows


def page_of(path: Path) -> Page:
    """The page of a file of rows, by its name. Raises ValueError: as `load`, or no page has that name."""
    from .pages import PAGES  # which imports this module

    names = [name for name in PAGES if path.name.startswith(name)]
    if not names:
        raise ValueError(f"{path}: no page for it; there are {', '.join(PAGES)}")
    return PAGES[max(names, key=len)](load(path))


def write(path: Path, describe: Callable[[Rows], Page] | None = None) -> str:
    """Write the page and the plot of a file of rows; returns the page. describe: default, by the file's name."""
    page = describe(load(path)) if describe else page_of(path)
    path.with_suffix(".md").write_text(page.markdown(), encoding="utf-8")
    if page.panels:
        draw(page.panels, plot_of(path))
    return page.markdown()


def plot_of(path: Path) -> Path:
    """Where the plot of a file of rows is; the study's is in docs/."""
    return RESULTS.parents[1] / "docs" / "study.png" if path == RESULTS / "study.jsonl" else path.with_suffix(".png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path, help="files of rows; default: all that are committed")
    for path in parser.parse_args().files or sorted(RESULTS.rglob("*.jsonl")):
        write(path)
        print(path.with_suffix(".md"))


if __name__ == "__main__":
    main()
