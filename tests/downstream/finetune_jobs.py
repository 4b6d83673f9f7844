"""Several fine-tuning runs in one set of processes, because most of a small run's time is its imports.

`python -m tests.downstream.finetune_jobs JOBS.json` on each rank; JOBS.json is a list of {"words": [...]}, the words of
a command line, each with an optional {"branch": [run, new run, step]} that is made first. Rank 0 writes what came of
each job into RESULTS: an exit code, or the message of a user's mistake.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

import torch.distributed as dist

from bevt_ds.errors import UserError
from bevt_ds.finetune import main
from bevt_ds.runtime.checkpoint import name_of
from tests.training.processes import ROOT, SECONDS, launch

RESULTS = "results.json"


def run_jobs(folder: Path, jobs: list[dict], world: int = 1, seconds: float = SECONDS) -> list[int | str]:
    """Run all jobs in order on so many ranks, within so many seconds; returns what came of each."""
    path = folder / "jobs.json"
    path.write_text(json.dumps(jobs))
    output = launch(["-m", "tests.downstream.finetune_jobs", str(path)], world, seconds)
    results = folder / RESULTS
    assert results.exists(), output
    return json.loads(results.read_text())


def words(settings: dict[str, object], stage: int = 2, recipe: str = "finetune_demo") -> list[str]:
    """A command line. Stage 0, for which the project ships no JSON, has one next to the run's folder."""
    path = ROOT / "ds_configs" / f"zero{stage}.json"
    if stage == 0:
        path = Path(f"{settings['output_dir']}.json")
        path.write_text(json.dumps({"zero_optimization": {"stage": 0}}))
    return ["--deepspeed_config", str(path), f"recipe={recipe}", *(f"{key}={value}" for key, value in settings.items())]


def branch(run: Path, new: Path, step: int) -> None:
    """What a run had written when it was killed after `step` steps, as another run's folder."""
    checkpoint = Path("checkpoints") / name_of(step)
    shutil.copytree(run / checkpoint, new / checkpoint)
    for name in ("config.json", "log.jsonl"):
        shutil.copy(run / name, new / name)


def work(path: Path) -> None:
    """All jobs of a file, on this rank."""
    results: list[int | str] = []
    for job in json.loads(path.read_text()):
        if "branch" in job and os.environ.get("RANK", "0") == "0":
            run, new, step = job["branch"]
            branch(Path(run), Path(new), step)
        if dist.is_initialized():
            dist.barrier()
        try:
            results.append(main(job["words"]))
        except UserError as error:
            results.append(str(error))
    if os.environ.get("RANK", "0") == "0":
        (path.parent / RESULTS).write_text(json.dumps(results))


if __name__ == "__main__":
    work(Path(sys.argv[1]))
