"""What a test or a probe writes, and the run that its weights are from.

RUN/eval-1/ (or probe-1/, ...)
  scores.json          accuracies, coverage, each class, and the resolved configuration
  predictions.parquet  a row a video
  confusion.png
  bad_samples.jsonl    what could not be decoded, if anything
"""

from __future__ import annotations

import json
from itertools import count
from pathlib import Path
from typing import Any

import torch

import bevt_ds
from bevt_ds.config.recipes import joint_swin_b
from bevt_ds.config.samples import LabelledDataConfig, ViewsConfig, labelled_as
from bevt_ds.config.schema import Config, FinetuneConfig, InferenceT
from bevt_ds.disk import make_folder
from bevt_ds.errors import UserError
from bevt_ds.eval.confusion import draw_confusion
from bevt_ds.eval.metrics import Scores
from bevt_ds.eval.predictions import Predictions, write_parquet
from bevt_ds.runtime.distributed import Ranks
from bevt_ds.runtime.run_dir import CONFIG, LOG, read_config, write_json

SCORES, PREDICTIONS, CONFUSION = "scores.json", "predictions.parquet", "confusion.png"
PARENTS = 3  # RUN/checkpoints/step-00001000/weights


def run_of(weights: str) -> Path | None:
    """The folder of the run that `weights` are from: itself or a folder around it; None if there is none."""
    path = Path(weights)
    return next((p for p in (path, *path.parents[:PARENTS]) if (p / CONFIG).is_file() and (p / LOG).is_file()), None)


def run_config(weights: str) -> FinetuneConfig | Config | None:
    """The configuration of the run that `weights` are from, of fine-tuning or of pretraining; None: they are from none.

    Raises:
        UserError: another version of this project wrote it.
    """
    folder = run_of(weights)
    if folder is None:
        return None
    pretraining = "tokenizer" in json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    return read_config(folder, Config if pretraining else FinetuneConfig)


def sampling_of(weights: str) -> tuple[FinetuneConfig | Config, LabelledDataConfig]:
    """The run that `weights` are from, and how it samples clips; where there is no run, the original's pretraining.

    Raises:
        UserError: another version of this project wrote the run.
    """
    run = (run_config(weights) if weights else None) or joint_swin_b()
    return run, labelled_as(run.data) if isinstance(run, Config) else run.data


def one_view(kind: type[InferenceT], weights: str, recipe: str, **views: int) -> InferenceT:
    """A measurement of one view of each sample, sampled as by the run that the weights are from, else the original's.

    views: further fields of ViewsConfig.

    Raises:
        UserError: a recipe is named, or another version of this project wrote the run.
    """
    if recipe:
        raise UserError(f"{kind.program} has no recipe: sampling is that of the weights' run, the rest is key=value.")
    run, data = sampling_of(weights)
    return kind(
        recipe=run.recipe,
        weights=weights,
        data=data,
        views=ViewsConfig(clips=1, crops=1, short_side=data.short_side, **views),
        precision=run.train.precision,
        kernels=run.model.kernels,
    )


def without_classifier(weights: str) -> UserError:
    """The error for weights of pretraining where a classifier is needed."""
    return UserError(
        f"weights={weights} has no classifier: fine-tune it first with `bevt_ds/finetune.py init_from={weights}`, or"
        " measure its features with `bevt_ds/probe.py`."
    )


def claim_folder(output_dir: str, weights: str, name: str, ranks: Ranks) -> Path:
    """A new folder for results, the same on every rank: `output_dir`, or the first free NAME-1, NAME-2, ... Collective.

    Raises:
        UserError: it holds results already, or cannot be written.
    """
    problem, folder = None, ""
    if ranks.is_main:
        try:
            folder = str(_claim(output_dir, run_of(weights) or Path("runs"), name))
        except UserError as error:
            problem = str(error)
    problem, folder = ranks.broadcast((problem, folder))
    if problem:
        raise UserError(problem)
    return Path(folder)


def _claim(output_dir: str, home: Path, name: str) -> Path:
    if not output_dir:
        make_folder(home)
        return _first_free(home, name)
    folder = Path(output_dir)
    if (folder / SCORES).exists():
        raise UserError(f"output_dir={folder} holds {SCORES} already: name another, or none.")
    make_folder(folder)
    return folder


def _first_free(home: Path, name: str) -> Path:
    """A folder of `home` that this call has made: two tests that start together get two."""
    for number in count(1):
        folder = home / f"{name}-{number}"
        try:
            folder.mkdir()
        except FileExistsError:
            continue
        return folder


def write_results(
    folder: Path, predictions: Predictions, names: tuple[str, ...], expected: int, facts: dict[str, Any]
) -> dict[str, Any]:
    """Write all files for predictions over the classes `names`; returns what scores.json holds.

    `expected` is how many videos the whole set has; `facts` say what was tested.
    """
    scores = Scores(len(names))
    scores.add(predictions.probabilities, predictions.labels)
    values = scores.result() | {
        "expected": expected,
        "classes": class_accuracies(scores, names),
        "versions": {"bevt_ds": bevt_ds.__version__, "torch": torch.__version__},
        **facts,
    }
    write_parquet(folder / PREDICTIONS, predictions, names)
    draw_confusion(scores.confusion.numpy(), names, folder / CONFUSION)
    write_json(folder / SCORES, values)  # the last: where it is, the others are too
    return values


def class_accuracies(scores: Scores, names: tuple[str, ...]) -> list[dict[str, Any]]:
    """Name, videos and accuracy of each class, in label order; None where it does not occur."""
    hits, videos = scores.confusion.diagonal().tolist(), scores.confusion.sum(1).tolist()
    return [
        {"name": name, "videos": n, "accuracy": hit / n if n else None}
        for name, n, hit in zip(names, videos, hits, strict=True)
    ]


def as_lines(values: dict[str, Any], folder: Path) -> str:
    """The results as people read them."""
    rows = (("top-1", "top1"), ("top-5", "top5"), ("mean class accuracy", "mean_class_accuracy"))
    lines = [f"{title:<20}{values[key]:8.2%}" for title, key in rows if key in values]
    share = values["videos"] / max(values["expected"], 1)
    lines.append(f"{'coverage':<20}{values['videos']:,} of {values['expected']:,} expected ({share:.1%})")
    occurring = sum(entry["videos"] > 0 for entry in values["classes"])
    lines.append(f"{'classes':<20}{occurring:,} of {len(values['classes']):,} occur")
    return "\n".join([*lines, f"wrote {folder}/"])
