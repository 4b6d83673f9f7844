"""The folder that a run writes, and where its weights are read from.

runs/joint/
  config.json       the resolved configuration
  log.jsonl         a line every train.log_every steps
  tensorboard/      the same numbers
  checkpoints/      step-00001000/ ... : everything that a continuation needs
  weights/          config.json + model.safetensors: the fp32 weights, for init_from and from_pretrained
  samples.png       input, mask, and where the prediction was right
  summary.json      held-out losses beside their baselines
  bad_samples.jsonl what could not be decoded, if anything
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from bevt_ds.checkpoint import checkpoints, make_folder
from bevt_ds.config import Config
from bevt_ds.errors import UserError
from bevt_ds.overrides import to_dict
from bevt_ds.ranks import Ranks

CONFIG = "config.json"
LOG = "log.jsonl"
SUMMARY = "summary.json"
SAMPLES = "samples.png"
CHECKPOINTS = "checkpoints"
WEIGHTS = "weights"


def choose_folder(config: Config, ranks: Ranks) -> Path:
    """The output folder, created on rank 0 and the same on every rank. Collective.

    Raises:
        UserError: it holds another run already, or cannot be written.
    """
    problem, name = None, ""
    if ranks.is_main:
        try:
            name = str(_claim(config))
        except UserError as error:
            problem = str(error)
    problem, name = ranks.broadcast((problem, name))
    if problem:
        raise UserError(problem)
    return Path(name)


def _claim(config: Config) -> Path:
    folder = Path(config.output_dir) if config.output_dir else _free_name(Path("runs") / config.recipe, config)
    if (folder / CONFIG).exists() and config.resume == "never":
        raise UserError(
            f"output_dir={folder} holds a run already: continue it with resume=auto, or name another output_dir."
        )
    make_folder(folder)
    return folder


def _free_name(first: Path, config: Config) -> Path:
    """runs/demo, or runs/demo-2, ...; to resume without a name means the newest of them that has a checkpoint."""
    taken, candidate, number = [], first, 1
    while (candidate / CONFIG).exists():
        taken.append(candidate)
        number += 1
        candidate = first.with_name(f"{first.name}-{number}")
    if config.resume == "auto":
        resumable = [folder for folder in taken if checkpoints(folder / CHECKPOINTS)]
        return resumable[-1] if resumable else candidate
    return candidate


def write_config(folder: Path, config: Config) -> None:
    """Save the resolved configuration."""
    write_json(folder / CONFIG, to_dict(config))


def write_json(path: Path, values: object) -> None:
    """A JSON file that people read too."""
    path.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")


def weights_of(path: str) -> Path:
    """Where `init_from` finds weights: inside a run's folder, or the path itself.

    Raises:
        UserError: no such path.
    """
    given = Path(path)
    if not given.exists():
        raise UserError(f"init_from={path}: no such file or folder.")
    if (given / WEIGHTS).is_dir():
        return given / WEIGHTS
    if (given / LOG).is_file():
        commits = checkpoints(given / CHECKPOINTS)
        if not commits:
            raise UserError(f"init_from={path}: this run has not written a checkpoint yet.")
        return commits[0] / WEIGHTS
    return given


def publish_weights(folder: Path) -> None:
    """Put the newest checkpoint's weights where people look for them: weights/ of the run."""
    final, aside = folder / WEIGHTS, folder / f".tmp-{WEIGHTS}"
    shutil.rmtree(aside, ignore_errors=True)
    shutil.copytree(checkpoints(folder / CHECKPOINTS)[0] / WEIGHTS, aside)
    shutil.rmtree(final, ignore_errors=True)
    aside.rename(final)
