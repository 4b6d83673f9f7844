"""What a kind of training gives to the loop: a `Task`, and the `Setup` of the run that it is made from."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import KW_ONLY, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor, nn

from bevt_ds.batch import Batch
from bevt_ds.config.schema import TrainingConfig, UnlabelledConfig
from bevt_ds.config.validate import zero_stage
from bevt_ds.data.loader import BackgroundLoader, Loader, eval_batches
from bevt_ds.folders import weights_of
from bevt_ds.model.weights import PretrainedMixin, fit_init
from bevt_ds.runtime import checkpoint, run_dir
from bevt_ds.runtime.background import Commits
from bevt_ds.runtime.continuing import Build, Start, begin_engine
from bevt_ds.runtime.distributed import Ranks
from bevt_ds.runtime.ema import WeightAverage
from bevt_ds.runtime.engine import Engine
from bevt_ds.runtime.optim import learning_rate
from bevt_ds.runtime.run_log import RunLog
from bevt_ds.runtime.signals import StopRequest

ConfigT = TypeVar("ConfigT", bound=TrainingConfig)
BatchT = TypeVar("BatchT")  # has `to(device, non_blocking=...)`
StreamsT = TypeVar("StreamsT", bound=UnlabelledConfig)


@dataclass(frozen=True)
class Setup(Generic[ConfigT]):
    """What is known of a run before its loader and engine are made. `start`: the checkpoint that it continues from."""

    config: ConfigT
    ds_values: Mapping[str, Any]  # the DeepSpeed JSON
    folder: Path
    ranks: Ranks
    commits: Commits
    start: Start | None = None
    changes: tuple[checkpoint.Change, ...] = ()  # what has been overridden on resume so far
    loader_state: dict[str, Any] | None = None  # what the loaders of the run that is continued pass on
    stop: StopRequest = field(default_factory=StopRequest)

    @property
    def first_step(self) -> int:
        """The number of the first update, from 0."""
        return self.start[1].step if self.start else 0

    @property
    def first_position(self) -> int:
        """The step of the plan whose samples the first update takes."""
        return self.first_step + self.config.train.skip_steps

    @property
    def loading(self) -> dict[str, Any]:
        """What every loader is told of the run: its ranks, where it begins, and where bad samples are listed."""
        start = {"start_step": self.first_position, "state": self.loader_state}
        return {"ranks": self.ranks, "device": self.ranks.device, "folder": self.folder, **start}

    def begin_model(self, model: PretrainedMixin, **options: Any) -> Iterator[tuple[str, nn.Module]]:
        """The modules of a model on the meta device by name, each with its values, which are made as it comes.

        They are those of the seed and, in a new run, of `init_from`; see fit_init's options.

        Raises:
            UserError: `init_from` does not fit.
        """
        state = {}
        if self.config.init_from and self.start is None:
            state, report = fit_init(model, weights_of(self.config.init_from, "init_from"), **options)
            if self.ranks.is_main:
                print(report, flush=True)
        return model.materialise(torch.Generator().manual_seed(self.config.train.seed), state)

    def begin_engine(self, build: Build, fingerprint: str, ema: float = 0.0) -> tuple[Engine, WeightAverage | None]:
        """The engine, and the average of its weights if `ema` is not 0, as the run begins or continues. Collective.

        fingerprint: of the data that the run reads.

        Raises:
            UserError: the checkpoint is of other data or another configuration.
        """
        if self.start:
            folder, saved = self.start
            stage = zero_stage(self.ds_values)
            now = replace(saved, world=self.ranks.world, stage=stage, config=self.config, data=fingerprint)
            checkpoint.check_continues(saved, now, folder)
        return begin_engine(build, self.config, self.start, ema)


@dataclass
class Task(ABC, Generic[ConfigT, BatchT]):
    """What one kind of training gives to the loop. `steps` and `step_flops` are of the whole run and of one step."""

    setup: Setup[ConfigT]
    loader: BackgroundLoader
    engine: Engine
    steps: int
    step_flops: float
    shown: ClassVar[Mapping[str, str]] = {"loss": ".3f"}  # fields of a log line on the progress bar, and their formats

    @property
    def config(self) -> ConfigT:
        return self.setup.config

    @property
    def ranks(self) -> Ranks:
        return self.setup.ranks

    def prepare(self, batch: BatchT, step: int, micro_step: int) -> BatchT:
        """A micro-batch, on the device, as the network is given it: what a bundle of a non-finite step holds."""
        return batch

    @abstractmethod
    def forward(self, batch: BatchT, step: int, micro_step: int) -> tuple[Tensor, Mapping[str, Tensor]]:
        """A prepared micro-batch's share of the step's loss, and sums for the log line; both on the device."""

    @abstractmethod
    def metrics(self, totals: Mapping[str, float], step: int) -> dict[str, float]:
        """Fields of a log line, "loss" among them, from a step's sums over the global batch."""

    def after_step(self) -> None:
        """What follows every step, also one that was skipped."""

    def is_due(self, step: int) -> bool:
        """Whether the step has a log line of its own, whatever train.log_every says."""
        return False

    def measurements(self, step: int) -> dict[str, float]:
        """More fields of a log line, whose time is not the step's. Collective."""
        return {}

    def every_so_often(self, step: int, log: RunLog) -> None:
        """What follows some steps, such as a validation; its time is not the step's. Collective.

        Stopped: it was given up because the run is to stop; `make_up` does it when the run goes on.
        """

    def make_up(self, step: int, log: RunLog) -> None:
        """What was given up after `step`, the last one before the run goes on. Collective."""

    @property
    def fingerprint(self) -> str:
        """Digest of the data that a continued run must find again."""
        return self.loader.fingerprint

    @property
    def trained_streams(self) -> list[str]:
        """The streams that the run trains, of "video" and "image"."""
        return ["video"]

    @property
    def frozen_files(self) -> Mapping[str, str]:
        """The files of frozen weights that the task reads, by what they are, such as a tokenizer."""
        return {}

    def averages(self) -> dict[str, list[Tensor]]:
        """Further tensors like the engine's masters that a checkpoint holds, by what they are."""
        return {}

    def rest(self) -> Callable[[Path], None]:
        """What writes the rest of a checkpoint into a folder: as it is now, though it is called later, in a thread."""
        return lambda folder: None

    def load(self, folder: Path) -> None:
        """Read what `rest` wrote, once the engine is loaded. Collective."""

    def describe(self) -> str:
        """The size of the task in one line, or nothing."""
        return ""

    def finish(self, batches: Iterator[BatchT]) -> str | None:
        """What follows the last step; returns why the run has not learned, or None. Collective."""
        return None


