"""For a long time, much of it bad: memory and open files at the end are those of a tenth of the way."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from benchmarks.pages_data import slope
from bevt_ds.config.samples import DataConfig, MaskConfig
from bevt_ds.config.schema import Config, TrainConfig
from bevt_ds.data.decoding.images import check_image
from bevt_ds.data.decoding.pool import DecodePool
from bevt_ds.data.limits import BadSample
from bevt_ds.data.loader import Loader
from bevt_ds.data.pixels.pipeline import PixelPipeline
from bevt_ds.shards.pack import pack
from bevt_ds.shards.synthetic.draw_worker import encode_jpeg
from tests.loader.damage import (
    BAD_CLIPS,
    BAD_PICTURES,
    DEADLINE,
    LIMITS,
    PLAIN_VIEW,
    UNDER_WAY,
    Tally,
    clips,
    damaged_clip,
    drawn_image,
    in_order,
    mutate,
    quiet,
    watched,
)
from tests.loader.media import images_of

POINTS = 20  # of the curve
LONG = 10_000  # cases from which on the slope says something
MOST_A_CASE = 1024  # bytes by which memory may grow with each


def soak_clips(numbers: range, seed: int) -> Tally:
    """Through the decode workers: a tenth is bad in one of several ways, another tenth damaged at random."""
    tally, pool = Tally(), DecodePool(len(os.sched_getaffinity(0)), DEADLINE, LIMITS)
    try:
        for part in _parts(numbers, "soak"):
            for _, _, future in in_order(pool, part, partial(_clip, seed=seed)):
                _note(tally, future.result)
            _look(tally, pool.pids)
    finally:
        pool.close()
    _require_bad(tally, len(numbers))
    return _judged(tally)


def _clip(number: int, names: tuple[str, ...], seed: int) -> bytes:
    if number % 10 == 0:
        return list(BAD_CLIPS.values())[number // 10 % len(BAD_CLIPS)]()
    if number % 10 == 5:
        return damaged_clip(number, seed, number % 20 == 5, names)
    return clips()[names[number % 2]]


def soak_images(numbers: range, seed: int) -> Tally:
    """The same for images, through DALI in this very process, whose graph goes on after each that it refuses."""
    tally, pipeline, good = Tally(), PixelPipeline("image", 1, 32, 16, threads=1), encode_jpeg(drawn_image())
    with quiet():
        for part in _parts(numbers, "image-soak"):
            for number in part:
                _note(tally, partial(_show, pipeline, _picture(number, seed, good)))
            _look(tally, [])
    _require_bad(tally, len(numbers))
    return _judged(tally)


def _picture(number: int, seed: int, good: bytes) -> bytes:
    if number % 10 == 0:
        return list(BAD_PICTURES.values())[number // 10 % len(BAD_PICTURES)]()
    return mutate(good, np.random.default_rng((seed, 5, number))) if number % 10 == 5 else good


def _show(pipeline: PixelPipeline, data: bytes) -> None:
    check_image(data, LIMITS)
    images_of(pipeline, [data], [PLAIN_VIEW])


def soak_loader(numbers: range, seed: int) -> Tally:
    """The whole loader over as many clips."""
    tally = Tally()
    with tempfile.TemporaryDirectory() as folder:
        media, small = Path(folder) / "media", DataConfig(frames=4, stride=2, size=32, token_size=16)
        media.mkdir()
        for name, data in clips().items():
            (media / f"{name}.{'webm' if name == 'webm' else 'mp4'}").write_bytes(data)
        pack(media, Path(folder), "video", jobs=1)
        data = replace(small, videos=f"{folder}/*.tar", short_side=(32, 40), mask=MaskConfig(min_block=40))
        train = TrainConfig(global_clips=8, global_images=0, micro_clips=8, seed=seed)
        with Loader(Config("soak", data=data, train=train)) as loader:
            for part in _parts(range(0, len(numbers), 8), "loader"):
                for _ in part:
                    began = time.monotonic()
                    next(loader)
                    tally.note("batches", time.monotonic() - began)
                _look(tally, loader.worker_pids, each=8)
    return _judged(tally)


def _parts(numbers: range, what: str) -> Iterator[range]:
    size = -(-len(numbers) // POINTS)
    yield from watched([numbers[start : start + size] for start in range(0, len(numbers), size)], what)


def _note(tally: Tally, work) -> None:
    began = time.monotonic()
    try:
        work()
        outcome = "decoded"
    except BadSample as bad:
        outcome = "timed out or killed its worker" if bad.transient else "refused"
    tally.note(outcome, time.monotonic() - began)


def _look(tally: Tally, workers: list[int], each: int = 1) -> None:
    """Note resident memory and open files of this process and its workers. `each`: cases an outcome stands for."""
    pids = [os.getpid(), *workers]
    pages = sum(int(Path(f"/proc/{pid}/statm").read_text().split()[1]) for pid in pids)
    tally.curve.append(
        {
            "cases": each * sum(tally.outcomes.values()),
            "bytes": pages * os.sysconf("SC_PAGE_SIZE"),
            "files": sum(len(os.listdir(f"/proc/{pid}/fd")) for pid in pids),
        }
    )


def _require_bad(tally: Tally, cases: int) -> None:
    if tally.outcomes["refused"] < cases // 10:
        tally.faults.append(f"only {tally.outcomes['refused']} of {cases} were bad")


def _judged(tally: Tally) -> Tally:
    """A fault unless memory has grown by no more than 5 % or 16 MB and files by no more than may be under way."""
    early, late = tally.curve[: POINTS // 10][-1], tally.curve[-1]
    memory, files = late["bytes"] - early["bytes"], late["files"] - early["files"]
    if files > UNDER_WAY or memory > max(0.05 * early["bytes"], 16 << 20):
        tally.faults.append(f"{memory >> 20} MB and {files} files more at the end than after a tenth")
    if late["cases"] >= LONG and slope(tally.curve) > MOST_A_CASE:
        tally.faults.append(f"memory grows by {slope(tally.curve):.0f} bytes a case")
    return tally
