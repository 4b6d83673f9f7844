"""How a run begins or continues: from which checkpoint, with which configuration, and with what engine."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

from bevt_ds.config.schema import TrainingConfig, TrainingT
from bevt_ds.errors import UserError
from bevt_ds.runtime import checkpoint, run_dir
from bevt_ds.runtime.checkpoint import RESHARDING
from bevt_ds.runtime.distributed import Ranks
from bevt_ds.runtime.ema import WeightAverage
from bevt_ds.runtime.engine import Engine
from bevt_ds.runtime.pieces import AVERAGE
from bevt_ds.runtime.run_record import RECORD, other_versions

Start = tuple[Path, checkpoint.Facts]  # a checkpoint and what it says of its run
Build = Callable[[Any], Engine]  # of a configuration


def find_start(config: TrainingConfig, folder: Path, ranks: Ranks) -> Start | None:
    """The checkpoint to continue from, verified, or None for a new run of any kind. Collective.

    Raises:
        UserError: the one that was asked for is missing or damaged.
    """
    if config.resume == "never":
        return None
    if config.resume == "auto":
        return checkpoint.newest_valid(folder / run_dir.CHECKPOINTS, ranks, type(config))
    given = Path(config.resume)
    if damage := checkpoint.find_damage(given, ranks):
        raise UserError(f"resume={given}: {damage}")
    return given, checkpoint.read_facts(given, type(config))


def go_on(
    config: TrainingT, given: Collection[str], folder: Path, start: Start | None
) -> tuple[TrainingT, tuple[checkpoint.Change, ...], dict[str, Any] | None]:
    """The configuration with which a run begins or goes on; all that was overridden so far; the loader's skips.

    `given` are the keys that the command line decides: of the fields that may be overridden, all others keep the value
    that the run has.

    Raises:
        UserError: the saved configuration cannot be read, or less is to be skipped than has been.
    """
    if config.resume == "auto" and (folder / run_dir.CONFIG).is_file():
        config = checkpoint.keep_settings(run_dir.read_config(folder, type(config)), config, given)
    elif start:
        config = checkpoint.keep_settings(start[1].config, config, given)
    if not start:
        return config, (), None
    saved = start[1]
    skips = saved.skips if saved.config.train.seed == config.train.seed else {**saved.skips, "skips": []}
    return config, saved.changes + checkpoint.overrides(saved.config, config, saved.step), skips


def print_changes(changes: Sequence[checkpoint.Change], start: Start | None) -> None:
    """Say what the run overrides, and since when; and which packages are of other versions than where it goes on."""
    for change in changes:
        print(f"from step {change['step']} on, {change['key']}: {change['from']} -> {change['to']}", flush=True)
    if not start:
        return
    folder, saved = start
    if others := other_versions(folder.absolute().parents[1] / RECORD, saved.step):
        print(f"warning: other versions than those that committed step {saved.step}: {', '.join(others)}", flush=True)


def require_steps(first_step: int, steps: int) -> None:
    """UserError: the run has gone further than it is now to go."""
    if first_step > steps:
        raise UserError(f"the run has done {first_step} steps, and is now to end after {steps}: give more steps.")


def begin_engine(
    build: Build, config: TrainingConfig, start: Start | None, ema: float = 0.0
) -> tuple[Engine, WeightAverage | None]:
    """The engine of a run and, where `ema` is not 0, the moving average of its weights. Collective."""
    engine = build(config)
    average = WeightAverage(engine, ema) if ema else None
    if start:
        commit, facts = start
        averages = {AVERAGE: average.parts} if average else {}
        engine.load(commit, **averages)
        if average and facts.schema < RESHARDING:
            average.load_shards(commit)
    return engine, average
