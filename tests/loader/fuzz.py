"""Damage tars, images and videos at random and see that nothing dies, hangs, or is lost without a word.

`python -m tests.loader.fuzz` runs the large counts and appends a row for each kind to a file, if it is given one; CI
runs a few thousand cases through test_fuzz.py. Every case is a function of (kind, seed, number), so that one which
fails can be run again with `--kind KIND --first NUMBER --cases 1`.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path

import av
import numpy as np
from nvidia.dali import fn, pipeline_def, types

from benchmarks import report
from benchmarks.common import append_row, machine, provenance
from benchmarks.pages_data import damaged_media
from bevt_ds.data.decoding.images import check_image
from bevt_ds.data.decoding.pool import DecodePool
from bevt_ds.data.decoding.video import probe
from bevt_ds.data.limits import BadSample
from bevt_ds.data.pixels.pipeline import PixelPipeline
from bevt_ds.data.reading.index import load_shard
from bevt_ds.data.reading.members import Shard, read_member
from bevt_ds.data.reading.tar_scan import scan
from bevt_ds.errors import UserError
from bevt_ds.shards.synthetic.draw_worker import encode_jpeg
from bevt_ds.shards.writer import sample_records
from tests.loader.damage import (
    DEADLINE,
    LIMITS,
    PLAIN_VIEW,
    Tally,
    damaged_clip,
    drawn_image,
    in_order,
    mutate,
    quiet,
    watched,
)
from tests.loader.media import images_of
from tests.loader.soak import soak_clips, soak_images, soak_loader

PATIENCE = 120.0  # seconds for a video whose worker may have to be replaced, on a machine that may be busy


# Tars


@lru_cache(maxsize=1)
def tar() -> tuple[bytes, list[tuple[bytes, bytes]]]:
    """A tar of 8 samples, one of them with a long name; of each image its record (headers and data) and its data."""
    rng = np.random.default_rng(0)
    parts, records = [], []
    for i in range(8):
        name = f"sample-{i}" + "x" * (120 * (i == 3))
        media = rng.bytes(300 + 200 * i)
        record = sample_records({"__key__": name, "jpg": media})
        parts += [record, sample_records({"__key__": name, "cls": str(i).encode()})]
        records.append((record[: record.index(media) + len(media)], media))
    return b"".join(parts) + bytes(1024), records


def run_tars(numbers: range, seed: int) -> Tally:
    """With no index: refused, or every sample that is still there is found. With one: right bytes or BadSample."""
    tally = Tally()
    data, records = tar()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "s.tar"
        path.write_bytes(data)
        known = load_shard(str(path))
        good = [read_member(member) for member in known.members()]
        for number in watched(numbers, "tars"):
            changed = mutate(data, np.random.default_rng((seed, 1, number)))
            path.write_bytes(changed)
            began = time.monotonic()
            outcome, fault = _scan_case(path, changed, records)
            fault = fault or _read_case(known, good)
            tally.note(outcome, time.monotonic() - began)
            if fault:
                tally.faults.append(f"tar {number}: {fault}")
    if tally.slowest > DEADLINE:
        tally.faults.append(f"a tar took {tally.slowest:.1f} s")
    return tally


def _scan_case(path: Path, changed: bytes, records: list[tuple[bytes, bytes]]) -> tuple[str, str]:
    try:
        with path.open("rb") as file:
            shard = scan(str(path), file)
    except UserError:
        return "refused", ""
    found = {read_member(member) for member in shard.members()}
    present = [media for record, media in records if (at := changed.find(record)) >= 0 and at % 512 == 0]
    lost = [media for media in present if media not in found]
    return "read", f"{len(lost)} samples lost without a word" if lost else ""


def _read_case(known: Shard, good: list[bytes]) -> str:
    for member, expected in zip(known.members(), good, strict=True):
        try:
            if read_member(member) != expected:
                return "other bytes than those that were indexed"
        except BadSample:
            continue
    return ""


# Images


def run_jpegs(numbers: range, seed: int) -> Tally:
    """Through the header check and DALI, in this very process: an image or BadSample."""
    tally = Tally()
    good, pipeline = encode_jpeg(drawn_image()), PixelPipeline("image", 1, 32, 16, threads=1)
    for number in watched(numbers, "jpegs"):
        data = mutate(good, np.random.default_rng((seed, 2, number)))
        began = time.monotonic()
        try:
            check_image(data, LIMITS)
            with quiet():
                pixels, _ = images_of(pipeline, [data], [PLAIN_VIEW])
            outcome = "decoded"
            if pixels.shape != (1, 3, 32, 32) or not pixels.isfinite().all():
                tally.faults.append(f"jpeg {number}: not an image")
        except BadSample:
            outcome = "refused"
        tally.note(outcome, time.monotonic() - began)
    return tally


# Videos


def run_videos(numbers: range, seed: int, headers_only: bool) -> Tally:
    """Through the decode workers: a clip of the right shape or BadSample, and none that is waited for without end."""
    tally, deaths = Tally(), 0
    pool = DecodePool(len(os.sched_getaffinity(0)), DEADLINE, LIMITS)
    make = partial(damaged_clip, seed=seed, headers_only=headers_only)
    try:
        for number, data, future in in_order(pool, watched(numbers, "headers" if headers_only else "videos"), make):
            began = time.monotonic()
            try:
                pixels = future.result(timeout=PATIENCE)
                outcome = "decoded"
                if pixels.shape[:2] != (1, 4) or pixels.shape[2] * pixels.shape[3] > LIMITS.pixels:
                    tally.faults.append(f"video {number}: shape {pixels.shape} of {len(data)} bytes")
            except BadSample as bad:
                outcome = "timed out or killed its worker" if bad.transient else "refused"
                deaths += bad.transient
            tally.note(outcome, time.monotonic() - began)
        if len(pool.pids) != len(os.sched_getaffinity(0)):
            tally.faults.append("the pool has lost workers")
    finally:
        pool.close()
    return tally


# Header mutants that pass the preflight, through DALI's own decoder


def run_dali(numbers: range, seed: int) -> Tally:
    """In a process of its own, whose death is the fault: what the preflight lets through must not kill DALI."""
    receive, send = multiprocessing.get_context("spawn").Pipe(duplex=False)
    process = multiprocessing.get_context("spawn").Process(target=_dali_child, args=(send, numbers, seed))
    process.start()
    send.close()
    tally, last = Tally(), numbers.start
    try:
        while True:
            last, outcome, seconds = receive.recv()
            tally.note(outcome, seconds)
    except EOFError:
        process.join()
    if process.exitcode:
        tally.faults.append(f"after header mutant {last}: DALI's process ended with {process.exitcode}")
    return tally


def _dali_child(results, numbers: range, seed: int) -> None:
    av.logging.set_level(av.logging.PANIC)

    @pipeline_def(batch_size=1, num_threads=1, device_id=None, prefetch_queue_depth=1)
    def graph():
        encoded = fn.external_source(name="encoded", dtype=types.UINT8)
        return fn.decoders.video(encoded, device="cpu", frames=[0, 3, 7])

    pipe = graph()
    pipe.build()
    for number in numbers:
        data = damaged_clip(number, seed, True, ("vp9", "webm"))
        began = time.monotonic()
        try:
            probe(data, LIMITS)
            pipe.feed_input("encoded", [np.frombuffer(data, np.uint8)])
            with quiet():
                outcome = f"decoded {pipe.run()[0].as_array().shape[1]} frames"
        except BadSample:
            outcome = "refused"
        except RuntimeError:
            outcome = "passed, and refused by DALI"
            pipe = graph()
            pipe.build()
        results.send((number, outcome, time.monotonic() - began))


KINDS: dict[str, tuple[Callable[[range, int], Tally], int]] = {
    "tars": (run_tars, 10_000),
    "jpegs": (run_jpegs, 10_000),
    "videos": (partial(run_videos, headers_only=False), 10_000),
    "headers": (partial(run_videos, headers_only=True), 50_000),
    "dali": (run_dali, 50_000),
    "soak": (soak_clips, 100_000),
    "image-soak": (soak_images, 100_000),
    "loader": (soak_loader, 20_000),
}


def row(kind: str, numbers: range, seed: int, tally: Tally, seconds: float) -> dict[str, object]:
    """What a run has found, with the machine and versions it ran on."""
    return {
        "kind": kind,
        "cases": len(numbers),
        "first": numbers.start,
        "seed": seed,
        "outcomes": dict(sorted(tally.outcomes.items())),
        "faults": tally.faults,
        "slowest_s": round(tally.slowest, 2),
        "wall_s": round(seconds),
        "curve": tally.curve,
        **provenance("cpu"),
        **machine(),
    }


def main() -> int:
    """Run the kinds that are asked for; returns 1 if any fault was found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kind", choices=KINDS, action="append", help="default: all")
    parser.add_argument("--cases", type=int, help="default: " + ", ".join(f"{k} {n}" for k, (_, n) in KINDS.items()))
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="append a JSON row for each kind to this file")
    arguments = parser.parse_args()
    faults = 0
    for kind in arguments.kind or KINDS:
        run, cases = KINDS[kind]
        numbers = range(arguments.first, arguments.first + (arguments.cases or cases))
        began = time.monotonic()
        tally = run(numbers, arguments.seed)
        seconds = time.monotonic() - began
        print(f"{kind}: {tally}; {seconds:.0f} s", *tally.faults[:20], sep="\n  ", flush=True)
        if arguments.out:
            append_row(arguments.out, row(kind, numbers, arguments.seed, tally, seconds))
            report.write(arguments.out, damaged_media)
        faults += len(tally.faults)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
