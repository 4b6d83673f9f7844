"""How fast clips come: this project's loader and a torch DataLoader, on raw and on packed shards of the same videos.

`python -m benchmarks.loader` makes the videos, measures every row in a process of its own, in rounds, so that what else
the machine does meets all of them, and appends to benchmarks/results/loader.jsonl; `--page` draws loader.md from it.
CPU seconds a clip, of the process and all it has started, are what a busy machine disturbs least.
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
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.common import append_row, provenance, read_rows
from benchmarks.loader_media import SIZES, STRIDES, prepare
from bevt_ds.config import Config, DataConfig, TrainConfig

RESULTS = Path(__file__).parent / "results" / "loader.jsonl"
MICRO = 4  # clips a batch
_TICK = os.sysconf("SC_CLK_TCK")

# name -> (shards, clips_per_video or the DataLoader's decoder)
ROWS: dict[str, tuple[str, int | str]] = {
    "ours, raw": ("raw", 1),
    "ours, raw, 4 clips a video": ("raw", 4),
    "ours, packed": ("packed", 1),
    "ours, packed, fps=": ("fps", 1),
    "ours, packed, fps=, 4 clips a video": ("fps", 4),
    "DataLoader + PyAV, raw": ("raw", "pyav"),
    "DataLoader + PyAV, packed": ("packed", "pyav"),
    "DataLoader + PyAV, packed, fps=": ("fps", "pyav"),
    "DataLoader + torchcodec, raw": ("raw", "torchcodec"),
}


def configuration(folder: Path, row: str, sampling: str) -> Config:
    """The recipe's clip, on this machine's cores."""
    shards, variant = ROWS[row]
    frames, stride = STRIDES[sampling]
    cores = len(os.sched_getaffinity(0))
    data = DataConfig(
        videos=str(folder / (f"fps-{sampling}-*.tar" if shards == "fps" else f"{shards}-*.tar")),
        frames=frames,
        stride=1 if shards == "fps" else stride,
        clips_per_video=variant if isinstance(variant, int) else 1,
        workers=cores,
        threads=cores,
    )
    return Config("benchmark", data=data, train=TrainConfig(global_clips=MICRO, global_images=0, micro_clips=MICRO))


def measure(folder: Path, row: str, sampling: str, clips: int) -> dict[str, Any]:
    """One row: rates over `clips` clips after the first batches, and the seconds to the first one."""
    began = time.perf_counter()
    batches = _batches(configuration(folder, row, sampling), ROWS[row][1])
    next(batches)
    first = time.perf_counter() - began
    for _ in islice(batches, 8):  # what was prepared ahead must not count as fast
        pass
    began, cpu = time.perf_counter(), cpu_seconds()
    counts = list(islice(batches, clips // MICRO))
    seconds, cpu = time.perf_counter() - began, cpu_seconds() - cpu
    got = len(counts) * MICRO
    decoded = counts[-1] - counts[0]
    return {
        "clips_per_s": round(got / seconds, 2),
        "decoded_frames_per_s": round(decoded / seconds * len(counts) / (len(counts) - 1)) if decoded else None,
        "cpu_s_per_clip": round(cpu / got, 5),
        "peak_mb": round(peak_bytes() / 1e6),
        "first_batch_s": round(first, 2),
        "clips": got,
    }


def _batches(config: Config, variant: int | str) -> Iterator[int]:
    """Frames decoded so far, after each batch."""
    if isinstance(variant, str):
        from benchmarks.loader_dataset import data_loader

        total = 0
        for _, _, decoded in data_loader(config, variant):
            total += int(decoded.sum())
            yield total
    else:
        from bevt_ds.data.loader import Loader

        with Loader(config) as loader:
            for _ in loader:
                yield loader.decoded_frames


def _family() -> list[int]:
    """This process and all that it has started."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue  # it has ended
    family = [os.getpid()]
    for pid in family:
        family += [child for child, parent in parents.items() if parent == pid]
    return family


def cpu_seconds() -> float:
    total = 0.0
    for pid in _family():
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        total += sum(map(int, fields[11:15])) / _TICK  # user and system time, and those of children that ended
    return total


def peak_bytes() -> int:
    """The sum of the largest resident sizes; what processes share is counted for each."""
    status = [Path(f"/proc/{pid}/status").read_text() for pid in _family()]
    return sum(int(text.partition("VmHWM:")[2].split()[0]) * 1024 for text in status)


