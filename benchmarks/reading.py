"""What reading a sample costs: its bytes, the check of their CRC-32 (`data.verify`), and the deadline of a read.

`python -m benchmarks.reading` appends to results/reading.jsonl and writes its page. CPU time, all threads, of files
that are in the page cache; the variants take turns, so that other load on the machine affects all of them alike.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from tqdm import trange

from benchmarks import report
from benchmarks.common import RESULTS, append_row, machine, provenance, quantiles
from benchmarks.loader_media import SIZES, draw_clip
from bevt_ds.config.samples import DataConfig
from bevt_ds.data.decoding.video import opened
from bevt_ds.data.limits import Limits
from bevt_ds.data.plan import clip_frames
from bevt_ds.data.reading.index import load_shard
from bevt_ds.data.reading.members import Member, read_member
from bevt_ds.data.reading.storage import Storage
from bevt_ds.shards.writer import sample_records

ROWS = RESULTS / "reading.jsonl"
KIB = (20, 160, 2000)  # an image, a clip of ten seconds at 340x256, one at 1280x720
SAMPLES = 32


def cpu_ms(work: Callable[[], object], times: int) -> float:
    began = time.process_time()
    for _ in range(times):
        work()
    return 1000 * (time.process_time() - began) / times


def write_shard(path: Path, kib: int) -> list[Member]:
    """Members of random bytes."""
    rng = np.random.default_rng(0)
    records = [sample_records({"__key__": f"{i:04d}", "mp4": rng.bytes(kib << 10)}) for i in range(SAMPLES)]
    path.write_bytes(b"".join(records) + bytes(1024))
    return list(load_shard(str(path)).members())


def reading(members: list[Member]) -> dict[str, Callable[[], object]]:
    """Each variant reads all members."""
    storage = Storage(DataConfig())
    return {
        "read": lambda: [read_member(member, verify=False) for member in members],
        "read, verify": lambda: [read_member(member) for member in members],
        "read, verify, deadline": lambda: [storage.read(member) for member in members],
    }


def decoding() -> dict[str, Callable[[], object]]:
    """The same clip of 16 frames at stride 8, of the benchmark's drawn videos."""

    def decode(data: bytes) -> None:
        with opened(data, Limits()) as video:
            video.frames(clip_frames(0.5, video.total, 16, 8, 0.0))

    videos = {size: draw_clip(0, size) for size in SIZES}
    return {f"decode 16x8, {size}, {len(data) >> 10} KiB": lambda d=data: decode(d) for size, data in videos.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory() as folder:
        works: dict[str, tuple[Callable[[], object], int]] = {name: (work, 1) for name, work in decoding().items()}
        for kib in KIB:
            members = write_shard(Path(folder) / f"{kib}.tar", kib)
            works |= {f"{name}, {kib} KiB": (work, SAMPLES) for name, work in reading(members).items()}
        spent: dict[str, list[float]] = {name: [] for name in works}
        for _ in trange(rounds, disable=None):
            for name, (work, samples) in works.items():
                spent[name].append(cpu_ms(work, 1) / samples)
    for name, values in spent.items():
        facts = {"row": name, **vars(quantiles(values)), "rounds": rounds}
        append_row(ROWS, {**facts, **provenance("cpu"), **machine()})
    print(report.write(ROWS))


if __name__ == "__main__":
    main()
