"""One rank of one row of the scaling benchmark; rank 0 prints what it measured. Started by benchmarks.scaling."""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import torch

from bevt_ds.batch import Batch
from bevt_ds.config.deepspeed import read_json
from bevt_ds.config.validate import validate
from bevt_ds.plan.memory import WIDTHS
from bevt_ds.plan.traffic import expected_bytes, sent_bytes
from bevt_ds.runtime.background import Commits
from bevt_ds.runtime.engine_setup import start_ranks
from bevt_ds.train.loop import train_step
from bevt_ds.train.pretraining import Pretraining, make_engine
from bevt_ds.train.targets import open_targets
from bevt_ds.train.task import Setup

from .common import provenance, quantiles
from .scaling_traffic import Traffic
from .step_batch import base_configuration, resident_batch

WARM_UP = 2


@dataclass(frozen=True)
class Job:
    """One launch. A step is `micro_steps` micro-batches a rank; a micro-batch is the same in every launch."""

    ranks: int
    zero: int
    micro_steps: int
    model: str
    micro_clips: int
    micro_images: int
    steps: int  # timed


def set_up(job: Job) -> tuple[Pretraining, Batch]:
    """The training program's own parts, but for its loader, and a micro-batch of noise in its place."""
    samples, ranks = job.ranks * job.micro_steps, start_ranks()
    config = validate(base_configuration(job.model, job.micro_clips, job.micro_images, samples))
    setup = Setup(config, read_json(f"zero{job.zero}"), Path(), ranks, Commits(ranks))
    targets = open_targets(config, ranks.device, torch.float32)
    engine = make_engine(config, setup, targets.head, config.train.steps)
    data, train = config.data, config.train
    batch = resident_batch(train.micro_clips, train.micro_images, data.frames, data.size, ranks.rank, data.mask)
    return Pretraining(setup, None, engine, job.steps, 0.0, targets, probe=None), batch.to(ranks.device)


def timed_steps(task: Pretraining, batch: Batch, job: Job) -> list[tuple[float, float]]:
    """Of each step after the warm-up: milliseconds of the slowest rank, and CPU seconds of all ranks together."""
    times = []
    for step in range(WARM_UP + job.steps):
        task.ranks.barrier()
        began, cpu = time.perf_counter(), time.process_time()
        train_step(task, iter([batch] * job.micro_steps), step)
        if task.ranks.device.type == "cuda":
            torch.cuda.synchronize()
        spent = task.ranks.gather((1000 * (time.perf_counter() - began), time.process_time() - cpu))
        times.append((max(wall for wall, _ in spent), sum(cpu for _, cpu in spent)))
    return times[WARM_UP:]


def measure(job: Job) -> dict[str, object]:
    """Times without counting; then the collectives of one more step. Collective."""
    task, batch = set_up(job)
    times = timed_steps(task, batch, job)
    timing = quantiles([wall for wall, _ in times])
    with Traffic() as traffic:
        train_step(task, iter([batch] * job.micro_steps), WARM_UP + job.steps)
    parameters = sum(p.ds_numel if hasattr(p, "ds_numel") else p.numel() for p in task.engine.module.parameters())
    precision = task.config.train.precision
    sent = sent_bytes(traffic.payload, job.ranks)
    expected = expected_bytes(job.zero, parameters, job.ranks, job.micro_steps, WIDTHS[precision])
    gpu = task.ranks.device.type == "cuda"
    return {
        "precision": precision,
        "parameters": parameters,
        **timing.in_ms(),
        "clips_per_s": round(1000 * task.config.train.global_clips / timing.p50, 3),
        "images_per_s": round(1000 * task.config.train.global_images / timing.p50, 3),
        "cpu_s": round(median(cpu for _, cpu in times), 4),
        "peak_mb": round(torch.cuda.max_memory_allocated() / 1e6, 1) if gpu else None,
        "optimizer_mb": round(task.engine.optimizer_bytes() / 1e6, 3),
        "calls": dict(traffic.calls),
        "sent_by_kind": {kind: round(size / 1e6, 3) for kind, size in sent.items()},
        "sent_mb": round(sum(sent.values()) / 1e6, 3),
        "expected_mb": round(expected / 1e6, 3),
        "provenance": provenance(task.ranks.device.type),
    }


def main() -> None:
    """Rank 0 prints one JSON line last."""
    job = Job(**json.loads(sys.argv[1]))
    result = measure(job)
    if os.environ["RANK"] == "0":
        print(json.dumps({**asdict(job), **result}), flush=True)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
