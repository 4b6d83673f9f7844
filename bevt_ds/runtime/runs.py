"""What runs of every kind share: where they start, and what they say on the way."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch import Tensor
from tqdm import tqdm

from bevt_ds.config.schema import TrainingConfig, TrainingT
from bevt_ds.data.loader import LEDGER, BackgroundLoader
from bevt_ds.errors import UserError
from bevt_ds.kernels import resolve
from bevt_ds.runtime import checkpoint, run_dir
from bevt_ds.runtime.distributed import Ranks
from bevt_ds.runtime.engine import Engine

ADVICE = (
    "Continue from the last checkpoint: the same command with resume=auto and a lower optim.lr, with"
    " train.precision=bf16 or fp32 if it was fp16, or with train.skip_steps=N to pass over the samples of N more steps."
)
LONG_WAIT = 0.05  # share of the time that the loop may wait for data without a word


def require_finite(loss: float, step: int) -> None:
    """Stop a run that has diverged.

    Raises:
        UserError: the loss is not a finite number.
    """
    if not abs(loss) < float("inf"):
        raise UserError(f"the loss of step {step} is {loss}. {ADVICE}")


def require_good(engine: Engine, loss: float, step: int) -> None:
    """Stop a run that has diverged before it is saved. Collective.

    Raises:
        UserError: the loss of `step`, or something of the weights and the optimizer after it, is not a finite number.
    """
    require_finite(loss, step)
    if not engine.is_finite():
        raise UserError(f"after step {step} weights or optimizer are not finite: nothing is saved. {ADVICE}")


def require_known_targets(metrics: Mapping[str, float | Tensor], vocabulary: int, where: str) -> None:
    """Stop a run whose tokenizer gives ids that the head does not have.

    Raises:
        UserError: there were such ids, `where` says where.
    """
    if unknown := int(metrics["unknown_targets"]):
        raise UserError(
            f"{unknown:,} targets {where} are outside the head's vocabulary of {vocabulary:,} ids: the tokenizer gives"
            " ids that are negative or not below its vocab_size. Their rows have no gradient."
        )


def find_start(config: TrainingConfig, folder: Path, ranks: Ranks) -> tuple[Path, checkpoint.Facts] | None:
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
    config: TrainingT, given: Collection[str], folder: Path, start: tuple[Path, checkpoint.Facts] | None
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


def kernel_provider(config: TrainingConfig, ranks: Ranks) -> str:
    """What `model.kernels` comes to on this device: triton or torch.

    Raises:
        UserError: triton was asked for and cannot run.
    """
    try:
        return resolve(config.model.kernels, ranks.device)
    except RuntimeError as error:
        raise UserError(f"model.{error}") from error


def report_wait(step: int, share: float, loader: BackgroundLoader) -> None:
    """Say what the data is short of, if the loop has waited for it for a good `share` of its time. On rank 0."""
    cause = loader.bottleneck()  # also where nothing is said: the next line's cause is of its own stretch of time
    if share > LONG_WAIT:
        tqdm.write(f"step {step}: {share:.0%} of the time went into waiting; {cause}")


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
