"""The training loop, and under it the set-up in the order in which things depend on each other."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from bevt_ds.batch import Batch
from bevt_ds.config.recipes import get_recipe
from bevt_ds.config.schema import Config
from bevt_ds.config.validate import micro_steps
from bevt_ds.data.ledger import merge_states
from bevt_ds.data.loader import Loader, eval_batches
from bevt_ds.eval.held_out import as_json, as_table, evaluate, shortfall
from bevt_ds.eval.online_probe import OnlineProbe
from bevt_ds.eval.visualize import draw
from bevt_ds.model.presets import create_model
from bevt_ds.model.tokenizers import Tokenizer, load_tokenizer, require_vocabulary, tokenize
from bevt_ds.model.weights import load_init
from bevt_ds.runtime import checkpoint, run_dir
from bevt_ds.runtime.distributed import Ranks
from bevt_ds.runtime.engine import Engine, start_ranks
from bevt_ds.runtime.flops import Sizes
from bevt_ds.runtime.logging import RunLog, SpeedMeter, StepSums, expected_step_flops, step_metrics
from bevt_ds.runtime.optim import freeze_unused, learning_rate, parameter_groups
from bevt_ds.runtime.runs import (
    find_start,
    kernel_provider,
    report_bad,
    report_wait,
    require_finite,
    require_known_targets,
)
from bevt_ds.shards.synthetic.draw import ensure_demo_shards

NOT_LEARNED = 1  # exit code


@dataclass(frozen=True)
class Run:
    """Everything the loop uses."""

    config: Config
    folder: Path
    ranks: Ranks
    loader: Loader
    tokenizer: Tokenizer
    engine: Engine
    first_step: int
    probe: OnlineProbe | None


def train_step(run: Run, batches: Iterator[Batch], step: int, earlier: StepSums | None = None) -> StepSums:
    """One optimizer update over the global batch; returns its metrics, still on the device.

    earlier: what the step before returned, if no log line was written of it.
    """
    sums = StepSums(earlier)
    for _ in range(micro_steps(run.config, run.ranks.world)):
        batch = tokenize(run.tokenizer, next(batches).to(run.ranks.device, non_blocking=True))
        if probe_due(run, step):
            run.probe.count(batch)
        output = run.engine.forward(batch)
        run.engine.backward(output.loss)
        run.engine.step(step)
        sums.add(output.metrics)
    return sums


def train(run: Run, batches: Iterator[Batch], log: RunLog, speed: SpeedMeter) -> None:
    """Every step that is left, with its log lines and checkpoints."""
    train = run.config.train
    steps, sums = range(run.first_step, train.steps), None
    with tqdm(steps, initial=run.first_step, total=train.steps, unit="step", disable=not run.ranks.is_main) as bar:
        for step in bar:
            sums = train_step(run, batches, step, sums)
            speed.steps += 1
            done = step + 1
            if done % train.log_every == 0 or done == train.steps or probe_due(run, step):
                bar.set_postfix_str(write_line(run, log, speed, sums, step))
                sums = None
            if done % train.checkpoint_every == 0 or done == train.steps:
                save_checkpoint(run, done)


def write_line(run: Run, log: RunLog, speed: SpeedMeter, sums: StepSums, step: int) -> str:
    """Write the log line of one step; returns the short form for the progress bar. Collective.

    Raises:
        UserError: the loss is not a finite number, or targets were outside the vocabulary.
    """
    totals = sums.totals(run.ranks)
    require_known_targets(totals, run.tokenizer.vocab_size, f"since the last log line (now step {step})")
    values: dict[str, Any] = step_metrics(totals)
    require_finite(values["loss"], step)
    values |= {"lr": run.engine.last_lr, "grad_norm": run.engine.grad_norm()}
    values["optimizer_bytes"] = run.engine.optimizer_bytes()
    values |= speed.read(run.loader.wait_seconds()) | {"bad_samples": run.loader.bad_samples}
    if probe_due(run, step):
        with speed.paused():
            values |= run.probe.measure(run.engine)
    log.write(step, values)
    if run.ranks.is_main:
        report_wait(step, values["data_wait"], run.loader)
    return ", ".join(f"{k} {values[k]:.3f}" for k in ("loss_video", "loss_image", "probe_top1") if k in values)


def probe_due(run: Run, step: int) -> bool:
    """Whether the online probe follows this step."""
    return run.probe is not None and run.probe.due(step)


def save_checkpoint(run: Run, steps_done: int) -> None:
    """Commit a checkpoint: the engine's shards, and the weights on their own. Collective."""

    def write(folder: Path) -> None:
        run.engine.save(folder)
        export_weights(run, folder / run_dir.WEIGHTS)

    root = run.folder / run_dir.CHECKPOINTS
    checkpoint.save(root, facts(run, steps_done), write, run.ranks, run.config.train.keep_checkpoints)


def export_weights(run: Run, folder: Path) -> None:
    """Write the fp32 weights where `from_pretrained` and `init_from` read them. Collective."""
    state = run.engine.weights()
    if run.ranks.is_main:
        run.engine.module.save_pretrained(folder, state, trained_streams(run.config))


def trained_streams(config: Config) -> list[str]:
    """The streams that the run trains."""
    sizes = {"video": config.train.global_clips, "image": config.train.global_images}
    return [name for name, size in sizes.items() if size]


