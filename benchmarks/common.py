"""What every benchmark needs: its options, timing, ceilings of the machine, and where a number comes from."""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil
import torch

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
SPIN = 4_000_000  # clocks, about 2 ms: longer than a host takes to enqueue forward and backward of any competitor
EXPS_PER_CLOCK = 16  # exp2 of a streaming multiprocessor per clock, compute capability 8.0 and 9.0


@dataclass(frozen=True)
class Timing:
    """Milliseconds: median, 20th and 80th percentile."""

    p50: float
    p20: float
    p80: float

    def in_ms(self) -> dict[str, float]:
        """As fields of a row."""
        return {f"{name}_ms": value for name, value in vars(self).items()}


def quantiles(milliseconds: list[float]) -> Timing:
    """Of at least one repetition."""
    return Timing(*(round(float(q), 5) for q in torch.tensor(milliseconds).quantile(torch.tensor([0.5, 0.2, 0.8]))))


def time_on_gpu(run: Callable[[], Any], budget_ms: float) -> Timing:
    """GPU time between events, second-level cache flushed before each repetition.

    The flush and a short spin keep the GPU busy while the host enqueues, so launch overhead is not measured.
    """
    flush = torch.empty(512 * 2**20, dtype=torch.uint8, device="cuda")
    times, spent, start = [], 0.0, time.perf_counter()
    while len(times) < 10 or (spent < budget_ms and time.perf_counter() - start < 10 * budget_ms / 1000):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        flush.zero_()
        torch.cuda._sleep(SPIN)
        begin.record()
        run()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
        spent += times[-1]
    return quantiles(times)


def time_on_cpu(run: Callable[[], Any], budget_ms: float) -> Timing:
    """Wall time."""
    times = []
    while len(times) < 5 or sum(times) < budget_ms:
        start = time.perf_counter()
        run()
        times.append(1000 * (time.perf_counter() - start))
    return quantiles(times)


def measure(run: Callable[[], Any], device: str, budget_ms: float = 100.0) -> Timing:
    """Time of `run` after three warm-up runs."""
    for _ in range(3):
        run()
    return (time_on_gpu if device == "cuda" else time_on_cpu)(run, budget_ms)


def cpu_seconds(work: Callable[[], Any]) -> float:
    """CPU time of one run of `work`, all threads of this process."""
    began = time.process_time()
    work()
    return time.process_time() - began


def family() -> list[int]:
    """This process and all that it has started."""
    process = psutil.Process()
    return [process.pid, *(child.pid for child in process.children(recursive=True))]


def cpu_seconds_of(pids: Sequence[int]) -> float:
    """User and system time of processes so far, and those of their children that ended."""
    return sum(sum(psutil.Process(pid).cpu_times()[:4]) for pid in pids)


def in_turns(works: Mapping[str, Callable[[], float]], rounds: int, warm: int = 0) -> dict[str, list[float]]:
    """What each work returns in each round, so that other load on the machine affects all alike; who begins alternates.

    warm: rounds before these, which are not kept.
    """
    found: dict[str, list[float]] = {name: [] for name in works}
    for number in range(-warm, rounds):
        for name in list(works)[:: 1 if number % 2 else -1]:
            value = works[name]()
            found[name] += [value] * (number >= 0)
    return found


def peak_megabytes(run: Callable[[], Any], device: str) -> float | None:
    """Memory that `run` needs above what is allocated before it; None on a CPU, where torch does not count."""
    if device != "cuda":
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return round((torch.cuda.max_memory_allocated() - before) / 1e6, 1)


