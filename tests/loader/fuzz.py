"""Damage tars, pictures and videos at random and see that nothing dies, hangs, or is lost without a word.

`python -m tests.loader.fuzz` runs the large counts; CI runs a few thousand cases through test_fuzz.py. Every case is a
function of (kind, seed, number), so that one which fails can be run again with `--kind KIND --first NUMBER --cases 1`.
"""

from __future__ import annotations

import argparse
import io
import multiprocessing
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from fractions import Fraction
from functools import lru_cache, partial
from pathlib import Path

import av
import numpy as np
from nvidia.dali import fn, pipeline_def, types

from bevt_ds.config import Config, DataConfig, MaskConfig, TrainConfig
from bevt_ds.data.decode_pool import DecodePool
from bevt_ds.data.draw_worker import encode_jpeg
from bevt_ds.data.images import check_image
from bevt_ds.data.index import load_shard
from bevt_ds.data.limits import BadSample, Limits
from bevt_ds.data.loader import Loader
from bevt_ds.data.members import Shard, read_member
from bevt_ds.data.pack import pack
from bevt_ds.data.pipeline import PixelPipeline
from bevt_ds.data.plan import PlanEntry
from bevt_ds.data.shard_writer import sample_records
from bevt_ds.data.tar_scan import scan
from bevt_ds.data.video import probe
from bevt_ds.errors import UserError

UNDER_WAY = 8  # files that the reading threads and decode processes may hold open at the moment of the count
DEADLINE = 5.0  # seconds a video may take; a hundred times what one of these does
SLACK = 1.0  # seconds beyond it
LIMITS = Limits(pixels=1 << 20, frames=5000, clip_bytes=1 << 26)
FRAMES = 12
HEADER = 700  # bytes at the head of a WebM, and about the size of the tables of these MP4s


@dataclass
class Tally:
    """What became of the cases of one kind."""

    outcomes: Counter[str] = field(default_factory=Counter)
    slowest: float = 0.0
    faults: list[str] = field(default_factory=list)

    def note(self, outcome: str, seconds: float) -> None:
        self.outcomes[outcome] += 1
        self.slowest = max(self.slowest, seconds)

    def __str__(self) -> str:
        counts = ", ".join(f"{n} {outcome}" for outcome, n in sorted(self.outcomes.items()))
        return f"{sum(self.outcomes.values())} cases: {counts}; slowest {self.slowest:.2f} s; {len(self.faults)} faults"


def mutate(data: bytes, rng: np.random.Generator, first: int = 0, last: int | None = None) -> bytes:
    """Flipped bits, other bytes, a cut, a repeated or a missing piece, within data[first:last]."""
    last = len(data) if last is None else last
    changed = bytearray(data)
    for _ in range(int(rng.integers(1, 5))):
        at = int(rng.integers(first, last))
        match int(rng.integers(5)):
            case 0:
                changed[at] ^= 1 << int(rng.integers(8))
            case 1:
                changed[at : at + 4] = rng.bytes(4)
            case 2:
                changed[at : at + 4] = int(rng.choice([0, 1, 0xFF, 0x7FFFFFFF, 0xFFFFFFFF])).to_bytes(4, "big")
            case 3 if rng.random() < 0.2:
                del changed[at:]
                return bytes(changed)
            case 4 if rng.random() < 0.2:
                piece = int(rng.integers(1, 600))
                changed[at:at] = changed[at : at + piece] if rng.random() < 0.5 else b""
                del changed[at : at + int(rng.integers(1, 64))]
        last = min(last, len(changed))
        if first >= last:
            break
    return bytes(changed)


# Tars


@lru_cache(maxsize=1)
def tar() -> tuple[bytes, list[tuple[bytes, bytes]]]:
    """A tar of 8 samples, one of them with a long name; of each picture its record (headers and data) and its data."""
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
        for number in numbers:
            changed = mutate(data, np.random.default_rng((seed, 1, number)))
            path.write_bytes(changed)
            began = time.monotonic()
            outcome, fault = _scan_case(path, changed, records)
            fault = fault or _read_case(known, good)
            tally.note(outcome, time.monotonic() - began)
            if fault:
                tally.faults.append(f"tar {number}: {fault}")
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


