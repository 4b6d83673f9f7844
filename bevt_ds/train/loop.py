"""The training loop, the same for every kind of training: steps, log lines, checkpoints, resume.

A kind of training is a `Task` (task.py). It says how a micro-batch becomes a loss, what a log line shows, what else a
checkpoint holds and what follows the last step; pretraining.py and finetuning.py are two of them. Read `train_step`,
then `train`, then `run_training`, which sets a run up in the order in which things depend on each other.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from bevt_ds.config.schema import TrainingConfig
from bevt_ds.config.validate import micro_steps
from bevt_ds.data.ledger import merge_states
from bevt_ds.data.loader import LEDGER, BackgroundLoader
from bevt_ds.disk import told
from bevt_ds.errors import UserError
from bevt_ds.exit_codes import FINISHED, NOT_LEARNED, STOPPED
from bevt_ds.kernels import resolve
from bevt_ds.plan.planning import require_room
from bevt_ds.progress import progress_bar
from bevt_ds.runtime import checkpoint, run_dir
from bevt_ds.runtime.agreement import require_agreement
from bevt_ds.runtime.background import Commits
from bevt_ds.runtime.bundle import Held
from bevt_ds.runtime.commit import save, what_is_kept
from bevt_ds.runtime.console import keep_console
from bevt_ds.runtime.continuing import find_start, go_on, print_changes, require_steps
from bevt_ds.runtime.distributed import Ranks, describe_device, device_memory
from bevt_ds.runtime.engine import TAG
from bevt_ds.runtime.joining import joined
from bevt_ds.runtime.logging import SpeedMeter, StepSums, peak_bytes
from bevt_ds.runtime.pieces import SavedPieces
from bevt_ds.runtime.place import PLACE
from bevt_ds.runtime.run_log import RunLog
from bevt_ds.runtime.run_record import RunRecord
from bevt_ds.runtime.signals import Stopped, StopRequest
from bevt_ds.train.nonfinite import Watch, require_finite, require_good
from bevt_ds.train.task import ConfigT, Setup, Task

LONG_WAIT = 0.05  # share of the time that the loop may wait for data without a word


def train_step(
    task: Task, batches: Iterator, step: int, earlier: StepSums | None = None, watch: Watch | None = None
) -> StepSums:
    """One optimizer update over the global batch; returns its metrics, still on the device.

    earlier: what the step before returned, if no log line was written of it. watch: is told what becomes of the step.
    """
    sums, held = StepSums(earlier), Held(step)
    for micro_step in range(micro_steps(task.config, task.ranks.world)):
        PLACE.enter("data", step)
        batch = next(batches).to(task.ranks.device, non_blocking=True)
        PLACE.enter("step", step)
        batch = task.prepare(batch, step, micro_step)
        loss, metrics = task.forward(batch, step, micro_step)
        task.engine.backward(watch.mark(loss) if watch else loss)
        if watch:
            watch.settle()
        verdict = task.engine.step(step)
        sums.add(metrics)
        held.add(batch, loss)
    task.after_step()
    if watch and verdict:
        watch.note(held, verdict, sums)
    return sums


def train(task: Task, batches: Iterator, log: RunLog, stop: StopRequest) -> None:
    """Every step that is left, with its log lines and checkpoints.

    A checkpoint that is due after a step that was skipped waits for one that was not: what is saved then is known to
    be good for a step.

    Raises:
        Stopped: a rank has been asked to stop; the commit of the step that was under way has begun.
    """
    config, first, steps, watch = task.config.train, task.setup.first_step, task.steps, Watch(task)
    unreported, due, speed = None, False, SpeedMeter(config, task.step_flops, task.ranks.world, task.ranks.device)
    if first:
        task.make_up(first - 1, log)
    with progress_bar(
        range(first, steps), initial=first, total=steps, unit="step", disable=not task.ranks.is_main
    ) as bar:
        for step in bar:
            sums = unreported = train_step(task, batches, step, unreported, watch)
            speed.steps += 1
            done = step + 1
            task.setup.commits.poll()
            if done % config.log_every == 0 or done == steps or task.is_due(step):
                PLACE.enter("log", step)
                bar.set_postfix_str(write_line(task, log, speed, sums, step, watch.was_skipped(step)), refresh=False)
                unreported = None
            with speed.paused(), suppress(Stopped):  # raised below, once the step is committed
                PLACE.enter("validation", step)
                task.every_so_often(step, log)
            due = due or done % config.checkpoint_every == 0
            committed = done == steps or (due and not watch.was_skipped(step))
            if committed:
                save_step(task, sums, step, watch)
                due = False
            if reason := stop.agreed(task.ranks):
                if not committed:
                    save_step(task, sums, step, watch)
                raise Stopped(f"by {reason}; {done} steps are committed")
    task.setup.commits.wait()


def save_step(task: Task, sums: StepSums, step: int, watch: Watch) -> None:
    """Begin to commit what the run is after `step`, whose metrics `sums` are. Collective; see `save_checkpoint`."""
    PLACE.enter("save", step)
    loss = None if watch.was_skipped(step) else task.metrics(sums.totals(task.ranks), step)["loss"]
    save_checkpoint(task, step + 1, loss, watch.saved())


def write_line(task: Task, log: RunLog, speed: SpeedMeter, sums: StepSums, step: int, skipped: bool = False) -> str:
    """Write the log line of one step; returns the short form for the progress bar. Collective.

    Numbers of a `skipped` step that are not finite are null there.

    Raises:
        UserError: the loss of another step is not a finite number, or what the task finds wrong.
    """
    values: dict[str, Any] = task.metrics(sums.totals(task.ranks), step)
    if not skipped:
        require_finite(values["loss"], step)
    require_agreement(task.engine, task.ranks, step)
    values |= {"lr": task.engine.last_lr, "grad_norm": task.engine.grad_norm()}
    values |= {"optimizer_bytes": task.engine.optimizer_bytes(), "peak_bytes": peak_bytes(task.ranks.device)}
    values["skipped_steps"] = task.engine.skipped_steps
    values |= task.setup.commits.figures()
    values |= speed.read(task.loader.wait_seconds()) | {"bad_samples": task.loader.bad_samples}
    with speed.paused():
        values |= task.measurements(step)
    values = {name: value if value is None or math.isfinite(value) else None for name, value in values.items()}
    values |= report_wait(step, values["data_wait"], task.loader, shown=task.ranks.is_main)
    log.write(step, values)
    shown = {name: form for name, form in task.shown.items() if values.get(name) is not None}
    return ", ".join(f"{name} {values[name]:{form}}" for name, form in shown.items())


def report_wait(step: int, share: float, loader: BackgroundLoader, shown: bool = True) -> dict[str, str]:
    """What the data is short of, as a field of the log line, if the loop has waited for a good `share` of its time."""
    cause = loader.bottleneck()  # also where nothing is said: the next line's cause is of its own stretch of time
    if share <= LONG_WAIT:
        return {}
    if shown:
        tqdm.write(f"step {step}: {share:.0%} of the time went into waiting; {cause}")
    return {"waits_for": cause}


def save_checkpoint(
    task: Task, steps_done: int, loss: float | None, write_more: Callable[[Path], object] = lambda folder: None
) -> None:
    """Begin to commit a checkpoint: each rank's pieces, the task's own part, and the weights on their own. Collective.

    loss: of the last step; None: it was skipped. write_more: writes what else belongs to it, on rank 0.

    Raises:
        UserError: the loss, or something that would be saved, is not a finite number. Nothing is saved then.
    """
    require_good(task.engine, loss, steps_done - 1, task.averages())
    require_agreement(task.engine, task.ranks, steps_done - 1)

    commits, rank = task.setup.commits, task.ranks.rank
    commits.begin()
    snapshot, write_rest = task.engine.snapshot(**task.averages()), task.rest()

    def write_pieces(folder: Path) -> None:
        snapshot.write(folder / TAG, rank)
        write_rest(folder)

    def write_weights(folder: Path) -> None:
        if rank == 0:
            write_more(folder)
            with SavedPieces(folder / TAG) as saved:
                task.engine.module.save_pretrained(folder / run_dir.WEIGHTS, saved.weights(), task.trained_streams)

    root = task.setup.folder / run_dir.CHECKPOINTS
    now = replace(facts(task, steps_done), loss=loss)
    needed = snapshot.size * 4 // 3  # the weights on their own are as large as each moment
    stages, keep = [write_pieces, write_weights], task.config.train.keep_checkpoints
    commits.start(lambda ranks: save(root, now, stages, ranks, keep, needed))


def facts(task: Task, steps_done: int) -> checkpoint.Facts:
    """What a checkpoint says of this run. Collective."""
    skips = merge_states(task.ranks.gather(task.loader.state()))
    world, changes = task.ranks.world, task.setup.changes
    return checkpoint.Facts(steps_done, world, task.engine.stage, task.config, task.fingerprint, skips, changes)


def run_training(
    config: ConfigT,
    ds_values: Mapping[str, Any],
    notes: Sequence[str],
    open_task: Callable[[Setup[ConfigT]], AbstractContextManager[Task]],
    given: Collection[str] = (),
) -> int:
    """Set up a run of any kind and train to its end, or until it is asked to stop; returns the exit code.

    Args:
        config: the resolved configuration.
        ds_values: the DeepSpeed JSON.
        notes: what the JSON changed in the config, to be printed.
        open_task: makes the task, loader and engine included; leaving its block ends the loader.
        given: keys that the command line or the JSON decides; a run that goes on keeps its values of the others.
    """
    waits = {"data": 2 * config.data.read_seconds}  # reading has its own deadline
    with joined(StopRequest(config.train.grace_seconds), config.train.rank_deadline, waits) as (ranks, stop):
        try:
            return _run(config, ds_values, notes, open_task, given, ranks, stop)
        except Stopped as stopped:  # its commit, in the background, has ended
            stop.stopped()
            if ranks.is_main:
                print(f"\nstopped {stopped}; resume=auto continues", flush=True)
            ranks.barrier()  # launchers end the other ranks once one has ended
            return STOPPED


def _run(
    config: ConfigT,
    ds_values: Mapping[str, Any],
    notes: Sequence[str],
    open_task: Callable[[Setup[ConfigT]], AbstractContextManager[Task]],
    given: Collection[str],
    ranks: Ranks,
    stop: StopRequest,
) -> int:
    """`run_training`, once the ranks have met. Stopped: see `train`."""
    folder = run_dir.choose_folder(config, ranks)
    config = replace(config, output_dir=str(folder))
    if ranks.is_main:
        keep_console(folder)
        print(
            "\n".join([f"recipe {config.recipe}, output in {folder}/", describe_device(ranks.device), *notes]),
            flush=True,
        )
    provider = kernel_provider(config, ranks)
    if ranks.device.type == "cuda":
        require_room(config, ds_values, ranks.world, *device_memory(ranks.device))
    start = find_start(config, folder, ranks)
    config, changes, loader_state = go_on(config, given, folder, start)
    commits = Commits(ranks)
    setup = Setup(config, ds_values, folder, ranks, commits, start, changes, loader_state, stop)
    is_told = told(folder, lambda: what_is_kept(folder / run_dir.CHECKPOINTS))
    record = partial(RunRecord, folder, ranks, setup.first_step)
    with is_told, open_task(setup) as task, record(task.frozen_files), commits:
        require_steps(setup.first_step, task.steps)
        if start:
            task.load(start[0])
        with ranks.writing(folder / run_dir.CONFIG):
            if ranks.is_main:
                run_dir.write_config(folder, config, changes, ds_values)
        if ranks.is_main:
            print_changes(changes, start)
            print("\n".join([opening(task, provider), *filter(None, [task.describe()])]), flush=True)
        batches = iter(task.loader)
        with RunLog(folder, ranks, setup.first_step, config.log.names) as log:
            log.write_settings(config)
            with stop.training():
                train(task, batches, log, stop)
            PLACE.enter("finish", task.steps)
            with ranks.writing(folder / run_dir.WEIGHTS):
                if ranks.is_main:
                    commit = folder / run_dir.CHECKPOINTS / checkpoint.name_of(task.steps)
                    run_dir.publish_weights(folder, commit)
            problem = task.finish(batches)
            log.write_image(task.steps - 1, folder / run_dir.SAMPLES)
    return close_run(setup, task.steps, problem)


def kernel_provider(config: TrainingConfig, ranks: Ranks) -> str:
    """What `model.kernels` comes to on this device: triton or torch.

    Raises:
        UserError: triton was asked for and cannot run.
    """
    try:
        return resolve(config.model.kernels, ranks.device)
    except RuntimeError as error:
        raise UserError(f"model.{error}") from error


def opening(task: Task, provider: str) -> str:
    """Where the run begins, and on what."""
    now = f"kernels: {provider}, ZeRO stage {task.engine.stage}, {task.ranks.world} ranks"
    if not task.setup.start:
        return f"starting at step 0, {now}"
    saved = task.setup.start[1]
    same = (saved.stage, saved.world) == (task.engine.stage, task.ranks.world)
    before = "" if same else f", saved at ZeRO stage {saved.stage} by {saved.world} ranks"
    return f"continuing from step {saved.step}, {now}{before}"


def close_run(setup: Setup, steps: int, problem: str | None) -> int:
    """The closing lines; returns the exit code."""
    if setup.ranks.is_main:
        report_bad(setup.folder, steps + setup.config.train.skip_steps)
        print(f"\nwrote {setup.folder}/", flush=True)
        if problem:
            print(f"not learned: {problem}", flush=True)
    return NOT_LEARNED if problem else FINISHED


def report_bad(folder: Path, steps: int) -> None:
    """Say how many samples of the first `steps` could not be used, if there were any. On rank 0.

    Each counts once, though the list is of all that was read: ahead of the last step, or again after a resume. A line
    that a crash cut short is passed over.
    """
    if not (path := folder / LEDGER).exists():
        return
    places = set()
    for line in path.read_text(encoding="utf-8").splitlines():
        with suppress(ValueError):
            event = json.loads(line)
            places.add(tuple(event[name] for name in ("stream", "step", "slot", "attempt")))
    counts = Counter(stream for stream, step, *_ in places if step < steps)
    if counts:
        named = ", ".join(f"{n} of {stream}" for stream, n in sorted(counts.items()))
        print(f"\ncould not be used: {named}; see {path}", flush=True)
