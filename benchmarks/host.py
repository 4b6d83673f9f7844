"""What the loader's Python costs the thread that launches a step's kernels, in the same process.

`python -m benchmarks.host`: a thread does what a launching thread does, small operators one after the other, while the
loader rests and while a batch is taken now and then, in turns. The system says how long the thread ran and how long it
waited for a core; what is left of the time it waited for Python's lock, which the loader's threads had. That does not
depend on how busy the machine is, as a rate would. Then the CPU seconds of Python's threads, whose lock is not held for
longer, where decoders and pixels cost nothing: all of the loader's (host_free.py), and what is left of it where it has
a process of its own (host_apart.py). Rows go to benchmarks/results/host-DEVICE.jsonl.
"""

from __future__ import annotations

import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks import host_apart, host_free, report
from benchmarks.common import add_row, command_line, provenance, rows_of
from benchmarks.decode import drawn_jpeg
from benchmarks.loader_media import draw_clip
from bevt_ds.config.schema import Config, DataConfig, TrainConfig
from bevt_ds.data.decoder_choice import cores
from bevt_ds.data.loader import Loader
from bevt_ds.shards.pack import pack

STREAMS = {"clips": (4, 0), "images": (0, 32)}  # of a micro-batch
FREE_STREAMS = {"clips": (8, 0), "images": (0, 64), "both": (8, 64)}  # the same where decoding costs nothing: a GPU's
OPERATORS = 200  # between two looks at the clock


@dataclass
class Times:
    """Seconds of one thread over a while."""

    wall: float
    ran: float
    queued: float  # for a core

    @property
    def held_up(self) -> float:
        """Neither running nor waiting for a core: by Python's lock."""
        return max(self.wall - self.ran - self.queued, 0.0)

    def __sub__(self, other: Times) -> Times:
        return Times(self.wall - other.wall, self.ran - other.ran, self.queued - other.queued)


def now() -> Times:
    """Of the calling thread, by Linux's scheduler."""
    ran, queued, _ = Path(f"/proc/self/task/{threading.get_native_id()}/schedstat").read_text().split()
    return Times(time.perf_counter(), int(ran) / 1e9, int(queued) / 1e9)


def launch(seconds: float) -> Times:
    """Small operators, one after the other, for so long."""
    x, began = torch.zeros(8), now()
    while time.perf_counter() - began.wall < seconds:
        for _ in range(OPERATORS):
            x.add_(1.0)
    return now() - began


def rest(loader: Loader, seconds: float) -> None:
    """Until the loader has prepared all that it may: its process does nothing for a tenth of the time."""
    while True:
        before = time.process_time()
        time.sleep(seconds / 10)
        if time.process_time() - before < seconds / 100:
            return


def window(loader: Iterator, seconds: float, batches: int) -> Times:
    """Launching, with so many batches taken at even distances; waiting for one is not counted."""
    total = Times(0.0, 0.0, 0.0)
    for _ in range(max(batches, 1)):
        if batches:
            next(loader)
        part = launch(seconds / max(batches, 1))
        total = Times(total.wall + part.wall, total.ran + part.ran, total.queued + part.queued)
    return total


def measure(config: Config, seconds: float, rounds: int) -> dict[str, Any]:
    """Held up for each sample: medians over rounds of a window with the loader at work, less one in which it rests."""
    size = config.train.micro_clips + config.train.micro_images
    costs, idle_shares, busy_shares, rates = [], [], [], []
    with Loader(config) as loader:
        next(loader)
        for _ in range(rounds):
            rest(loader, seconds)
            idle = window(loader, seconds, 0)
            busy = window(loader, seconds, batches := config.data.prefetch + 1)
            costs.append((busy.held_up / busy.wall - idle.held_up / idle.wall) * busy.wall / (batches * size))
            idle_shares.append(idle.held_up / idle.wall)
            busy_shares.append(busy.held_up / busy.wall)
            rates.append(batches * size / busy.wall)
    return {
        "samples_per_s": round(median(rates), 1),
        "held_up_idle": round(median(idle_shares), 4),
        "held_up_busy": round(median(busy_shares), 4),
        "held_up_per_sample_ms": round(1000 * median(costs), 3),
        "lowest_ms": round(1000 * min(costs), 3),
        "highest_ms": round(1000 * max(costs), 3),
        "rounds": rounds,
    }


def shards(folder: Path, clips: int, images: int, size: str) -> Config:
    """Drawn videos and images, packed, and a run that reads both."""
    media = folder / "media"
    media.mkdir()
    for i in range(clips):
        (media / f"{i}.mp4").write_bytes(draw_clip(i, size))
    for i in range(images):
        (media / f"{i}.jpg").write_bytes(drawn_jpeg(i))
    pack(media, folder, "video", "video")
    pack(media, folder, "image", "image")
    data = DataConfig(
        videos=f"{folder}/video-*.tar", images=f"{folder}/image-*.tar", decoder="cpu", workers=cores(), threads=cores()
    )
    return Config("benchmark", data=data)


def rows(config: Config, seconds: float, rounds: int) -> Iterator[dict[str, Any]]:
    """The facts of every row, without provenance."""
    for is_free, streams in ((False, STREAMS), (True, FREE_STREAMS)):
        for stream, (clips, images) in streams.items():
            train = TrainConfig(global_clips=clips, global_images=images, micro_clips=clips, micro_images=images)
            own = replace(config, train=train)
            if is_free:
                for place, part in (("here", host_free), ("apart", host_apart)):
                    yield {"stream": stream, "decoders": "free", "loader": place, **part.measure(own, rounds)}
            else:
                yield {"stream": stream, **measure(own, seconds, rounds)}


def main(words: list[str] | None = None) -> None:
    parser = command_line(__doc__, rounds=5)
    parser.add_argument("--clips", type=int, default=4, help="drawn videos; default: %(default)s")
    parser.add_argument("--images", type=int, default=16, help="drawn images; default: %(default)s")
    parser.add_argument("--size", default="340x256", help="of videos; default: %(default)s")
    parser.add_argument("--seconds", type=float, default=4.0, help="a window; default: %(default)s")
    arguments = parser.parse_args(words)
    path = rows_of("host", provenance("cpu")["device"], arguments.out)
    with tempfile.TemporaryDirectory() as folder:
        config = shards(Path(folder), arguments.clips, arguments.images, arguments.size)
        for row in rows(config, arguments.seconds, arguments.rounds):
            add_row(path, row)
    report.write(path)


if __name__ == "__main__":
    main()
