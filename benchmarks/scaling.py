"""How the step scales over ranks, and what it sends: weak and strong, ZeRO 1 to 3.

    python -m benchmarks.scaling               # 1, 2, 4, 8 GPUs of this machine; without a GPU, 1 and 2 ranks over gloo
    python -m benchmarks.scaling --ranks 1,2 --zero 2,3

Weak: every rank takes one micro-batch a step. Strong: the step is that of the most ranks, and fewer ranks take more
micro-batches. A step is the training program's own, tokenizer and all, on micro-batches of noise that stay on the
device; reading shards is not in it. Rows go to benchmarks/results/scaling-<device>.jsonl; a page and a plot are drawn
from those of the last run.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict
from datetime import UTC, datetime

import torch
from tqdm import tqdm

from . import report
from .common import ROOT, append_row, command_line, rows_of
from .scaling_worker import Job

MOST_RANKS = 8
SMALL = {"model": "tiny", "micro_clips": 2, "micro_images": 8, "steps": 5}  # 2 CPU cores: a quarter of a second
LARGE = {"model": "swin_b", "micro_clips": 8, "micro_images": 64, "steps": 20}


def default_ranks(gpus: int) -> list[int]:
    """Powers of two up to the machine's GPUs; without one, 1 and 2 on the CPU."""
    return [n for n in (1, 2, 4, MOST_RANKS) if n <= (gpus or 2)]


def jobs(ranks: list[int], stages: list[int], sizes: dict[str, object]) -> list[Job]:
    """Each launch once: weak and strong scaling meet at the most ranks.

    Raises:
        ValueError: a number of ranks that does not divide the largest.
    """
    most = max(ranks)
    if uneven := [n for n in ranks if most % n]:
        raise ValueError(f"--ranks: {uneven[0]} does not divide {most}, so the strong row's step would be another one")
    pairs = sorted({(n, steps) for n in ranks for steps in (1, most // n)})
    return [Job(ranks=n, zero=stage, micro_steps=steps, **sizes) for n, steps in pairs for stage in stages]


def launch(job: Job, gpu: bool) -> dict[str, object]:
    """Start the ranks and return what rank 0 printed. Raises RuntimeError with the end of their output."""
    command = ["torch.distributed.run", "--standalone", "--nproc_per_node", str(job.ranks)]
    command += ["-m", "benchmarks.scaling_worker", json.dumps(asdict(job))]
    environment = os.environ if gpu else {**os.environ, "OMP_NUM_THREADS": "1"}  # a rank a core, however many ranks
    done = subprocess.run(
        [sys.executable, "-m", *command], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{job} failed:\n{done.stderr[-4000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def rounds(todo: list[Job], count: int, gpu: bool) -> Iterator[dict[str, object]]:
    """Every job once a round, so that other load on the machine affects all of them alike."""
    started = datetime.now(UTC).isoformat(timespec="seconds")
    bar = tqdm([(number, job) for number in range(count) for job in todo], unit="launch")
    for number, job in bar:
        bar.set_postfix_str(f"{job.ranks} ranks, ZeRO {job.zero}")
        yield {"op": "scaling", "run": started, "round": number, **launch(job, gpu), "load": os.getloadavg()[0]}


def numbers(text: str) -> list[int]:
    """'1,2' -> [1, 2]."""
    return sorted({int(word) for word in text.split(",")})


def main() -> None:
    """The command."""
    gpus = torch.cuda.device_count()
    sizes = LARGE if gpus else SMALL
    parser = command_line(__doc__, rounds=1)
    parser.add_argument("--ranks", type=numbers, default=default_ranks(gpus), help="default: %(default)s")
    parser.add_argument("--zero", type=numbers, default=[1, 2, 3], help="ZeRO stages; default: %(default)s")
    parser.add_argument("--model", default=sizes["model"], help="preset; default: %(default)s")
    parser.add_argument("--steps", type=int, default=sizes["steps"], help="timed steps a launch; default: %(default)s")
    options = parser.parse_args()
    if gpus and max(options.ranks) > gpus:
        parser.error(f"--ranks {max(options.ranks)}: this machine has {gpus} GPUs")
    if not set(options.zero) <= {1, 2, 3}:
        parser.error(f"--zero {options.zero}: stages are 1, 2, 3")
    try:
        todo = jobs(options.ranks, options.zero, {**sizes, "model": options.model, "steps": options.steps})
    except ValueError as error:
        parser.error(str(error))
    for row in rounds(todo, options.rounds, gpus > 0):
        path = rows_of("scaling", row["provenance"]["device"], options.out)
        append_row(path, row)
    print(report.write(path))


if __name__ == "__main__":
    main()
