"""The study's table and plot, drawn from its rows, and a picture of the classes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np

from benchmarks.study_data import CLIP
from bevt_ds.rng import Use, generator
from bevt_ds.shards.synthetic.motion import COURSES, render_action

Row = dict[str, Any]

TITLES = {"scratch": "from scratch", "images": "pictures only", "joint": "joint (BEVT)"}
GROUPS = {group: [n for n, c in COURSES.items() if c.group == group] for group in ("direction", "speed", "order")}
COLOURS = ("0.6", "tab:orange", "tab:blue")


def best_rate(rows: Sequence[Row], arm: str) -> float:
    """The learning rate whose run with the first seed did best on the validation clips; the test clips have no say."""
    first = min(row["seed"] for row in rows)
    return max((row["val"], row["lr"]) for row in rows if (row["arm"], row["seed"]) == (arm, first))[1]


def group_accuracy(row: Row, group: str) -> float:
    """The mean accuracy of a group's classes."""
    return mean(row["classes"][name] for name in GROUPS[group])


def measured(rows: Sequence[Row]) -> dict[str, dict[str, list[float]]]:
    """Start -> "all" and each group -> test accuracy of each seed, at the start's rate."""
    chosen = {arm: [r for r in rows if (r["arm"], r["lr"]) == (arm, best_rate(rows, arm))] for arm in TITLES}
    groups = {group: lambda row, group=group: group_accuracy(row, group) for group in GROUPS}
    columns = {"all": lambda row: row["test"], **groups}
    return {arm: {name: [of(r) for r in found] for name, of in columns.items()} for arm, found in chosen.items()}


def by_labels(rows: Sequence[Row]) -> dict[int, list[Row]]:
    """The rows of each number of training clips a class, fewest first."""
    counts = sorted({row["scale"]["labels"] for row in rows})
    return {count: [row for row in rows if row["scale"]["labels"] == count] for count in counts}


def write_page(rows: Sequence[Row], page: Path, picture: Path) -> str:
    """Draw both files and return the page."""
    curves, rows = [row for row in rows if "pretraining" in row], [row for row in rows if "arm" in row]
    parts = by_labels(rows)
    lines = ["# Study: what pretraining is worth where only motion tells the classes apart", ""]
    lines += [f"Test accuracy, mean (lowest to highest seed); chance is {1 / len(COURSES):.1%}.", ""]
    for part in parts.values():
        lines += _section(part)
    lines += _pretraining(curves) if curves else []
    text = "\n".join([*lines, *_provenance(rows)]) + "\n"
    page.write_text(text)
    draw({count: measured(part) for count, part in parts.items()}, curves, picture)
    return text


def _section(rows: Sequence[Row]) -> Iterator[str]:
    values, scale = measured(rows), rows[0]["scale"]
    yield f"## {scale['labels']} training clips a class, {scale['finetune_epochs']} passes over them"
    yield ""
    yield "| start | lr | all | " + " | ".join(f"{group} ({len(names)})" for group, names in GROUPS.items()) + " |"
    yield "|---" * (3 + len(GROUPS)) + "|"
    for arm, columns in values.items():
        cells = [f"{mean(v):.1%} ({min(v):.1%} to {max(v):.1%})" for v in columns.values()]
        yield f"| {TITLES[arm]} | {best_rate(rows, arm):g} | " + " | ".join(cells) + " |"
    yield ""
    yield _verdict(values)
    yield ""


def _pretraining(curves: Sequence[Row]) -> Iterator[str]:
    """How often masked cells are right at the end, beside copying them from the nearest visible frame."""
    yield from ("## Pretraining", "", "| start | steps | clips' masked cells | copying them | pictures' masked cells |")
    yield "|---|---|---|---|---|"
    for row in curves:
        cells = [f"{row[kind][-1]:.1%}" if kind in row else "" for kind in ("video", "image")]
        copying = f"{row['copying']:.1%}" if "copying" in row else ""
        yield f"| {TITLES[row['pretraining']]} | {row['steps'][-1]:,} | {cells[0]} | {copying} | {cells[1]} |"
    yield ""


