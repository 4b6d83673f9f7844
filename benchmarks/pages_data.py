"""The pages of the data path (loader, reading, damaged files) and of the study; pages.py has the others."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from statistics import mean, median

import numpy as np

from benchmarks.study_motion import COURSES

from .report import Columns, Page, Panel, Row, Rows, facts, fields, grouped, newest, spread, table

# The loader

DECODING = "decoding_cpu_s_per_clip"
# row, the row it is compared with (None: the best DataLoader on raw shards), how many times as fast it has to be; the
# factor of shards with a lower rate is that of 16x8
LOADER_GOALS = [
    ("ours, raw", None, 1.2),
    ("ours, packed", None, 1.5),
    ("ours, packed, fps=", None, 3.0),
    ("ours, raw, 4 clips a video", "ours, raw", 2.0),
    ("ours, packed, fps=, 4 clips a video", "ours, packed, fps=", 2.0),
]
LOADER = """\
Made by `python -m benchmarks.loader`: videos of 10 s at 30 frames/s, batches of 4 clips, 224 pixels normalised and the
tokenizer's 112 (ours of the frames that hold a masked position, three quarters on average; the DataLoaders know no
mask), every row in a process of its own. DataLoaders have a worker a core, this project's loader one more. Medians over
the rounds, with the lowest and highest; CPU time is that of all processes. Decoding, from a file's bytes to RGB, is
that of the processes which do nothing else. The first batch includes imports, except torch's. Memory is the sum of each
process's peak, in which shared memory counts more than once."""
LOADER_GOALS_TEXT = """\
Times as many clips for the same CPU time, and in the same time; best: the DataLoader on raw shards that needs least CPU
time, or gives most clips/s. At most: what several clips a video would give if they cost no more decoding than none; the
rest, from RGB to the network's pixels, each clip needs for itself."""
Group = dict[str, Rows]  # the rounds of each row


def loader(rows: Rows) -> Page:
    """Rates and costs by video size and sampling; goals; shards; memory."""
    rows = newest(rows)
    groups: dict[str, Group] = {}
    for (size, sampling, name), rounds in grouped([r for r in rows if "row" in r], "size", "sampling", "row").items():
        groups.setdefault(f"{size}, {sampling}", {})[name] = rounds
    parts = [LOADER, facts(rows), "![CPU time a clip, and memory over 20,000 clips](loader.png)"]
    for title, group in groups.items():
        parts += [f"## {title}", table([_rounds(name, rounds) for name, rounds in group.items()], LOADER_COLUMNS)]
    goals: Columns = {name: lambda cells, i=i: cells[i] for i, name in enumerate(GOAL_COLUMNS)}
    parts += ["## What was to be reached", LOADER_GOALS_TEXT, table(_goals(groups), goals, names=3)]
    return Page("Loader", [*parts, *_shards(rows), *_soak(rows)], [_cpu_panel(groups), *_memory_panels(rows)])


def _rounds(name: str, rounds: Rows) -> Row:
    """One row of the table: the values of all rounds, or why there are none."""
    reasons = sorted({row["not_measured"] for row in rounds if "not_measured" in row})
    return {"row": name, "rounds": rounds, **({"not_measured": "; ".join(reasons)} if reasons else {})}


def _over_rounds(name: str, form: str, scale: float = 1) -> Callable[[Row], str]:
    return lambda row: spread([None if r.get(name) is None else scale * r[name] for r in row["rounds"]], form)


LOADER_COLUMNS: Columns = {
    **fields("row row s"),
    "clips/s": _over_rounds("clips_per_s", ".1f"),
    "CPU ms a clip": _over_rounds("cpu_s_per_clip", ".1f", 1000),
    "of it decoding": _over_rounds(DECODING, ".1f", 1000),
    "decoded frames/s": _over_rounds("decoded_frames_per_s", ".0f"),
    "peak MB": _over_rounds("peak_mb", ".0f"),
    "first batch s": _over_rounds("first_batch_s", ".1f"),
    "rounds": lambda row: str(len(row["rounds"])),
}
GOAL_COLUMNS = ("videos", "row", "against", "to reach", "CPU", "at most", "clips/s")


def _middle(group: Group, name: str, key: str = "cpu_s_per_clip") -> float:
    """Median over the rounds; infinite where there is none."""
    values = [row[key] if row.get(key) is not None else float("inf") for row in group.get(name, [])]
    return median(values or [float("inf")])


