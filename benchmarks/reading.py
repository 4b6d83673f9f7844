"""What reading a sample costs: its bytes, the check of their CRC-32 (`data.verify`), and the deadline of a read.

`python -m benchmarks.reading` appends to results/reading.jsonl and writes its page. CPU time, all threads, of files
that are in the page cache; the variants take turns, so that other load on the machine affects all of them alike.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

from benchmarks import report
from benchmarks.common import RESULTS, add_row, command_line, cpu_seconds, in_turns, quantiles
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


def cpu_ms(work: Callable[[], object], samples: int) -> float:
    """Of a sample."""
    return 1000 * cpu_seconds(work) / samples


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
    arguments = command_line(__doc__, rounds=15, out=ROWS).parse_args()
    with tempfile.TemporaryDirectory() as folder:
        works = {name: partial(cpu_ms, work, 1) for name, work in decoding().items()}
        for kib in KIB:
            members = write_shard(Path(folder) / f"{kib}.tar", kib)
            works |= {f"{name}, {kib} KiB": partial(cpu_ms, work, SAMPLES) for name, work in reading(members).items()}
        spent = in_turns(works, arguments.rounds)
    for name, values in spent.items():
        add_row(arguments.out, {"row": name, **vars(quantiles(values)), "rounds": arguments.rounds})
    print(report.write(arguments.out))


if __name__ == "__main__":
    main()