@dataclass
class StreamsTask(Task[StreamsT, Batch]):
    """A training on streams of clips and images.

    shown_batch: the held-out samples, on the host, that are drawn at each checkpoint; None where nothing is held out.
    """

    loader: Loader
    _: KW_ONLY
    shown_batch: Batch | None = None

    @abstractmethod
    def draw(self, batch: Batch, path: Path) -> None:
        """Write what has been learned of the first samples of a batch. Collective."""

    def every_so_often(self, step: int, log: RunLog) -> None:
        """Draw the same samples at each checkpoint but the last, which `finish` draws."""
        done = step + 1
        if self.shown_batch is not None and done % self.config.train.checkpoint_every == 0 and done != self.steps:
            self.draw(self.shown_batch, self.setup.folder / run_dir.PANELS / f"{checkpoint.name_of(done)}.png")

    @property
    def trained_streams(self) -> list[str]:
        return trained_streams(self.config)

    def describe(self) -> str:
        samples = " and ".join(f"{n:,} {kind}s" for kind, n in self.loader.samples.items())
        epoch = self.loader.steps_an_epoch
        steps = f"{self.steps:,} steps, {epoch:,.1f} an epoch: {self.steps / epoch:,.2f} epochs"
        return f"{samples} to train on, read by {self.loader.place}; {steps}"

    def held_out(self) -> list[Batch]:
        """All held-out samples of this rank; rank 0 lists those that are bad."""
        folder = self.setup.folder if self.ranks.is_main else None
        return list(eval_batches(self.config, device=self.ranks.device, folder=folder))

    def write_summary(self, values: Mapping[str, Any], text: str) -> None:
        """Write and print how good the result is, if anything was held out. Collective."""
        path = self.setup.folder / run_dir.SUMMARY
        with self.ranks.writing(path):
            if self.ranks.is_main and values:
                run_dir.write_json(path, values)
        if self.ranks.is_main and values:
            print(f"\n{text}", flush=True)


def first_held_out(setup: Setup[StreamsT]) -> Batch | None:
    """The held-out samples that are drawn. Shards that cannot be evaluated are found here, before the first step."""
    with closing(eval_batches(setup.config, folder=setup.folder if setup.ranks.is_main else None)) as held_out:
        return next(held_out, None)


def steps_of(config: UnlabelledConfig, loader: Loader) -> int:
    """The steps of the whole run."""
    return config.train.steps or math.ceil(config.train.epochs * loader.steps_an_epoch)


def schedule_of(config: UnlabelledConfig, steps: int) -> Callable[[int], float]:
    """The learning rate of update number n of `steps`, from 0."""
    return partial(learning_rate, optim=config.optim, steps=steps, warmup=config.optim.warmup_steps)


def trained_streams(config: UnlabelledConfig) -> list[str]:
    """The streams that the run trains."""
    sizes = {"video": config.train.global_clips, "image": config.train.global_images}
    return [name for name, size in sizes.items() if size]
