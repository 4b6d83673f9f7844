"""How fast clips come: this project's loader and torch DataLoaders, on raw and on packed shards of the same videos.

`python -m benchmarks.loader` makes the videos (once), measures every row in a process of its own, in rounds, so that
other load on the machine affects all rows alike, and appends to benchmarks/results/loader.jsonl; `--page` only writes
the page and the plot again. CPU seconds are those of the process and all that it has started.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks import report
from benchmarks.common import add_row, command_line, cpu_seconds_of, family
from benchmarks.loader_media import SIZES, STRIDES, prepare, quality
from bevt_ds.config.samples import DataConfig
from bevt_ds.config.schema import Config, TrainConfig

ROWS = "loader.jsonl"
MICRO = 4  # clips a batch
SOAK_CLIPS, SOAK_POINTS = 20_000, 20


@dataclass(frozen=True)
class Backend:
    """One row: who loads, and from which shards."""

    shards: str  # raw | packed | fps
    clips_per_video: int = 1
    decoder: str = ""  # of a DataLoader; empty: this project's loader
    device: str = "cpu"
    ours: str = "gpu"  # data.decoder of this project's loader on a GPU


BACKENDS = {
    "ours, raw": Backend("raw"),
    "ours, raw, 4 clips a video": Backend("raw", clips_per_video=4),
    "ours, packed": Backend("packed"),
    "ours, packed, fps=": Backend("fps"),
    "ours, packed, fps=, 4 clips a video": Backend("fps", clips_per_video=4),
    "DataLoader + PyAV, raw": Backend("raw", decoder="pyav"),
    "DataLoader + PyAV, packed": Backend("packed", decoder="pyav"),
    "DataLoader + PyAV, packed, fps=": Backend("fps", decoder="pyav"),
    "DataLoader + torchcodec, raw": Backend("raw", decoder="torchcodec"),
    "DataLoader + torchcodec, packed, fps=": Backend("fps", decoder="torchcodec"),
    "ours, DALI mixed, raw": Backend("raw", device="cuda"),
    "ours, NVDEC, raw": Backend("raw", device="cuda", ours="nvdec"),
    "ours, NVDEC, packed": Backend("packed", device="cuda", ours="nvdec"),
    "ours, NVDEC, packed, fps=": Backend("fps", device="cuda", ours="nvdec"),
    "ours, split, raw": Backend("raw", device="cuda", ours="split"),
    "DataLoader + torchcodec CUDA, raw": Backend("raw", decoder="torchcodec", device="cuda"),
}


def configuration(folder: Path, backend: Backend, sampling: str) -> Config:
    """The recipe's clip, on this machine's cores, and the number of workers that suits each.

    Ours wait while their pixels are taken: one more than the cores gives a tenth more clips/s. DataLoaders get a worker
    a core: with one more they were slower with torchcodec, and torch warns.
    """
    frames, stride = STRIDES[sampling]
    cores = len(os.sched_getaffinity(0))
    name = f"fps-{sampling}" if backend.shards == "fps" else backend.shards
    data = DataConfig(
        videos=str(folder / f"{name}-*.tar"),
        frames=frames,
        stride=1 if backend.shards == "fps" else stride,
        clips_per_video=backend.clips_per_video,
        decoder=backend.ours if backend.device == "cuda" else "cpu",
        workers=cores if backend.decoder else cores + 1,
        threads=cores,
    )
    return Config("benchmark", data=data, train=TrainConfig(global_clips=MICRO, global_images=0, micro_clips=MICRO))


def measure(folder: Path, row: str, sampling: str, seconds: float) -> dict[str, Any]:
    """One row: rates over `seconds` after the first batches, and the seconds to the first one.

    These include the loader's imports, except torch's.
    """
    began = time.perf_counter()
    backend = BACKENDS[row]
    batches = _batches(configuration(folder, backend, sampling), backend)
    next(batches)
    first = time.perf_counter() - began
    counts = [list(islice(batches, 8))[-1]]  # what was prepared ahead must not count as fast
    began, cpu, decoders_cpu = time.perf_counter(), cpu_seconds_of(family()), cpu_seconds_of(counts[0].decoders)
    while time.perf_counter() - began < seconds:
        counts.append(next(batches))
    if backend.device == "cuda":
        torch.cuda.synchronize()
    elapsed, cpu = time.perf_counter() - began, cpu_seconds_of(family()) - cpu
    decoders_cpu = cpu_seconds_of(counts[-1].decoders) - decoders_cpu
    clips, decoded = MICRO * (len(counts) - 1), counts[-1].frames - counts[0].frames
    return {
        "clips_per_s": round(clips / elapsed, 2),
        "decoded_frames_per_s": round(decoded / elapsed) or None,
        "cpu_s_per_clip": round(cpu / clips, 5),
        "decoding_cpu_s_per_clip": round(decoders_cpu / clips, 5) or None,
        "peak_mb": round(memory("VmHWM") / 1e6),
        "first_batch_s": round(first, 2),
        "clips": clips,
    }


def soak(folder: Path, row: str, clips: int) -> dict[str, Any]:
    """Memory and open files while clips go through the loader, 128 pixels wide to make it quick."""
    from bevt_ds.data.loader import Loader

    config = configuration(folder, BACKENDS[row], "16x8")
    config = replace(config, data=replace(config.data, size=128, token_size=64, short_side=(144, 176)))
    megabytes, files, device = [], [], []
    with Loader(config, device=BACKENDS[row].device) as loader:
        for _ in range(SOAK_POINTS):
            for _ in islice(loader, max(clips // SOAK_POINTS // MICRO, 1)):
                pass
            if torch.cuda.is_available():
                free, total = torch.cuda.mem_get_info()
                device.append(round((total - free) / 1e6))
            megabytes.append(round(memory("VmRSS") / 1e6))
            files.append(len(os.listdir("/proc/self/fd")))
    return {"clips": clips, "rss_mb": megabytes, "open_files": files, **({"device_mb": device} if device else {})}


class Decoded(NamedTuple):
    """After a batch: frames decoded so far, 0 where they are not counted; and the processes that do nothing else."""

    frames: int
    decoders: list[int]


def _batches(config: Config, backend: Backend) -> Iterator[Decoded]:
    if backend.decoder:
        from benchmarks.loader_dataset import data_loader

        total = 0
        for _, _, decoded in data_loader(config, backend.decoder, backend.device):
            total += int(decoded.sum())
            yield Decoded(total, [])
    else:
        from bevt_ds.data.loader import Loader

        with Loader(config, device=backend.device) as loader:
            for _ in loader:
                yield Decoded(loader.decoded_frames, loader.worker_pids)


def memory(field: str) -> int:
    """Bytes of all processes, VmRSS (now) or VmHWM (at most); what processes share is counted for each."""
    status = [Path(f"/proc/{pid}/status").read_text() for pid in family()]
    return sum(int(text.partition(f"{field}:")[2].split()[0]) * 1024 for text in status)


def in_own_process(*arguments: str) -> dict[str, Any]:
    """What `--measure` or `--soak` prints; a backend that cannot run says why."""
    command = [sys.executable, "-m", "benchmarks.loader", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    if result.returncode:
        return {"not_measured": result.stderr.strip().splitlines()[-1]}
    return json.loads(result.stdout.splitlines()[-1])


def main() -> None:
    parser = command_line(__doc__, rounds=2)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "bevt-loader-benchmark")
    parser.add_argument("--videos", type=int, nargs=2, default=(200, 60), help="drawn videos of each size")
    parser.add_argument("--real", type=Path, help="a folder of real videos to go with them")
    parser.add_argument("--seconds", type=float, default=5.0, help="a row and round")
    parser.add_argument("--row", choices=BACKENDS, action="append", help="default: all")
    parser.add_argument("--prepare", action="store_true", help="only make the videos and shards")
    parser.add_argument("--page", action="store_true", help="only write loader.md and loader.png again")
    parser.add_argument("--measure", nargs=4, metavar=("ROW", "SAMPLING", "FOLDER", "SECONDS"), help="one row, as JSON")
    parser.add_argument("--soak", type=Path, metavar="FOLDER", help="memory over 20,000 clips, as JSON")
    parser.add_argument("--size", choices=SIZES, nargs="+", default=list(SIZES), help="of videos; default: all")
    parser.add_argument("--sampling", choices=STRIDES, nargs="+", default=list(STRIDES), help="default: all")
    parser.add_argument("--no-soak", action="store_true", help="measure rows only")
    parser.add_argument("--soak-row", choices=BACKENDS, default="ours, packed, fps=", help="default: %(default)s")
    parser.add_argument("--soak-clips", type=int, default=SOAK_CLIPS, help="default: %(default)s")
    arguments = parser.parse_args()
    if arguments.measure:
        row, sampling, folder, seconds = arguments.measure
        print(json.dumps(measure(Path(folder), row, sampling, float(seconds))))
    elif arguments.soak:
        print(json.dumps(soak(arguments.soak, arguments.soak_row, arguments.soak_clips)))
    elif arguments.page:
        report.write(arguments.out / ROWS)
    else:
        _run(arguments)


def _run(arguments: argparse.Namespace) -> None:
    folders = {
        size: prepare(arguments.folder, size, count, arguments.real)
        for size, count in zip(SIZES, arguments.videos, strict=True)
        if size in arguments.size
    }
    if arguments.prepare:
        return
    for size, folder in folders.items():
        for shards, facts in quality(folder).items():
            add_row(arguments.out / ROWS, {"shards": shards, "size": size, **facts})
    _measure_rows(folders, arguments)
    if not arguments.no_soak:
        soaked = in_own_process("--soak", str(folders["340x256"]))
        add_row(arguments.out / ROWS, {"soak": "340x256, packed, fps=", **soaked})
    report.write(arguments.out / ROWS)


def _measure_rows(folders: dict[str, Path], arguments: argparse.Namespace) -> None:
    for number in range(arguments.rounds):
        for size, folder in folders.items():
            for sampling in arguments.sampling:
                for row in arguments.row or BACKENDS:
                    if BACKENDS[row].device == "cuda" and not torch.cuda.is_available():
                        result = {"not_measured": "no CUDA device"}
                    else:
                        result = in_own_process("--measure", row, sampling, str(folder), str(arguments.seconds))
                    facts = {"row": row, "size": size, "sampling": sampling, "round": number, **result}
                    add_row(arguments.out / ROWS, facts)


if __name__ == "__main__":
    main()
