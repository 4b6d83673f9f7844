"""Fine-tuning: what it gives to the loop, and its parts in the order in which they depend on each other."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from tqdm import tqdm

from bevt_ds.batch import LabelledBatch
from bevt_ds.config.samples import ViewsConfig
from bevt_ds.config.schema import FinetuneConfig
from bevt_ds.data.labelled_loader import LabelledLoader
from bevt_ds.data.labels import Classes
from bevt_ds.eval.metrics import Scores
from bevt_ds.eval.videos import each_video
from bevt_ds.model.arch import SwinArch
from bevt_ds.model.presets import create_classifier, require_same_sizes
from bevt_ds.runtime import run_dir
from bevt_ds.runtime.ema import WeightAverage
from bevt_ds.runtime.engine import Engine
from bevt_ds.runtime.flops import encoder_macs, training_flops
from bevt_ds.runtime.graphs import make_graphs
from bevt_ds.runtime.optim import layer_decay_groups, learning_rate
from bevt_ds.runtime.pieces import AVERAGE
from bevt_ds.runtime.run_log import RunLog
from bevt_ds.train.classification import classification_loss
from bevt_ds.train.loop import run_training
from bevt_ds.train.mixup import Mixing
from bevt_ds.train.nonfinite import require_finite_export
from bevt_ds.train.task import Setup, Task

BEST_SCORES = "scores.json"


def finetune(config: FinetuneConfig, ds_values: Mapping[str, Any], notes: Sequence[str], given: Collection[str]) -> int:
    """A whole run; returns the exit code. See `run_training`."""
    return run_training(config, ds_values, notes, open_finetuning, given)


@dataclass
class Finetuning(Task[FinetuneConfig, LabelledBatch]):
    """Classification of labelled clips. `average`, `mixing`: None where the run has none."""

    loader: LabelledLoader
    average: WeightAverage | None
    mixing: Mixing | None
    shown: ClassVar[Mapping[str, str]] = {"loss": ".3f", "acc": ".1%"}

    def prepare(self, batch: LabelledBatch, step: int, micro_step: int) -> LabelledBatch:
        """Mixed, if the run mixes clips; `labels` are then shares of classes, float (B,K)."""
        if not self.mixing:
            return batch
        part = micro_step * self.ranks.world + self.ranks.rank
        clips, targets = self.mixing(batch.pixels, batch.labels, step, part)
        return replace(batch, pixels=clips, labels=targets)

    def forward(self, batch: LabelledBatch, step: int, micro_step: int) -> tuple[Tensor, Mapping[str, Tensor]]:
        logits = self.engine.forward(batch.pixels, batch.sample_keys)
        loss, metrics = classification_loss(logits, batch.labels, self.config.train.label_smoothing)
        return loss / batch.count, metrics

    def metrics(self, totals: Mapping[str, float], step: int) -> dict[str, float]:
        means = {"loss": totals["loss"] / totals["clips"], "acc": totals["hits"] / totals["clips"]}
        return {**means, "epoch": (step + 1) / self.loader.steps_an_epoch}

    def after_step(self) -> None:
        if self.average:
            self.average.update()

    def every_so_often(self, step: int, log: RunLog) -> None:
        """Validate every train.val_every epochs, and after the last step."""
        if self.is_validated(step):
            record_validation(self, log, step)

    def make_up(self, step: int, log: RunLog) -> None:
        """The validation, if a signal has ended it."""
        if self.is_validated(step) and not log.has(step, "val_top1"):
            record_validation(self, log, step)

    def is_validated(self, step: int) -> bool:
        done, every = step + 1, self.config.train.val_every * self.loader.steps_an_epoch
        return bool(self.config.data.val) and (done % every == 0 or done == self.steps)

    @property
    def fingerprint(self) -> str:
        """The classes' names are part of the data."""
        return data_digest(self.loader)

    def averaged(self) -> AbstractContextManager[None]:
        """What is validated and exported: the moving average where the run keeps one, else the weights themselves."""
        return self.average.applied() if self.average else nullcontext()

    def averages(self) -> dict[str, list[Tensor]]:
        return {AVERAGE: self.average.parts} if self.average else {}

    def describe(self) -> str:
        loader = self.loader
        videos = sum(map(len, loader.val_shards))
        validation = f"{videos:,} for validation" if loader.val_shards else "none for validation"
        return (
            f"{loader.videos:,} training videos of {len(loader.classes)} classes, {validation};"
            f" {self.steps:,} steps, {loader.steps_an_epoch:,} an epoch"
        )


