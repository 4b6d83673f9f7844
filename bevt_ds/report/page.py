"""`bevt report RUN [RUN ...]`: one HTML file that shows runs, alone or side by side. It needs no network to be read.

Everything is read from the runs' folders, which are not changed; a run that goes on is shown as far as it is.
"""

from __future__ import annotations

import argparse
import base64
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape

import bevt_ds
from bevt_ds.errors import UserError
from bevt_ds.report.charts import line_chart
from bevt_ds.report.compare import by_key, number
from bevt_ds.report.run_files import Run, read_run

MOST_PANELS, MOST_ROWS = 8, 12  # of a run, spread evenly over its steps
CHARTS: dict[str, dict[str, str]] = {  # title -> field of a log line: its label
    "Loss": {"loss": "loss", "loss_video": "clips", "loss_image": "images"},
    "Masked accuracy": {"acc_video": "clips", "acc_image": "images"},
    "Accuracy": {"top1": "training", "val_top1": "validation", "probe_top1": "probe"},
    "Learning rate": {"lr": "learning rate"},
    "Gradient norm": {"grad_norm": "before clipping"},
    "Throughput, samples a second": {"clips_per_s": "clips", "images_per_s": "images"},
    "Model FLOPs utilisation": {"mfu": "of the bf16 peak"},
    "Waiting for data, share of the time": {"data_wait": "data wait"},
    "Feature rank": {"feature_rank": "effective rank"},
    "Visual tokens in use": {"codebook_use": "share of ids", "codebook_perplexity": "perplexity"},
    "Parts of a tokenizer's loss": {
        "loss_pixels": "pixels",
        "loss_perceptual": "perceptual",
        "loss_commitment": "distance to codes",
    },
    "Reconstruction, PSNR in dB": {"psnr": "frames"},
    "Reconstruction, share of the variance": {"explained": "kept"},
    "Skipped steps and bad samples": {"skipped_steps": "skipped steps", "bad_samples": "bad samples"},
}
FAULTS = ("skipped_steps", "bad_samples")  # drawn where one is not 0
IDS = "Visual tokens of the held-out samples"
TOGETHER = {"loss": ("loss_video", "loss_image")}  # a sum is not drawn where its parts are


@dataclass(frozen=True)
class Shown:
    """A run as the template shows it."""

    run: Run
    panels: list[tuple[str, str]]  # caption, data URL
    rows: list[dict[str, Any]]
    columns: list[str]


