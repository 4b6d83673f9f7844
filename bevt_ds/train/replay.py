"""`bevt replay BUNDLE`: run a step that was not finite again, and say which sample and which layer it comes from.

BUNDLE is a folder RUN/nonfinite/step-N, which holds all that is needed: it may be copied to another machine. Exit code
0: it was reproduced; 1: it was not.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bevt_ds.batch import DTYPES, Batch, LabelledBatch
from bevt_ds.config.parse import from_dict
from bevt_ds.config.schema import Config, FinetuneConfig
from bevt_ds.errors import UserError
from bevt_ds.exit_codes import FINISHED, FOUND_FAULTS
from bevt_ds.model.bevt import BEVT
from bevt_ds.model.classifier import VideoClassifier
from bevt_ds.model.tensor_file import some
from bevt_ds.model.weights import CONFIG
from bevt_ds.runtime.bundle import MODEL, Bundle, Place, read_bundle
from bevt_ds.train.classification import classification_loss
from bevt_ds.train.narrowing import FORWARD, Layer, Outcome, culprits, is_finite, run

KINDS = {"BEVT": (BEVT, Config), "VideoClassifier": (VideoClassifier, FinetuneConfig)}
Sample = tuple[str, int]  # stream, and number within it
Batches = Batch | LabelledBatch


@dataclass(frozen=True)
class Replay:
    """A network as a bundle has it, and how a micro-batch becomes a loss. `scale`: by which the gradient is larger."""

    model: nn.Module
    loss: Callable[[Batches], Tensor]
    device: torch.device
    scale: float = 1.0

    def run(self, batch: Batches, fresh: bool = True) -> Outcome:
        """Forward and backward pass of a micro-batch; the gradient is added to the one before unless `fresh`."""
        outcome = run(self.model, lambda: self.loss(batch.to(self.device)) * self.scale, fresh)
        return replace(outcome, loss=outcome.loss / self.scale)


@dataclass(frozen=True)
class Finding:
    """What a replay found.

    way: "forward", the loss is not finite; "backward", a gradient; None: not reproduced. weights: parameters that are
    not finite, and how many of their numbers. groups: samples that are bad on their own, or several that are together
    alone. pixels: those of them whose pixels are not finite. missing: micro-batches that the bundle does not hold.
    """

    step: int
    device: str
    precision: str
    way: str | None
    loss: float | str
    place: Place | None = None
    samples: int = 0
    groups: tuple[tuple[str, ...], ...] = ()
    pixels: tuple[str, ...] = ()
    weights: Mapping[str, int] | None = None
    layer: Layer | None = None
    parameters: tuple[str, ...] = ()
    missing: tuple[Place, ...] = ()

    @property
    def reproduced(self) -> bool:
        return self.way is not None


def main(argv: Sequence[str]) -> int:
    """Replay a bundle and print what comes out; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="bevt replay", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundle", type=Path, metavar="BUNDLE", help="a folder RUN/nonfinite/step-N")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: a GPU if there is one")
    parser.add_argument("--precision", choices=tuple(DTYPES), help="default: the run's")
    parser.add_argument("--kernels", choices=("auto", "torch", "triton"), help="default: the run's")
    parser.add_argument("--json", action="store_true", help="the finding as JSON")
    arguments = parser.parse_args(argv)
    bundle = read_bundle(arguments.bundle)
    device, precision = choose_device(arguments.device), arguments.precision or bundle.report["precision"]
    finding = find(bundle, begin(bundle, device, precision, arguments.kernels), precision)
    if arguments.json:
        print(json.dumps(asdict(finding) | {"reproduced": finding.reproduced, "answer": answer(finding)}, indent=1))
    else:
        print(answer(finding))
    return FINISHED if finding.reproduced else FOUND_FAULTS


def choose_device(name: str | None) -> torch.device:
    """UserError: a GPU was asked for and there is none."""
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no GPU; `bevt doctor` says why. --device cpu works everywhere.")
    return torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))


