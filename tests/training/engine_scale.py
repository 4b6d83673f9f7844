"""What engine configurations do with a real model: `python -m tests.training.engine_scale DIR [NAME]`, on any ranks.

Each case begins a pretraining engine as a run does, and takes steps over the same global batch. Rank 0 writes a
JSON line for each case to DIR/rows.jsonl: losses, whether the initial weights are the seed's, the largest shares of the
parameters that a rank held whole at a time and that it read to go on from a checkpoint, how often a step gathers the
parameters, and the order of gradients and reductions in it. Of a larger model, the memory that its beginning took.
"""

from __future__ import annotations

import ctypes
import gc
import json
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.scaling_traffic import Traffic
from bevt_ds.batch import Batch, Stream
from bevt_ds.config.deepspeed import read_json
from bevt_ds.config.recipes import demo
from bevt_ds.config.schema import Config
from bevt_ds.model.presets import create_model
from bevt_ds.runtime import engine as engine_module
from bevt_ds.runtime.background import Commits
from bevt_ds.runtime.distributed import Ranks
from bevt_ds.runtime.engine import TAG, Engine
from bevt_ds.runtime.engine_setup import start_ranks
from bevt_ds.runtime.pieces import WEIGHTS, SavedPieces
from bevt_ds.train import pretraining
from bevt_ds.train.task import Setup

IMAGES, SIZE, VOCABULARY = 8, 32, 64
STEPS = {"fp32": 20, "bf16": 5}
GRID = SIZE // 16
CASES = [("zero1", 0, "fp32"), *((f"zero{n}", n, precision) for precision in ("fp32", "bf16") for n in (1, 2, 3))]
LARGE_CASES = [("zero2", 2, "fp32"), ("zero3", 3, "fp32")]
LARGE = "swin_s"  # large enough to stand out in the memory of a process
REDUCTIONS = {"all_reduce", "reduce", "reduce_scatter", "all_to_all"}


class Watched(Engine):
    """An engine that knows the most memory that the process took while the model got its values, beyond what it had."""

    def _begin(self, *arguments: Any) -> None:
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # what is free goes back to the system
        Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here on
        before = memory("VmRSS")
        super()._begin(*arguments)
        self.begin_bytes = memory("VmHWM") - before


class Order(Traffic):
    """Inside the block, notes each gradient that is ready, as "g", and each reduction that is called, as "R"."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.events: list[str] = []
        self._hooks = [p.register_hook(self._note) for p in model.parameters() if p.requires_grad]

    def _note(self, gradient: torch.Tensor) -> None:
        self.events.append("g")

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        before = sum(self.calls[kind] for kind in REDUCTIONS)
        result = super().__torch_dispatch__(func, types, args, kwargs)
        self.events += ["R"] * (sum(self.calls[kind] for kind in REDUCTIONS) - before)
        return result

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for hook in self._hooks:
            hook.remove()


def numel(parameter: torch.nn.Parameter) -> int:
    """Its elements, over all ranks."""
    return getattr(parameter, "ds_numel", parameter.numel())


def memory(name: str) -> int:
    """A figure of /proc/self/status in bytes."""
    return 1024 * int(re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])


def make_config(name: str, precision: str, folder: Path, ranks: Ranks) -> Config:
    """The demo with images alone, and at least two micro-steps."""
    config = demo()
    micro = min(IMAGES // ranks.world // 2, 2)
    images = {"global_images": IMAGES, "micro_images": micro, "global_clips": 0, "steps": 20}
    train = replace(config.train, precision=precision, offload_dir=str(folder), **images)
    model = replace(config.model, name=name, window=(2, 2, 2), drop_path=0.1)
    return replace(config, model=model, train=train, optim=replace(config.optim, lr=1e-3, warmup_steps=4))


def make_engine(json_name: str, stage: int, config: Config, folder: Path, ranks: Ranks) -> Watched:
    """As a new run does it; `stage` in the JSON's place."""
    values = read_json(json_name)
    values["zero_optimization"]["stage"] = stage
    pretraining.Engine = Watched
    setup = Setup(config, values, folder, ranks, Commits(ranks))
    return pretraining.make_engine(config, setup, {"vocab_size": VOCABULARY}, config.train.steps)