def main(argv: Sequence[str]) -> int:
    """Write the report; returns the exit code."""
    parser = argparse.ArgumentParser(prog="bevt report", description=__doc__.split("\n")[0])
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="the folder that a run writes")
    parser.add_argument("--out", type=Path, help="the file to write; default: report.html in the first run's folder")
    arguments = parser.parse_args(argv)
    path = arguments.out or arguments.runs[0] / "report.html"
    html = render([read_run(folder) for folder in arguments.runs])
    with writing(path):
        path.write_text(html, encoding="utf-8")
    print(f"wrote {path}")
    return 0


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """The block writes the file that a command names. UserError: it cannot be written."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write {path} ({error.strerror}): name another file with --out.") from error


def render(runs: Sequence[Run]) -> str:
    """The page."""
    templates = Environment(
        loader=PackageLoader("bevt_ds.report", "."),
        autoescape=select_autoescape(default=True),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    templates.filters |= {"number": number, "raw": json.dumps}
    names = unique_names(runs)
    return templates.get_template("report.html").render(
        names=names,
        shown=[show(run) for run in runs],
        differing=differing(runs),
        charts=charts(runs, names),
        now=datetime.now(UTC).isoformat(timespec="minutes"),
        version=bevt_ds.__version__,
    )


def show(run: Run) -> Shown:
    """The parts of a run that are cut to what a page holds."""
    panels = [(_caption(step), png_url(path.read_bytes())) for step, path in spread_evenly(run.panels, MOST_PANELS)]
    rows = spread_evenly(run.rows, MOST_ROWS)
    columns = list(dict.fromkeys(key for row in rows for key, value in row.items() if value is not None))
    return Shown(run, panels, rows, columns)


def charts(runs: Sequence[Run], names: Sequence[str]) -> list[tuple[str, str]]:
    """Title and SVG of every chart that has a point."""
    found = []
    for title, fields in CHARTS.items():
        for subtitle, series, levels in chart_series(runs, names, fields):
            heading = title if not subtitle else f"{title}: {subtitle}"
            starts = [s["first_step"] for s in runs[0].starts if s.get("first_step")] if len(runs) == 1 else []
            found.append((heading, line_chart(heading, series, levels, starts)))
    if counts := id_counts(runs, names):
        found.append((IDS, line_chart(IDS, counts, xlabel="ids, the commonest first", log=True)))
    return found


def id_counts(runs: Sequence[Run], names: Sequence[str]) -> dict[str, tuple[list[int], list[int]]]:
    """Run and stream -> how often each visual token occurs in the held-out samples, by rank."""
    found = {}
    for name, run in zip(names, runs, strict=True):
        for stream, values in run.summary.items():
            if isinstance(values, dict) and (counts := values.get("id_counts")):
                found[stream if len(runs) == 1 else f"{name}, {stream}"] = list(range(1, len(counts) + 1)), counts
    return found


def chart_series(
    runs: Sequence[Run], names: Sequence[str], fields: Mapping[str, str]
) -> list[tuple[str, dict[str, Any], dict[str, float]]]:
    """(subtitle, label -> points, label -> constant): one chart of a run's fields, or of several runs one a field."""
    fields = {key: label for key, label in fields.items() if any(_worth_drawing(run, key) for run in runs)}
    fields = {key: label for key, label in fields.items() if not set(TOGETHER.get(key, ())) & fields.keys()}
    if not fields:
        return []
    if len(runs) == 1:
        levels = {f"{name}, {label}": loss for key, label in fields.items() for name, loss in blind_loss(runs[0], key)}
        return [("", {label: runs[0].series(key) for key, label in fields.items()}, levels)]
    return [
        (label, {name: run.series(key) for name, run in zip(names, runs, strict=True) if run.series(key)[0]}, {})
        for key, label in fields.items()
    ]


def _worth_drawing(run: Run, key: str) -> bool:
    values = run.series(key)[1]
    return any(values) if key in FAULTS else bool(values)


def blind_loss(run: Run, key: str) -> list[tuple[str, float]]:
    """What a guess is that ignores the input, and its held-out loss, for the loss of a stream; else nothing."""
    stream = run.summary.get(key.removeprefix("loss_"), {}) if key.startswith("loss_") else {}
    guesses = {"unigram_entropy": "unigram", "mean_loss": "mean feature"}
    return [(guesses[key], stream[key]) for key in guesses if isinstance(stream, dict) and key in stream]


def differing(runs: Sequence[Run]) -> dict[str, list[str]]:
    """key -> the value of each run, of settings in which runs differ; none of one run."""
    values = by_key([run.settings for run in runs])
    return {key: each for key, each in values.items() if len(set(each)) > 1 and key != "output_dir"}


def unique_names(runs: Sequence[Run]) -> list[str]:
    """The folders' names, or where two are equal their paths."""
    names = [run.name for run in runs]
    return names if len(set(names)) == len(names) else [str(run.folder) for run in runs]


def spread_evenly(items: Sequence[Any], most: int) -> list[Any]:
    """At most so many of them, the first and the last included."""
    if len(items) <= most:
        return list(items)
    return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]


def png_url(data: bytes) -> str:
    """A PNG inside the page."""
    return "data:image/png;base64," + base64.b64encode(data).decode()


def _caption(step: int) -> str:
    return "at the end" if step < 0 else f"after {step:,} steps"
