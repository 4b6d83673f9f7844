"""`bevt view SHARDS [KEY=VALUE ...]`: what a recipe makes of samples: frames, crop, mask, and the tokenizer's view.

Samples come through the same plan, decoders and pixels as in training, so what is shown is what a network gets.
"""

from __future__ import annotations

import argparse
import html
import io
import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure

from bevt_ds.batch import Stream, denormalised
from bevt_ds.config.parse import apply_overrides, parse_overrides
from bevt_ds.config.recipes import get_recipe
from bevt_ds.config.schema import Config
from bevt_ds.config.validate import check_fields
from bevt_ds.data.decoding.video import opened
from bevt_ds.data.ledger import Ledger, Skips, StageTimes
from bevt_ds.data.limits import BadSample, Limits
from bevt_ds.data.open_stream import Source, open_reader, open_resources
from bevt_ds.data.plan import PlanEntry, StreamId, clip_frames
from bevt_ds.data.reading.members import Shard
from bevt_ds.data.stream import Resources, sample_name
from bevt_ds.errors import UserError
from bevt_ds.report.page import png_url, writing

SHOWN = 8  # frames of a clip
HIDDEN = 0.5
STREAMS = {"video": StreamId.VIDEO, "image": StreamId.IMAGE}
PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><meta name="color-scheme" content="light dark">
<meta name="viewport" content="width=device-width, initial-scale=1"><title>{title}</title>
<link rel="icon" href="data:,">
<body style="font: 15px system-ui, sans-serif; max-width: 1200px; margin: auto; padding: 1rem">
<h1>{title}</h1>{body}</body></html>
"""


@dataclass(frozen=True)
class Sheet:
    """A sample as it is shown: what is said of it, and rows of frames, each (H,W,3) in [0,1]; none if it is bad."""

    caption: str
    rows: dict[str, list[np.ndarray]]
    titles: list[str]  # of the columns


def main(argv: Sequence[str]) -> int:
    """Write the contact sheets; returns the exit code."""
    parser = argparse.ArgumentParser(prog="bevt view", description=__doc__)
    parser.add_argument("shards", help="shards, as data.videos or data.images takes them")
    parser.add_argument("settings", nargs="*", metavar="KEY=VALUE", help="recipe=NAME (default: demo) and overrides")
    parser.add_argument("--kind", choices=sorted(STREAMS), default="video", help="default: %(default)s")
    parser.add_argument("--count", type=int, default=6, help="samples to show; default: %(default)s")
    parser.add_argument("--step", type=int, default=0, help="the first samples of which step; default: %(default)s")
    parser.add_argument("--key", action="append", help="show the sample of this key; may be given again")
    parser.add_argument("--bad", type=Path, metavar="RUN", help="show the samples in RUN/bad_samples.jsonl, and why")
    parser.add_argument("--out", type=Path, default=Path("view.png"), help="*.png or *.html; default: %(default)s")
    arguments = parser.parse_args(argv)
    if arguments.out.suffix not in (".png", ".html"):
        raise UserError(f"--out {arguments.out}: name a .png or a .html file.")
    reasons = read_reasons(arguments.bad) if arguments.bad else {}
    keys = [*(arguments.key or ()), *reasons]
    if arguments.count < 1 or arguments.step < 0:
        raise UserError("--count is at least 1, and --step at least 0.")
    config = view_config(arguments.settings, arguments.shards, arguments.kind)
    found = list(sheets(config, arguments.kind, arguments.step, keys or arguments.count, reasons))
    write(found, arguments.out, arguments.shards)
    print(f"wrote {arguments.out}")
    return 0


def view_config(settings: Sequence[str], shards: str, kind: str) -> Config:
    """The recipe on these shards. UserError: a setting that cannot be."""
    overrides = parse_overrides(settings)
    config = apply_overrides(get_recipe(overrides.pop("recipe", "demo")), overrides)
    check_fields(config)
    return replace(config, data=replace(config.data, **{f"{kind}s": shards}, clips_per_video=1, holdout=0.0))


def read_reasons(run: Path) -> dict[str, str]:
    """Key -> why, of the samples that a run lists as bad. UserError: it lists none."""
    path = run / "bad_samples.jsonl" if run.is_dir() else run
    try:
        events = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.endswith("}")]
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}. Name the folder of a run with bad samples.") from error
    return {event["key"]: event["reason"] for event in events}


def sheets(
    config: Config, kind: str, step: int, wanted: Sequence[str] | int, reasons: dict[str, str]
) -> Iterator[Sheet]:
    """One for each sample: so many of a step, as training takes them, or those of the `wanted` keys.

    Raises:
        UserError: no shard, or no sample of a key.
    """
    pattern = config.data.videos if kind == "video" else config.data.images
    with ExitStack() as closing:
        shared = open_resources(config.data, kind == "video", StageTimes(), closing)
        shards = shared.storage.shards(pattern, kind)
        if isinstance(wanted, int):
            size = max(config.train.global_clips if kind == "video" else config.train.global_images, wanted)
            yield from part_sheets(config, kind, step, shards, (size, wanted), shared, reasons)
        else:
            for part in (with_key(shards, key, kind) for key in wanted):
                yield from part_sheets(config, kind, 0, part, (len(part), len(part)), shared, reasons)


def with_key(shards: list[Shard], key: str, kind: str) -> list[Shard]:
    """Shards that hold nothing but the sample of this key, so that a bad one has no substitute. UserError: none has."""
    found = [shard.at([shard.keys.index(key)]) for shard in shards if key in shard.keys]
    if not found:
        raise UserError(
            f"no {kind} has the key {key!r} in these shards: a key is a member's name without its extension; the"
            " other kind needs --kind."
        )
    return found


def part_sheets(
    config: Config,
    kind: str,
    step: int,
    shards: list[Shard],
    sizes: tuple[int, int],
    shared: Resources,
    reasons: dict[str, str],
) -> Iterator[Sheet]:
    """The sheets of the first samples of a step. sizes: samples of the step, and how many of them are shown."""
    ledger, count = Ledger(STREAMS[kind], None, Skips()), sizes[1]
    source = Source(STREAMS[kind], "", *sizes)
    reader = open_reader(source, shards, config, shared, torch.device("cpu"), "cpu", ledger)
    entries = [reader.plan.entry(step, slot) for slot in range(count)]
    members = [shards[entry.shard].member(entry.member) for entry in entries]
    if any(member.key in reasons for member in members):
        for entry, member in zip(entries, members, strict=True):
            yield Sheet(f"{sample_name(member)}: {reasons[member.key]}", *first_frames(entry, shards, shared, config))
        return
    pending = reader.begin(step, range(count))
    stream = reader.finish(pending)
    for i, entry in enumerate(pending.entries):
        shard = shards[entry.shard]
        caption = [sample_name(shard.member(entry.member))]
        caption += [f"label {label}"] if (label := shard.labels[entry.member]) else []
        caption += [f"short side {entry.short_side}{', mirrored' if entry.flip else ''}"]
        caption += ["in place of one that cannot be used"] if entry.attempt else []
        titles = frame_titles(entry, shard, shared, config) if kind == "video" else [""]
        yield sample_sheet(stream, i, ", ".join(caption), titles)


def frame_titles(entry: PlanEntry, shard: Shard, shared: Resources, config: Config) -> list[str]:
    """Number and time in the source of each frame of a clip."""
    data = config.data
    with opened(shared.storage.read(shard.member(entry.member)), Limits.of(data)) as video:
        numbers = clip_frames(entry.start, video.total, data.frames, data.stride, entry.phase)
        return [f"{n}: {time:.2f} s" for n, time in zip(numbers, video.times()[numbers], strict=True)]


def first_frames(
    entry: PlanEntry, shards: list[Shard], shared: Resources, config: Config
) -> tuple[dict[str, list[np.ndarray]], list[str]]:
    """What can be decoded of a bad video: its first frame, or nothing."""
    try:
        data = shared.storage.read(shards[entry.shard].member(entry.member))
        with opened(data, Limits.of(config.data)) as video:
            return {"first frame": [video.frames(np.zeros(1, np.int64))[0] / 255]}, ["0"]
    except BadSample:
        return {}, []


def sample_sheet(stream: Stream, i: int, caption: str, titles: list[str]) -> Sheet:
    """Rows of one sample of a micro-batch: input, what is hidden, and the tokenizer's view where a cell is masked."""
    frames = np.clip(denormalised(stream.pixels[i]), 0, 1)
    masks = np.repeat(stream.mask[i].reshape(-1, *stream.mask.shape[-2:]).numpy(), len(frames) // len(titles) or 1, 0)
    masks = np.repeat(masks, len(frames) // len(masks), 0)
    scale = frames.shape[1] // masks.shape[1]
    cells = masks.repeat(scale, 1).repeat(scale, 2)[..., None]
    shown = np.unique(np.linspace(0, len(frames) - 1, SHOWN).round().astype(int))
    views = view_of(stream, i)
    rows = {
        "input": [frames[t] for t in shown],
        "masked": [np.where(cells[t], HIDDEN, frames[t]) for t in shown],
        "tokenizer": [views.get(t, np.full((*stream.view.shape[-2:], 3), HIDDEN)) for t in shown],
    }
    return Sheet(caption, rows, [titles[t] for t in shown])


def view_of(stream: Stream, i: int) -> dict[int, np.ndarray]:
    """Frame of sample i -> the tokenizer's view of it; frames without a masked cell have none."""
    places = enumerate(stream.view_places[i].tolist())
    return {t: stream.view[place].permute(1, 2, 0).numpy() for t, place in places if place >= 0}


def write(found: Sequence[Sheet], path: Path, title: str) -> None:
    """One image of all sheets, or a page with an image of each. UserError: the file cannot be written."""
    with writing(path):
        if path.suffix == ".png":
            path.write_bytes(draw(found))
        else:
            body = "".join(
                f'<figure style="margin: 0 0 2rem"><figcaption>{html.escape(sheet.caption)}</figcaption>'
                f'<img style="width: 100%" alt="" src="{png_url(draw([sheet]))}"></figure>'
                for sheet in found
            )
            path.write_text(PAGE.format(title=html.escape(title), body=body), encoding="utf-8")


def draw(found: Sequence[Sheet]) -> bytes:
    """Sheets below each other, as a PNG."""
    figure = Figure(figsize=(12, sum(0.4 + 1.5 * len(sheet.rows) for sheet in found)), layout="constrained")
    heights = [0.4 + 1.5 * len(sheet.rows) for sheet in found]
    for part, sheet in zip(np.atleast_1d(figure.subfigures(len(found), 1, height_ratios=heights)), found, strict=True):
        part.suptitle(sheet.caption, fontsize=10)
        if not sheet.rows:
            continue
        grid = part.subplots(len(sheet.rows), len(sheet.titles), squeeze=False)
        for axes, (label, frames) in zip(grid, sheet.rows.items(), strict=True):
            axes[0].set_ylabel(label, fontsize=8)
            for axis, frame in zip(axes, frames, strict=True):
                axis.imshow(frame, interpolation="nearest")
                axis.set(xticks=[], yticks=[])
        for axis, text in zip(grid[0], sheet.titles, strict=True):
            axis.set_title(text, fontsize=8)
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=80)
    return file.getvalue()
