"""Steps whose loss or gradient is not finite: counted, named, written down; too many of them end the run.

runtime/guard.py leaves such a step out. Here is what the loop makes of it. On a GPU, where the device decides, the host
asks only before the next update, while the device is busy with the next gradient. What is needed to name the step is
held for as long, and the weights are still those with which it was computed.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor
from tqdm import tqdm

from bevt_ds.config.validate import micro_steps
from bevt_ds.disk import DiskError
from bevt_ds.errors import NonFiniteError
from bevt_ds.folders import CHECKPOINTS, checkpoints
from bevt_ds.model.tensor_file import SHOWN, not_finite, some
from bevt_ds.runtime import bundle
from bevt_ds.runtime.bundle import FOLDER, REPORT, Held, Place
from bevt_ds.runtime.checkpoint import Facts, name_of
from bevt_ds.runtime.commit import save
from bevt_ds.runtime.distributed import Ranks
from bevt_ds.runtime.engine import Engine
from bevt_ds.runtime.guard import Verdict
from bevt_ds.runtime.logging import StepSums
from bevt_ds.train.spikes import Spikes

if TYPE_CHECKING:
    from bevt_ds.train.task import Task

ADVICE = (
    "Continue from the last checkpoint: the same command with resume=auto and a lower optim.lr, with"
    " train.precision=bf16 or fp32 if it was fp16, or with train.skip_steps=N to pass over the samples of N more steps."
)


def require_finite(loss: float, step: int) -> None:
    """Stop a run that has diverged.

    Raises:
        NonFiniteError: the loss is not a finite number.
    """
    if not math.isfinite(loss):
        raise NonFiniteError(f"the loss of step {step} is {loss}. {ADVICE}")


def require_good(
    engine: Engine, loss: float | None, step: int, averages: Mapping[str, list[Tensor]] | None = None
) -> None:
    """Stop a run that has diverged before it is saved. Collective.

    loss: of `step`; None: the step was skipped. averages: further tensors like the engine's masters that are saved.

    Raises:
        NonFiniteError: the loss, or something of the weights and the optimizer after the step, is not a finite number.
    """
    if loss is not None:
        require_finite(loss, step)
    if not engine.is_finite(**(averages or {})):
        raise NonFiniteError(f"after step {step} weights or optimizer are not finite: nothing is saved. {ADVICE}")


def require_finite_export(weights: Mapping[str, Tensor], ranks: Ranks, step: int) -> None:
    """Refuse to export weights, which rank 0 has. Collective.

    Raises:
        NonFiniteError: on all ranks, where a weight is not a finite number.
    """
    bad = ranks.broadcast(not_finite(weights))
    if bad:
        raise NonFiniteError(f"after step {step} {some(bad)} of the weights are not finite: not exported. {ADVICE}")


class Watch:
    """Counts a run's skipped steps and says which samples they had. Every method is collective."""

    def __init__(self, task: Task) -> None:
        self._task = task
        self._pending: tuple[Held, Verdict, StepSums] | None = None  # the step before, if the device has not told yet
        self._folder = task.setup.folder / FOLDER
        earlier = [p for p in self._folder.glob("step-*") if p.name < name_of(task.setup.first_step)]
        whole = sum((folder / bundle.MODEL).is_dir() for folder in earlier)
        self._spikes = spikes_of(task)
        self._row, (self._all, self._whole) = 0, task.ranks.broadcast((len(earlier), whole))
        self._last: int | None = None  # the step that was skipped last

    def mark(self, loss: Tensor) -> Tensor:
        """A micro-batch's share of the loss, NaN where it is a spike."""
        return self._spikes.mark(loss) if self._spikes else loss

    def saved(self) -> Callable[[Path], None]:
        """What writes what is known of earlier losses into a checkpoint."""
        return self._spikes.saved() if self._spikes else lambda folder: None

    def note(self, held: Held, verdict: Verdict, sums: StepSums) -> None:
        """A step is done, or on its way, with these sums of its metrics."""
        if self._spikes:
            held.limit = self._spikes.limit
            self._spikes.after_step()
        self._pending = held, verdict, sums
        if verdict.ready is None:
            self.settle()

    def settle(self) -> None:
        """Judge the step before; waits for the device to know. To be called before the weights change again.

        Raises:
            NonFiniteError: it was skipped, and is one too many.
        """
        if self._pending:
            pending, self._pending = self._pending, None
            self._judge(*pending)

    def was_skipped(self, step: int) -> bool:
        """Whether the last step, number `step`, was skipped. As `settle`."""
        self.settle()
        return self._last == step

    def _judge(self, held: Held, verdict: Verdict, sums: StepSums) -> None:
        if not verdict.is_skipped():
            self._row = 0
            return
        self._last, task = held.step, self._task
        task.engine.count_skipped()
        task.metrics(sums.totals(task.ranks), held.step)  # raises where the task knows why
        losses = task.ranks.gather([float(loss) for loss in held.losses])
        if verdict.scaling and all(math.isfinite(loss) for own in losses for loss in own):
            return  # fp16 finds its loss scale
        self._row, self._all = self._row + 1, self._all + 1
        report = self._report(held, verdict, losses)
        said = self._write(held, report)
        if task.ranks.is_main:
            tqdm.write(f"{describe(report)} {said}")
        most_in_a_row, most = task.config.train.max_skipped
        if self._row > most_in_a_row or self._all > most:
            raise NonFiniteError(f"{describe(report)} {self._reason()} {kept(task.setup.folder)} {ADVICE}")

    def _reason(self) -> str:
        row, most = self._task.config.train.max_skipped
        return f"{self._row} steps in a row and {self._all} in all were skipped: over train.max_skipped={row},{most}."

    def _write(self, held: Held, report: dict[str, Any]) -> str:
        """Write the bundle of a step that was skipped; says where, or why it could not be written. Collective."""
        task, rank = self._task, self._task.ranks.rank
        own = {place: held.batches[place[1]] for place in map(tuple, report["batches"]) if place[0] == rank}
        weights = task.engine.shown_weights() if report["batches"] else {}

        def write_batches(folder: Path) -> None:
            for place, batch in own.items():
                bundle.write_batch(folder / bundle.batch_file(place), batch)

        def write_rest(folder: Path) -> None:
            if weights:  # rank 0 has them all
                task.engine.module.save_pretrained(folder / bundle.MODEL, weights, task.trained_streams)
            if rank == 0:
                (folder / REPORT).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")

        size = sum(map(bundle.size_of, own.values())) + sum(w.nbytes for w in weights.values())
        facts = Facts(
            held.step, task.ranks.world, task.engine.stage, task.config, task.fingerprint, {}, task.setup.changes
        )
        stages, on = [write_batches, write_rest], lambda root: "The run goes on without it."
        try:
            folder = save(self._folder, facts, stages, task.ranks, sys.maxsize, size, on)
        except DiskError as error:
            return f"Its bundle: {error}"
        self._whole += bool(report["batches"])
        return f"Run `bevt replay {folder}`" if report["batches"] else f"See {folder}"

    def _report(self, held: Held, verdict: Verdict, losses: list[list[float]]) -> dict[str, Any]:
        """What is known of a step that was skipped; numbers that are not finite as text. Collective."""
        setup, engine, ranks = self._task.setup, self._task.engine, self._task.ranks
        limit = math.inf if held.limit is None else float(held.limit)
        why = f"the run has {bundle.WHOLE} bundles with them" if self._whole >= bundle.WHOLE else ""
        why = why or ("its numbers are finite, its loss is a spike" if spiked(losses, limit) else "")
        batches = [] if why else bundle.choose(losses, ranks.gather(held.sizes()))
        return {
            "step": held.step,
            "plan_step": held.step + setup.config.train.skip_steps,
            "precision": setup.config.train.precision,
            "stage": engine.stage,
            "limit": plain(limit),  # over which a micro-batch's share of the loss, times their number, is a spike
            "losses": [[plain(loss) for loss in own] for own in losses],  # by rank and micro-step
            "keys": ranks.gather(held.keys),
            "norms": {name: plain(norm) for name, norm in verdict.norms().items()},
            "world": ranks.world,
            "device": ranks.device.type,
            "loss_scale": engine.guard.loss_scale,
            "batches": batches,  # the micro-batches that are kept, each [rank, micro-step]
            "why_no_batch": why or "they are too large",
        }