def draw_batch(step: int, first: int, number: int) -> Batch:
    """`number` of the IMAGES images of a step, from `first` on: noise, a row of masked cells each, drawn targets."""
    generator = torch.Generator().manual_seed(step)
    pixels = torch.randn(IMAGES, 3, SIZE, SIZE, generator=generator)
    mask = torch.arange(GRID)[:, None].expand(GRID, GRID) == torch.arange(IMAGES)[:, None, None] % GRID
    targets = torch.randint(VOCABULARY, mask.shape, generator=generator)
    own = slice(first, first + number)
    cells = mask[own].flatten().nonzero().flatten()
    keys, places = torch.arange(IMAGES)[own] + IMAGES * step, torch.zeros_like(cells)
    image = Stream(
        pixels[own],
        torch.empty(0),
        mask[own],
        cells,
        cells,
        places,
        keys,
        int(mask.sum()),
        targets[own].flatten()[cells],
    )
    return Batch(None, image)


def take_step(engine: Engine, config: Config, step: int) -> float:
    """The loss of the global batch."""
    ranks, micro = engine.ranks, config.train.micro_images
    loss = torch.zeros(())
    for first in range(ranks.rank * micro, IMAGES, ranks.world * micro):
        share = engine.forward(draw_batch(step, first, micro)).loss
        engine.backward(share)
        engine.step(step)
        loss += share.detach().float()
    return float(ranks.sum(loss))


@contextmanager
def live_share(engine: Engine) -> Iterator[list[float]]:
    """Inside the block, each module's forward adds to the list: which share of the parameters is whole on this rank."""
    parameters, shares = list(engine.module.parameters()), []
    sizes = [numel(p) for p in parameters]

    def note(*_: Any) -> None:
        whole = sum(size for p, size in zip(parameters, sizes, strict=True) if p.numel() == size)
        shares.append(whole / sum(sizes))

    hooks = [module.register_forward_hook(note) for module in engine.module.modules()]
    yield shares
    for hook in hooks:
        hook.remove()


def is_the_seeds(engine: Engine, config: Config) -> bool:
    """Whether the masters are what the seed draws for a whole model, in the compute type. Collective."""
    given = engine.weights()
    if not engine.ranks.is_main:
        return True
    whole = create_model(config.model.name, vocab_size=VOCABULARY, window=config.model.window)
    whole.init_weights(torch.Generator().manual_seed(config.train.seed))
    frozen = {name for name, p in engine.module.named_parameters() if not p.requires_grad}
    kept = {n: p if n in frozen else p.to(engine.dtype).float() for n, p in whole.state_dict().items()}
    return given.keys() == kept.keys() and all(torch.equal(given[name], kept[name]) for name in kept)


def read_share(engine: Engine, folder: Path) -> float:
    """The largest share of the weights that a rank reads to go on from a checkpoint of this moment. Collective."""
    read = []

    class Counted(SavedPieces):
        def read(self, key: str, start: int, size: int) -> torch.Tensor:
            read.append(size * key.startswith(WEIGHTS))
            return super().read(key, start, size)

    engine.snapshot().write(folder / TAG, engine.ranks.rank)
    engine.ranks.barrier()
    engine_module.SavedPieces = Counted
    engine.load(folder)
    trained = sum(numel(p) for p in engine.module.parameters() if p.requires_grad)
    return max(engine.ranks.gather(sum(read) / trained))


def measure(engine: Watched, config: Config, folder: Path) -> dict[str, Any]:
    """What the steps of a case show. Collective."""
    row: dict[str, Any] = {"read": read_share(engine, folder)}
    with Order(engine.module) as order, live_share(engine) as shares:
        first = take_step(engine, config, 0)
    size = engine.dtype.itemsize * sum(map(numel, engine.module.parameters()))
    row["gathered"] = order.payload["all_gather"] / size
    row["losses"] = [first, *(take_step(engine, config, step) for step in range(1, STEPS[config.train.precision]))]
    return row | {"order": "".join(order.events), "live": max(shares)}


def main(folder: Path, *names: str) -> None:
    """Every case, or the DeepSpeed JSONs of these names at stage 3 in fp32; rank 0 writes the rows."""
    ranks = start_ranks()
    todo = [("tiny", *case) for case in [(name, 3, "fp32") for name in names] or CASES]
    todo += [(LARGE, *case) for case in LARGE_CASES if ranks.world == 2 and not names]
    for model, name, stage, precision in todo:
        config = make_config(model, precision, folder, ranks)
        engine = make_engine(name, stage, config, folder, ranks)
        size = 4 * sum(map(numel, engine.module.parameters()))
        row = {"model": model, "config": name, "stage": stage, "precision": precision}
        row["begin"] = [taken / size for taken in ranks.gather(engine.begin_bytes)]
        row["the seed's"] = is_the_seeds(engine, config)
        if model == "tiny":
            row |= measure(engine, config, folder / f"{name}-{stage}-{precision}")
        if ranks.is_main:
            with (folder / "rows.jsonl").open("a") as file:
                file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