def _verdict(values: dict[str, dict[str, list[float]]]) -> str:
    """Whether joint pretraining is ahead, by the worst seed against the best of the others."""
    joint, others = values["joint"]["all"], [v for arm in ("scratch", "images") for v in values[arm]["all"]]
    if min(joint) > max(others):
        return "Joint pretraining is ahead: its worst seed is better than the best seed of either other start."
    if mean(joint) > max(mean(values[arm]["all"]) for arm in ("scratch", "images")):
        return "Joint pretraining is ahead in the mean; the seeds of the starts overlap."
    return "Joint pretraining is not ahead."


def _provenance(rows: Sequence[Row]) -> Iterator[str]:
    facts = [row["provenance"] for row in rows]
    for name in facts[0]:
        seen = sorted({fact[name] for fact in facts})
        yield f"* {name}: {seen[0] if len(seen) == 1 else f'{seen[0]} to {seen[-1]}'}"


def draw(parts: dict[int, dict[str, dict[str, list[float]]]], curves: Sequence[Row], picture: Path) -> None:
    """Bars of the mean with a dot for each seed; a panel for each number of labels, and one for pretraining."""
    from matplotlib import pyplot

    count = len(parts) + bool(curves)
    figure, panels = pyplot.subplots(count, figsize=(7, 2.9 * count), layout="constrained", squeeze=False)
    for axes, (labels, values) in zip(panels[: len(parts), 0], parts.items(), strict=True):
        for i, (arm, columns) in enumerate(values.items()):
            places = [j + 0.27 * (i - 1) for j in range(len(columns))]
            axes.bar(places, [mean(v) for v in columns.values()], 0.25, color=COLOURS[i], label=TITLES[arm])
            for place, v in zip(places, columns.values(), strict=True):
                axes.plot([place] * len(v), v, "k.", markersize=4)
        axes.axhline(1 / len(COURSES), color="0.3", linewidth=0.8, linestyle=":", label="chance")
        axes.set_xticks(range(len(GROUPS) + 1), ["all classes", *GROUPS])
        axes.set_ylabel("test accuracy")
        axes.set_ylim(0, 1)
        axes.set_title(f"{labels} training clips a class", fontsize=9)
    panels[0, 0].legend(frameon=False, fontsize=8, ncols=4, loc="upper center")
    if curves:
        _draw_curves(panels[-1, 0], curves)
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=100)
    pyplot.close(figure)


def _draw_curves(axes: Any, curves: Sequence[Row]) -> None:
    """Masked accuracy over the steps of pretraining."""
    for row in curves:
        colour = COLOURS[list(TITLES).index(row["pretraining"])]
        for kind, style in (("video", "-"), ("image", "--")):
            if kind in row:
                label = f"{TITLES[row['pretraining']]}, {'clips' if kind == 'video' else 'pictures'}"
                axes.plot(row["steps"], row[kind], style, color=colour, label=label)
        if "copying" in row:
            axes.axhline(row["copying"], color="0.3", linewidth=0.8, linestyle=":", label="copying the nearest frame")
    axes.set_xlabel("steps of pretraining")
    axes.set_ylabel("masked cells right")
    axes.set_ylim(0, 1)
    axes.set_title("pretraining", fontsize=9)
    axes.legend(frameon=False, fontsize=8, ncols=2, loc="upper center")


def draw_classes(picture: Path, seed: int = 7) -> None:
    """A clip of each class from the same draw, a row each: only the motion differs."""
    from matplotlib import pyplot

    figure, rows = pyplot.subplots(len(COURSES), figsize=(6.4, 5.6), layout="constrained")
    for axes, name in zip(rows, COURSES, strict=True):
        clip = render_action(generator(seed, Use.SYNTHETIC), name, CLIP)
        spaced = np.pad(clip, ((0, 0), (0, 0), (2, 2), (0, 0)), constant_values=255)
        axes.imshow(np.concatenate(list(spaced), axis=1))
        axes.set_frame_on(False)
        axes.set_ylabel(name.replace("_then_", "\nthen "), rotation=0, ha="right", va="center", fontsize=8)
        axes.set_xticks([])
        axes.set_yticks([])
    figure.savefig(picture, dpi=80, bbox_inches="tight")
    pyplot.close(figure)
