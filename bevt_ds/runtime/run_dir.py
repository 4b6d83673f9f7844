"""The folder that a run writes (`bevt_ds.folders`: where its weights are read from).

runs/joint/
  config.json       the resolved configuration
  deepspeed.json    the DeepSpeed JSON with which it was started last
  run.json          each start: command, commit, versions, hosts, GPUs, dates
  console.log       what rank 0 printed
  changes.json      what was overridden on resume, and from which step on, if anything
  log.jsonl         a line every train.log_every steps
  tensorboard/      the same numbers; wandb/, mlflow.db, mlruns/ and loggers.json where log.to names these
  checkpoints/      step-00001000/ ... : everything that a continuation needs
  weights/          config.json + model.safetensors: the fp32 weights, for init_from and from_pretrained
  samples.png       input, mask, and where the prediction was right
  panels/           step-00001000.png ...: the same of the same samples, at each checkpoint
  summary.json      held-out losses and their baselines; of fine-tuning, the validation of best/ and of weights/
  best/             of fine-tuning: the weights that did best on the validation videos
  bad_samples.jsonl what could not be decoded, if anything
  nonfinite/        a bundle of each step whose loss or gradient was not finite (bundle.py)
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain, count, dropwhile, islice, takewhile
from pathlib import Path
from typing import Any

from bevt_ds.config.files import CONFIG, ENGINE, read_settings
from bevt_ds.config.parse import to_dict
from bevt_ds.config.schema import Config, TrainingConfig, TrainingT
from bevt_ds.data.reading.index import write_atomic
from bevt_ds.disk import make_folder
from bevt_ds.errors import UserError
from bevt_ds.folders import CHECKPOINTS, LOG, WEIGHTS, checkpoints
from bevt_ds.runtime.checkpoint import Change, check_same
from bevt_ds.runtime.distributed import Ranks
from bevt_ds.runtime.lock import hold, owner_of

CHANGES = "changes.json"
SUMMARY = "summary.json"
SAMPLES = "samples.png"
PANELS = "panels"
BEST = "best"
WRITTEN = (
    CONFIG,
    CHANGES,
    LOG,
    SUMMARY,
    SAMPLES,
    PANELS,
    CHECKPOINTS,
    WEIGHTS,
    BEST,
    "tensorboard",
    "bad_samples.jsonl",
)


def choose_folder(config: TrainingConfig, ranks: Ranks) -> Path:
    """The output folder of a run of any kind, created on rank 0 and the same on every rank. Collective.

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


def _claim(config: TrainingConfig) -> Path:
    """The folder, made or checked. On rank 0."""
    if not config.output_dir:
        return _claim_free_name(Path("runs") / config.recipe, config)
    folder = Path(config.output_dir)
    require_fit(folder, config)
    make_folder(folder)
    _require_alone(folder, hold(folder))
    return folder


def _require_alone(folder: Path, owner: str | None) -> None:
    """UserError: another run owns the folder."""
    if owner:
        raise UserError(f"output_dir={folder} is in use by another run ({owner}): end it, or name another folder.")


def require_fit(folder: Path, config: TrainingConfig) -> None:
    """Whether what a folder holds is what `config` may write to. UserError: it is not."""
    if config.resume == "auto" and (folder / CONFIG).is_file():
        check_same(read_config(folder, type(config)), config, folder)
    elif config.resume not in ("never", "auto") and Path(config.resume).resolve().parent == _commits(folder).resolve():
        _require_newest(Path(config.resume), folder)
    else:
        _require_unused(folder)


def require_writable(folder: Path) -> None:
    """Whether a folder can be made or written, without doing it, and no run is at work in it. UserError: it is not."""
    there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise UserError(f"output_dir={folder}: {there} is no folder that can be written to.")
    _require_alone(folder, owner_of(folder))


def folder_of(config: TrainingConfig) -> Path:
    """The folder that a run would write, which is not made."""
    if config.output_dir:
        return Path(config.output_dir)
    resumable, free = _numbered(Path("runs") / config.recipe)
    return resumable[-1] if config.resume == "auto" and resumable else free


