"""Ids or features as targets: what is each worth at a CPU's scale? `python -m benchmarks.targets`.

On the study's small set (benchmarks/study.py, SMALL): joint pretraining on its clips and images with each kind of
target, with the same masks, decoder, steps and seed; then the same fine-tuning on few labels, from each and from
scratch. Runs that are there are kept: stop it and start it at will.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from benchmarks import report
from benchmarks.common import RESULTS, add_row, command_line, read_rows
from benchmarks.study import SMALL
from benchmarks.study_data import prepare
from benchmarks.study_runs import Scale, finetune, pretrain

TARGETS = {  # start -> settings of its pretraining; {folder}: where the runs lie
    "joint": (),
    "timm": ("target=features", "teacher.name=resnet10t"),
    "own": ("target=features", "teacher.weights={folder}/joint"),
}
ARMS = ("scratch", *TARGETS)


def losses_of(folder: Path, scale: Scale, arm: str) -> dict[str, Any]:
    """Pretrain an arm, or continue it: the mean losses of its first and its last log line."""
    pretrain(folder, scale, arm, tuple(word.format(folder=folder) for word in TARGETS[arm]))
    first, *_, last = read_rows(folder / arm / "log.jsonl")
    names = ("loss_video", "loss_image")
    return {"pretraining": arm, **{f"first_{name}": first[name] for name in names}, **{n: last[n] for n in names}}


def carry_out(folder: Path, scale: Scale, out: Path) -> None:
    """Everything that is not done yet; a row for each part, when it is done."""
    prepare(folder / "shards", scale.splits())
    jobs = [(arm, seed) for seed in scale.seeds for arm in ARMS]

    def note(row: dict[str, Any]) -> None:
        add_row(out, row | {"scale": asdict(scale)})

    def tune(job: tuple[str, int]) -> None:
        arm, seed = job
        note({"arm": arm, "seed": seed, **finetune(folder, scale, arm, seed, scale.rates[0])})

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        for wave in (("joint", "timm"), ("own",)):
            for row in pool.map(lambda arm: losses_of(folder, scale, arm), wave):
                note(row)
        list(pool.map(tune, jobs))


def main(argv: Sequence[str] | None = None) -> None:
    parser = command_line(__doc__, out=RESULTS / "targets.jsonl")
    parser.add_argument("--folder", type=Path, default=Path("runs/targets"))
    parser.add_argument("--seeds", type=int, default=3, help="of the fine-tuning, each with training clips of its own")
    arguments = parser.parse_args(argv)
    scale = replace(SMALL, seeds=tuple(range(arguments.seeds)))
    arguments.out.unlink(missing_ok=True)
    carry_out(arguments.folder.resolve(), scale, arguments.out)
    print(report.write(arguments.out))


if __name__ == "__main__":
    main()
