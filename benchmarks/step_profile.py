"""`python -m benchmarks.step --profile`: what host and device do in one step, written to a folder.

    profile.json   step, host and device time by part, operators, launches, the share in which the device idles
    host.txt       the functions in which the host spends its time, under cProfile
    trace.json.gz  the step as a Chrome trace, for chrome://tracing or ui.perfetto.dev

Profilers slow the host down: times of the step are taken without one, parts with torch's. Without a GPU what is of the
device is "not measured".
"""

from __future__ import annotations

import cProfile
import gzip
import io
import json
import pstats
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from .step_parts import (
    MARK,
    PARTS,
    busy_ms,
    count_operators,
    is_compiled,
    kernels_of,
    launch_calls,
    marked,
    parts_of_events,
)

STEPS, FUNCTIONS = 5, 60  # timed or under cProfile; lines of each list of host.txt
NOT_MEASURED = "not measured"


def timed_ms(run: Callable[[], None], synchronise: Callable[[], None]) -> float:
    """Milliseconds of a step, the device's work included; median of some."""
    times = []
    for _ in range(STEPS):
        synchronise()
        began = time.perf_counter()
        run()
        synchronise()
        times.append(1e3 * (time.perf_counter() - began))
    return median(times)


def host_functions(run: Callable[[], None]) -> tuple[float, str]:
    """(milliseconds of a step under cProfile, its functions by own and by cumulative time)."""
    profiler, began = cProfile.Profile(), time.perf_counter()
    profiler.enable()
    for _ in range(STEPS):
        run()
    profiler.disable()
    elapsed, text = 1e3 * (time.perf_counter() - began) / STEPS, io.StringIO()
    for order in ("tottime", "cumulative"):
        pstats.Stats(profiler, stream=text).sort_stats(order).print_stats(FUNCTIONS)
    return elapsed, text.getvalue()


def write_trace(trace: profile, path: Path) -> None:
    """The Chrome trace, compressed."""
    with tempfile.TemporaryDirectory() as folder:
        plain = Path(folder) / "trace.json"
        trace.export_chrome_trace(str(plain))
        with plain.open("rb") as source, gzip.open(path, "wb", 6) as target:
            shutil.copyfileobj(source, target)


def by_part(events: list[Any], cost: Callable[[Any], float]) -> dict[str, float]:
    """Milliseconds by part."""
    sums = parts_of_events(events, cost)
    return {name: round(1e-3 * sums.get(name, 0.0), 3) for name in PARTS}


def write_profile(run: Callable[[], None], marks: nn.Module | None, device: str, folder: Path) -> dict[str, Any]:
    """Profile a step that has warmed up; returns what profile.json holds. marks: see `profile_step`."""
    gpu, folder = device == "cuda", Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    synchronise = torch.cuda.synchronize if gpu else lambda: None
    step_ms = timed_ms(run, synchronise)
    profiled_ms, functions = host_functions(run)
    (folder / "host.txt").write_text(functions, encoding="utf-8")
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if gpu else [])]
    with marked(marks), profile(activities=activities) as trace:
        run()
        synchronise()
    write_trace(trace, folder / "trace.json.gz")
    host = [e for e in trace.events() if e.device_type == torch.autograd.DeviceType.CPU and not e.is_async]
    result = {"step_ms": round(step_ms, 3), "step_ms_under_cprofile": round(profiled_ms, 3)}
    result["host_ms"] = by_part(host, lambda e: e.self_cpu_time_total)
    counted = marks is not None and not is_compiled(marks)
    result["operators"] = count_operators(run) if counted else NOT_MEASURED
    result |= _device(trace, host, step_ms) if gpu else dict.fromkeys(DEVICE, NOT_MEASURED)
    (folder / "profile.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return result


DEVICE = ("device_ms", "launches", "launch_calls", "device_busy_ms", "idle_share")


def _device(trace: profile, host: list[Any], step_ms: float) -> dict[str, Any]:
    """What the device did, from the kernels of the trace."""
    busy = busy_ms(trace.events())
    parts = by_part(host, lambda e: sum(k.duration for k in e.kernels if not k.name.startswith(MARK)))
    launches = sum(len(kernels_of(e)) for e in host)
    idle = round(max(0.0, 1 - busy / step_ms), 4)
    return dict(zip(DEVICE, (parts, launches, launch_calls(host), round(busy, 3), idle), strict=True))
