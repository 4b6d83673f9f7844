"""Stage x precision x accumulation on so many ranks in one process group: `python -m tests.training.engine_matrix DIR`.

A small network with a frozen part is trained by the engine, and by torch's AdamW over the whole batch; saved half-way,
it goes on in a second engine: of the same layout, or of another one in another process (`link`). Rank 0 writes one JSON
line for each case to DIR/rows.jsonl.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from bevt_ds.batch import DTYPES
from bevt_ds.config.deepspeed import read_json
from bevt_ds.config.recipes import demo
from bevt_ds.config.schema import Config
from bevt_ds.model.containers import read_deepspeed
from bevt_ds.runtime.checkpoint import Facts
from bevt_ds.runtime.continuing import Build, begin_engine
from bevt_ds.runtime.distributed import Ranks
from bevt_ds.runtime.engine import FROZEN, TAG, Engine
from bevt_ds.runtime.engine_setup import start_ranks
from bevt_ds.runtime.pieces import AVERAGE, SavedPieces

SAMPLES = 48
SAVED, STEPS = 2, 4
SAVED_OFFLOAD, STEPS_OFFLOAD = 20, 24  # the rounding of a running product shows only after some steps
LR, DECAY = 1e-2, 0.1
TYPES = ("fp32", "bf16")
LINK, EMA = 5, 0.25  # steps on each number of ranks in turn


class Network(nn.Module):
    """Two layers and a norm; `unused` takes no part and is frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last, self.unused = (
            nn.Linear(12, 32),
            nn.LayerNorm(32),
            nn.Linear(32, 5),
            nn.Linear(7, 3),
        )
        generator = torch.Generator().manual_seed(3)
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -0.5, 0.5, generator=generator)
        self.unused.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.norm(self.first(x))))

    def groups(self) -> list[dict[str, Any]]:
        return [
            {"params": [*self.first.parameters(), *self.last.parameters()], "weight_decay": DECAY},
            {"params": list(self.norm.parameters()), "weight_decay": 0.0},
        ]


def sample_batch(step: int) -> tuple[Tensor, Tensor]:
    """Inputs and targets of all SAMPLES of a step."""
    generator = torch.Generator().manual_seed(100 + step)
    return torch.randn(SAMPLES, 12, generator=generator), torch.randn(SAMPLES, 5, generator=generator)


def make_config(precision: str, accumulation: int, ranks: Ranks) -> Config:
    """What the engine needs of a run that takes all samples a step."""
    config = demo()
    micro = SAMPLES // (accumulation * ranks.world)
    train = replace(config.train, precision=precision, global_clips=SAMPLES, micro_clips=micro, global_images=0)
    return replace(config, train=train, optim=replace(config.optim, lr=LR, eps=1e-2))


