"""The page of the benchmark of decoders."""

from __future__ import annotations

from .report import Columns, Page, Panel, Row, Rows, facts, fields, grouped, newest, table

DECODE = """\
Made by `python -m benchmarks.decode`: a decoder alone, from a file's bytes in memory to RGB, no network. A video's
sample is a clip of 16 frames, `stride` apart, from a drawn place in a drawn video of 10 s at 30 frames/s; an
image's is the whole of a drawn JPEG. Milliseconds a batch: the first, in which sessions, graphs and indexes are made,
and the median of those after the second, with the 20th and 80th percentile. CPU milliseconds are of all
processes. With `--rounds` all take turns, and a row is of the round in which it took the least of them."""
OPTIONS = {  # where they are False
    "index": "no index",
    "listed": "start and stride",
    "fresh": "the same clips again",
    "whole": "what a crop of 224 needs",
}


def decode(rows: Rows) -> Page:
    """A table for each kind of media; the best rate of each way."""
    rows = newest(rows)
    parts, groups = [DECODE, facts(rows)], grouped(rows, "media", "size")
    for (name, size), group in groups.items():
        parts += [f"## {name}, {size}", table(group, COLUMNS)]
    return Page("Decoding", parts, list(_panels(groups)))


def _options(row: Row) -> str:
    return ", ".join(text for name, text in OPTIONS.items() if not row.get(name, True))


COLUMNS: Columns = {
    **fields("decoder way s | batch batch d | at a time lanes d | stride stride d"),
    "what differs": _options,
    **fields("samples/s samples_per_s .1f | wanted frames/s wanted_frames_per_s .0f | first ms first_ms .0f"),
    "ms": lambda row: f"{row['p50_ms']:.1f} ({row['p20_ms']:.1f} to {row['p80_ms']:.1f})",
    "CPU ms a sample": lambda row: f"{1000 * row['cpu_s_per_sample']:.2f}",
}


def _panels(groups: dict[tuple, Rows]):
    """Videos and images apart."""
    for is_image, title in ((False, "clips/s, best setting"), (True, "images/s, best setting")):
        best: dict[str, dict[str, float]] = {}
        for (name, _), group in groups.items():
            for row in group:
                if (name == "jpeg") == is_image and "samples_per_s" in row and row["fresh"]:
                    rates = best.setdefault(name, {})
                    rates[row["way"]] = max(rates.get(row["way"], 0.0), row["samples_per_s"])
        if best:
            names = list(dict.fromkeys(way for rates in best.values() for way in rates))
            bars = {name: [rates.get(way) for way in names] for name, rates in best.items()}
            yield Panel(title, names=names, bars=bars)


PACKING = """\
Made by `python -m benchmarks.packing`: each video rewritten by the profile `train`, then clips of 16 frames decoded
from the copy, all in one thread, in milliseconds of CPU time. A clip lasts as long at either frame rate: stride 8 at
the source's, 1 at 3.75 frames/s. PSNR of 8-bit RGB against the source scaled to the same size. Packets a clip are what
a decoder gets for it, from the keyframe in front of it on, less those between what one frame needs and the keyframe of
the next; how fast NVDEC decodes them is not measured."""


def packing(rows: Rows) -> Page:
    """Size against the cost of decoding."""
    rows = newest(rows)
    parts = [PACKING, facts(rows)]
    for (media, fps), group in grouped(rows, "media", "fps").items():
        rate = f"{fps:g} frames/s" if fps else "the source's frame rate"
        parts += [f"## {group[0]['videos']} {media} videos, {rate}", table(group, PACKED, names=2)]
    return Page("Packing", parts)


PACKED: Columns = {
    **fields("codec codec s | keyframe every keyframe_every d | crf crf d | bytes/frame bytes_per_frame .0f"),
    **fields("of the source of_source .2f | PSNR dB psnr_db .1f | packing, ms/frame pack_frame_ms .2f"),
    **fields("decoding, CPU ms/clip decode_clip_ms .1f | packets/clip packets_per_clip .1f"),
}


HOST = """\
Made by `python -m benchmarks.host`: a thread of the loader's process does small operators one after the other, as one
that launches kernels does, while the loader rests and while batches are taken, in turns. Held up: time in which it
neither ran nor waited for a core, by the system's count, so by Python's lock; of a sample, what the loader at work
adds, median of the rounds. On a CPU the loader's threads also make pixels, which on a GPU DALI does."""


GOAL = {"clips": 100, "images": 800, "both": 900}  # a second, next to a step on one GPU
FREE = """## With decoders that cost nothing

CPU time of Python's threads in the process that trains, where frames and pixels are there at once, as if a GPU made
them; its lock is held for no longer than that. With the loader in that process (here): plan, masks, threads, reading,
checks, index tensors; the calls by which a GPU is given its work come on top. With the loader in a process of its own
(apart): messages, and DALI's graphs of a GPU run, which are fed and run but make nothing; CUDA's calls come on top. Of
micro-batches of 8 clips, of 64 images, and of both. The last column: of one thread, at 100 clips and 800 images a
second."""


def host(rows: Rows) -> Page:
    """What the loader costs a thread next to it."""
    free = newest([row for row in rows if row.get("decoders") == "free"])
    rows = newest([row for row in rows if row.get("decoders") != "free"])
    columns: Columns = {
        **fields("samples stream s | samples/s samples_per_s .1f | held up, loader at rest held_up_idle .2%"),
        **fields("held up, loader at work held_up_busy .2% | ms a sample held_up_per_sample_ms .3f"),
        "lowest to highest": lambda row: f"{row['lowest_ms']:.3f} to {row['highest_ms']:.3f}",
        **fields("rounds rounds d"),
    }
    parts = [HOST, facts(rows), table(rows, columns)]
    if free:
        costs: Columns = {
            **fields("samples stream s | loader loader s"),
            **fields("CPU ms a sample free_cpu_per_sample_ms .4f | highest highest_ms .4f | rounds rounds d"),
            "of a thread": lambda row: f"{row['free_cpu_per_sample_ms'] / 1000 * GOAL[row['stream']]:.2%}",
        }
        parts += [FREE, facts(free), table(free, costs)]
    return Page("The loader next to a launching thread", parts)