# Pictures


def run_jpegs(numbers: range, seed: int) -> Tally:
    """Through the header check and DALI, in this very process: a picture or BadSample."""
    tally = Tally()
    rng = np.random.default_rng(0)
    smooth = rng.integers(0, 255, (6, 8, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
    good = encode_jpeg(smooth)
    entry = PlanEntry(0, 0, 0, 0, 0, 0.0, 0.0, 32, (0.5, 0.5), False, (1.0, 1.0, 1.0))
    pipeline = PixelPipeline("image", 1, 32, 16, threads=1)
    for number in numbers:
        data = mutate(good, np.random.default_rng((seed, 2, number)))
        began = time.monotonic()
        try:
            check_image(data, LIMITS)
            with quiet():
                pixels, _ = pipeline.run([data], [entry])
            outcome = "decoded"
            if pixels.shape != (1, 3, 32, 32) or not pixels.isfinite().all():
                tally.faults.append(f"jpeg {number}: not a picture")
        except BadSample:
            outcome = "refused"
        tally.note(outcome, time.monotonic() - began)
    return tally


@contextmanager
def quiet() -> Iterator[None]:
    """libjpeg and FFmpeg inside DALI write a line for every bad file, past Python's sys.stderr."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


# Videos


@lru_cache(maxsize=1)
def clips() -> dict[str, bytes]:
    """Short clips: H.264 in MP4, VP9 in WebM and in MP4."""
    rng = np.random.default_rng(0)
    base = rng.integers(0, 255, (6, 8, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
    frames = [np.roll(base, 3 * i, axis=1) for i in range(FRAMES)]
    quick = {"deadline": "realtime", "cpu-used": "8"}
    return {
        "h264": _encode(frames, "mp4", "libx264", {"g": "6", "bf": "2"}),
        "webm": _encode(frames, "webm", "libvpx-vp9", quick),
        "vp9": _encode(frames, "mp4", "libvpx-vp9", quick),
    }


def _encode(frames: list[np.ndarray], container: str, codec: str, options: dict[str, str]) -> bytes:
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container) as out:
        stream = out.add_stream(codec, rate=Fraction(25))
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt, stream.options = "yuv420p", options
        for frame in frames:
            out.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        out.mux(stream.encode(None))
    return buffer.getvalue()


def damaged_clip(number: int, seed: int, headers_only: bool, names: tuple[str, ...]) -> bytes:
    rng = np.random.default_rng((seed, 3 + headers_only, number))
    name = names[number % len(names)]
    data = clips()[name]
    if not headers_only:
        return mutate(data, rng)
    first = 0 if name == "webm" else data.index(b"moov") - 4  # the tables, which FFmpeg writes behind the frames
    return mutate(data, rng, first, min(first + HEADER, len(data)) if name == "webm" else len(data))


def run_videos(numbers: range, seed: int, headers_only: bool) -> Tally:
    """Through the decode workers: a clip of the right shape or BadSample, within the deadline."""
    tally, deaths = Tally(), 0
    pool = DecodePool(len(os.sched_getaffinity(0)), DEADLINE, LIMITS)
    try:
        for number, future, data in _ahead(pool, numbers, partial(damaged_clip, seed=seed, headers_only=headers_only)):
            began = time.monotonic()
            try:
                _, pixels = future.result(timeout=4 * (DEADLINE + SLACK))
                outcome = "decoded"
                if pixels.shape[:2] != (1, 4) or pixels.shape[2] * pixels.shape[3] > LIMITS.pixels:
                    tally.faults.append(f"video {number}: shape {pixels.shape} of {len(data)} bytes")
            except BadSample as bad:
                outcome = "timed out or killed its worker" if bad.transient else "refused"
                deaths += bad.transient
            tally.note(outcome, time.monotonic() - began)
        if len(pool.pids) != len(os.sched_getaffinity(0)):
            tally.faults.append("the pool has lost workers")
        if tally.slowest > DEADLINE + SLACK:
            tally.faults.append(f"a sample took {tally.slowest:.1f} s")
    finally:
        pool.close()
    return tally


def _ahead(pool: DecodePool, numbers: range, make: Callable[..., bytes]) -> Iterator[tuple[int, Future, bytes]]:
    under_way: list[tuple[int, Future, bytes]] = []
    for number in numbers:
        data = make(number, names=("h264", "webm"))
        under_way.append((number, pool.clips(lambda data=data: data, [(0.5, 0.0)], 4, 2), data))
        if len(under_way) > 8:
            yield under_way.pop(0)
    yield from under_way


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


# For a long time


def run_soak(numbers: range, seed: int) -> Tally:
    """Decodes with a tenth of them bad: memory and open files at the end are those after a tenth of the way."""
    tally = Tally()
    pool = DecodePool(len(os.sched_getaffinity(0)), DEADLINE, LIMITS)
    size, early = max(len(numbers) // 10, 1), None
    try:
        for start in range(0, len(numbers), size):
            part = numbers[start : start + size]
            for _, future, _ in _ahead(pool, part, partial(_one_in_ten, seed=seed)):
                began = time.monotonic()
                try:
                    future.result()
                    tally.note("decoded", time.monotonic() - began)
                except BadSample:
                    tally.note("refused", time.monotonic() - began)
            early = early or _resources(pool.pids)
        _require_flat(tally, early, _resources(pool.pids))
    finally:
        pool.close()
    return tally


def run_loader(numbers: range, seed: int) -> Tally:
    """The whole loader over as many clips: memory and open files at the end are those after a tenth of the way."""
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
            early = None
            for number in range(0, len(numbers), 8):
                began = time.monotonic()
                next(loader)
                tally.note("batches", time.monotonic() - began)
                if number >= len(numbers) // 10:
                    early = early or _resources(loader.worker_pids)
            _require_flat(tally, early, _resources(loader.worker_pids))
    return tally


def _require_flat(tally: Tally, early: tuple[int, int], late: tuple[int, int]) -> None:
    """A fault, unless memory has grown by no more than 5 % or 16 MB and files by no more than may be under way."""
    memory, files = (now - then for now, then in zip(late, early, strict=True))
    if files > UNDER_WAY or memory > max(0.05 * early[0], 16 << 20):
        tally.faults.append(f"{memory >> 20} MB and {files} files more at the end than after a tenth")


def _one_in_ten(number: int, names: tuple[str, ...], seed: int) -> bytes:
    return damaged_clip(number, seed, False, names) if number % 10 == 0 else clips()[names[number % 2]]


def _resources(workers: list[int]) -> tuple[int, int]:
    """Resident bytes and open files of this process and its workers."""
    pids = [os.getpid(), *workers]
    resident = sum(int(Path(f"/proc/{pid}/statm").read_text().split()[1]) for pid in pids)
    return resident * os.sysconf("SC_PAGE_SIZE"), sum(len(os.listdir(f"/proc/{pid}/fd")) for pid in pids)


KINDS: dict[str, tuple[Callable[[range, int], Tally], int]] = {
    "tars": (run_tars, 10_000),
    "jpegs": (run_jpegs, 10_000),
    "videos": (partial(run_videos, headers_only=False), 10_000),
    "headers": (partial(run_videos, headers_only=True), 50_000),
    "dali": (run_dali, 50_000),
    "soak": (run_soak, 100_000),
    "loader": (run_loader, 20_000),
}


def main() -> int:
    """Run the kinds that are asked for; returns 1 if any fault was found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kind", choices=KINDS, action="append", help="default: all")
    parser.add_argument("--cases", type=int, help="default: " + ", ".join(f"{k} {n}" for k, (_, n) in KINDS.items()))
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    faults = 0
    for kind in arguments.kind or KINDS:
        run, cases = KINDS[kind]
        began = time.monotonic()
        tally = run(range(arguments.first, arguments.first + (arguments.cases or cases)), arguments.seed)
        print(f"{kind}: {tally}; {time.monotonic() - began:.0f} s", *tally.faults[:20], sep="\n  ", flush=True)
        faults += len(tally.faults)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