def make_engine(stage: int, offload: bool, ranks: Ranks, config: Config) -> Engine:
    """The network under DeepSpeed with the project's JSON of that stage; without ZeRO for stage 0."""
    values = read_json(f"zero{max(stage, 1)}")
    values["zero_optimization"]["stage"] = stage
    if offload:
        values["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
    model = Network()
    return Engine(model, config, values, ranks, 32, model.groups(), lambda step: LR)


def advance(engine: Engine, steps: Sequence[int], accumulation: int) -> list[float]:
    """Do these steps, this rank its share of each micro-batch; returns the losses of the whole batches."""
    ranks, losses = engine.ranks, []
    parts = accumulation * ranks.world
    for step in steps:
        total = torch.zeros((), dtype=torch.float64)
        inputs, targets = (t.chunk(parts) for t in sample_batch(step))
        for micro_step in range(accumulation):
            own = micro_step * ranks.world + ranks.rank
            outputs = engine.forward(inputs[own]).float()
            loss = (outputs - targets[own]).square().sum() / SAMPLES
            total += loss.item()
            engine.backward(loss)
            engine.step(step)
        losses.append(ranks.sum(total).item())
    return losses


@dataclass
class Expected:
    """What torch alone comes to: the weights, their moving average, and the loss of each step."""

    weights: dict[str, Tensor]
    average: dict[str, Tensor]
    losses: list[float]


def reference(precision: str, steps: int) -> Expected:
    """The same training by torch alone: fp32 weights, whole batches, forward in the compute dtype."""
    masters, shown, losses = Network(), Network().to(DTYPES[precision]), []
    average = {name: value.clone() for name, value in masters.state_dict().items()}
    optimizer = torch.optim.AdamW(masters.groups(), lr=LR, betas=demo().optim.betas, eps=1e-2)
    for step in range(steps):
        shown.load_state_dict(masters.state_dict())
        shown.zero_grad()
        inputs, targets = sample_batch(step)
        loss = (shown(inputs.to(DTYPES[precision])).float() - targets).square().sum().div(SAMPLES)
        loss.backward()
        losses.append(loss.item())
        for master, copy in zip(masters.parameters(), shown.parameters(), strict=True):
            master.grad = None if copy.grad is None else copy.grad.float()
        torch.nn.utils.clip_grad_norm_(masters.parameters(), demo().optim.clip_grad)
        optimizer.step()
        for name, value in masters.state_dict().items():
            average[name].lerp_(value, EMA)
    return Expected(masters.state_dict(), average, losses)


def measure(engine: Engine, again: Engine, accumulation: int, saved: int, steps: int, folder: Path) -> dict[str, Any]:
    """Train `engine` to the end; `again` from its checkpoint. Collective; the row is whole on rank 0."""
    advance(engine, range(saved), accumulation)
    save(engine, folder)
    half_way = engine.weights()
    advance(engine, range(saved, steps), accumulation)
    again.load(folder)
    padding = poison_padding(again)
    advance(again, range(saved, steps), accumulation)
    whole, resumed = engine.weights(), again.weights()
    judged = [again.is_finite(), spoilt_is_finite(again)]
    if not engine.ranks.is_main:
        return {}
    names = {dtype: name for name, dtype in DTYPES.items()}
    expected, initial = reference(names[engine.dtype], steps).weights, Network()
    files = read(folder)
    return {
        "deviation": deviation(whole, expected),
        "moved": float((whole["first.weight"] - initial.first.weight).abs().max()),
        "resumed exactly": all(torch.equal(whole[n], resumed[n]) for n in whole),
        "frozen kept": torch.equal(whole["unused.weight"], initial.unused.weight),
        "files read": all(
            torch.equal(files[f"weights/{n}"], half_way[n].flatten()) for n in half_way if "unused" not in n
        ),
        "only tensors and JSON": {path.suffix for path in folder.rglob("*.*")} == {".safetensors", ".json"},
        "padding": padding,
        "finite, and spoilt": judged,
    }


def poison_padding(engine: Engine) -> int:
    """Put NaN wherever the engine's masters and moments hold no parameter; the elements that are so. Collective."""
    padded, pieces = 0, engine._pieces()
    for flats in engine._kinds().values():
        for number, flat in enumerate(flats):
            held = torch.zeros(flat.numel(), dtype=torch.bool)
            for piece in pieces:
                if piece.flat == number:
                    held[piece.offset : piece.offset + piece.size] = True
            flat.detach().view(-1)[~held] = math.nan
            padded += int((~held).sum())
    return engine.ranks.sum_counts([padded])[0]


def spoilt_is_finite(engine: Engine) -> bool:
    """Whether the engine takes a NaN in the last element of the last parameter for a finite number. Collective."""
    *_, last = engine._pieces()
    if engine.ranks.rank == engine.ranks.world - 1:
        last.of(engine.masters())[-1] = math.nan
    return engine.is_finite()


def save(engine: Engine, folder: Path, **more: list[Tensor]) -> None:
    """Write every rank's part. Collective."""
    engine.snapshot(**more).write(folder / TAG, engine.ranks.rank)
    engine.ranks.barrier()


def read(folder: Path) -> dict[str, Tensor]:
    """All that a checkpoint's ranks wrote, whole."""
    with SavedPieces(folder / TAG) as saved:
        return {key: saved.read(key, 0, size) for key, size in saved.sizes().items()}


def deviation(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """The largest difference between two sets of tensors; of the first, whole or flattened."""
    return max(float((ours[name] - value.reshape(ours[name].shape)).abs().max()) for name, value in theirs.items())


def link(build: Build, source: Path | None, first: int, precisions: Sequence[str], ranks: Ranks, folder: Path) -> dict:
    """Go on from `source` for LINK steps, and save. Collective; the row is whole on rank 0.

    precisions: of the run that saved, and of this one.
    """
    configs = [make_config(name, 2, ranks) for name in precisions]
    start = source and (source, Facts(first, 0, 0, configs[0], "", {}))
    engine, average = begin_engine(build, configs[1], start, EMA)
    save(engine, folder / "begun", **{AVERAGE: average.parts})
    losses = []
    for step in range(first, first + LINK):
        losses += advance(engine, [step], 2)
        average.update()
    save(engine, folder, **{AVERAGE: average.parts})
    weights = engine.weights()
    with average.applied():
        averages = engine.weights()
    back = engine.weights()
    if not ranks.is_main:
        return {}
    expected = reference(precisions[1], first + LINK)
    pairs = zip(losses, expected.losses[first:], strict=True)
    return {
        "compute type": str(engine.dtype),
        "kept": source is None or same_files(source, folder / "begun"),
        "losses": max(abs(loss / theirs - 1) for loss, theirs in pairs),
        "deviation": max(deviation(weights, expected.weights), deviation(averages, expected.average)),
        "frozen kept": torch.equal(weights["unused.weight"], Network().unused.weight),
        "average taken back": all(torch.equal(weights[n], back[n]) for n in weights),
        "moved": deviation(weights, {"first.weight": Network().first.weight.detach()}),
    }


def same_files(ours: Path, theirs: Path) -> bool:
    """Whether two checkpoints hold the same, however it was split."""
    a, b = read(ours), read(theirs)
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def old_format(build: Build, accumulation: int, folder: Path) -> dict[str, Any]:
    """A checkpoint as earlier versions wrote it, with DeepSpeed's shards, goes on to the same weights."""
    engine, again = build(), build()
    advance(engine, range(SAVED), accumulation)
    engine.ds.save_checkpoint(str(folder), tag=TAG, save_latest=False)
    if engine.ranks.is_main:
        save_file(engine._frozen, folder / TAG / FROZEN)
    engine.ranks.barrier()
    half_way, gathered = engine.weights(), read_deepspeed(folder / TAG)
    again.load(folder)
    for one in (engine, again):
        advance(one, range(SAVED, STEPS), accumulation)
    whole, resumed = engine.weights(), again.weights()
    return {
        "resumed exactly": all(torch.equal(whole[n], resumed[n]) for n in whole),
        "gathered": not engine.stage or all(torch.equal(half_way[n], gathered[n]) for n in half_way),
    }


def main(folder: Path, words: list[str]) -> None:
    """Every case; rank 0 writes the rows."""
    ranks, offload = start_ranks(), "offload" in words
    stages = (1, 2, 3) if offload else (0, 1, 2, 3)
    accumulations = (1, 2, 4) if "wide" in words else (2,)
    for stage, precision, accumulation in product(stages, TYPES, accumulations):
        if (stage, precision) == (0, "bf16"):
            continue  # refused before the start
        build, place = partial(make_engine, stage, offload, ranks), folder / f"{stage}-{precision}-{accumulation}"
        made = partial(build, make_config(precision, accumulation, ranks))
        if "link" in words:
            rows = follow(build, stage, precision, ranks, folder, int(words[-1]))
        elif "old" in words:
            rows = [old_format(made, accumulation, place)]
        else:
            lengths = (SAVED_OFFLOAD, STEPS_OFFLOAD) if offload else (SAVED, STEPS)
            rows = [measure(made(), made(), accumulation, *lengths, place)]
        if ranks.is_main:
            facts = {"stage": stage, "precision": precision, "accumulation": accumulation}
            with (folder / "rows.jsonl").open("a") as file:
                file.writelines(json.dumps({**facts, **row}) + "\n" for row in rows)


def follow(build: Build, stage: int, precision: str, ranks: Ranks, folder: Path, number: int) -> list[dict[str, Any]]:
    """Link `number` of a chain: it begins with what another stage has saved in the link before.

    The second begins once more with what the other precision saved at that stage.
    """
    own = [0, 1, 2, 3] if precision == "fp32" else [1, 2, 3]
    before = own[(own.index(stage) + 1) % len(own)]
    rows = []
    for earlier in (precision, *(name for name in TYPES if name != precision and number == 1 and before and stage)):
        source = folder / f"{number - 1}-{earlier}-{before}" if number else None
        place = folder / (f"{number}-{precision}-{stage}" if earlier == precision else f"other-{precision}-{stage}")
        rows.append({"earlier": earlier} | link(build, source, number * LINK, (earlier, precision), ranks, place))
    return rows


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