def plain(number: float) -> float | str:
    """As JSON has it, which knows finite numbers alone."""
    return number if math.isfinite(number) else str(number)


def spikes_of(task: Task) -> Spikes | None:
    """What judges a run's losses; None: nothing does."""
    deviations, ranks = task.config.train.max_spike, task.ranks
    if not deviations:
        return None
    parts, start = micro_steps(task.config, ranks.world) * ranks.world, task.setup.start
    return Spikes(deviations, parts, ranks, start[0] if start else None)


def spiked(losses: Sequence[Sequence[float]], limit: float) -> list[Place]:
    """The micro-batches, each (rank, micro-step), whose share of the loss, times their number, is over the limit."""
    parts = sum(map(len, losses))
    return [(rank, i) for rank, own in enumerate(losses) for i, loss in enumerate(own) if loss * parts > limit]


def describe(report: Mapping[str, Any]) -> str:
    """One line: what of a step is not finite, or which of its losses is a spike, and its samples."""
    bad = [
        (rank, micro, loss)
        for rank, own in enumerate(report["losses"])
        for micro, loss in enumerate(own)
        if isinstance(loss, str)
    ]
    if bad:
        places = ", ".join(f"{loss} on rank {rank} in micro-step {micro}" for rank, micro, loss in bad[:SHOWN])
        what = f"its loss is {places}"
        keys = [key for rank, micro, _ in bad for key in report["keys"][rank][micro]]
    elif spikes := spiked(report["losses"], limit := float(report.get("limit", "inf"))):
        parts = sum(map(len, report["losses"]))
        shown = [(rank, i, report["losses"][rank][i] * parts) for rank, i in spikes[:SHOWN]]
        places = [f"{loss:.4g} on rank {rank} in micro-step {i}" for rank, i, loss in shown]
        what = f"its loss is a spike, {', '.join(places)}, over {limit:.4g}"
        keys = [key for rank, micro in spikes for key in report["keys"][rank][micro]]
    else:
        norms = [name for name, norm in report["norms"].items() if isinstance(norm, str)]
        what = (
            f"the loss is finite, its gradient is not, in {some(norms)}" if norms else "its gradient's norm overflows"
        )
        keys = [key for own in report["keys"] for micro in own for key in micro]
    return f"step {report['step']} is skipped: {what}; samples: {some(keys)}."


def kept(folder: Path) -> str:
    """One sentence on the last checkpoint."""
    commits = checkpoints(folder / CHECKPOINTS)
    return f"The last checkpoint is {commits[0]}." if commits else "There is no checkpoint yet."