def _goals(groups: dict[str, Group]) -> Iterator[tuple[str, ...]]:
    """The cells of each goal whose rows were measured."""
    for title, group in groups.items():
        rivals = [n for n in group if n.startswith("D") and n.endswith(", raw") and _middle(group, n) < float("inf")]
        for name, other, factor in LOADER_GOALS:
            if not (other or rivals):
                continue
            leanest = other or min(rivals, key=lambda n: _middle(group, n))
            fastest = other or max(rivals, key=lambda n: _middle(group, n, "clips_per_s"))
            if float("inf") in (_middle(group, leanest), _middle(group, name)):
                continue
            cpu = _middle(group, leanest) / _middle(group, name)
            speed = _middle(group, name, "clips_per_s") / _middle(group, fastest, "clips_per_s")
            wanted = "" if "fps=" in name and other is None and not title.endswith("16x8") else f"{factor}x"
            times = [f"{ratio:.2f}x{' (not reached)' if wanted and ratio < factor else ''}" for ratio in (cpu, speed)]
            against = other or f"best: {' / '.join(dict.fromkeys((leanest, fastest)))}"
            yield title, name, against, wanted, times[0], _bound(group, other) if other else "", times[1]


def _bound(group: Group, name: str) -> str:
    """How much less CPU time a row would take without its decoding; empty where that is not known."""
    cpu, decoding = _middle(group, name), _middle(group, name, DECODING)
    return f"{cpu / (cpu - decoding):.2f}x" if decoding < cpu else ""


def _shards(rows: Rows) -> list[str]:
    sets = [row for row in rows if "shards" in row]
    raw = {row["size"]: row["megabytes"] for row in sets if row["shards"] == "raw"}
    counts = [f"{r['size']}: {r['videos']} videos, {r['real_videos']} of them real" for r in rows if "videos" in r]
    columns: Columns = fields("videos size s | shards shards s | MB megabytes .1f") | {
        "of the raw ones": lambda row: f"{row['megabytes'] / raw[row['size']]:.2f}",
        "PSNR dB": lambda row: f"{row['psnr_db']:.1f}" if "psnr_db" in row else "the source",
    }
    text = "PSNR of 8-bit RGB against the source scaled to the same size, mean over 8 videos."
    return ["## The shards", f"{'; '.join(counts)}. {text}", table(sets, columns, names=2)]


def _soak(rows: Rows) -> Iterator[str]:
    yield "## Memory"
    for row in (row for row in rows if "soak" in row):
        if "not_measured" in row:
            yield f"Not measured: {row['not_measured']}"
        else:
            files, clips = row["open_files"], row["clips"]
            points = f"{clips:,} clips of {row['soak']} (crops of 128 pixels), after each {clips // len(files):,}:"
            memory = ", ".join(map(str, row["rss_mb"]))
            yield f"{points}\nresident {memory} MB; open files {min(files)} to {max(files)}."


def _cpu_panel(groups: dict[str, Group]) -> Panel:
    names = dict.fromkeys(name for group in groups.values() for name in group)
    names = [name for name in names if all(_middle(group, name) < float("inf") for group in groups.values())]
    bars = {title: [1000 * _middle(group, name) for name in names] for title, group in groups.items()}
    return Panel("CPU ms a clip, logarithmic", names=names, bars=bars, log=True)