def begin(bundle: Bundle, device: torch.device, precision: str, kernels: str | None = None) -> Replay:
    """The network of a bundle, with its weights.

    Raises:
        UserError: it is neither of pretraining nor of fine-tuning.
    """
    folder = bundle.folder / MODEL
    name = json.loads((folder / CONFIG).read_text(encoding="utf-8"))["model"] if (folder / CONFIG).is_file() else ""
    if name not in KINDS:
        raise UserError(f"{folder} is a network of neither pretraining nor fine-tuning: `bevt replay` knows these two.")
    kind, settings = KINDS[name]
    config, dtype = from_dict(bundle.manifest["config"], settings), DTYPES[precision]
    with redirect_stdout(sys.stderr):  # says what it loads
        model = kind.from_pretrained(folder, kernels=kernels or config.model.kernels)
    model = model.to(device, dtype).train()

    def pretraining(batch: Batches) -> Tensor:
        return model(batch.cast(dtype)).loss

    def finetuning(batch: Batches) -> Tensor:
        logits = model(batch.pixels.to(dtype), batch.sample_keys)
        return classification_loss(logits, batch.labels, config.train.label_smoothing)[0] / batch.count

    scale = bundle.report["world"] * bundle.report["loss_scale"]
    return Replay(model, pretraining if kind is BEVT else finetuning, device, scale)


def find(bundle: Bundle, replay: Replay, precision: str) -> Finding:
    """Run every micro-batch of a bundle until one is not finite, alone or added to those before, and narrow it down."""
    common = {"step": bundle.report["step"], "device": replay.device.type, "precision": precision}
    common |= {"missing": missing(bundle), "weights": spoilt(replay.model)}
    outcome = Outcome(math.nan, None)
    for together in (False, True) if len(bundle.places) > 1 else (False,):
        for i, place in enumerate(bundle.places):
            batch = bundle.batch(place)
            outcome = replay.run(batch, fresh=not together or i == 0)
            if outcome.way:
                return _narrow(replay, batch, outcome, Finding(**common, way=outcome.way, loss="", place=place))
    return Finding(**common, way=None, loss=plain(outcome.loss))


def _narrow(replay: Replay, batch: Batches, outcome: Outcome, finding: Finding) -> Finding:
    """The finding, with samples and layer."""
    samples = samples_of(batch)
    groups: list[list[Sample]] = []
    if not finding.weights:
        groups = culprits(samples, lambda chosen: replay.run(only(batch, chosen)).way is not None)
    closest = replay.run(only(batch, groups[0])) if groups else outcome
    closest = closest if closest.way == outcome.way else outcome
    spoilt_pixels = [sample for group in groups for sample in group if not is_finite(pixels_of(batch, sample))]
    return replace(
        finding,
        loss=plain(outcome.loss),
        samples=len(samples),
        groups=tuple(tuple(key_of(batch, sample) for sample in group) for group in groups),
        pixels=tuple(key_of(batch, sample) for sample in spoilt_pixels),
        layer=closest.layer,
        parameters=closest.parameters,
    )


def streams_of(batch: Batches) -> dict[str, Any]:
    """The parts of a batch that have samples, by name."""
    parts = {"clip": batch} if isinstance(batch, LabelledBatch) else {"clip": batch.video, "image": batch.image}
    return {name: part for name, part in parts.items() if part is not None}


def samples_of(batch: Batches) -> list[Sample]:
    """All samples of a batch."""
    return [(name, i) for name, part in streams_of(batch).items() for i in range(len(part.pixels))]


def only(batch: Batches, samples: Sequence[Sample]) -> Batches:
    """A batch of these samples alone."""
    chosen = {name: [i for stream, i in samples if stream == name] for name in ("clip", "image")}
    parts = {name: part.only(chosen[name]) for name, part in streams_of(batch).items() if chosen[name]}
    return parts["clip"] if isinstance(batch, LabelledBatch) else Batch(parts.get("clip"), parts.get("image"))