@contextmanager
def open_finetuning(setup: Setup[FinetuneConfig]) -> Iterator[Finetuning]:
    """Loader, engine and moving average of a run; every label is checked."""
    config = setup.config
    if config.init_from and setup.start is None:
        require_same_sizes(config.model.name, config.init_from)
    with LabelledLoader(config.data, config.train, **setup.loading) as loader:
        steps = config.train.steps or config.train.epochs * loader.steps_an_epoch
        build = partial(make_engine, setup=setup, loader=loader, steps=steps)
        engine, average = setup.begin_engine(build, data_digest(loader), config.optim.ema)
        mixing = make_mixing(config, loader.classes)
        yield Finetuning(setup, loader, engine, steps, step_flops(config, engine), average, mixing)


def data_digest(loader: LabelledLoader) -> str:
    """What identifies the samples and their classes."""
    return hashlib.sha256(repr((loader.fingerprint, loader.classes.names)).encode()).hexdigest()


def make_mixing(config: FinetuneConfig, classes: Classes) -> Mixing | None:
    """Mixup and cutmix, if the run wants any."""
    train = config.train
    return Mixing(train.mixup, train.cutmix, len(classes), train.seed) if train.mixup or train.cutmix else None


def make_engine(config: FinetuneConfig, setup: Setup[FinetuneConfig], loader: LabelledLoader, steps: int) -> Engine:
    """The classifier under DeepSpeed, as a new run begins."""
    options, names = asdict(config.model), loader.classes.names
    with torch.device("meta"):
        model = create_classifier(options.pop("name"), len(names), classes=names, **options)
    groups = layer_decay_groups(model, model.arch["depths"], config.optim)
    epoch = loader.steps_an_epoch
    warmup = config.optim.warmup_epochs * epoch
    schedule = partial(learning_rate, optim=config.optim, steps=steps, warmup=warmup, steps_an_epoch=epoch)
    width, modules = SwinArch.of(model.arch).width, setup.begin_model(model)
    engine = Engine(model, config, setup.ds_values, setup.ranks, width, groups, schedule, modules)
    engine.module.encoder.replay = make_graphs(config, engine.stage, engine.ranks)
    return engine


def step_flops(config: FinetuneConfig, engine: Engine) -> float:
    """Training FLOPs of one step; the head's are left out."""
    data = config.data
    macs = encoder_macs(SwinArch.of(engine.module.arch), (data.frames, data.size, data.size)).total()
    return float(training_flops(config.train.global_clips * macs))


def record_validation(task: Finetuning, log: RunLog, step: int) -> None:
    """Validate, write a line of log.jsonl, and keep the weights if none did better before. Collective."""
    main, run_folder = task.ranks.is_main, task.setup.folder
    with task.averaged():
        scores = validate(task)
        if main:
            run_dir.restore(run_folder / run_dir.BEST)
        best = read_scores(run_folder / run_dir.BEST) if main else None
        if task.ranks.broadcast(best is None or scores["top1"] > best["top1"]):
            best = {"step": step, **scores}
            state = task.engine.weights()
            require_finite_export(state, task.ranks, step)
            with task.ranks.writing(run_folder / run_dir.BEST):
                if main:
                    keep_best(task, state, best)
    log.write(step, {f"val_{name}": value for name, value in scores.items()})
    if main:
        tqdm.write(f"step {step}: validation {as_text(scores)}")
    with task.ranks.writing(run_folder / run_dir.SUMMARY):
        if main:
            run_dir.write_json(run_folder / run_dir.SUMMARY, {"best": best, "last": {"step": step, **scores}})


def validate(task: Finetuning) -> dict[str, float]:
    """Scores on the validation videos: one clip of each, centre crop, short side as in training. Collective.

    Raises:
        Stopped: the run is to stop.
    """
    data, loader = task.config.data, task.loader
    views = ViewsConfig(clips=1, crops=1, short_side=data.short_side, micro_videos=task.config.train.micro_clips)
    scores = Scores(len(loader.classes))
    batches = each_video(data, views, loader.val_shards, loader.classes, task.setup.folder, task.ranks, "validation")
    with task.engine.evaluating():
        for batch in batches:
            task.setup.stop.check(task.ranks)
            logits = task.engine.forward(batch.pixels.flatten(0, 1), None)
            scores.add(logits.float().softmax(-1), batch.labels)
    return scores.summed(task.ranks).result()


def keep_best(task: Finetuning, state: dict[str, Tensor], scores: dict[str, float]) -> None:
    """Replace best/ by these weights and what they scored. On rank 0."""

    def write(folder: Path) -> None:
        task.engine.module.save_pretrained(folder, state, task.trained_streams)
        run_dir.write_json(folder / BEST_SCORES, scores)

    run_dir.replace_folder(task.setup.folder / run_dir.BEST, write)


def read_scores(best: Path) -> dict[str, float] | None:
    """What the best weights so far scored, or None."""
    path = best / BEST_SCORES
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def as_text(scores: dict[str, float]) -> str:
    """Scores as people read them."""
    names = [name for name in ("top1", "top5", "mean_class_accuracy") if name in scores]
    shares = ", ".join(f"{name} {scores[name]:.2%}" for name in names)
    return f"{shares} of {scores['videos']:,} videos"
