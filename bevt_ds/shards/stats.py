"""What is in some shards, as a table and plots, and whether this machine can feed a recipe from them."""

from __future__ import annotations

import os
import time
import warnings
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from bevt_ds.config.samples import DataConfig
from bevt_ds.data.decoding.pool import DecodePool
from bevt_ds.data.limits import BadSample, Limits
from bevt_ds.data.plan import PlanEntry, StreamId, StreamPlan
from bevt_ds.data.reading.members import Member, Shard
from bevt_ds.data.reading.storage import Storage
from bevt_ds.errors import UserError

Facts = Sequence[dict[str, Any]]
NUMBERS = {
    "seconds": lambda f: f["duration"],
    "frames": lambda f: f["frames"],
    "frames a second": lambda f: f["fps"],
    "short side, pixels": lambda f: min(f["width"], f["height"]),
    "KiB": lambda f: f["size"] / 1024,
    "frames between keyframes": lambda f: f["keyframe_gap"],
}
ADD_UP = ("seconds", "frames", "KiB")
CLASSES = ("codec", "container", "label")
COLUMNS = 3
MOST_BARS = 12  # of a panel: the commonest classes, or a bar for each of a few values
LONGEST = 28  # characters of a class's name


@dataclass(frozen=True)
class Supply:
    """What decoding clips of these shards costs here."""

    clips: int  # measured
    decoded_frames: float  # a clip
    clips_per_second: float  # of all cores
    cores: int

    @property
    def frames_per_second(self) -> float:
        return self.clips_per_second * self.decoded_frames


def table(facts: Facts) -> str:
    """Minimum, median and maximum of each number, and how often each class occurs."""
    lines = [f"{'':26}{'least':>12}{'median':>12}{'most':>12}{'sum':>14}"]
    for name, values in _numbers(facts).items():
        row = (values.min(), np.median(values), values.max())
        total = f"{values.sum():14,.0f}" if name in ADD_UP else ""
        lines.append(f"{name:26}" + "".join(f"{v:12.5g}" for v in row) + total)
    for name, counts in _classes(facts).items():
        common = ", ".join(f"{value} {n}" for value, n in counts.most_common(8))
        rest = f", and {len(counts) - 8} more" if len(counts) > 8 else ""
        lines.append(f"{name:26}{common}{rest}")
    return "\n".join(lines)


