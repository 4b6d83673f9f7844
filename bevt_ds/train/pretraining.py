"""Pretraining: what it gives to the loop, and its parts in the order in which they depend on each other."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from bevt_ds.batch import Batch
from bevt_ds.config.schema import Config
from bevt_ds.data.loader import Loader, eval_batches
from bevt_ds.eval.held_out import as_json, as_table, shortfall
from bevt_ds.eval.online_probe import OnlineProbe
from bevt_ds.model.arch import SwinArch
from bevt_ds.model.presets import create_model, require_same_sizes
from bevt_ds.model.tokenizers import DalleTokenizer
from bevt_ds.runtime import checkpoint, run_dir
from bevt_ds.runtime.engine import DTYPES, Engine
from bevt_ds.runtime.graphs import CudaBackend, make_graphs
from bevt_ds.runtime.logging import expected_step_flops, step_metrics
from bevt_ds.runtime.optim import freeze_unused, learning_rate, parameter_groups
from bevt_ds.runtime.run_log import RunLog
from bevt_ds.runtime.tokenizer_graph import ReplayedTokenizer
from bevt_ds.train.loop import run_training
from bevt_ds.train.targets import IdTargets, Targets, open_targets
from bevt_ds.train.task import Setup, Task


def pretrain(config: Config, ds_values: Mapping[str, Any], notes: Sequence[str], given: Collection[str]) -> int:
    """A whole run; returns the exit code. See `run_training`."""
    return run_training(config, ds_values, notes, open_pretraining, given)


@dataclass
class Pretraining(Task[Config, Batch]):
    """Masked image modelling, or joint masked image and video modelling.

    probe: None where the run has none. shown_batch: the held-out samples, on the host, whose predictions are drawn at
    each checkpoint; None where nothing is held out.
    """

    loader: Loader
    targets: Targets
    probe: OnlineProbe | None
    shown_batch: Batch | None = None
    shown: ClassVar[Mapping[str, str]] = dict.fromkeys(("loss_video", "loss_image", "probe_top1"), ".3f")

    def prepare(self, batch: Batch, step: int, micro_step: int) -> Batch:
        """With its targets."""
        return self.targets.fill(batch)

    def forward(self, batch: Batch, step: int, micro_step: int) -> tuple[Tensor, Mapping[str, Tensor]]:
        if self.is_due(step):
            self.probe.count(batch)
        output = self.engine.forward(batch)
        return output.loss, output.metrics

    def metrics(self, totals: Mapping[str, float], step: int) -> dict[str, float]:
        """UserError: targets outside the head's vocabulary since the last line."""
        self.targets.require(totals, f"since the last log line (now step {step})")
        return step_metrics(totals) | {"epoch": (step + 1) / self.loader.steps_an_epoch}

    def is_due(self, step: int) -> bool:
        return self.probe is not None and self.probe.due(step)

    def measurements(self, step: int) -> dict[str, float]:
        return self.probe.measure(self.engine) if self.is_due(step) else {}

    def every_so_often(self, step: int, log: RunLog) -> None:
        """Draw the predictions of the same samples at each checkpoint but the last, which `finish` draws."""
        done = step + 1
        if self.shown_batch is not None and done % self.config.train.checkpoint_every == 0 and done != self.steps:
            self.draw(self.shown_batch, self.setup.folder / run_dir.PANELS / f"{checkpoint.name_of(done)}.png")

    def draw(self, batch: Batch, path: Path) -> None:
        """Write what the network predicts for the first samples of a batch. Collective."""
        filled = self.targets.fill(batch.to(self.ranks.device))
        with self.ranks.writing(path):
            self.targets.draw(self.engine, filled, path)

    @property
    def trained_streams(self) -> list[str]:
        return trained_streams(self.config)

    @property
    def frozen_files(self) -> Mapping[str, str]:
        return self.targets.files

    def describe(self) -> str:
        trained = " and ".join(f"{n:,} {kind}s" for kind, n in self.loader.samples.items())
        epoch = self.loader.steps_an_epoch
        length = f"{trained} to train on; {self.steps:,} steps, {epoch:,.1f} an epoch: {self.steps / epoch:,.2f} epochs"
        return "\n".join(filter(None, [length, self.targets.describe()]))

    def finish(self, batches: Iterator[Batch]) -> str | None:
        """Write samples.png, measure the held-out losses, and print them with their baselines."""
        folder, ranks = self.setup.folder, self.ranks
        held_out = list(eval_batches(self.config, device=ranks.device, folder=folder if ranks.is_main else None))
        shown = held_out[0] if held_out else next(batches)
        self.draw(shown, folder / run_dir.SAMPLES)
        summaries = self.targets.evaluate(self.engine, held_out)
        with ranks.writing(folder / run_dir.SUMMARY):
            if ranks.is_main and summaries:
                run_dir.write_json(folder / run_dir.SUMMARY, as_json(summaries))
        if ranks.is_main and summaries:
            print(f"\n{as_table(summaries, judged_on(self.config))}", flush=True)
        return shortfall(summaries, self.config.train.min_gain, judged_on(self.config))


