"""Checkpoints: what one says of its run, which one a run continues from, and whether it may.

A checkpoint is `checkpoints/step-00000100/`: what the ranks wrote under `state/` (pieces.py), the fp32 weights, and
`manifest.json` with the size and SHA-256 of every file. The position in the data is the step itself. Every rank sees
the same file system. commit.py writes them.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bevt_ds.config.parse import config_fields, from_dict, get_value, set_value, to_dict
from bevt_ds.config.schema import Config, FinetuneConfig, TrainingConfig, TrainingT
from bevt_ds.errors import UserError
from bevt_ds.folders import CHECKPOINT_NAME, checkpoint_folders
from bevt_ds.runtime.distributed import Ranks
from bevt_ds.runtime.manifest import SCHEMA, content_problems, file_problems, read_manifest

RESHARDING = 2  # since this schema the state is the project's own, for any number of ranks, ZeRO stage and precision
Change = dict[str, Any]  # step from which it holds, key, and the values: from, to


@dataclass(frozen=True)
class Facts:
    """What a checkpoint says about the run that wrote it."""

    step: int  # updates done
    world: int
    stage: int  # ZeRO
    config: TrainingConfig  # of the run
    data: str  # fingerprint of the shards
    skips: dict[str, Any]  # what the loader must know besides the step
    changes: tuple[Change, ...] = ()  # what has been overridden on resume so far
    loss: float | None = None  # of the last step; older checkpoints do not say
    schema: int = SCHEMA


def name_of(step: int) -> str:
    """The folder of the checkpoint after `step` updates."""
    return f"step-{step:08d}"


def newest_valid(root: Path, ranks: Ranks, kind: type[TrainingConfig] = Config) -> tuple[Path, Facts] | None:
    """The newest checkpoint whose every byte is as written; damaged ones are named and passed over. Collective.

    `kind` is the config dataclass of the runs that write here.

    Raises:
        UserError: checkpoints exist and none is whole.
    """
    candidates = ranks.broadcast([str(p) for p in checkpoint_folders(root)] if ranks.is_main else None)
    for candidate in map(Path, candidates):
        problem = find_damage(candidate, ranks)
        if problem is None:
            return candidate, read_facts(candidate, kind)
        if ranks.is_main:
            print(f"checkpoint {candidate} is damaged ({problem}); trying the one before", flush=True)
    if candidates:
        raise UserError(f"{root}: no checkpoint is whole. Move the folder away to start again from step 0.")
    return None


def find_damage(folder: Path, ranks: Ranks) -> str | None:
    """What is wrong with a checkpoint's files, or None. Ranks share the hashing, and all say the same. Collective."""
    problems = ranks.gather(_damage(folder, ranks))
    named = list(dict.fromkeys(problem for own in problems for problem in own))
    more = f"; {len(named) - 3} more" if len(named) > 3 else ""
    return "; ".join(named[:3]) + more or None


def _damage(folder: Path, ranks: Ranks) -> list[str]:
    """What this rank finds; of the contents it reads its share."""
    try:
        manifest = read_manifest(folder)
        named = CHECKPOINT_NAME.fullmatch(folder.name)
        if named and int(named[1]) != manifest["step"]:
            return [f"its manifest is of step {manifest['step']}"]
        files = manifest["files"]
        names = sorted(files)[ranks.rank :: ranks.world]
        return file_problems(folder, files) or content_problems(folder, files, names)
    except UserError as error:
        return [str(error)]
    except OSError as error:
        return [f"{error.filename} cannot be read ({error.strerror})"]


def read_facts(folder: Path, kind: type[TrainingConfig] = Config) -> Facts:
    """The facts in a checkpoint's manifest, its configuration as `kind`.

    Raises:
        UserError: not a checkpoint of such a run, or of a newer version of this project.
    """
    manifest = read_manifest(folder)
    plain = {name: manifest[name] for name in ("schema", "step", "world", "stage", "data", "skips")}
    later = {"changes": tuple(manifest.get("changes", ())), "loss": manifest.get("loss")}
    return Facts(config=from_dict(manifest["config"], kind), **plain, **later)


def as_manifest(facts: Facts) -> dict[str, Any]:
    """The facts as JSON has them."""
    plain = {name: getattr(facts, name) for name in ("schema", "step", "world", "stage", "data", "skips", "loss")}
    return plain | {"changes": list(facts.changes), "config": to_dict(facts.config)}


def check_continues(saved: Facts, now: Facts, folder: Path) -> None:
    """Refuse to continue a different run.

    Raises:
        UserError: other data, or another configuration; of an earlier version, another layout too.
    """
    layouts = [{"ranks": f.world, "ZeRO stage": f.stage, "precision": f.config.train.precision} for f in (saved, now)]
    if saved.schema < RESHARDING and layouts[0] != layouts[1]:
        before, after = (", ".join(f"{name} {value}" for name, value in layout.items()) for layout in layouts)
        raise UserError(
            f"{folder} was written by an earlier version, whose checkpoints cannot be split in another way: it has"
            f" {before}, and this run {after}. Continue it once as it was, to its next checkpoint."
        )
    check_same(saved.config, now.config, folder)
    if saved.data != now.data:
        raise UserError(f"{folder} was trained on other shards than these: their sample lists or their classes differ.")


def check_same(saved: TrainingConfig, now: TrainingConfig, folder: Path) -> None:
    """Refuse a configuration that would compute something else than the one which `folder` was begun with.

    What a user may override on resume may differ, see `keep_settings`.

    Raises:
        UserError: the fields that differ.
    """
    mixes = isinstance(now, FinetuneConfig) and (now.train.mixup or now.train.cutmix)
    tied = {"train.micro_clips"} if mixes else ()  # clips are mixed within a forward pass
    changed = [
        f"{f.key}: {get_value(saved, f.key)} -> {get_value(now, f.key)}"
        for f in config_fields(type(now))
        if (f.field.resume == "never" or f.key in tied) and get_value(saved, f.key) != get_value(now, f.key)
    ]
    if changed:
        raise UserError(
            f"{folder} belongs to a run with another configuration ({'; '.join(changed)}). Continue it unchanged, or"
            " begin a new run from its weights with init_from and another output_dir."
        )


def keep_settings(saved: TrainingT, now: TrainingT, given: Collection[str]) -> TrainingT:
    """`now`, with the `saved` values of fields that may be overridden on resume and that are not `given`.

    So the command that began a run, started again, takes nothing back.

    Raises:
        UserError: train.skip_steps below the saved one, which would train on samples again.
    """
    for leaf in config_fields(type(now)):
        if leaf.field.resume == "override" and leaf.key not in given:
            now = set_value(now, leaf.key, get_value(saved, leaf.key))
    if now.train.skip_steps < saved.train.skip_steps:
        raise UserError(
            f"train.skip_steps={now.train.skip_steps}: the run has passed over the samples of"
            f" {saved.train.skip_steps} steps so far; give that number, or a larger one to skip more."
        )
    return now


def overrides(saved: TrainingConfig, now: TrainingConfig, step: int) -> tuple[Change, ...]:
    """What a run that goes on from `step` overrides of the configuration that was saved there."""
    return tuple(
        {"step": step, "key": leaf.key, "from": get_value(saved, leaf.key), "to": get_value(now, leaf.key)}
        for leaf in config_fields(type(now))
        if leaf.field.resume == "override" and get_value(saved, leaf.key) != get_value(now, leaf.key)
    )