def facts(run: Run, steps_done: int) -> checkpoint.Facts:
    """What a checkpoint says of this run. Collective."""
    skips = merge_states(run.ranks.gather(run.loader.state()))
    return checkpoint.Facts(steps_done, run.ranks.world, run.engine.stage, run.config, run.loader.fingerprint, skips)


def finish(run: Run, batches: Iterator[Batch]) -> int:
    """Exported weights, picture and closing summary; returns the exit code. Collective."""
    config, device = run.config, run.ranks.device
    if run.ranks.is_main:
        commit = run.folder / run_dir.CHECKPOINTS / checkpoint.name_of(config.train.steps)
        run_dir.publish_weights(run.folder, commit)
    held_out = list(eval_batches(config, device=device, folder=run.folder if run.ranks.is_main else None))
    shown = held_out[0] if held_out else next(batches)
    draw(run.engine, tokenize(run.tokenizer, shown.to(device)), run.folder / run_dir.SAMPLES)
    summaries = evaluate(run.engine, run.tokenizer, held_out)
    problem = shortfall(summaries, config.train.min_gain)
    if run.ranks.is_main:
        if summaries:
            run_dir.write_json(run.folder / run_dir.SUMMARY, as_json(summaries))
            print(f"\n{as_table(summaries)}", flush=True)
        report_bad(run.folder, config.train.steps)
        print(f"\nwrote {run.folder}/", flush=True)
        if problem:
            print(f"not learned: {problem}", flush=True)
    return NOT_LEARNED if problem else 0


def pretrain(config: Config, ds_values: dict[str, Any], notes: list[str]) -> int:
    """Set up and run; returns the exit code.

    Args:
        config: the resolved configuration.
        ds_values: the DeepSpeed JSON.
        notes: what the JSON changed in the config, to be printed.
    """
    ranks = start_ranks()
    folder = run_dir.choose_folder(config, ranks)
    config = replace(config, output_dir=str(folder))
    if ranks.is_main:
        print("\n".join([f"recipe {config.recipe}, output in {folder}/", *notes]), flush=True)
        if shard_patterns(config) == shard_patterns(get_recipe("demo")):
            ensure_demo_shards(Path(config.data.videos).parent)
    ranks.barrier()
    provider = kernel_provider(config, ranks)
    tokenizer = make_tokenizer(config, ranks)
    probe = OnlineProbe(config, tokenizer.vocab_size, ranks) if config.probe.every else None
    with closing(eval_batches(config, folder=folder if ranks.is_main else None)) as held_out:
        next(held_out, None)  # shards that cannot be evaluated are to be known now, not after the last step
    start = find_start(config, folder, ranks)
    first_step = start[1].step if start else 0
    skips = start[1].skips if start else None
    with Loader(config, ranks.rank, ranks.world, first_step, ranks.device, folder, skips, ranks.sum_counts) as loader:
        engine = make_engine(config, ds_values, ranks, tokenizer.vocab_size, fresh=not start)
        require_vocabulary(tokenizer, engine.module.arch["vocab_size"])
        run = Run(config, folder, ranks, loader, tokenizer, engine, first_step, probe)
        if start:
            checkpoint.check_continues(start[1], facts(run, first_step), start[0])
            engine.load(start[0])
        if ranks.is_main:
            run_dir.write_config(folder, config)
            origin = f"continuing from step {first_step}" if start else "starting at step 0"
            print(f"{origin}, kernels: {provider}, ZeRO stage {engine.stage}, {ranks.world} ranks", flush=True)
        batches = iter(loader)
        with RunLog(folder, ranks, first_step) as log:
            flops = expected_step_flops(config, Sizes.of(engine.module.arch))
            train(run, batches, log, SpeedMeter(config.train, flops, ranks.world, ranks.device))
        return finish(run, batches)


def shard_patterns(config: Config) -> tuple[str, ...]:
    """All shards that a run reads, as the configuration names them."""
    data = config.data
    return data.videos, data.images, data.eval_videos, data.eval_images


def make_tokenizer(config: Config, ranks: Ranks) -> Tokenizer:
    """The frozen tokenizer of a run, on its device, compiled if the model is."""
    name, drawn = config.tokenizer.name, {"vocab_size": config.tokenizer.vocab_size, "seed": config.tokenizer.seed}
    options = {"weights": config.tokenizer.weights} if name == "dalle" else drawn
    tokenizer = load_tokenizer(name, **options).to(ranks.device)
    if config.model.compile:
        tokenizer.compile()
    return tokenizer


def make_engine(config: Config, ds_values: dict[str, Any], ranks: Ranks, vocab_size: int, fresh: bool = True) -> Engine:
    """The model, initialised from the seed and, in a `fresh` run, from `init_from`, under DeepSpeed."""
    options = asdict(config.model)
    model = create_model(options.pop("name"), vocab_size=vocab_size, **options)
    model.init_weights(torch.Generator().manual_seed(config.train.seed))
    if config.init_from and fresh:
        report = load_init(model, run_dir.weights_of(config.init_from), head=config.init_head)
        if ranks.is_main:
            print(report, flush=True)
    freeze_unused(model, trained_streams(config))
    groups = parameter_groups(model, config.optim.weight_decay)
    schedule = partial(learning_rate, optim=config.optim, steps=config.train.steps, warmup=config.optim.warmup_steps)
    return Engine(model, config, ds_values, ranks, Sizes.of(model.arch).width, groups, schedule)
