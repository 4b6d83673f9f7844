"""loader.md and loader.png from the rows that benchmarks.loader has written."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt  # noqa: E402 - after the choice of a backend without a display

from benchmarks.common import read_rows  # noqa: E402

Rows = list[dict[str, Any]]
DECODING = "decoding_cpu_s_per_clip"
# row, the row it is compared with (None: the best DataLoader on raw shards), how many times as fast it has to be; the
# factor of shards with a lower rate is that of 16x8
TARGETS = [
    ("ours, raw", None, 1.2),
    ("ours, packed", None, 1.5),
    ("ours, packed, fps=", None, 3.0),
    ("ours, raw, 4 clips a video", "ours, raw", 2.0),
    ("ours, packed, fps=, 4 clips a video", "ours, packed, fps=", 2.0),
]


def write_page(results: Path) -> None:
    """From the rows of the newest commit in `results`."""
    rows = list(read_rows(results))
    rows = [row for row in rows if row["commit"] == rows[-1]["commit"]]
    results.with_suffix(".md").write_text(page(rows))
    draw(rows, results.with_suffix(".png"))


def page(rows: Rows) -> str:
    """Tables of the rows, by video size and sampling; shards; memory."""
    return "\n".join([*_head(rows), *_tables(rows), *_targets(rows), *_shards(rows), *_soak(rows), ""])


def _head(rows: Rows) -> list[str]:
    first = rows[0]
    versions = ("python", "torch", "av", "nvidia-dali-cuda130", "torchvision", "torchcodec")
    loads = [row["load"] for row in rows]
    return [
        "# Loader",
        "",
        "Drawn by `python -m benchmarks.loader --page` from loader.jsonl: videos of 10 s at 30 frames/s, batches of 4",
        "clips, 224 pixels normalised and the tokenizer's 112 (ours of the frames that hold a masked cell, three",
        "quarters on average; the DataLoaders know no mask), every row in a process of its own. DataLoaders have a",
        "worker a core, this project's loader one more. Medians over the rounds, with the lowest and highest; CPU time",
        "is that of all processes. Decoding, from a file's bytes to RGB, is that of the processes which do nothing",
        "else. The first batch includes imports but torch's. Memory is the sum of each process's peak, in which shared",
        "memory counts more than once.",
        "",
        f"Commit {first['commit']}; {first['cores']} cores, {first['cpu']}; load {min(loads):.1f} to {max(loads):.1f};",
        ", ".join(f"{name} {first[name]}" for name in versions if first.get(name)) + ".",
        "",
        "![CPU time a clip, and memory over 20,000 clips](loader.png)",
        "",
    ]


def groups(rows: Rows) -> Iterator[tuple[str, str, dict[str, Rows]]]:
    """Video size, sampling, and the rounds of each row."""
    measured = [row for row in rows if "row" in row]
    for size, sampling in dict.fromkeys((row["size"], row["sampling"]) for row in measured):
        group: dict[str, Rows] = {}
        for row in measured:
            if (row["size"], row["sampling"]) == (size, sampling):
                group.setdefault(row["row"], []).append(row)
        yield size, sampling, group


def _tables(rows: Rows) -> Iterator[str]:
    for size, sampling, group in groups(rows):
        yield from (f"## {size}, {sampling}", "")
        yield "| row | clips/s | CPU ms a clip | of it decoding | decoded frames/s | peak MB | first batch s | rounds |"
        yield "|---|---|---|---|---|---|---|---|"
        for name, rounds in group.items():
            if reasons := {r["not_measured"] for r in rounds if "not_measured" in r}:
                yield f"| {name} | not measured: {'; '.join(sorted(reasons))} |||||||"
                continue
            cells = [
                _spread([r["clips_per_s"] for r in rounds], ".1f"),
                _spread([1000 * r["cpu_s_per_clip"] for r in rounds], ".1f"),
                _spread([_milliseconds(r.get(DECODING)) for r in rounds], ".1f"),
                _spread([r["decoded_frames_per_s"] for r in rounds], ".0f"),
                _spread([r["peak_mb"] for r in rounds], ".0f"),
                _spread([r["first_batch_s"] for r in rounds], ".1f"),
            ]
            yield f"| {name} | {' | '.join(cells)} | {len(rounds)} |"
        yield ""


def _milliseconds(seconds: float | None) -> float | None:
    return None if seconds is None else 1000 * seconds


def _spread(values: list[float | None], form: str) -> str:
    if None in values:
        return "not counted"
    return f"{median(values):{form}} ({min(values):{form}} to {max(values):{form}})"


def _targets(rows: Rows) -> Iterator[str]:
    yield from ("## What was to be reached", "")
    yield "Times as many clips for the same CPU time, and in the same time; best: the DataLoader on raw shards that"
    yield "needs least CPU time, or gives most clips/s. At most: what several clips a video would give if they cost no"
    yield "more decoding than none; the rest, from RGB to the network's pixels, each clip needs for itself."
    yield from ("", "| videos | row | against | to reach | CPU | at most | clips/s |", "|---|---|---|---|---|---|---|")
    for size, sampling, group in groups(rows):
        rivals = [n for n in group if n.startswith("D") and _middle(group, n) < float("inf") and n.endswith(", raw")]
        for name, other, factor in TARGETS:
            leanest = other or min(rivals, key=lambda n: _middle(group, n))
            fastest = other or max(rivals, key=lambda n: _middle(group, n, "clips_per_s"))
            if float("inf") in (_middle(group, leanest), _middle(group, name)):
                continue
            cpu = _middle(group, leanest) / _middle(group, name)
            speed = _middle(group, name, "clips_per_s") / _middle(group, fastest, "clips_per_s")
            wanted = "" if "fps=" in name and other is None and sampling != "16x8" else f"{factor}x"
            shown = other or f"best: {' / '.join(dict.fromkeys((leanest, fastest)))}"
            times = [f"{ratio:.2f}x{' (not reached)' if wanted and ratio < factor else ''}" for ratio in (cpu, speed)]
            reached = f"{wanted} | {times[0]} | {_bound(group, other) if other else ''} | {times[1]}"
            yield f"| {size}, {sampling} | {name} | {shown} | {reached} |"
    yield ""


def _bound(group: dict[str, Rows], name: str) -> str:
    """How much less CPU time a row would take without its decoding; empty where that is not known."""
    cpu, decoding = _middle(group, name), _middle(group, name, DECODING)
    return f"{cpu / (cpu - decoding):.2f}x" if decoding < cpu else ""


def _middle(group: dict[str, Rows], name: str, key: str = "cpu_s_per_clip") -> float:
    """Median over the rounds; infinite where there is none."""
    values = [r[key] if r.get(key) is not None else float("inf") for r in group.get(name, [])]
    return median(values or [float("inf")])


def _shards(rows: Rows) -> Iterator[str]:
    yield from ("## The shards", "")
    sizes = [f"{r['size']}: {r['videos']} videos, {r['real_videos']} of them real" for r in rows if "videos" in r]
    yield f"{'; '.join(sizes)}. PSNR of 8-bit RGB against the source scaled to the same size, mean over 8 videos."
    yield from ("", "| videos | shards | MB | of the raw ones | PSNR dB |", "|---|---|---|---|---|")
    of_sets = [row for row in rows if "shards" in row]
    for row in of_sets:
        raw = next(r["megabytes"] for r in of_sets if (r["size"], r["shards"]) == (row["size"], "raw"))
        decibels = f"{row['psnr_db']:.1f}" if "psnr_db" in row else "the source"
        share = row["megabytes"] / raw
        yield f"| {row['size']} | {row['shards']} | {row['megabytes']:.1f} | {share:.2f} | {decibels} |"
    yield ""


def _soak(rows: Rows) -> Iterator[str]:
    yield from ("## Memory", "")
    for row in (r for r in rows if "soak" in r):
        if "not_measured" in row:
            yield f"Not measured: {row['not_measured']}"
            continue
        megabytes, files = row["rss_mb"], row["open_files"]
        step = row["clips"] // len(files)
        yield f"{row['clips']:,} clips of {row['soak']} (crops of 128 pixels), after each {step:,}:"
        yield f"resident {', '.join(map(str, megabytes))} MB; open files {min(files)} to {max(files)}."


def draw(rows: Rows, path: Path) -> None:
    """CPU time a clip as bars for each size and sampling, and the memory curve."""
    figure, axes = plt.subplots(1, 2, figsize=(13, 6), width_ratios=(3, 1), layout="constrained")
    everything = list(groups(rows))
    names = [n for n in dict.fromkeys(n for *_, g in everything for n in g) if _is_measured(everything, n)]
    height = 0.8 / max(len(everything), 1)
    for i, (size, sampling, group) in enumerate(everything):
        places = [-j - i * height for j in range(len(names))]
        values = [1000 * _middle(group, name) for name in names]
        bars = axes[0].barh(places, values, height, label=f"{size}, {sampling}")
        axes[0].bar_label(bars, fmt="%.0f", fontsize=7, padding=2)
    ticks = [-j - 0.4 + height / 2 for j in range(len(names))]
    axes[0].set(yticks=ticks, yticklabels=names, xscale="log", xlabel="CPU ms a clip, logarithmic")
    figure.legend(loc="outside upper center", ncols=len(everything))
    for row in (r for r in rows if "rss_mb" in r):
        step = row["clips"] // len(row["rss_mb"])
        axes[1].plot([step * (i + 1) for i in range(len(row["rss_mb"]))], row["rss_mb"])
        axes[1].set_ylim(0, 1.2 * max(row["rss_mb"]))
    axes[1].set(xlabel="clips", ylabel="resident MB")
    figure.savefig(path, dpi=90)
    plt.close(figure)


def _is_measured(everything: list[tuple[str, str, dict[str, Rows]]], name: str) -> bool:
    return all(_middle(group, name) < float("inf") for *_, group in everything)