def _memory_panels(rows: Rows) -> Iterator[Panel]:
    for row in (row for row in rows if "rss_mb" in row):
        points = len(row["rss_mb"])
        x = [row["clips"] // points * (i + 1) for i in range(points)]
        yield Panel("clips", ylabel="resident MB", lines={row["soak"]: (x, row["rss_mb"])})


READING = """\
Made by `python -m benchmarks.reading`: milliseconds of CPU time a sample; the middle 60 % of {rounds} rounds lie
between the last two columns. `deadline`: the read is made by a thread that may be given up (`data.read_seconds`)."""


def reading(rows: Rows) -> Page:
    """What reading a sample costs: of the newest commit, each row as last measured."""
    rows = list({row["row"]: row for row in newest(rows)}.values())
    intro = READING.format(**rows[-1])
    columns = fields("what row s | median p50 .3f | 20 % p20 .3f | 80 % p80 .3f")
    return Page("Reading", [intro, facts(rows), table(rows, columns)])


def damaged_media(rows: Rows) -> Page:
    """What became of damaged files, and memory on the way."""
    columns: Columns = {
        **fields("kind kind s | cases cases ,"),
        "outcomes": lambda row: ", ".join(f"{count:,} {outcome}" for outcome, count in row["outcomes"].items()),
        "faults": lambda row: str(len(row["faults"])),
        **fields("slowest s slowest_s .2f"),
        "minutes": lambda row: f"{row['wall_s'] / 60:.1f}",
        **fields("commit commit s"),
    }
    curves: Columns = fields("kind kind s") | {
        "cases": lambda row: _six_of(row, "cases"),
        "MB": lambda row: _six_of(row, "bytes", 1e-6),
        "files": lambda row: _six_of(row, "files"),
        "bytes a case after the first tenth": lambda row: f"{slope(row['curve']):.0f}",
    }
    intro = "Made by `python -m tests.loader.fuzz --out loader_fuzz.jsonl`; `make fuzz` runs other numbers of cases."
    parts, with_curves = [intro, facts(rows), table(rows, columns)], [row for row in rows if row["curve"]]
    if with_curves:
        parts += ["Memory and open files of the process and its workers on the way:", table(with_curves, curves)]
    return Page("Damaged media", parts)


def _six_of(row: Row, name: str, scale: float = 1) -> str:
    points = [row["curve"][i] for i in np.linspace(0, len(row["curve"]) - 1, 6).astype(int)]
    return " ".join(f"{round(point[name] * scale):,}" for point in points)


def slope(curve: Sequence[dict[str, float]]) -> float:
    """Bytes of memory for each further case, by least squares over a curve of 20 points after its first tenth."""
    settled = curve[1:] or curve
    return float(np.polyfit([point["cases"] for point in settled], [point["bytes"] for point in settled], 1)[0])


# The study

STARTS = {"scratch": "from scratch", "images": "images only", "joint": "joint (BEVT)"}
MOTIONS = {group: [n for n, c in COURSES.items() if c.group == group] for group in ("direction", "speed", "order")}


def best_rate(rows: Rows, arm: str) -> float:
    """The learning rate whose run with the first seed did best on the validation clips; the test clips have no say."""
    first = min(row["seed"] for row in rows)
    return max((row["val"], row["lr"]) for row in rows if (row["arm"], row["seed"]) == (arm, first))[1]


def measured(rows: Rows) -> dict[str, dict[str, list[float]]]:
    """Start -> "all" and each group -> test accuracy of each seed, at the start's rate."""
    found = {}
    for arm in STARTS:
        at_rate = [row for row in rows if (row["arm"], row["lr"]) == (arm, best_rate(rows, arm))]
        groups = {
            name: [mean(row["classes"][c] for c in classes) for row in at_rate] for name, classes in MOTIONS.items()
        }
        found[arm] = {"all": [row["test"] for row in at_rate], **groups}
    return found


def study(rows: Rows) -> Page:
    """Accuracy by start and group for each number of labels; pretraining."""
    curves, rows = [row for row in rows if "pretraining" in row], [row for row in rows if "arm" in row]
    parts, panels = [f"Test accuracy, mean (lowest to highest seed); chance is {1 / len(COURSES):.1%}."], []
    for labels in sorted({row["scale"]["labels"] for row in rows}):
        found = [row for row in rows if row["scale"]["labels"] == labels]
        values, title = measured(found), f"{labels} training clips a class"
        parts += [f"## {title}, {found[0]['scale']['finetune_epochs']} passes over them"]
        parts += [table(STARTS, _study_columns(found, values)), _verdict(values)]
        bars = {STARTS[arm]: [mean(v) for v in groups.values()] for arm, groups in values.items()}
        ends = {STARTS[arm]: [(min(v), max(v)) for v in groups.values()] for arm, groups in values.items()}
        more = {"names": ["all classes", *MOTIONS], "levels": {"chance": 1 / len(COURSES)}}
        panels.append(Panel("test accuracy, lowest to highest seed", title, bars=bars, spread=ends, **more))
    if curves:
        parts += ["## Pretraining", table(curves, CURVE_COLUMNS)]
        panels.append(_curves(curves))
    name = "Study: what pretraining is worth where only motion tells the classes apart"
    return Page(name, [*parts, facts([*curves, *rows])], panels)


def _study_columns(rows: Rows, values: dict[str, dict[str, list[float]]]) -> Columns:
    def seeds(group: str) -> Callable[[str], str]:
        def cell(arm: str) -> str:
            found = values[arm][group]
            return f"{mean(found):.1%} ({min(found):.1%} to {max(found):.1%})"

        return cell

    groups = {f"{name} ({len(classes)})": seeds(name) for name, classes in MOTIONS.items()}
    return {"start": STARTS.get, "lr": lambda arm: f"{best_rate(rows, arm):g}", "all": seeds("all"), **groups}


CURVE_COLUMNS: Columns = {
    "start": lambda row: STARTS[row["pretraining"]],
    "steps": lambda row: f"{row['steps'][-1]:,}",
    "clips' masked positions": lambda row: f"{row['video'][-1]:.1%}" if "video" in row else "",
    "copying them": lambda row: f"{row['copying']:.1%}" if "copying" in row else "",
    "images' masked positions": lambda row: f"{row['image'][-1]:.1%}" if "image" in row else "",
}


def _verdict(values: dict[str, dict[str, list[float]]]) -> str:
    """Whether joint pretraining is ahead, by the worst seed against the best of the others."""
    joint, others = values["joint"]["all"], [v for arm in ("scratch", "images") for v in values[arm]["all"]]
    if min(joint) > max(others):
        return "Joint pretraining is ahead: its worst seed is better than the best seed of either other start."
    if mean(joint) > max(mean(values[arm]["all"]) for arm in ("scratch", "images")):
        return "Joint pretraining is ahead in the mean; the seeds of the starts overlap."
    return "Joint pretraining is not ahead."


def _curves(rows: Rows) -> Panel:
    """Masked accuracy over the steps of pretraining."""
    lines, levels = {}, {}
    for row in rows:
        for kind, name in (("video", "clips"), ("image", "images")):
            if kind in row:
                lines[f"{STARTS[row['pretraining']]}, {name}"] = row["steps"], row[kind]
        if "copying" in row:
            levels["copying the nearest frame"] = row["copying"]
    return Panel("steps of pretraining", "pretraining", "masked positions right", lines=lines, levels=levels)


# What pretraining predicts

TARGETS = """\
Made by `python -m benchmarks.targets`: joint pretraining on the study's small set (500 steps of 16 clips and 8 images)
with the same masks, decoder and seed, then the same fine-tuning on 10 clips a class. Eight classes that differ in their
motion alone; chance is 12.5 %. Test accuracy, median (lowest to highest seed of the fine-tuning). Seeds of one start
are up to 18 points apart in the study: a smaller difference of one seed each ranks nothing."""
TARGET_NAMES = {
    "scratch": "no pretraining",
    "joint": "ids of a random projection",
    "timm": "features of resnet10t with random weights",
    "own": "features of the run on ids",
}


def targets(rows: Rows) -> Page:
    """Accuracy after pretraining on ids or on features, and how far each loss fell."""
    tested, trained = [row for row in rows if "arm" in row], [row for row in rows if "pretraining" in row]
    by_arm = grouped(tested, "arm")
    groups = {"all": tuple(COURSES), **MOTIONS}

    def cell(classes: Sequence[str]) -> Callable[[tuple], str]:
        return lambda key: spread([mean(row["classes"][c] for c in classes) for row in by_arm[key]], ".1%")

    columns = {"targets": lambda key: TARGET_NAMES[key[0]], "seeds": lambda key: str(len(by_arm[key]))}
    columns |= {name: cell(classes) for name, classes in groups.items()}
    losses = fields(
        "pretraining name s | loss of clips, first line first_loss_video .3f | clips, last loss_video .3f | loss of"
        " images, first line first_loss_image .3f | images, last loss_image .3f"
    )
    named = [row | {"name": TARGET_NAMES[row["pretraining"]]} for row in trained]
    return Page("Ids or features as targets", [TARGETS, facts(rows), table(by_arm, columns), table(named, losses)])


# The trained tokenizer

TOKENIZERS = """\
Made by `python -m benchmarks.tokenizers`: `recipe=vq_demo` with each quantiser (64 ids, the same network, steps and
seed), the joint demo with its ids, and a linear probe of the encoder on the study's drawn actions, whose eight classes
differ in their motion alone: 192 clips to fit it, 192 to test it. One seed each, at a small scale: differences of a few
points of the probe mean nothing. Gains are nats below the unigram entropy of an arm's own ids and are not comparable
between arms: ids that are easier to predict gain more. psnr and explained are of held-out images."""


def tokenizers(rows: Rows) -> Page:
    """Use, perplexity, reconstruction, and what pretraining makes of the ids."""
    columns = fields(
        "ids arm s | psnr, dB psnr .2f | explained explained .1% | ids in use codebook_use .0% | perplexity"
        " codebook_perplexity .1f | gain, clips gain_video .3f | gain, images gain_image .3f | probe probe_top1 .1%"
    )
    return Page("Quantisers of the trained tokenizer", [TOKENIZERS, facts(rows), table(rows, columns)])


# Ids made once

KEPT_IDS = """\
Made by `python -m benchmarks.kept_ids`: forward, backward and AdamW of the demo's network on its batch of 4 clips of 8
frames at 128 pixels and 12 images, with the loader, on a CPU in fp32. "made": the tokenizer makes the ids in the step;
"kept": they are read from the files of `bevt tokens`. CPU seconds of all threads and decode workers, median (lowest to
highest round). `vq` and `dalle` have random weights, which take as long as trained ones."""


def kept_ids(rows: Rows) -> Page:
    """CPU seconds of a step with ids that are made and with kept ones."""
    columns = {
        "tokenizer": lambda row: row["tokenizer"],
        "a step, ids made": lambda row: spread(row["made"], ".2f"),
        "a step, ids kept": lambda row: spread(row["kept"], ".2f"),
        "saved": lambda row: f"{row['saved']:.0%}",
    }
    return Page("Ids made once", [KEPT_IDS, facts(rows), table(rows, columns)])
