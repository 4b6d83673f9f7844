"""Stage x precision x accumulation on so many ranks in one process group: `python -m tests.training.engine_matrix DIR`.

A small network with a frozen part is trained by the engine, and by torch's AdamW over the whole batch; saved half-way,
it goes on in a second engine. Rank 0 writes one JSON line for each case to DIR/rows.jsonl.
"""

from __future__ import annotations

import json
import sys
import zipfile
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import chain, product
from pathlib import Path
from typing import Any

import torch
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
from torch import Tensor, nn

from bevt_ds.config.deepspeed import read_json
from bevt_ds.config.recipes import demo
from bevt_ds.config.schema import Config
from bevt_ds.runtime.checkpoint import Facts
from bevt_ds.runtime.continuing import Build, begin_engine
from bevt_ds.runtime.distributed import Ranks
from bevt_ds.runtime.ema import WeightAverage
from bevt_ds.runtime.engine import DTYPES, TAG, Engine, start_ranks

SAMPLES = 16
SAVED, STEPS = 2, 4
SAVED_OFFLOAD, STEPS_OFFLOAD = 20, 24  # the rounding of a running product shows only after some steps
LR, DECAY = 1e-2, 0.1
TYPES = ("fp32", "bf16")


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


def make_engine(
    stage: int, offload: bool, ranks: Ranks, config: Config, weights: dict[str, Tensor] | None = None
) -> Engine:
    """The network under DeepSpeed with the project's JSON of that stage; without ZeRO for stage 0."""
    values = read_json(f"zero{max(stage, 1)}")
    values["zero_optimization"]["stage"] = stage
    if offload:
        values["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
    model = Network()
    if weights:
        model.load_state_dict(weights)
    return Engine(model, config, values, ranks, 32, model.groups(), lambda step: LR)


def advance(engine: Engine, steps: Sequence[int], accumulation: int) -> None:
    """Do these steps, this rank its share of each micro-batch."""
    ranks = engine.ranks
    parts = accumulation * ranks.world
    for step in steps:
        inputs, targets = (t.chunk(parts) for t in sample_batch(step))
        for micro_step in range(accumulation):
            own = micro_step * ranks.world + ranks.rank
            outputs = engine.forward(inputs[own]).float()
            engine.backward((outputs - targets[own]).square().sum() / SAMPLES)
            engine.step(step)


def reference(precision: str, steps: int) -> dict[str, Tensor]:
    """The same training by torch alone: fp32 weights, whole batches, forward in the compute dtype."""
    masters, shown = Network(), Network().to(DTYPES[precision])
    optimizer = torch.optim.AdamW(masters.groups(), lr=LR, betas=demo().optim.betas, eps=1e-2)
    for step in range(steps):
        shown.load_state_dict(masters.state_dict())
        shown.zero_grad()
        inputs, targets = sample_batch(step)
        (shown(inputs.to(DTYPES[precision])).float() - targets).square().sum().div(SAMPLES).backward()
        for master, copy in zip(masters.parameters(), shown.parameters(), strict=True):
            master.grad = None if copy.grad is None else copy.grad.float()
        torch.nn.utils.clip_grad_norm_(masters.parameters(), demo().optim.clip_grad)
        optimizer.step()
    return masters.state_dict()


def measure(engine: Engine, again: Engine, accumulation: int, saved: int, steps: int, folder: Path) -> dict[str, Any]:
    """Train `engine` to the end; `again` from its checkpoint. Collective; the row is whole on rank 0."""
    advance(engine, range(saved), accumulation)
    engine.save(folder)
    half_way = engine.weights()
    advance(engine, range(saved, steps), accumulation)
    again.load(folder)
    advance(again, range(saved, steps), accumulation)
    whole, resumed = engine.weights(), again.weights()
    if not engine.ranks.is_main:
        return {}
    names = {dtype: name for name, dtype in DTYPES.items()}
    expected, initial = reference(names[engine.dtype], steps), Network()
    row = {
        "deviation": max(float((whole[n] - expected[n]).abs().max()) for n in expected),
        "moved": float((whole["first.weight"] - initial.first.weight).abs().max()),
        "resumed exactly": all(torch.equal(whole[n], resumed[n]) for n in whole),
        "frozen kept": torch.equal(whole["unused.weight"], initial.unused.weight),
        "scripts": [path.name for path in folder.rglob("*.py")],
        "zip files": all(map(zipfile.is_zipfile, folder.rglob("*.pt"))),
    }
    if engine.stage > 1 or (engine.stage and engine.dtype is torch.float32):  # what DeepSpeed's own converter knows
        theirs = get_fp32_state_dict_from_zero_checkpoint(str(folder), tag=TAG)
        row["shards read"] = all(torch.equal(theirs[n], half_way[n]) for n in half_way if "unused" not in n)
    return row


def hand_over(build: Build, configs: Sequence[Config], accumulation: int, stage: int, folder: Path) -> dict[str, Any]:
    """What a checkpoint of the first configuration becomes in a run of the second, at once and after more steps."""
    ema = 0.5 if stage < 3 else 0.0
    before, average = begin_engine(build, configs[0], None, ema)
    for step in range(SAVED):
        advance(before, [step], accumulation)
        if average:
            average.update()
    before.save(folder)
    if average:
        average.save(folder)
    old, old_average = before.whole_state(), averaged(before, average)
    start = folder, Facts(SAVED, before.ranks.world, stage, configs[0], "", {})
    after, average = begin_engine(build, configs[1], start, ema)
    new, new_average = after.whole_state(), averaged(after, average)
    advance(after, range(SAVED, STEPS), accumulation)
    got, expected = after.whole_state().weights, reference(configs[1].train.precision, STEPS)
    return {
        "compute type": str(after.dtype),
        "weights kept": equal(old.weights, new.weights) and equal(old_average, new_average),
        "averages differ": stage == 3 or not equal(old.weights, old_average),
        "moments kept": all(map(torch.equal, chain(*old.moments.values()), chain(*new.moments.values()))),
        "updates": (old.updates, new.updates),
        "deviation": max(float((got[n] - expected[n]).abs().max()) for n in got),
    }


def averaged(engine: Engine, average: WeightAverage | None) -> dict[str, Tensor]:
    """The averages by name; none where none are kept."""
    if average is None:
        return {}
    with average.applied():
        return engine.whole_state().weights


def equal(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    """Whether two sets of tensors are the same to the last bit."""
    return ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in ours)


def main(folder: Path, words: set[str]) -> None:
    """Every case; rank 0 writes the rows."""
    ranks, offload = start_ranks(), "offload" in words
    stages = (1, 2, 3) if words & {"offload", "other"} else (0, 1, 2, 3)
    accumulations = (1, 2, 4) if "wide" in words else (2,)
    for stage, precision, accumulation in product(stages, TYPES, accumulations):
        if (stage, precision) == (0, "bf16"):
            continue  # refused before the start
        configs = [make_config(name, accumulation, ranks) for name in sorted(TYPES, key=lambda n: n != precision)]
        build, place = partial(make_engine, stage, offload, ranks), folder / f"{stage}-{precision}-{accumulation}"
        if "other" in words:
            row = hand_over(build, configs, accumulation, stage, place)
        else:
            lengths = (SAVED_OFFLOAD, STEPS_OFFLOAD) if offload else (SAVED, STEPS)
            row = measure(build(configs[0]), build(configs[0]), accumulation, *lengths, place)
        if ranks.is_main:
            facts = {"stage": stage, "precision": precision, "accumulation": accumulation}
            with (folder / "rows.jsonl").open("a") as file:
                file.write(json.dumps({**facts, **row}) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), set(sys.argv[2:]))
