"""A decoder alone: clips and images a second by who decodes, codec, batch, lanes, index, frame list and stream.

`python -m benchmarks.decode` draws its files and appends a row for each way and setting to
benchmarks/results/decode-DEVICE.jsonl; a way that cannot run here has a row that says why. A row's first batch is timed
by itself, because that is when sessions, graphs and indexes are made. CPU seconds are those of this process and of all
that it has started.
"""

from __future__ import annotations

import argparse
import io
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from functools import partial
from multiprocessing import get_context
from typing import Any, NamedTuple

import av
import torch
from PIL import Image

from benchmarks import report
from benchmarks.common import add_row, command_line, cpu_seconds_of, family, provenance, quantiles, reason, rows_of
from benchmarks.decode_ways import IMAGE_WAYS, VIDEO_WAYS, Decode, Sample, Setting, Way, samples
from benchmarks.loader_media import draw_clip
from bevt_ds.data.decoder_choice import cores
from bevt_ds.data.decoding.transcode import Profile, transcode
from bevt_ds.data.decoding.video import opened
from bevt_ds.data.limits import Limits
from bevt_ds.rng import Use, generator
from bevt_ds.shards.synthetic.scene import Extent, render

# name -> codec, encoder, its options; then what the packer makes of the first
RAW = {
    "h264": ("h264", "libx264", {"preset": "medium", "crf": "23"}),
    "hevc": ("hevc", "libx265", {"preset": "ultrafast", "crf": "25", "x265-params": "log-level=none:pools=1"}),
    "mpeg4": ("mpeg4", "mpeg4", {"g": "12", "bf": "2"}),
    "vp9": ("vp9", "libvpx-vp9", {"deadline": "realtime", "cpu-used": "8", "crf": "32", "b": "0"}),
}
PACKED = {"packed": Profile(), "packed fps=3.75": Profile(fps=3.75)}
IMAGE = (375, 500)  # height, width


def media(name: str, files: int, size: str) -> tuple[str, list[bytes]]:
    """The codec and the files of a kind: drawn videos of 10 s, or JPEGs, encoded as the web has them."""
    if name == "jpeg":
        return name, [drawn_jpeg(i) for i in range(files)]
    codec, encoder, options = RAW.get(name, RAW["h264"])
    with ProcessPoolExecutor(cores(), get_context("spawn")) as processes:
        raw = list(processes.map(partial(draw_clip, size=size, encoder=encoder, options=options), range(files)))
        if name in PACKED:
            rewrite = partial(transcode, profile=PACKED[name], limits=Limits())
            raw = [data for data, _ in processes.map(rewrite, raw)]
    return codec, raw


def drawn_jpeg(number: int) -> bytes:
    """A drawn scene with a sensor's noise at quality 90."""
    rng, (height, width) = generator(0, Use.SYNTHETIC, 3, number), IMAGE
    image = render(rng, Extent(height=height, width=width, frames=1))[0]
    noisy = (image + rng.normal(0, 2.0, image.shape)).clip(0, 255).astype("uint8")
    buffer = io.BytesIO()
    Image.fromarray(noisy).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def totals(codec: str, files: Sequence[bytes]) -> list[int]:
    """Frames of each file, 0 for images."""
    if codec == "jpeg":
        return [0] * len(files)
    counts = []
    for data in files:
        with opened(data, Limits()) as video:
            counts.append(video.total)
    return counts


class Case(NamedTuple):
    """What a row measures of a kind of files."""

    way: str
    setting: Setting
    fresh: bool


def settings(
    way: Way, batches: Sequence[int], lanes: Sequence[int], frames: int, stride: int
) -> Iterator[tuple[Setting, bool]]:
    """Setting and whether streams are fresh: batches and lanes, then, at the first of both, one change at a time."""
    base = Setting(batches[0], lanes[0], frames, stride)
    for batch in batches:
        for count in lanes:
            yield replace(base, batch=batch, lanes=count), True
    yield base, False
    for name in way.varies:
        yield replace(base, **{name: False}), True


def measure(
    ways: Mapping[str, Way], case: Case, files: Sequence[bytes], counts: Sequence[int], seconds: float
) -> dict[str, Any]:
    """Facts of one row; what a library raises, whatever it is, becomes the reason."""
    try:
        with ways[case.way].open(case.setting) as decode:
            return timed(decode, samples(files, counts, case.setting, case.fresh), case.setting, seconds)
    except Exception as error:  # libraries raise whatever they like
        return {"not_measured": reason(error)}


