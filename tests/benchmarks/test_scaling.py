"""The scaling benchmark: counted collectives, traffic formulas, efficiency, pages."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from benchmarks import pages, report, scaling
from benchmarks.common import append_row
from benchmarks.scaling_traffic import Traffic
from benchmarks.scaling_worker import Job
from bevt_ds.plan.traffic import expected_bytes, sent_bytes

SIZES = {"model": "tiny", "micro_clips": 1, "micro_images": 2, "steps": 1}


@pytest.fixture
def one_rank():
    """A process group of one rank: that of a test before this one, which DeepSpeed still uses, or its own."""
    if dist.is_initialized():
        yield
        return
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore::FutureWarning")  # DeepSpeed calls these names, so they are the ones to count
def test_collectives_are_counted(one_rank):
    x, out = torch.ones(10), torch.empty(10)
    with Traffic() as traffic:
        dist.all_reduce(x)
        dist.all_reduce(x.half())
        dist.all_gather_into_tensor(out, x)
        dist.all_gather([out], x)
        dist.reduce_scatter_tensor(out, x)
        dist.reduce(x, 0)
        dist.broadcast(x[:3], 0)
        dist.barrier()
        x + x
    assert traffic.payload == {"all_reduce": 60, "all_gather": 80, "reduce_scatter": 40, "reduce": 40, "broadcast": 12}
    assert traffic.calls == {"all_reduce": 2, "all_gather": 2, "reduce_scatter": 1, "reduce": 1, "broadcast": 1}


def test_unknown_collective_is_an_error(one_rank):
    with pytest.raises(KeyError, match="gather_"), Traffic():
        dist.gather(torch.ones(1), [torch.empty(1)])


@pytest.mark.parametrize("ranks", [1, 2, 8])
def test_traffic_formulas_equal_ring_collectives(ranks):
    """ZeRO-1 is a reduce-scatter and an all-gather, as much as one all-reduce; ZeRO-3 is half as much again."""
    size, parameters = 4_000, 1_000
    pair = sum(sent_bytes({"reduce_scatter": size, "all_gather": size}, ranks).values())
    assert expected_bytes(1, parameters, ranks, micro_steps=3, width=4) == pair
    assert pair == sum(sent_bytes({"all_reduce": size}, ranks).values()) == 2 * size * (ranks - 1) / ranks
    assert expected_bytes(2, parameters, ranks, micro_steps=1, width=4) == pair
    assert expected_bytes(2, parameters, ranks, micro_steps=3, width=4) == 2 * pair
    assert expected_bytes(3, parameters, ranks, micro_steps=1, width=4) == 1.5 * pair


def test_weak_and_strong_jobs_meet_at_the_most_ranks():
    jobs = scaling.jobs([1, 2, 4], [2], SIZES)
    assert [(job.ranks, job.micro_steps) for job in jobs] == [(1, 1), (1, 4), (2, 1), (2, 2), (4, 1)]
    with pytest.raises(ValueError, match="3 does not divide 4"):
        scaling.jobs([3, 4], [2], SIZES)


def test_default_ranks():
    assert [scaling.default_ranks(n) for n in (0, 1, 3, 8, 16)] == [[1, 2], [1], [1, 2], [1, 2, 4, 8], [1, 2, 4, 8]]


def made_row(ranks: int, micro_steps: int, ms: float, cpu: float = 1.0, run: str = "now") -> dict:
    names = {"run": run, "ranks": ranks, "zero": 2, "micro_steps": micro_steps, "model": "tiny", "precision": "fp32"}
    times = {"p50_ms": ms, "p20_ms": ms, "p80_ms": ms, "cpu_s": cpu, "clips_per_s": 1.0, "images_per_s": 2.0}
    sizes = {"micro_clips": 1, "micro_images": 2, "peak_mb": None, "optimizer_mb": 3.0}
    sent = 3.0 * (ranks > 1)
    traffic = {"sent_by_kind": {"all_reduce": sent}, "sent_mb": sent, "calls": {"all_reduce": 5}}
    traffic["expected_mb"] = 2.0 * (ranks > 1)
    return {**names, **times, **sizes, **traffic, "load": 0.0, "provenance": {"device": "CPU"}}


ROWS = [
    made_row(1, 1, 50, run="before"),
    made_row(1, 1, 100),
    made_row(1, 2, 200, cpu=2.0),
    made_row(2, 1, 125, cpu=2.5),
]


def test_weak_and_strong_scaling_efficiency():
    """Weak: the same work a rank takes 125 ms instead of 100. Strong: half of 200 ms would be 100 ms, not 125.

    By CPU time two ranks do twice the work of one in 2.5 s instead of 2 s.
    """
    modes = pages.split(pages.chosen(ROWS))
    assert {mode: [(r["ranks"], r["micro_steps"]) for r in rows] for mode, rows in modes.items()} == {
        "weak": [(1, 1), (2, 1)],
        "strong": [(1, 2), (2, 1)],
    }
    for rows in modes.values():
        for by in (pages.rate, pages.cpu_rate):
            assert [pages.efficiency(row, rows, by) for row in rows] == [1.0, pytest.approx(0.8)]
    assert pages.efficiency(ROWS[3], ROWS[3:]) is None


def test_median_launch_represents_its_rounds():
    rows = [made_row(1, 1, ms) for ms in (300, 100, 120)]
    assert [row["p50_ms"] for row in pages.chosen(rows)] == [120]


def test_scaling_page_shows_times_and_traffic():
    page = pages.scaling(ROWS)
    text, (speed, sent) = page.markdown(), page.panels
    assert "| 2 | 2 | 1 | 125 (125-125) | 1.00 | 2.0 | 80% | 80% | 2.50 | 3.0 |" in text
    assert "| 2 | 2 | 1 | 3.00 (5) | 0.00 | 3.00 | 2.00 | 1.50 |" in text
    assert speed.lines["weak, ZeRO 2"] == ([1, 2], [1.0, pytest.approx(1.6)])
    assert sent.bars == {"all-reduce": [3.0]} and sent.marks == {"paper": [2.0]}


def test_scaling_page_of_one_rank_has_no_traffic(tmp_path):
    path = tmp_path / "scaling.jsonl"
    append_row(path, made_row(1, 1, 100) | {"provenance": {"device": "CPU", "commit": "abc"}})
    assert "Sent a step" not in report.write(path)
    assert path.with_suffix(".png").exists()


@pytest.mark.dist
def test_two_ranks_send_what_zero_formulas_say():
    """ZeRO-2 halves the optimizer's state, gathers parameters once, and sends gradients twice at most."""
    row = scaling.launch(Job(ranks=2, zero=2, micro_steps=1, **SIZES), gpu=False)
    half = row["parameters"] * 4 / 1e6 / 2
    assert row["optimizer_mb"] == pytest.approx(2 * half, rel=0.01)  # two moments of half the parameters
    assert row["sent_by_kind"]["all_gather"] == pytest.approx(half, rel=0.01)  # padding and flags are the rest
    assert row["expected_mb"] == pytest.approx(2 * half, rel=0.01)
    assert row["expected_mb"] <= row["sent_mb"] <= 1.51 * row["expected_mb"]
    assert row["p20_ms"] <= row["p50_ms"] <= row["p80_ms"] and row["cpu_s"] > 0


def test_failed_launch_is_an_error(monkeypatch):
    monkeypatch.setattr("sys.executable", "false")
    with pytest.raises(RuntimeError, match=r"Job\(ranks=1.* failed"):
        scaling.launch(Job(ranks=1, zero=2, micro_steps=1, **SIZES), gpu=False)
