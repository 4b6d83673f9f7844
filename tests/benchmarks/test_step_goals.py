"""The table of goals of a step on a GPU, and providers that fail: from rows that are made up."""

from types import SimpleNamespace

import torch

from benchmarks import pages, step
from benchmarks.common import read_rows
from benchmarks.step_goals import GOALS, NOT_MEASURED, OURS, WITH_GRAPHS, goals
from benchmarks.step_parts import busy_ms


def row(provider, case="resident", batch="8 clips 64 images", **values):
    """A row of Swin-B."""
    facts = {"model": "swin_b", "pixels": "", "vocabulary": "", "tokenizer": "dalle", "dtype": "bf16"}
    return facts | {"provider": provider, "case": case, "batch": batch, "provenance": {"device": "a GPU"}} | values


def test_goals_are_ratios_within_one_run():
    """Of the last run that has them; one that failed gives its reason."""
    first = {"eager": row("eager", p50_ms=100.0), OURS: row(OURS, p50_ms=100.0)}
    second = {
        "eager": row("eager", p50_ms=300.0, peak_mb=1000.0),
        OURS: row(OURS, p50_ms=200.0, peak_mb=430.0, idle_share=0.25, launch_calls=2232),
        WITH_GRAPHS: row(WITH_GRAPHS, error="UserError: no"),
    }
    tuned = {"eager": row("eager", "fine-tuning", "8 clips", p50_ms=2.0)}
    tuned[WITH_GRAPHS] = row(WITH_GRAPHS, "fine-tuning", "8 clips", p50_ms=0.5)
    large = "32 clips 256 images"
    apart = [
        {"eager": row("eager", batch=large, p50_ms=9.0, peak_mb=10.0), OURS: row(OURS, batch=large, p50_ms=3.0)},
        {OURS: row(OURS, batch=large, p50_ms=4.0), WITH_GRAPHS: row(WITH_GRAPHS, batch=large, p50_ms=2.0, peak_mb=4.0)},
    ]
    found = {what: values for what, *values in goals([first, second, tuned, *apart])}
    assert found["8 + 64 against eager"] == ["3.0x", "1.50x", f"{NOT_MEASURED}: UserError: no"]
    assert found["8 + 64, peak memory against eager"][1] == "0.43x"
    assert found["8 + 64, share in which the device idles"][1] == "25.0%"
    assert found["8 + 64, launch calls"][1] == "2,232"
    assert found["8 + 64 against torch.compile"][1:] == [NOT_MEASURED, f"{NOT_MEASURED}: UserError: no"]
    assert found["fine-tuning, 8 clips, against eager"][1:] == [NOT_MEASURED, "4.00x"]
    assert found["32 + 256 against eager"][1:] == ["3.00x", "6.00x, by ours"]
    assert found["32 + 256, peak memory against eager"][1:] == [NOT_MEASURED] * 2
    assert len(found) == len(GOALS)


def test_the_goals_are_on_the_page_of_a_gpu_alone():
    rows = [row("eager", p50_ms=3.0), row(OURS, p50_ms=1.0)]
    assert "| 8 + 64 against eager | 3.0x | 3.00x | not measured |" in pages.step_goal_table(rows)
    assert pages.step_goal_table([row(OURS, p50_ms=1.0) | {"model": "tiny"}]).count(NOT_MEASURED) == 2 * len(GOALS)


class Benchmark(step.Benchmark):
    """Without a process group; what is written of a provider is its name and its steps."""

    def __init__(self, path):
        self.device, self.path, self.seconds, self.failed = "cpu", path, 0.0, []
        self.limits, self.source = {}, {"device": "none"}

    def write(self, case, entry, batch, batches):
        self.row(case, entry.name, {"p50_ms": float(len(entry.wall_ms))})


def failing(after):
    """A provider whose step fails after so many."""
    steps = []

    def run(batches):
        steps.append(next(batches))
        if len(steps) > after:
            raise RuntimeError("CUDA out of memory\nmore")

    return lambda: run


CASE = step.Case("resident", 1, 1, {}, lambda batch: 1)


def test_providers_that_fail_leave_a_row_and_the_others_go_on(tmp_path):
    """In warming up, in a later round, and all of them. Of ours it is noted, for the command's status."""
    benchmark, warm = Benchmark(tmp_path / "rows.jsonl"), step.WARM_UP["cpu"]
    providers = {"eager": failing(0), WITH_GRAPHS: failing(warm + 1), "+ kernels": failing(warm + 2), OURS: failing(99)}
    benchmark.in_turns(CASE, providers, "a batch")
    rows = {r["provider"]: r for r in read_rows(benchmark.path)}
    assert rows.pop(OURS)["p50_ms"] == 3.0
    assert set(rows) == {"eager", WITH_GRAPHS, "+ kernels"}
    assert {r["error"] for r in rows.values()} == {"RuntimeError: CUDA out of memory"}
    assert benchmark.failed == ["resident, + kernels"]
    benchmark.in_turns(CASE, {OURS: failing(0)}, "a batch")
    assert benchmark.failed[1:] == ["resident, ours"]


def test_bytes_that_are_held_count_the_whole_pool_of_a_graph(monkeypatch):
    """What is free in the allocator's own pool is there for all; in a graph's it is for the graph."""
    segment = lambda pool, total, used: {"segment_pool_id": pool, "total_size": total, "allocated_size": used}  # noqa: E731
    monkeypatch.setattr(torch.cuda, "memory_snapshot", lambda: [segment((0, 0), 90, 10), segment((0, 1), 50, 20)])
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 30)
    assert (step.held_bytes("cuda"), step.held_bytes("cpu")) == (30 + 30, 0)


def test_kernels_of_a_replayed_graph_are_no_idle_time():
    """They are launched by no operator that has a part, and are on the device all the same."""
    span, kinds = SimpleNamespace(start=0, end=6000), torch.autograd.DeviceType
    kernel = SimpleNamespace(name="gemm", device_type=kinds.CUDA, time_range=span)
    mark = SimpleNamespace(name="part: compiled", device_type=kinds.CUDA, time_range=SimpleNamespace(start=0, end=9000))
    host = SimpleNamespace(name="_Replay", device_type=kinds.CPU, time_range=SimpleNamespace(start=0, end=9000))
    assert busy_ms([kernel, mark, host]) == 6.0
