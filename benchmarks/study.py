"""Does joint pretraining help where motion is all that tells the classes apart? `make study`, `make study SMALL=1`.

`python -m benchmarks.study` draws an action set into shards, pretrains on its unlabelled clips and images, fine-tunes
on a few labels from each start, tests, and draws the table and the plot. Every part of it is one of the project's own
commands on one core, as many at once as there are cores. What is done is not done again: stop it and start it at will.
The rows are in the study's folder; once it is whole they replace those of benchmarks/results/study.jsonl. `--page` only
draws these again.

Three starts, and the same fine-tuning for all: `scratch`; `images`, pretrained on images alone; `joint`, on clips and
images. The two pretrainings take as many steps, and as many tokens a step.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks import report
from benchmarks.common import RESULTS, ROOT, append_row, machine, provenance, read_rows
from benchmarks.pages_data import best_rate
from benchmarks.study_baseline import copy_accuracy
from benchmarks.study_data import draw_classes, prepare
from benchmarks.study_runs import ARMS, Scale, finetune, masked_accuracy, pretrain
from bevt_ds.config.command_line import run
from bevt_ds.errors import UserError

ROWS = RESULTS / "study.jsonl"
DOCS = ROOT / "docs"

FEW = Scale(
    unlabelled=6000,
    labels=10,
    validated=20,
    tested=80,
    pretrain_steps=12_000,
    finetune_epochs=80,
    rates=(2.5e-4, 5e-4, 1e-3),
    seeds=(0, 1, 2),
)
MANY = replace(FEW, labels=400, finetune_epochs=1, rates=(5e-4,))
SMALL = replace(
    FEW, unlabelled=2000, validated=10, tested=50, pretrain_steps=500, finetune_epochs=40, rates=(5e-4,), seeds=(0,)
)


@dataclass(frozen=True)
class Job:
    """A part of the study: `work` does it and returns its result in a few words."""

    name: str
    cost: int  # clips that pass through the network
    work: Callable[[], str]


class Study:
    """A folder for all that the commands and the study itself write, and how much of everything.

    `scales` differ in the fine-tuning only; what is pretrained serves all.

    UserError: the folder holds a study of another scale, whose pretrained weights would pass for this one's.
    """

    def __init__(self, folder: Path, *scales: Scale):
        self.folder, self.scales, self.lock = folder, scales, threading.Lock()
        self.results, stated = folder / "study.jsonl", folder / "scale.json"
        text = json.dumps([asdict(scale) for scale in scales], indent=1)
        if stated.exists() and stated.read_text() != text:
            raise UserError(f"{folder} holds a study of another scale: remove it, or name another with --folder")
        folder.mkdir(parents=True, exist_ok=True)
        stated.write_text(text)

    def waves(self) -> list[list[Job]]:
        """Jobs that may run side by side; each wave needs the one before it."""
        waves: list[list[Job]] = [[self._pretraining(arm) for arm in ("joint", "images")], [], []]
        for scale in self.scales:
            first, *others = scale.seeds
            waves[1] += [self._finetuning(scale, arm, first, rate) for arm in ARMS for rate in scale.rates]
            waves[2] += [self._finetuning(scale, arm, seed) for seed in others for arm in ARMS]
        return waves

    def splits(self) -> dict[str, int]:
        """Files of each split."""
        return {split: count for scale in self.scales for split, count in scale.splits().items()}

    def rows(self) -> list[dict[str, Any]]:
        """The results so far."""
        return list(read_rows(self.results))

    def _pretraining(self, arm: str) -> Job:
        scale = self.scales[0]

        def run() -> str:
            result = pretrain(self.folder, scale, arm)
            if not any(row.get("pretraining") == arm for row in self.rows()):
                copying = {"copying": copy_accuracy()} if arm == "joint" else {}
                self._note({"pretraining": arm, **masked_accuracy(self.folder, arm), **copying})
            return result

        return Job(f"pretrain {arm}", scale.pretrain_clips(), run)

    def _finetuning(self, scale: Scale, arm: str, seed: int, rate: float | None = None) -> Job:
        """Without a rate, the one that validation chose."""

        def run() -> str:
            rows = [row for row in self.rows() if "arm" in row and row["scale"]["labels"] == scale.labels]
            lr = rate or best_rate(rows, arm)
            done = [row for row in rows if (row["arm"], row["seed"], row["lr"]) == (arm, seed, lr)]
            row = done[0] if done else self._measure(scale, arm, seed, lr)
            return f"lr {lr:g}, validation {row['val']:.1%}, test {row['test']:.1%}"

        return Job(f"fine-tune {arm}, {scale.labels} labels a class, seed {seed}", scale.finetune_clips(), run)

    def _measure(self, scale: Scale, arm: str, seed: int, lr: float) -> dict[str, Any]:
        """Run the commands and append their row."""
        facts = {"arm": arm, "seed": seed, "lr": lr}
        row = {**facts, **finetune(self.folder, scale, **facts), "scale": asdict(scale)}
        self._note(row)
        return row

    def _note(self, row: dict[str, Any]) -> None:
        with self.lock:
            append_row(self.results, row | {"provenance": provenance("cpu") | machine()})


def main(argv: Sequence[str]) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--small", action="store_true", help="10 minutes: does it run? Too little to learn much")
    parser.add_argument("--folder", type=Path, help="shards and runs (default: runs/study, or runs/study-small)")
    parser.add_argument("--page", action="store_true", help="only draw the table and the plot")
    arguments = parser.parse_args(argv)
    if arguments.small:
        study = Study(arguments.folder or ROOT / "runs" / "study-small", SMALL)
        carry_out(study)
        print(report.write(study.results))
        return 0
    if not arguments.page:
        study = Study(arguments.folder or ROOT / "runs" / "study", FEW, MANY)
        carry_out(study)
        shutil.copyfile(study.results, ROWS)
    draw_classes(DOCS / "study-classes.png")
    print(report.write(ROWS))
    return 0


def carry_out(study: Study) -> None:
    """Everything that is not done yet; the first failure ends it once the jobs that run at the same time have ended."""
    prepare(study.folder / "shards", study.splits())
    waves = study.waves()
    clips = sum(job.cost for wave in waves for job in wave)
    cores = len(os.sched_getaffinity(0))
    with tqdm(total=clips, unit="clip", unit_scale=True) as bar, ThreadPoolExecutor(cores) as pool:
        for wave in waves:
            for job, result in zip(wave, pool.map(lambda job: job.work(), wave), strict=True):
                bar.update(job.cost)
                bar.write(f"{job.name}: {result}")


if __name__ == "__main__":
    run(main)