def pixels_of(batch: Batches, sample: Sample) -> Tensor:
    """The pixels of a sample."""
    return streams_of(batch)[sample[0]].pixels[sample[1]]


def key_of(batch: Batches, sample: Sample) -> str:
    """The name of a sample: shard/key, or its place in the batch where it has none."""
    keys = streams_of(batch)[sample[0]].keys
    return keys[sample[1]] if keys else f"{sample[0]} {sample[1]} of the micro-batch"


def spoilt(model: nn.Module) -> dict[str, int]:
    """Parameters and buffers that are not finite: how many of their numbers."""
    counts = {name: int((~torch.isfinite(value)).sum()) for name, value in model.state_dict().items()}
    return {name: count for name, count in counts.items() if count}


def missing(bundle: Bundle) -> tuple[Place, ...]:
    """Micro-batches that may be to blame and that the bundle does not hold."""
    losses = bundle.report["losses"]
    bad = [(rank, micro) for rank, own in enumerate(losses) for micro, loss in enumerate(own) if isinstance(loss, str)]
    places = bad or [(rank, micro) for rank, own in enumerate(losses) for micro in range(len(own))]
    return tuple(place for place in places if place not in bundle.places)


def plain(number: float) -> float | str:
    """As JSON has it, which knows finite numbers alone."""
    return number if math.isfinite(number) else str(number)


def answer(finding: Finding) -> str:
    """A finding in a few lines."""
    how = f"on {finding.device} in {finding.precision}"
    lines = [f"step {finding.step}: {'reproduced' if finding.reproduced else 'not reproduced'} {how}: {_what(finding)}"]
    if not finding.reproduced:
        if finding.missing:
            lines.append(f"the bundle lacks {len(finding.missing)} micro-batches, which were too large to keep")
        lines.append(
            "so weights and batch alone are not the cause on this device: try the device and the kernels of the run"
            " (--device, --kernels), or look at the machine"
        )
        return "\n".join(lines)
    lines.append(f"{_samples(finding)} (rank {finding.place[0]}, micro-step {finding.place[1]})")
    if finding.layer and not finding.pixels:  # else it is the first that takes them
        lines.append(f"layer: {_layer(finding)}")
    return "\n".join(lines)


def _what(finding: Finding) -> str:
    if finding.way is None:
        return f"loss ({finding.loss:.4g}) and gradient are finite"
    if finding.way == FORWARD:
        return f"the loss is {finding.loss}"
    names, loss = some(finding.parameters), f"the loss is finite ({finding.loss:.4g})"
    if not finding.layer:
        return f"{loss}, the norm of its gradient overflows, most of it in {names}"
    return f"{loss}, its gradient is not, in {names}"


def _samples(finding: Finding) -> str:
    """Which samples it comes from, or that it is the weights."""
    if finding.weights:
        named = some([f"{name} ({count} of its numbers)" for name, count in finding.weights.items()])
        return f"weights: not finite are {named}; no sample is to blame"
    if not finding.groups:
        return "samples: none alone, nor this micro-batch: only added to those before it"
    if len(finding.groups) == finding.samples > 1:
        return f"samples: each of the {finding.samples} alone, so it is none of them in particular"
    first = [key for group in finding.groups for key in group]
    together = "only together" if any(len(group) > 1 for group in finding.groups) else "alone"
    pixels = "; its pixels are not finite" if finding.pixels else ""
    return f"sample: {some(first)}, {together}, of {finding.samples}{pixels}"


def _layer(finding: Finding) -> str:
    """The first layer whose output or gradient is not finite."""
    layer, forward = finding.layer, finding.way == FORWARD
    what = "output" if forward else "gradient"
    if not layer.between:
        return f"{layer.name} ({layer.kind}) is the first whose {what} is not finite"
    parent = layer.name.rpartition(".")[0] or "the network itself"
    where = "before" if forward else "after"
    return f"what {parent} does {where} {layer.name} ({layer.kind}) is the first whose {what} is not finite"
