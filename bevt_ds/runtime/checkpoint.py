"""Checkpoints that are either whole or absent: written aside, hashed, renamed; verified before they are read.

A checkpoint is `checkpoints/step-00000100/`: what the ranks wrote under `state/` (pieces.py), the fp32 weights, and
`manifest.json` with the size and SHA-256 of every file. The position in the data is the step itself. Every rank sees
the same file system.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bevt_ds.config.parse import config_fields, from_dict, get_value, set_value, to_dict
from bevt_ds.config.schema import Config, FinetuneConfig, TrainingConfig, TrainingT
from bevt_ds.errors import UserError
from bevt_ds.folders import MANIFEST, checkpoints
from bevt_ds.runtime.distributed import Ranks

SCHEMA = 2
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


def save(root: Path, facts: Facts, write: Callable[[Path], None], ranks: Ranks, keep: int) -> Path:
    """Commit one checkpoint: all ranks write aside, then one rename makes it exist. Collective.

    Args:
        root: the folder of all checkpoints.
        write: writes this rank's files under the folder it is given; collective.
        keep: older checkpoints beyond this number are removed, after the new one is in place; except the one with the
            lowest loss, so that a run which is slowly going wrong can be begun again from before it did.

    Raises:
        UserError: the folder cannot be written.
    """
    final = root / name_of(facts.step)
    aside = root / f".tmp-{final.name}"
    if ranks.is_main:
        for torn in root.glob(".tmp-*"):  # left by a kill
            shutil.rmtree(torn)
        make_folder(aside)
    ranks.barrier()
    write(aside)
    ranks.barrier()
    if ranks.is_main:
        _seal(aside, facts)
        shutil.rmtree(final, ignore_errors=True)
        os.replace(aside, final)
        _sync(root)
        _write_text(root / "latest", final.name)
        best = _lowest_loss(checkpoints(root))
        for old in checkpoints(root)[keep:]:
            if old != best:
                shutil.rmtree(old)
    ranks.barrier()
    return final


def _lowest_loss(commits: list[Path]) -> Path | None:
    """The checkpoint whose last step had the lowest loss; None if none says. A damaged one says nothing."""
    losses = {}
    for commit in commits:
        with suppress(UserError):
            losses[commit] = _read_manifest(commit).get("loss")
    known = [commit for commit, loss in losses.items() if loss is not None]
    return min(known, key=losses.__getitem__, default=None)


def name_of(step: int) -> str:
    """The folder of the checkpoint after `step` updates."""
    return f"step-{step:08d}"


def newest_valid(root: Path, ranks: Ranks, kind: type[TrainingConfig] = Config) -> tuple[Path, Facts] | None:
    """The newest checkpoint whose every byte is as written; damaged ones are named and passed over. Collective.

    `kind` is the config dataclass of the runs that write here.

    Raises:
        UserError: checkpoints exist and none is whole.
    """
    candidates = ranks.broadcast([str(p) for p in checkpoints(root)] if ranks.is_main else None)
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
    """What is wrong with a checkpoint's files, or None. Ranks share the hashing. Collective."""
    problem = None
    try:
        files = sorted(_read_manifest(folder)["files"].items())
    except UserError as error:
        files, problem = [], str(error)
    for name, entry in files[ranks.rank :: ranks.world]:
        path = folder / name
        if not path.is_file() or path.stat().st_size != entry["size"]:
            problem = f"{name} is missing or cut"
        elif _digest(path) != entry["sha256"]:
            problem = f"{name} has changed since it was written"
    if ranks.all_hold(problem is None):
        return None
    return problem or "another rank found damage"


def read_facts(folder: Path, kind: type[TrainingConfig] = Config) -> Facts:
    """The facts in a checkpoint's manifest, its configuration as `kind`.

    Raises:
        UserError: not a checkpoint of such a run, or of a newer version of this project.
    """
    manifest = _read_manifest(folder)
    plain = {name: manifest[name] for name in ("step", "world", "stage", "data", "skips")}
    later = {"changes": tuple(manifest.get("changes", ())), "loss": manifest.get("loss"), "schema": manifest["schema"]}
    return Facts(config=from_dict(manifest["config"], kind), **plain, **later)


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


def make_folder(path: Path) -> None:
    """Create a folder that can be written to.

    Raises:
        UserError: it cannot.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / ".write-test"
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        raise UserError(f"cannot write to {path} ({error.strerror}): choose another output_dir.") from None


def _seal(folder: Path, facts: Facts) -> None:
    """Flush every file to disk and write the manifest, which carries a digest of itself."""
    files = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        _sync(path)
        files[str(path.relative_to(folder))] = {
            "size": path.stat().st_size,
            "sha256": _digest(path),
        }
    manifest = {
        "schema": facts.schema,
        "step": facts.step,
        "world": facts.world,
        "stage": facts.stage,
        "data": facts.data,
        "skips": facts.skips,
        "changes": list(facts.changes),
        "loss": facts.loss,
        "config": to_dict(facts.config),
        "files": files,
    }
    manifest["digest"] = _self_digest(manifest)
    _write_text(folder / MANIFEST, json.dumps(manifest, indent=1))
    _sync(folder)


def _read_manifest(folder: Path) -> dict[str, Any]:
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{folder} is not a checkpoint: it has no {MANIFEST}.") from None
    except ValueError:
        raise UserError(f"{folder}/{MANIFEST} is not JSON.") from None
    if not isinstance(manifest, dict) or manifest.get("digest") != _self_digest(manifest):
        raise UserError(f"{folder}/{MANIFEST} has changed since it was written.")
    if manifest["schema"] > SCHEMA:
        raise UserError(
            f"{folder} was written by a newer bevt_ds (schema {manifest['schema']}, this one reads {SCHEMA})."
        )
    return manifest


def _self_digest(manifest: dict[str, Any]) -> str:
    body = {name: value for name, value in manifest.items() if name != "digest"}
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_text(path: Path, text: str) -> None:
    aside = path.with_name(path.name + ".tmp")
    aside.write_text(text, encoding="utf-8")
    _sync(aside)
    os.replace(aside, path)
    _sync(path.parent)


def _sync(path: Path) -> None:
    """fsync a file or a folder."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