def reason(error: Exception) -> str:
    """Why a competitor could not run, in one line."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or ['no message'])[0][:160]}"


@cache
def ceilings(device: str) -> dict[str, float | None]:
    """Measured copy rate (read + write) and matrix product rate, and the exp2 rate by clock and unit count."""
    gpu = device == "cuda"
    dtype = torch.bfloat16 if gpu else torch.float32
    x = torch.randn(2**28 if gpu else 2**24, device=device, dtype=dtype)
    y = torch.empty_like(x)
    copy = 2 * x.nbytes / measure(lambda: y.copy_(x), device).p50 * 1e3
    n = 8192 if gpu else 1024
    a, b = torch.randn(n, n, device=device, dtype=dtype), torch.randn(n, n, device=device, dtype=dtype)
    matmul = 2 * n**3 / measure(lambda: a @ b, device).p50 * 1e3
    return {"copy_bytes_s": copy, "matmul_flop_s": matmul, "exp_s": exp_rate() if gpu else None}


def exp_rate() -> float:
    """exp2 per second of the current GPU at its highest clock."""
    query = ["nvidia-smi", "--query-gpu=clocks.max.sm", "--format=csv,noheader,nounits"]
    clock = float(subprocess.run(query, check=True, capture_output=True, text=True).stdout.split()[0]) * 1e6
    return EXPS_PER_CLOCK * torch.cuda.get_device_properties(0).multi_processor_count * clock


def commit() -> str:
    """The commit of this checkout, marked where a tracked file other than a result differs from it.

    In a copy of the tree without its history, the variable BEVT_COMMIT names the commit that it is a copy of.
    """
    if named := os.environ.get("BEVT_COMMIT"):
        return named

    def git(*command: str) -> str:
        return subprocess.run(["git", *command], check=True, capture_output=True, text=True, cwd=ROOT).stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/results")
    return git("rev-parse", "--short=12", "HEAD") + ("-dirty" if changed else "")


@cache
def provenance(device: str) -> dict[str, str]:
    """Commit, device, clocks and versions: without these a number is not written."""
    name = torch.cuda.get_device_name(0) if device == "cuda" else f"CPU {platform.processor() or platform.machine()}"
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    if device == "cuda":
        query = ["nvidia-smi", "--query-gpu=clocks.sm,clocks.mem,driver_version", "--format=csv,noheader"]
        versions["clocks"] = subprocess.run(query, check=True, capture_output=True, text=True).stdout.split("\n")[0]
    versions |= {"triton": found} if (found := package_version("triton")) else {}
    return {"commit": commit(), "device": name, "threads": str(torch.get_num_threads()), **versions}


def package_version(package: str) -> str | None:
    """None where it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def machine() -> dict[str, Any]:
    """The CPU's name, its cores, what else they are doing, and the versions of what decodes."""
    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    versions = {name: package_version(name) for name in ("av", "nvidia-dali-cuda130", "torchvision", "torchcodec")}
    cores, load = len(os.sched_getaffinity(0)), round(os.getloadavg()[0], 2)
    return {"cpu": names[0].partition(": ")[2], "cores": cores, "load": load, **versions}


def rows_of(benchmark: str, device: str, folder: Path) -> Path:
    """The file in `folder` that a benchmark appends its rows to; device: its name, as in `provenance`."""
    return folder / f"{benchmark}-{re.sub(r'[^a-z0-9]+', '-', device.lower()).strip('-')}.jsonl"


def read_rows(path: Path) -> Iterator[dict]:
    """The rows that an earlier run left."""
    if path.exists():
        yield from (json.loads(line) for line in path.read_text().splitlines())


def command_line(description: str, rounds: int | None = None, out: Path = RESULTS) -> argparse.ArgumentParser:
    """A parser with what most benchmarks take: where the rows go, and how often each is measured (None: no such)."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=out, help="the rows' " + ("file" if out.suffix else "folder"))
    if rounds:
        parser.add_argument("--rounds", type=int, default=rounds, help="of measuring; default: %(default)s")
    return parser


def add_row(path: Path, facts: dict[str, Any], device: str = "cpu") -> None:
    """Print what was measured, and append it with where it is from."""
    print(json.dumps(facts), flush=True)
    append_row(path, {**facts, "provenance": provenance(device) | machine()})


def append_row(path: Path, row: dict) -> None:
    """One JSON object a line, on disk before the next measurement starts."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")
