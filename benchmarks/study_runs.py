"""The project's commands as the study gives them: pretraining, fine-tuning, test. Each leaves its output in a log."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks.common import ROOT, read_rows
from benchmarks.study_data import FRAMES, SIZE
from benchmarks.study_motion import COURSES

ARMS = ("scratch", "images", "joint")
CLIPS, IMAGES = 16, 8  # a step of joint pretraining
IMAGES_A_CLIP = FRAMES // 2  # images with as many tokens as a clip
BATCH = 16  # clips a step of fine-tuning
POINTS = 20  # at most, of the curve of a pretraining
TAIL = 20  # lines of a log that a failure shows

PRETRAIN = f"""recipe=demo data.eval_videos= data.eval_images= tokenizer.vocab_size=32 optim.lr=2e-3
data.frames={FRAMES} data.size={SIZE} data.token_size={SIZE // 2} data.short_side={SIZE},{SIZE}
data.mask.ratio=0.75 data.mask.min_block=16 data.mask.tube=0.25,0.5
train.min_gain=0 train.log_every=50 train.checkpoint_every=500 train.keep_checkpoints=1""".split()
FINETUNE = f"""recipe=finetune_demo data.frames={FRAMES} data.size={SIZE} data.short_side={SIZE} optim.layer_decay=1
train.global_clips={BATCH} train.micro_clips={BATCH} train.log_every=20 train.checkpoint_every=1000
train.keep_checkpoints=1 views.short_side={SIZE} views.micro_videos=32""".split()


@dataclass(frozen=True)
class Scale:
    """How much of everything. `rates` are tried with the first seed; each seed has training clips of its own."""

    unlabelled: int  # clips, and as many images
    labels: int  # training clips a class
    validated: int  # clips a class that choose the rate
    tested: int  # clips a class
    pretrain_steps: int
    finetune_epochs: int
    rates: tuple[float, ...]
    seeds: tuple[int, ...]

    def splits(self) -> dict[str, int]:
        """Files of each split."""
        labelled = {self.training(seed): self.labels for seed in self.seeds} | {
            "val": self.validated,
            "test": self.tested,
        }
        unlabelled = {"unlabelled": self.unlabelled, "pictures": self.unlabelled}
        return unlabelled | {split: len(COURSES) * count for split, count in labelled.items()}

    def training(self, seed: int) -> str:
        """The split that a seed trains on."""
        return f"train{self.labels}-{seed}"

    def pretrain_clips(self) -> int:
        """What a pretraining costs, in clips that pass through the network."""
        return self.pretrain_steps * (CLIPS + IMAGES // IMAGES_A_CLIP)

    def finetune_clips(self) -> int:
        return self.finetune_epochs * self.labels * len(COURSES)


def pretrain(folder: Path, scale: Scale, arm: str, more: Sequence[str] = ()) -> str:
    """Pretrain into `folder`/`arm`, or continue it; returns the last losses as text. more: further settings."""
    clips = 0 if arm == "images" else CLIPS
    images = IMAGES + (CLIPS - clips) * IMAGES_A_CLIP
    words = (
        *PRETRAIN,
        f"data.videos={_shards(folder, 'unlabelled') if clips else ''}",
        f"data.images={_shards(folder, 'pictures')}",
        f"train.steps={scale.pretrain_steps}",
        f"optim.warmup_steps={scale.pretrain_steps // 20}",
        f"train.global_clips={clips}",
        f"train.micro_clips={clips}",
        f"train.global_images={images}",
        f"train.micro_images={images}",
        f"output_dir={folder / arm}",
        "resume=auto",
        *more,
    )
    if not (folder / arm / "weights").exists():
        call("pretrain", words, folder / f"{arm}.log")
    *_, last = read_rows(folder / arm / "log.jsonl")
    return ", ".join(f"{name} {last[name]:.3f}" for name in ("loss_video", "loss_image") if name in last)


def masked_accuracy(folder: Path, arm: str) -> dict[str, list[float]]:
    """What pretraining learned, from its log: "steps", and by then the share of masked positions it gets right.

    "video" and "image" are means over all that was logged since the step before.
    """
    rows = list(read_rows(folder / arm / "log.jsonl"))
    points = min(POINTS, len(rows))
    ends = [(i + 1) * len(rows) // points for i in range(points)]
    parts = [rows[begin:end] for begin, end in zip([0, *ends], ends, strict=False)]
    kinds = [kind for kind in ("video", "image") if f"acc_{kind}" in rows[-1]]
    means = {kind: [round(mean(row[f"acc_{kind}"] for row in part), 4) for part in parts] for kind in kinds}
    return {"steps": [part[-1]["step"] + 1 for part in parts], **means}


def finetune(folder: Path, scale: Scale, arm: str, seed: int, lr: float) -> dict[str, Any]:
    """Fine-tune into `folder`, or continue, and test: accuracy on the validation and test clips, and by class."""
    run = folder / f"{arm}-labels{scale.labels}-seed{seed}-lr{lr:g}"
    words = (
        *FINETUNE,
        f"data.train={_shards(folder, scale.training(seed))}",
        f"data.val={_shards(folder, 'val')}",
        f"optim.lr={lr}",
        f"train.seed={seed}",
        f"train.epochs={scale.finetune_epochs}",
        f"train.val_every={scale.finetune_epochs}",
        f"init_from={'' if arm == 'scratch' else folder / arm}",
        f"output_dir={run}",
        "resume=auto",
    )
    call("finetune", words, folder / f"{run.name}.log")
    test = run / "test"
    if not (test / "scores.json").exists():
        words = (f"weights={run}", f"data.val={_shards(folder, 'test')}", f"output_dir={test}")
        call("evaluate", words, folder / f"{run.name}.test.log")
    scores = json.loads((test / "scores.json").read_text())
    last = json.loads((run / "summary.json").read_text())["last"]
    classes = {row["name"]: row["accuracy"] for row in scores["classes"]}
    return {"val": last["top1"], "test": scores["top1"], "classes": classes}


def _shards(folder: Path, split: str) -> str:
    return str(folder / "shards" / f"{split}-0*.tar")


def call(entry: str, words: tuple[str, ...], log: Path) -> None:
    """Run `bevt_ds/{entry}.py` on one core. RuntimeError with the end of its output where it fails."""
    log.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, str(ROOT / "bevt_ds" / f"{entry}.py"), *words]
    with log.open("w") as output:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        code = subprocess.run(command, stdout=output, stderr=output, cwd=ROOT, env=environment).returncode
    if code:
        end = "\n".join(log.read_text().splitlines()[-TAIL:])
        raise RuntimeError(f"{entry} ended with code {code}; the end of {log}:\n{end}")
