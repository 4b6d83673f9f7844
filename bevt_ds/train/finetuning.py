"""Fine-tuning: its loop, and under it the set-up in the order in which things depend on each other.

What pretraining.py is to pretraining; the engine, the loader's manner, checkpoints and the log are the same.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from bevt_ds.batch import LabelledBatch
from bevt_ds.config.schema import FinetuneConfig, ViewsConfig
from bevt_ds.config.validate import micro_steps
from bevt_ds.data.labelled_loader import LabelledLoader, check_labelled
from bevt_ds.data.labels import Classes
from bevt_ds.data.ledger import merge_states
from bevt_ds.eval.metrics import Scores
from bevt_ds.eval.videos import each_video
from bevt_ds.model.presets import create_classifier
from bevt_ds.model.weights import load_init
from bevt_ds.runtime import checkpoint, run_dir
from bevt_ds.runtime.distributed import Ranks
from bevt_ds.runtime.ema import WeightAverage
from bevt_ds.runtime.engine import Engine, start_ranks
from bevt_ds.runtime.flops import Sizes, backbone_macs, training_flops
from bevt_ds.runtime.logging import RunLog, SpeedMeter, StepSums
from bevt_ds.runtime.optim import layer_decay_groups, learning_rate
from bevt_ds.runtime.runs import find_start, kernel_provider, report_bad, report_wait, require_finite
from bevt_ds.train.mixup import Mixing

BEST_SCORES = "scores.json"


@dataclass(frozen=True)
class Run:
    """Everything the loop uses."""

    config: FinetuneConfig
    folder: Path
    ranks: Ranks
    loader: LabelledLoader
    engine: Engine
    average: WeightAverage | None
    mixing: Mixing | None
    first_step: int
    steps: int  # of the whole run


def train_step(run: Run, batches: Iterator[LabelledBatch], step: int) -> StepSums:
    """One optimizer update over the global batch; returns its metrics, still on the device."""
    sums, ranks = StepSums(), run.ranks
    for micro_step in range(micro_steps(run.config, ranks.world)):
        batch = next(batches).to(ranks.device, non_blocking=True)
        clips, targets = batch.pixels, batch.labels
        if run.mixing:
            clips, targets = run.mixing(clips, targets, step, micro_step * ranks.world + ranks.rank)
        logits = run.engine.forward(clips, batch.sample_keys)
        loss, metrics = classification_loss(logits, targets, run.config.train.label_smoothing)
        run.engine.backward(loss / batch.count)
        run.engine.step(step)
        sums.add(metrics)
    if run.average:
        run.average.update()
    return sums


def classification_loss(logits: Tensor, targets: Tensor, smoothing: float) -> tuple[Tensor, dict[str, Tensor]]:
    """Cross-entropy summed over clips, and the sums that a log line needs.

    logits (B,K); targets: classes int64 (B,), or shares of classes float (B,K). With `smoothing` e a target's class
    counts 1 - e + e/K and every other e/K, as in the original (label_smooth_eps of mmaction2's base head). A clip is
    right where the best class is the target's, or that with the largest share.
    """
    logits = logits.float()
    loss = F.cross_entropy(logits, targets, label_smoothing=smoothing, reduction="sum")
    wanted = targets if targets.ndim == 1 else targets.argmax(-1)
    hits = (logits.argmax(-1) == wanted).sum()
    return loss, {"loss": loss.detach(), "hits": hits, "clips": torch.full_like(hits, len(logits))}


def train(run: Run, batches: Iterator[LabelledBatch], log: RunLog, speed: SpeedMeter) -> None:
    """Every step that is left, with its log lines, validations and checkpoints."""
    train = run.config.train
    steps = range(run.first_step, run.steps)
    with tqdm(steps, initial=run.first_step, total=run.steps, unit="step", disable=not run.ranks.is_main) as bar:
        for step in bar:
            sums = train_step(run, batches, step)
            speed.steps += 1
            done = step + 1
            if done % train.log_every == 0 or done == run.steps:
                bar.set_postfix_str(write_line(run, log, speed, sums, step))
            if run.config.data.val and (done % (train.val_every * run.loader.steps_an_epoch) == 0 or done == run.steps):
                with speed.paused():
                    record_validation(run, log, step)
            if done % train.checkpoint_every == 0 or done == run.steps:
                save_checkpoint(run, done)


def write_line(run: Run, log: RunLog, speed: SpeedMeter, sums: StepSums, step: int) -> str:
    """Write the log line of one step; returns the short form for the progress bar. Collective.

    Raises:
        UserError: the loss is not a finite number.
    """
    totals = sums.totals(run.ranks)
    loss, accuracy = totals["loss"] / totals["clips"], totals["hits"] / totals["clips"]
    require_finite(loss, step)
    values: dict[str, Any] = {"loss": loss, "acc": accuracy, "epoch": (step + 1) / run.loader.steps_an_epoch}
    values |= {"lr": run.engine.last_lr, "grad_norm": run.engine.grad_norm()}
    values["optimizer_bytes"] = run.engine.optimizer_bytes()
    values |= speed.read(run.loader.wait_seconds()) | {"bad_samples": run.loader.bad_samples}
    log.write(step, values)
    if run.ranks.is_main:
        report_wait(step, values["data_wait"], run.loader)
    return f"loss {loss:.3f}, acc {accuracy:.1%}"


def record_validation(run: Run, log: RunLog, step: int) -> None:
    """Validate, write a line of log.jsonl, and keep the weights if none did better before. Collective."""
    main, folder = run.ranks.is_main, run.folder / run_dir.BEST
    with averaged(run):
        scores = validate(run)
        best = read_scores(folder) if main else None
        if run.ranks.broadcast(best is None or scores["top1"] > best["top1"]):
            best = {"step": step, **scores}
            state = run.engine.weights()
            if main:
                keep_best(run, state, best)
    log.write(step, {f"val_{name}": value for name, value in scores.items()})
    if main:
        tqdm.write(f"step {step}: validation {as_text(scores)}")
        run_dir.write_json(run.folder / run_dir.SUMMARY, {"best": best, "last": {"step": step, **scores}})


def averaged(run: Run) -> AbstractContextManager[None]:
    """What is validated and exported: the moving average where the run keeps one, else the weights themselves."""
    return run.average.applied() if run.average else nullcontext()


def validate(run: Run) -> dict[str, float]:
    """Scores on the validation videos: one clip of each, centre crop, short side as in training. Collective."""
    data, train, ranks, loader = run.config.data, run.config.train, run.ranks, run.loader
    views = ViewsConfig(clips=1, crops=1, short_side=data.short_side, micro_videos=train.micro_clips)
    scores = Scores(len(loader.classes))
    batches = each_video(data, views, loader.val_shards, loader.classes, run.folder, ranks, "validation")
    with run.engine.evaluating():
        for batch in batches:
            logits = run.engine.forward(batch.pixels.flatten(0, 1), None)
            scores.add(logits.float().softmax(-1), batch.labels)
    return scores.summed(ranks).result()


def keep_best(run: Run, state: dict[str, Tensor], scores: dict[str, float]) -> None:
    """Replace best/ by these weights and what they scored. On rank 0."""

    def write(folder: Path) -> None:
        run.engine.module.save_pretrained(folder, state, ["video"])
        run_dir.write_json(folder / BEST_SCORES, scores)

    run_dir.replace_folder(run.folder / run_dir.BEST, write)


def read_scores(best: Path) -> dict[str, float] | None:
    """What the best weights so far scored, or None."""
    path = best / BEST_SCORES
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def as_text(scores: dict[str, float]) -> str:
    """Scores as people read them."""
    shares = ", ".join(f"{name} {scores[name]:.2%}" for name in ("top1", "top5", "mean_class_accuracy"))
    return f"{shares} of {scores['videos']:,} videos"


def save_checkpoint(run: Run, steps_done: int) -> None:
    """Commit a checkpoint: the engine's shards, the moving average, and the weights on their own. Collective."""

    def write(folder: Path) -> None:
        run.engine.save(folder)
        if run.average:
            run.average.save(folder)
        with averaged(run):
            state = run.engine.weights()
        if run.ranks.is_main:
            run.engine.module.save_pretrained(folder / run_dir.WEIGHTS, state, ["video"])

    root = run.folder / run_dir.CHECKPOINTS
    checkpoint.save(root, facts(run, steps_done), write, run.ranks, run.config.train.keep_checkpoints)


def facts(run: Run, steps_done: int) -> checkpoint.Facts:
    """What a checkpoint says of this run. Collective."""
    skips = merge_states(run.ranks.gather(run.loader.state()))
    data = hashlib.sha256(repr((run.loader.fingerprint, run.loader.classes.names)).encode()).hexdigest()
    return checkpoint.Facts(steps_done, run.ranks.world, run.engine.stage, run.config, data, skips)


def finetune(config: FinetuneConfig, ds_values: dict[str, Any], notes: list[str]) -> int:
    """Set up and run; returns the exit code.

    Args:
        config: the resolved configuration.
        ds_values: the DeepSpeed JSON.
        notes: what the JSON changed in the config, to be printed.
    """
    check_labelled(config.data)
    ranks = start_ranks()
    folder = run_dir.choose_folder(config, ranks)
    config = replace(config, output_dir=str(folder))
    if ranks.is_main:
        print("\n".join([f"recipe {config.recipe}, output in {folder}/", *notes]), flush=True)
    provider = kernel_provider(config, ranks)
    start = find_start(config, folder, ranks)
    first_step = start[1].step if start else 0
    with open_loader(config, folder, ranks, first_step, start[1].skips if start else None) as loader:
        steps = config.train.steps or config.train.epochs * loader.steps_an_epoch
        engine = make_engine(config, ds_values, ranks, loader, steps, fresh=start is None)
        average = WeightAverage(engine, config.optim.ema) if config.optim.ema else None
        mixing = make_mixing(config, loader.classes)
        run = Run(config, folder, ranks, loader, engine, average, mixing, first_step, steps)
        if start:
            checkpoint.check_continues(start[1], facts(run, first_step), start[0])
            engine.load(start[0])
            if average:
                average.load(start[0])
        if ranks.is_main:
            run_dir.write_config(folder, config)
            origin = f"continuing from step {first_step}" if start else "starting at step 0"
            print(f"{origin}, kernels: {provider}, ZeRO stage {engine.stage}, {ranks.world} ranks", flush=True)
            print(describe(run), flush=True)
        with RunLog(folder, ranks, first_step) as log:
            speed = SpeedMeter(config.train, step_flops(config, engine), ranks.world, ranks.device)
            train(run, iter(loader), log, speed)
    if ranks.is_main:
        run_dir.publish_weights(folder, folder / run_dir.CHECKPOINTS / checkpoint.name_of(steps))
        report_bad(folder, steps)
        print(f"\nwrote {folder}/", flush=True)
    return 0


def open_loader(
    config: FinetuneConfig, folder: Path, ranks: Ranks, first_step: int, skips: dict[str, Any] | None
) -> LabelledLoader:
    """The loader of the training clips, from `first_step` on; every label is checked."""
    return LabelledLoader(
        config.data, config.train, ranks.rank, ranks.world, first_step, ranks.device, folder, skips, ranks.sum_counts
    )


def make_mixing(config: FinetuneConfig, classes: Classes) -> Mixing | None:
    """Mixup and cutmix, if the run wants any."""
    train = config.train
    return Mixing(train.mixup, train.cutmix, len(classes), train.seed) if train.mixup or train.cutmix else None


def make_engine(
    config: FinetuneConfig, ds_values: dict[str, Any], ranks: Ranks, loader: LabelledLoader, steps: int, fresh: bool
) -> Engine:
    """The classifier, initialised from the seed and, in a `fresh` run, from `init_from`, under DeepSpeed."""
    options, names = asdict(config.model), loader.classes.names
    model = create_classifier(options.pop("name"), len(names), classes=names, **options)
    model.init_weights(torch.Generator().manual_seed(config.train.seed))
    if config.init_from and fresh:
        report = load_init(model, run_dir.weights_of(config.init_from))
        if ranks.is_main:
            print(report, flush=True)
    groups = layer_decay_groups(model, model.arch["depths"], config.optim)
    epoch = loader.steps_an_epoch
    warmup = config.optim.warmup_epochs * epoch
    schedule = partial(learning_rate, optim=config.optim, steps=steps, warmup=warmup, steps_an_epoch=epoch)
    return Engine(model, config, ds_values, ranks, Sizes.of(model.arch).width, groups, schedule)


def step_flops(config: FinetuneConfig, engine: Engine) -> float:
    """Training FLOPs of one step; the head's are left out."""
    data = config.data
    macs = backbone_macs(Sizes.of(engine.module.arch), (data.frames, data.size, data.size))
    return float(training_flops(config.train.global_clips * macs))


def describe(run: Run) -> str:
    """The size of the task in one line."""
    loader = run.loader
    validation = f"{sum(map(len, loader.val_shards)):,} for validation" if loader.val_shards else "none for validation"
    return (
        f"{loader.videos:,} training videos of {len(loader.classes)} classes, {validation};"
        f" {run.steps:,} steps, {loader.steps_an_epoch:,} an epoch"
    )