def timed(decode: Decode, batches: Iterator[list[Sample]], setting: Setting, seconds: float) -> dict[str, Any]:
    """The first batch by itself; then as many as fit into `seconds`, three at least."""
    began = time.perf_counter()
    decode(next(batches))
    first = time.perf_counter() - began
    decode(next(batches))
    times, frames, cpu, began = [], 0, cpu_seconds_of(family()), time.perf_counter()
    while len(times) < 3 or time.perf_counter() - began < seconds:
        batch, start = next(batches), time.perf_counter()
        frames += decode(batch)
        times.append(1000 * (time.perf_counter() - start))
    cpu, clips = cpu_seconds_of(family()) - cpu, setting.batch * len(times)
    return {
        "first_ms": round(1000 * first, 1),
        **quantiles(times).in_ms(),
        "samples_per_s": round(1000 * clips / sum(times), 2),
        "wanted_frames_per_s": round(1000 * frames / sum(times), 1),
        "cpu_s_per_sample": round(cpu / clips, 5),
        "batches": len(times),
    }


def least(cases: Sequence[Case], rounds: int, facts_of: Callable[[Case], dict[str, Any]]) -> dict[Case, dict[str, Any]]:
    """Of each case its facts of the round in which it took the least CPU time; in every round all have their turn.

    A way that fails has one row: nor would it work with another setting.
    """
    found: dict[Case, dict[str, Any]] = {}
    failed: set[str] = set()
    for _ in range(rounds):
        for case in cases:
            if case.way in failed:
                continue
            facts = facts_of(case)
            if "not_measured" in facts:
                failed.add(case.way)
            before = found.get(case, facts)
            found[case] = min(facts, before, key=lambda each: each.get("cpu_s_per_sample", 0.0))
    return found


def rows(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The facts of every row, without provenance."""
    for name in arguments.media:
        codec, files = media(name, arguments.files, arguments.size)
        counts, stride = totals(codec, files), 1 if "fps" in name else arguments.stride
        size = f"{IMAGE[1]}x{IMAGE[0]}" if codec == "jpeg" else arguments.size
        ways = {w: way for w, way in (IMAGE_WAYS if codec == "jpeg" else VIDEO_WAYS).items() if w in arguments.way}
        about = {"media": name, "size": size}
        yield from ({"way": w, **about, "not_measured": why} for w in ways if (why := ways[w].reason(codec)))
        chosen = (arguments.batch, arguments.lanes, arguments.frames, stride)
        cases = [Case(w, *each) for w, way in ways.items() if not way.reason(codec) for each in settings(way, *chosen)]
        facts_of = partial(measure, ways, files=files, counts=counts, seconds=arguments.seconds)
        for case, facts in least(cases, arguments.rounds, facts_of).items():
            yield {"way": case.way, **about, **asdict(case.setting), "fresh": case.fresh, **facts}


def main(words: Sequence[str] | None = None) -> None:
    parser = command_line(__doc__, rounds=1)
    kinds, ways = [*RAW, *PACKED, "jpeg"], [*VIDEO_WAYS, *IMAGE_WAYS]
    parser.add_argument("--media", nargs="+", choices=kinds, default=kinds)
    parser.add_argument("--way", nargs="+", choices=ways, default=ways)
    parser.add_argument("--batch", type=int, nargs="+", default=[8, 32], help="default: %(default)s")
    parser.add_argument(
        "--lanes", type=int, nargs="+", default=[1, 8], help="that decode at a time; default: %(default)s"
    )
    parser.add_argument("--frames", type=int, default=16, help="of a clip; default: %(default)s")
    parser.add_argument("--stride", type=int, default=8, help="of clips; 1 where packed with fps=")
    parser.add_argument("--files", type=int, default=32, help="of each kind; default: %(default)s")
    parser.add_argument("--size", default="340x256", help="of videos; default: %(default)s")
    parser.add_argument("--seconds", type=float, default=2.0, help="a row; default: %(default)s")
    arguments = parser.parse_args(words)
    av.logging.set_level(av.logging.PANIC)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    path = rows_of("decode", provenance(device)["device"], arguments.out)
    for row in rows(arguments):
        add_row(path, row, device)
    report.write(path)


if __name__ == "__main__":
    main()