@contextmanager
def open_pretraining(setup: Setup[Config]) -> Iterator[Pretraining]:
    """Targets, probe, loader and engine of a run. Shards that cannot be evaluated are found before the first step."""
    config, ranks = setup.config, setup.ranks
    ledger = setup.folder if ranks.is_main else None
    if config.init_from and setup.start is None:
        require_same_sizes(config.model.name, config.init_from)
    targets = open_targets(config, ranks.device, DTYPES[config.train.precision])
    with closing(eval_batches(config, folder=ledger)) as held_out:
        shown = next(held_out, None)
    with Loader(config, **setup.loading) as loader:
        steps = config.train.steps or math.ceil(config.train.epochs * loader.steps_an_epoch)
        probe = OnlineProbe(config, targets.vocabulary, ranks, steps) if config.probe.every else None
        build = partial(make_engine, setup=setup, head=targets.head, steps=steps)
        engine, _ = setup.begin_engine(build, loader.fingerprint)
        targets.require_head(engine.module.arch)
        replay_tokenizer(targets, engine, config)
        flops = expected_step_flops(config, engine.module.arch)
        yield Pretraining(setup, loader, engine, steps, flops, targets, probe, shown)


def judged_on(config: Config) -> dict[str, str]:
    """By stream, which data its held-out figures are of."""
    data, named = config.data, {"video": config.data.eval_videos, "image": config.data.eval_images}
    return {
        stream: f"data.eval_{stream}s={shards}" if shards else f"{data.holdout:.1%} of data.{stream}s={own}, held out"
        for (stream, shards), own in zip(named.items(), (data.videos, data.images), strict=True)
    }


def trained_streams(config: Config) -> list[str]:
    """The streams that the run trains."""
    sizes = {"video": config.train.global_clips, "image": config.train.global_images}
    return [name for name, size in sizes.items() if size]


def make_engine(config: Config, setup: Setup[Config], head: Mapping[str, int], steps: int) -> Engine:
    """The model under DeepSpeed, as a new run begins. head: BEVT's arguments for it."""
    options = asdict(config.model)
    with torch.device("meta"):
        model = create_model(options.pop("name"), **head, **options)
    freeze_unused(model, trained_streams(config))
    groups = parameter_groups(model, config.optim.weight_decay)
    schedule = partial(learning_rate, optim=config.optim, steps=steps, warmup=config.optim.warmup_steps)
    modules, width = setup.begin_model(model, head=config.init_head), SwinArch.of(model.arch).width
    engine = Engine(model, config, setup.ds_values, setup.ranks, width, groups, schedule, modules)
    engine.module.encoder.replay = make_graphs(config, engine.stage, engine.ranks)
    return engine


def replay_tokenizer(targets: Targets, engine: Engine, config: Config) -> None:
    """Encode with a CUDA graph where the encoder has them; other tokenizers than DALL-E's run as they are written."""
    if (
        engine.module.encoder.replay
        and isinstance(targets, IdTargets)
        and isinstance(targets.tokenizer, DalleTokenizer)
    ):
        say = partial(print, flush=True) if engine.ranks.is_main else lambda line: None
        targets.encoder = ReplayedTokenizer(targets.tokenizer, config.train.graphs, CudaBackend(), say)
