"""What is kept of a step that is not finite, so that `bevt replay` can run it again: RUN/nonfinite/step-N/.

  report.json      losses, keys of the samples, the gradient's norms by parameter
  batch/           the micro-batches, as the network was given them: rank-0-micro-0.safetensors, ...
  model/           the weights with which the step was computed, in its precision
  manifest.json    the run's configuration; the size and SHA-256 of every file

A skipped step changes no weights, so those of the step are still there when it is known to be skipped: before the next
update. Bundles hold weights of their own, and do not name a checkpoint: that would be up to `train.checkpoint_every`
updates older, and may be removed.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from bevt_ds.batch import Batch, LabelledBatch, Stream
from bevt_ds.errors import UserError
from bevt_ds.folders import MANIFEST
from bevt_ds.model.tensor_file import write_tensors
from bevt_ds.runtime.checkpoint import find_damage
from bevt_ds.runtime.distributed import Ranks
from bevt_ds.runtime.manifest import read_manifest

FOLDER, REPORT, MODEL, BATCH = "nonfinite", "report.json", "model", "batch"
WHOLE = 4  # bundles of a run with weights and batch: the first ones; later ones are the report alone
HELD_BYTES = 512 << 20  # micro-batches that a rank holds while it is not known whether their step counts
BATCH_BYTES = 1 << 30  # micro-batches of one bundle, over all ranks
Place = tuple[int, int]  # rank, micro-step


@dataclass
class Held:
    """What a rank holds of a step until it is known whether the step counts: by micro-step, keys, losses, batches.

    batches: as the network was given them, on the device; None of those beyond HELD_BYTES.
    """

    step: int
    keys: list[list[str]] = field(default_factory=list)
    losses: list[Tensor] = field(default_factory=list)
    batches: list[Any] = field(default_factory=list)
    size: int = 0
    limit: Tensor | None = None  # over which a micro-batch's loss was a spike

    def add(self, batch: Any, loss: Tensor) -> None:
        """Hold a micro-step. Nothing waits for the device."""
        batch = without_view(batch)
        self.keys.append(
            [key for name, keys in leaves(batch) if name.endswith("keys") and isinstance(keys, tuple) for key in keys]
        )
        self.losses.append(loss.detach())
        size = size_of(batch)
        self.batches.append(batch if self.size + size <= HELD_BYTES else None)
        self.size += size if self.batches[-1] is not None else 0

    def sizes(self) -> list[int]:
        """Bytes of each micro-batch that is held; 0: it is not."""
        return [0 if batch is None else size_of(batch) for batch in self.batches]


def without_view(batch: Any) -> Any:
    """A batch without the tokenizer's view, whose ids are known."""
    if not isinstance(batch, Batch):
        return batch
    streams = (batch.video, batch.image)
    return Batch(*(s if s is None or s.targets is None else replace(s, view=s.view[:0]) for s in streams))


def leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """What a batch of nested dataclasses holds, by dotted name."""
    if is_dataclass(value):
        for part in fields(value):
            yield from leaves(getattr(value, part.name), f"{name}.{part.name}" if name else part.name)
    else:
        yield name, value


def size_of(batch: Any) -> int:
    """Bytes of a batch's tensors."""
    return sum(value.nbytes for _, value in leaves(batch) if isinstance(value, Tensor))


def choose(losses: Sequence[Sequence[float]], sizes: Sequence[Sequence[int]]) -> list[Place]:
    """Which micro-batches a bundle holds: those whose loss is not finite, or all where each is; as many as may be.

    Both by rank and micro-step; a size of 0: not held.
    """
    places = [(rank, micro) for rank, own in enumerate(losses) for micro in range(len(own))]
    bad = [(rank, micro) for rank, micro in places if not math.isfinite(losses[rank][micro])]
    chosen, total = [], 0
    for rank, micro in bad or places:
        size = sizes[rank][micro]
        if size and total + size <= BATCH_BYTES:
            chosen.append((rank, micro))
            total += size
    return chosen


def batch_file(place: Place) -> str:
    """The file of a micro-batch in its bundle."""
    return f"{BATCH}/rank-{place[0]}-micro-{place[1]}.safetensors"


def write_batch(path: Path, batch: Any) -> None:
    """Write a batch of nested dataclasses: its tensors, and the rest as JSON."""
    values = dict(leaves(batch))
    tensors = {name: value.cpu() for name, value in values.items() if isinstance(value, Tensor)}
    rest = {name: value for name, value in values.items() if name not in tensors}
    path.parent.mkdir(exist_ok=True)
    write_tensors(path, tensors, {"rest": json.dumps(rest)})


def read_batch(path: Path) -> Batch | LabelledBatch:
    """What `write_batch` wrote of pretraining or fine-tuning.

    Raises:
        UserError: it is of another kind of training.
    """
    values: dict[str, Any] = load_file(path)
    with safe_open(path, "pt") as file:
        values |= json.loads(file.metadata()["rest"])
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    if values.keys() == {part.name for part in fields(LabelledBatch)}:
        return LabelledBatch(**values)
    streams = {
        stream: {name.split(".")[1]: value for name, value in values.items() if name.startswith(f"{stream}.")}
        for stream in ("video", "image")
    }
    if not any(streams.values()):
        raise UserError(f"{path} is a batch of neither pretraining nor fine-tuning: `bevt replay` knows these two.")
    return Batch(*(Stream(**own) if own else None for own in streams.values()))


@dataclass(frozen=True)
class Bundle:
    """What was read of a bundle. manifest: that of runtime/manifest.py, with the run's configuration."""

    folder: Path
    report: Mapping[str, Any]
    manifest: Mapping[str, Any]

    @property
    def places(self) -> list[Place]:
        """The micro-batches that it holds."""
        return [(rank, micro) for rank, micro in self.report["batches"]]

    def batch(self, place: Place) -> Batch | LabelledBatch:
        """One of them."""
        return read_batch(self.folder / batch_file(place))


def read_bundle(folder: Path) -> Bundle:
    """A bundle, every byte of which is as it was written.

    Raises:
        UserError: there is none, or it is damaged, or it is the report alone.
    """
    if (runs := sorted((folder / FOLDER).glob(f"*/{MANIFEST}"))) or (runs := sorted(folder.glob(f"step-*/{REPORT}"))):
        raise UserError(f"{folder}: name one of its bundles: {', '.join(str(path.parent) for path in runs)}")
    if not (folder / REPORT).is_file():
        raise UserError(f"{folder} is no bundle: it has no {REPORT}. A run writes them as RUN/{FOLDER}/step-N.")
    if damage := find_damage(folder, Ranks(0, 1, torch.device("cpu"))):
        raise UserError(f"{folder}: {damage}")
    report = json.loads((folder / REPORT).read_text(encoding="utf-8"))
    if not report["batches"]:
        raise UserError(f"{folder} is the report alone, without weights and batch: {report['why_no_batch']}.")
    return Bundle(folder, report, read_manifest(folder))
