"""Pretraining: what it gives to the loop, and its parts in the order in which they depend on each other."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from bevt_ds.batch import DTYPES, Batch
from bevt_ds.config.schema import Config
from bevt_ds.data.loader import Loader
from bevt_ds.eval.held_out import as_json, as_table, shortfall
from bevt_ds.eval.online_probe import OnlineProbe
from bevt_ds.model.arch import SwinArch
from bevt_ds.model.presets import create_model, require_same_sizes
from bevt_ds.model.tokenizers import DalleTokenizer
from bevt_ds.runtime import run_dir
from bevt_ds.runtime.engine import Engine
from bevt_ds.runtime.graphs import CudaBackend, make_graphs
from bevt_ds.runtime.logging import expected_step_flops, step_metrics
from bevt_ds.runtime.optim import freeze_unused, parameter_groups
from bevt_ds.runtime.tokenizer_graph import ReplayedTokenizer
from bevt_ds.train.loop import run_training
from bevt_ds.train.targets import IdTargets, Targets, open_targets
from bevt_ds.train.task import Setup, StreamsTask, first_held_out, schedule_of, steps_of, trained_streams


def pretrain(config: Config, ds_values: Mapping[str, Any], notes: Sequence[str], given: Collection[str]) -> int:
    """A whole run; returns the exit code. See `run_training`."""
    return run_training(config, ds_values, notes, open_pretraining, given)


@dataclass
class Pretraining(StreamsTask[Config]):
    """Masked image modelling, or joint masked image and video modelling.

    probe: None where the run has none.
    """

    targets: Targets
    probe: OnlineProbe | None
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

    def draw(self, batch: Batch, path: Path) -> None:
        """Write what the network predicts for the first samples of a batch. Collective."""
        filled = self.targets.fill(batch.to(self.ranks.device))
        with self.ranks.writing(path):
            self.targets.draw(self.engine, filled, path)

    @property
    def frozen_files(self) -> Mapping[str, str]:
        return self.targets.files

    def describe(self) -> str:
        return "\n".join(filter(None, [super().describe(), self.targets.describe()]))

    def finish(self, batches: Iterator[Batch]) -> str | None:
        """Write samples.png, measure the held-out losses, and print them with their baselines."""
        held_out = self.held_out()
        self.draw(held_out[0] if held_out else next(batches), self.setup.folder / run_dir.SAMPLES)
        summaries = self.targets.evaluate(self.engine, held_out)
        self.write_summary(as_json(summaries), as_table(summaries, judged_on(self.config)))
        return shortfall(summaries, self.config.train.min_gain, judged_on(self.config))


@contextmanager
def open_pretraining(setup: Setup[Config]) -> Iterator[Pretraining]:
    """Targets, probe, loader and engine of a run. Shards that cannot be evaluated are found before the first step."""
    config, ranks = setup.config, setup.ranks
    if config.init_from and setup.start is None:
        require_same_sizes(config.model.name, config.init_from)
    targets = open_targets(config, ranks.device, DTYPES[config.train.precision])
    shown = first_held_out(setup)
    with Loader(config, **setup.loading) as loader:
        steps = steps_of(config, loader)
        probe = OnlineProbe(config, targets.vocabulary, ranks, steps) if config.probe.every else None
        build = partial(make_engine, setup=setup, head=targets.head, steps=steps)
        engine, _ = setup.begin_engine(build, loader.fingerprint)
        targets.require_head(engine.module.arch)
        replay_tokenizer(targets, engine, config)
        flops = expected_step_flops(config, engine.module.arch)
        yield Pretraining(setup, loader, engine, steps, flops, targets, probe, shown_batch=shown)


def judged_on(config: Config) -> dict[str, str]:
    """By stream, which data its held-out figures are of."""
    data, named = config.data, {"video": config.data.eval_videos, "image": config.data.eval_images}
    return {
        stream: f"data.eval_{stream}s={shards}" if shards else f"{data.holdout:.1%} of data.{stream}s={own}, held out"
        for (stream, shards), own in zip(named.items(), (data.videos, data.images), strict=True)
    }


def make_engine(config: Config, setup: Setup[Config], head: Mapping[str, int], steps: int) -> Engine:
    """The model under DeepSpeed, as a new run begins. head: BEVT's arguments for it."""
    options = asdict(config.model)
    with torch.device("meta"):
        model = create_model(options.pop("name"), **head, **options)
    freeze_unused(model, trained_streams(config))
    groups = parameter_groups(model, config.optim.weight_decay)
    modules, width = setup.begin_model(model, head=config.init_head), SwinArch.of(model.arch).width
    engine = Engine(model, config, setup.ds_values, setup.ranks, width, groups, schedule_of(config, steps), modules)
    engine.module.encoder.replay = make_graphs(config, engine.stage, engine.ranks)
    return engine


def replay_tokenizer(targets: Targets, engine: Engine, config: Config) -> None:
    """Encode with a CUDA graph where the encoder has them; other tokenizers than DALL-E's run as they are written.

    Of a run on kept ids nothing is encoded but what is held out.
    """
    if (
        engine.module.encoder.replay
        and not config.tokens
        and isinstance(targets, IdTargets)
        and isinstance(targets.tokenizer, DalleTokenizer)
    ):
        say = partial(print, flush=True) if engine.ranks.is_main else lambda line: None
        agree, switch = engine.ranks.all_hold, config.train.graphs
        replayed = ReplayedTokenizer(targets.tokenizer, switch, CudaBackend(), agree, say)
        targets.encoder, targets.after_fill = replayed, replayed.after_micro_step