def write_config(
    folder: Path, config: TrainingConfig, changes: Sequence[Change] = (), engine: Mapping[str, Any] | None = None
) -> None:
    """Save the resolved configuration, what resumes have overridden, and the DeepSpeed JSON `engine`.

    From then on the folder is this run's.

    Raises:
        UserError: another run has taken the folder in the meantime.
    """
    if config.resume == "never" and (folder / CONFIG).exists():
        raise UserError(f"output_dir={folder} was taken by another run that started at the same time.")
    write_json(folder / CONFIG, to_dict(config))
    if changes:
        write_json(folder / CHANGES, list(changes))
    if engine is not None:
        write_json(folder / ENGINE, engine)


def _claim_free_name(first: Path, config: TrainingConfig) -> Path:
    """runs/demo, or runs/demo-2, ...; resume=auto without a name means the newest of them that has a checkpoint."""
    resumable, candidate = _numbered(first)
    if config.resume == "auto" and resumable:
        return _claim(replace(config, output_dir=str(resumable[-1])))
    make_folder(candidate)
    while hold(candidate):  # by a run that started at the same time and has written nothing yet
        candidate = next(name for name in _names(first, after=candidate) if not _is_taken(name))
        make_folder(candidate)
    return _claim(replace(config, output_dir=str(candidate)))


def _numbered(first: Path) -> tuple[list[Path], Path]:
    """Of runs/demo, runs/demo-2, ...: those that have a checkpoint, and the first that is free."""
    taken = list(takewhile(_is_taken, _names(first)))
    free = next(name for name in _names(first) if not _is_taken(name))
    return [folder for folder in taken if checkpoints(_commits(folder))], free


def _names(first: Path, after: Path | None = None) -> Iterator[Path]:
    names = chain([first], (first.with_name(f"{first.name}-{number}") for number in count(2)))
    return names if after is None else islice(dropwhile(lambda name: name != after, names), 1, None)


def _is_taken(folder: Path) -> bool:
    return any((folder / name).exists() for name in WRITTEN)


def _require_unused(folder: Path) -> None:
    found = sorted(name for name in WRITTEN if (folder / name).exists())
    if found:
        raise UserError(
            f"output_dir={folder} holds {', '.join(found)}, which a new run would overwrite: name another output_dir,"
            " or continue the run that is there with resume=auto."
        )


def _require_newest(checkpoint: Path, folder: Path) -> None:
    newest = checkpoints(_commits(folder))[:1]
    if newest and newest[0].name != checkpoint.name:
        raise UserError(
            f"resume={checkpoint}: {folder} has gone on to {newest[0].name}. Name another output_dir to branch off"
            " here, or use resume=auto to continue."
        )


def _commits(folder: Path) -> Path:
    return folder / CHECKPOINTS


def read_config(folder: Path, kind: type[TrainingT] = Config) -> TrainingT:
    """The configuration that a run's folder was begun with.

    Raises:
        UserError: it is damaged, or a run of another kind, or of another version, wrote the folder.
    """
    return read_settings(folder / CONFIG, kind)


def write_json(path: Path, values: object) -> None:
    """A JSON file that people read too; where it cannot be written, the one that is there stays as it is."""
    write_atomic(path, (json.dumps(values, indent=1) + "\n").encode())


def publish_weights(folder: Path, checkpoint: Path) -> None:
    """Put a checkpoint's weights where people look for them: weights/ of the run."""
    replace_folder(folder / WEIGHTS, lambda aside: shutil.copytree(checkpoint / WEIGHTS, aside))


def replace_folder(final: Path, write: Callable[[Path], object]) -> None:
    """Let `write` make a folder again, aside, and put it in the place of the one that is there.

    What fails leaves the one that is there. A kill between the two renames leaves it under another name: see `restore`.
    """
    aside, before = (final.with_name(f".tmp-{which}{final.name}") for which in ("", "before-"))
    restore(final)
    shutil.rmtree(aside, ignore_errors=True)
    try:
        write(aside)
        if final.exists():
            final.rename(before)
        aside.rename(final)
    except (OSError, UserError):
        shutil.rmtree(aside, ignore_errors=True)
        restore(final)
        raise
    shutil.rmtree(before, ignore_errors=True)


def restore(final: Path) -> None:
    """Put back the folder that `replace_folder` had moved away when the process was killed."""
    before = final.with_name(f".tmp-before-{final.name}")
    if before.exists() and not final.exists():
        before.rename(final)
    shutil.rmtree(before, ignore_errors=True)