def run_row(folder: Path, row: str, sampling: str, clips: int) -> dict[str, Any]:
    """Measure in a process of its own; a backend that is not installed says so."""
    command = [sys.executable, "-m", "benchmarks.loader", "--measure", row, sampling, str(folder), str(clips)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    if result.returncode:
        return {"not_measured": result.stderr.strip().splitlines()[-1]}
    return json.loads(result.stdout.splitlines()[-1])


def machine() -> dict[str, Any]:
    """Beside what every benchmark states: the CPU's name, its cores and what else they were doing."""
    from importlib.metadata import version

    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    versions = {package: version(package) for package in ("av", "nvidia-dali-cuda130", "torchvision")}
    cores = len(os.sched_getaffinity(0))
    return {"cpu": names[0].partition(": ")[2], "cores": cores, "load": os.getloadavg()[0], **versions}


def page(rows: list[dict[str, Any]]) -> str:
    """A table for each size and sampling: medians over the rounds, and CPU time against the best DataLoader row."""
    lines = ["# Loader", "", "Made by `python -m benchmarks.loader --page` from loader.jsonl, where each row's commit,"]
    lines += ["CPU, versions and load are. Medians over rounds; the machine was shared, so CPU seconds a clip are the"]
    lines += ["column to compare by. `ratio`: the best DataLoader row's CPU seconds on raw shards over this row's.", ""]
    for size, sampling in sorted({(row["size"], row["sampling"]) for row in rows}):
        group = [row for row in rows if (row["size"], row["sampling"]) == (size, sampling)]
        lines += [f"## {size}, {sampling}", ""]
        lines += ["| row | clips/s | decoded frames/s | CPU s a clip | ratio | peak MB | first batch s | rounds |"]
        lines += ["|---|---|---|---|---|---|---|---|", *_table(group), ""]
    return "\n".join(lines)


def _table(group: list[dict[str, Any]]) -> Iterator[str]:
    measured = {name: [r for r in group if r["row"] == name and "cpu_s_per_clip" in r] for name in ROWS}
    middle = lambda name, key: median(r[key] or 0 for r in measured[name])  # noqa: E731
    best = min(
        middle(name, "cpu_s_per_clip") for name in ROWS if name.endswith(", raw") and name[0] == "D" and measured[name]
    )
    for name in ROWS:
        if not measured[name]:
            reasons = {r["not_measured"] for r in group if r["row"] == name}
            yield f"| {name} | not measured: {'; '.join(sorted(reasons)) or 'not run'} |||||||"
            continue
        cpu = middle(name, "cpu_s_per_clip")
        cells = [f"{middle(name, 'clips_per_s'):.1f}", f"{middle(name, 'decoded_frames_per_s'):.0f}", f"{cpu:.4f}"]
        cells += [f"{best / cpu:.2f}", f"{middle(name, 'peak_mb'):.0f}", f"{middle(name, 'first_batch_s'):.1f}"]
        yield f"| {name} | {' | '.join(cells)} | {len(measured[name])} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "bevt-loader-benchmark")
    parser.add_argument("--videos", type=int, default=200, help="drawn videos of each size")
    parser.add_argument("--real", type=Path, help="a folder of real videos to go with them")
    parser.add_argument("--clips", type=int, default=400, help="clips a row and round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--size", choices=SIZES, action="append", help="default: both")
    parser.add_argument("--sampling", choices=STRIDES, action="append", help="default: both")
    parser.add_argument("--page", action="store_true", help="only draw loader.md")
    parser.add_argument("--measure", nargs=4, metavar=("ROW", "SAMPLING", "FOLDER", "CLIPS"), help="one row, as JSON")
    arguments = parser.parse_args()
    if arguments.measure:
        row, sampling, folder, clips = arguments.measure
        print(json.dumps(measure(Path(folder), row, sampling, int(clips))))
    elif not arguments.page:
        _measure_all(arguments)
    if not arguments.measure:
        RESULTS.with_suffix(".md").write_text(page(list(read_rows(RESULTS))))


def _measure_all(arguments: argparse.Namespace) -> None:
    for size in arguments.size or SIZES:
        folder = prepare(arguments.folder, size, arguments.videos, arguments.real)
        for number in range(arguments.rounds):
            for sampling in arguments.sampling or STRIDES:
                for row in ROWS:
                    result = run_row(folder, row, sampling, arguments.clips)
                    facts = {"row": row, "size": size, "sampling": sampling, "round": number}
                    append_row(RESULTS, {**facts, **result, **provenance("cpu"), **machine()})
                    print(json.dumps({**facts, **result}), flush=True)


if __name__ == "__main__":
    main()
