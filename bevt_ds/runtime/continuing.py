"""How a run begins or continues: from which checkpoint, with which configuration, and with what engine."""

from __future__ import annotations

import gc
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from bevt_ds.config.parse import set_value
from bevt_ds.config.schema import TrainingConfig, TrainingT
from bevt_ds.errors import UserError
from bevt_ds.runtime import checkpoint, run_dir
from bevt_ds.runtime.distributed import Ranks
from bevt_ds.runtime.ema import WeightAverage
from bevt_ds.runtime.engine import Engine, WholeState

Start = tuple[Path, checkpoint.Facts]  # a checkpoint and what it says of its run
Build = Callable[..., Engine]  # of a configuration and, by name, the `weights` to begin with in place of drawn ones


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


def print_changes(changes: Sequence[checkpoint.Change]) -> None:
    """Say what the run overrides, and since when."""
    for change in changes:
        print(f"from step {change['step']} on, {change['key']}: {change['from']} -> {change['to']}", flush=True)


def require_steps(first_step: int, steps: int) -> None:
    """UserError: the run has gone further than it is now to go."""
    if first_step > steps:
        raise UserError(f"the run has done {first_step} steps, and is now to end after {steps}: give more steps.")


def begin_engine(
    build: Build, config: TrainingConfig, start: Start | None, ema: float = 0.0
) -> tuple[Engine, WeightAverage | None]:
    """The engine of a run and, where `ema` is not 0, the moving average of its weights. Collective.

    DeepSpeed's shards fit the precision that wrote them. In another, an engine of that precision reads them and hands
    everything over by name, whole, through the memory of the CPU: 12 bytes for each parameter on every rank, once.
    """
    if start is None or start[1].config.train.precision == config.train.precision:
        return _read(build, config, start and start[0], ema)
    before = set_value(config, "train.precision", start[1].config.train.precision)
    state, averages = _whole(*_read(build, before, start[0], ema))
    gc.collect()  # the engine that read is full of cycles, and the next one needs its memory
    engine, average = build(config, weights=state.weights), None
    if averages:
        engine.take_weights(averages)
        average = WeightAverage(engine, ema)
    engine.take_weights(state.weights)
    engine.take_moments(state)
    return engine, average


def _read(build: Build, config: TrainingConfig, commit: Path | None, ema: float) -> tuple[Engine, WeightAverage | None]:
    engine = build(config)
    average = WeightAverage(engine, ema) if ema else None
    if commit:
        engine.load(commit)
        if average:
            average.load(commit)
    return engine, average


def _whole(engine: Engine, average: WeightAverage | None) -> tuple[WholeState, dict[str, Tensor] | None]:
    """What an engine holds, and the averages of its weights."""
    state = engine.whole_state()
    if average is None:
        return state, None
    with average.applied():
        return state, engine.whole_state().weights