def plot(facts: Facts, path: Path) -> None:
    """A panel for each number, a histogram or bars, and one for each class: a PNG. UserError: it cannot be written."""
    panels = [*_numbers(facts).items(), *_classes(facts).items()]
    columns = min(len(panels), COLUMNS) or 1
    rows = -(-len(panels) // columns) or 1
    figure = Figure(figsize=(4 * columns, 3 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    figure.suptitle(f"{len(facts)} samples")
    for axis, (name, values) in zip(axes.flat, panels, strict=False):
        _draw_panel(axis, name, values)
    for axis in list(axes.flat)[len(panels) :]:
        axis.set_visible(False)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Glyph", UserWarning)  # a label in a script that the font lacks
            figure.savefig(path)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot write the plots to {path} ({error}): name another file with --out") from error


def _draw_panel(axis: Axes, name: str, values: np.ndarray | Counter[str]) -> None:
    """Bars to the right for classes, upright ones for a few values, else a histogram."""
    axis.set_title(name)
    if isinstance(values, Counter):
        common = values.most_common(MOST_BARS)
        bars = axis.barh(range(len(common)), [n for _, n in common], height=0.6)
        axis.set_yticks(range(len(common)), [value.replace("$", r"\$") for value, _ in common])
        axis.bar_label(bars, padding=2)
        axis.margins(x=0.15)
        axis.set_xticks([])
        axis.set_ylim(max(len(common), 6) - 0.5, -0.5)
        if rest := len(values) - len(common):
            axis.set_xlabel(f"and {rest} more")
        return
    distinct, counts = np.unique(values, return_counts=True)
    if len(distinct) <= MOST_BARS:
        axis.bar([f"{value:.5g}" for value in distinct], counts, width=0.5)
        axis.set_xlim(-1, len(distinct))
        axis.tick_params(axis="x", rotation=45 if len(distinct) > 5 else 0)
    else:
        axis.hist(values, bins="auto" if len(distinct) < 1000 else 40)
    axis.yaxis.set_major_locator(MaxNLocator(integer=True))


def measure(shards: Sequence[Shard], config: DataConfig, seconds: float = 3.0) -> Supply:
    """Decode clips as a recipe's plan would choose them, on all cores, for about so long. UserError: none decodes."""
    shards = [videos for shard in shards if len(videos := shard.only("video"))]
    cores = len(os.sched_getaffinity(0))
    storage, pool = Storage(config, cores + 2), DecodePool(cores, config.decode_seconds, Limits.of(config))
    try:
        plan = StreamPlan(StreamId.VIDEO, [len(shard) for shard in shards], config, 0, 4 * cores)
        with suppress(BadSample):  # a worker starts in any case, which is what this is for
            pool.describe(storage.read(shards[0].member(0)))
        began, clips, decoded = time.monotonic(), 0, 0
        for step in range(1000):
            entries = [plan.entry(step, slot) for slot in range(plan.global_size)]
            members = [shards[e.shard].member(e.member) for e in entries]
            for n in _decoded_frames(pool, storage, members, entries, config):
                clips, decoded = clips + 1, decoded + n
            if time.monotonic() - began > seconds:
                break
        elapsed = time.monotonic() - began
    finally:
        pool.close()
        storage.close()
    if not clips:
        raise UserError("none of these videos can be decoded: `bevt shards check` says why")
    return Supply(clips, decoded / clips, clips / elapsed, cores)


def verdict(supply: Supply, recipe: str, config: DataConfig, wanted: float) -> str:
    """Whether these shards, on this machine, feed a GPU that takes `wanted` clips a second."""
    need = wanted * supply.decoded_frames
    cores = int(np.ceil(wanted / supply.clips_per_second * supply.cores))
    answer = "enough" if cores <= supply.cores else f"too few: that takes about {cores} cores like these"
    return (
        f"recipe {recipe}: {config.frames} frames at stride {config.stride}, {supply.decoded_frames:.1f} frames decoded"
        f" a clip.\n{wanted:g} clips/s need {need:.0f} frames/s; the {supply.cores} cores of this machine decode"
        f" {supply.frames_per_second:.0f} frames/s, which is {supply.clips_per_second:.1f} clips/s, by a trial of"
        f" {supply.clips} clips of these shards: {answer}."
    )


def _decoded_frames(pool: DecodePool, storage: Storage, members: list[Member], entries, config: DataConfig):
    def decode(member: Member, entry: PlanEntry) -> int:
        start = (entry.start, entry.phase)
        with pool.clips(storage.read(member), [start], config.frames, config.stride) as decoded:
            return decoded.reply["decoded"]

    for call in [storage.executor.submit(decode, *sample) for sample in zip(members, entries, strict=True)]:
        try:
            yield call.result()
        except BadSample:
            continue  # `check` is for those


def _numbers(facts: Facts) -> dict[str, np.ndarray]:
    """The numbers that all samples have."""
    result = {}
    for name, read in NUMBERS.items():
        try:
            result[name] = np.array([read(f) for f in facts], dtype=float)
        except KeyError:
            continue  # images have no frame rate
    return result if facts else {}


def _classes(facts: Facts) -> dict[str, Counter[str]]:
    counts = {name: Counter(_readable(str(f[name])) for f in facts if f.get(name)) for name in CLASSES}
    return {name: counter for name, counter in counts.items() if counter}


def _readable(text: str) -> str:
    """A label as one short line that does nothing to a terminal: it is whatever somebody put into a tar."""
    line = "".join(c if c.isprintable() else "?" for c in text)
    return line if len(line) <= LONGEST else line[: LONGEST - 1] + "…"
