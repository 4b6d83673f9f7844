"""The engine with which a run begins, or goes on where a checkpoint ends, in the same precision or in another."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from bevt_ds.config.parse import set_value
from bevt_ds.config.schema import TrainingConfig
from bevt_ds.runtime.checkpoint import Facts
from bevt_ds.runtime.ema import WeightAverage
from bevt_ds.runtime.engine import Engine, WholeState

Build = Callable[..., Engine]  # of a configuration and, by name, the `weights` to begin with in place of drawn ones


def begin_engine(
    build: Build, config: TrainingConfig, start: tuple[Path, Facts] | None, ema: float = 0.0
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
