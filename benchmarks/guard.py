"""What it costs to look for numbers that are not finite: `python -m benchmarks.guard`.

One process, one rank, the training program's own step (`tiny`, one clip and two images), at each ZeRO stage
and precision that a CPU can run. Variants take turns step by step:

    no check    clipping alone: the gradient's norm is computed, nothing looks whether it is finite
    guard       what training does
    deepspeed   the check and norms of DeepSpeed 0.19.8, which `guard` takes the place of (from stage 1)

Operators and the bytes that they read and write are exact; of the times compare the ratios. Rows go to
guard-DEVICE.jsonl.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from itertools import product, repeat
from statistics import median
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bevt_ds.runtime import flat_norms, guard
from bevt_ds.runtime.engine import Engine
from bevt_ds.runtime.engine_setup import start_ranks

from .common import add_row, command_line, cpu_seconds, in_turns, provenance, rows_of
from .step_batch import resident_batch
from .step_levers import Levers
from .step_providers import Ours, Setting, configuration

PLACES = [place for place in product((0, 1, 2, 3), ("fp32", "bf16")) if place != (0, "bf16")]
WARM_UP = 3  # steps; stage 3 learns the order of the modules in the first two
READS = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.equal.default)


class Traffic(TorchDispatchMode):
    """Operators inside the block, views and allocations aside; the bytes that they take and give; numbers read."""

    def __init__(self) -> None:
        super().__init__()
        self.operators = self.bytes = self.reads = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if not (function.is_view or "empty" in function.overloadpacket.__name__):
            self.operators += 1
            self.reads += function in READS
            self.bytes += sum(x.nbytes for x in tree_leaves((args, kwargs, result)) if isinstance(x, Tensor))
        return result


def _plain_backward(engine: Engine, loss: Tensor) -> None:
    engine.ds.backward(loss * engine.ranks.world, scale_wrt_gas=False)


@contextmanager
def unchecked() -> Iterator[None]:
    """Steps inside the block do not look whether loss and gradient are finite."""
    flags: dict[torch.device, Tensor] = {}
    never = lambda total: flags.setdefault(total.device, torch.zeros((), device=total.device))  # noqa: E731
    with mock.patch.object(flat_norms, "flag_of", never), mock.patch.object(Engine, "backward", _plain_backward):
        yield


@contextmanager
def as_deepspeed() -> Iterator[None]:
    """Engines made inside the block keep DeepSpeed's norms and checks."""
    with (
        mock.patch.object(guard, "_on_device", lambda *_: None),
        mock.patch.object(guard, "shorten_norms", lambda _: None),
    ):
        yield


def measure(setting: Setting, stage: int, precision: str, rounds: int) -> list[dict[str, Any]]:
    """A row of each variant."""
    data, train = setting.config.data, setting.config.train
    batch = resident_batch(train.micro_clips, train.micro_images, data.frames, data.size, 0, data.mask)
    batches = repeat(batch.to(setting.device))
    steps = {"guard": Ours(setting, Levers(), stage=stage, precision=precision)}
    steps["no check"] = steps["guard"]
    if stage:
        with as_deepspeed():
            steps["deepspeed"] = Ours(setting, Levers(), stage=stage, precision=precision)

    def cpu_of(name: str) -> float:
        with unchecked() if name == "no check" else nullcontext():
            return cpu_seconds(partial(steps[name], batches))

    rows = []
    for name in steps:
        in_turns({name: partial(cpu_of, name)}, 0, warm=WARM_UP)
        with Traffic() as traffic:
            cpu_of(name)
        rows.append({"variant": name, "operators": traffic.operators, "bytes": traffic.bytes, "reads": traffic.reads})
    seconds = in_turns({name: partial(cpu_of, name) for name in steps}, rounds)
    base = median(seconds["no check"])
    for row in rows:
        own = median(seconds[row["variant"]])
        row |= {"cpu_ms": round(1e3 * own, 2), "share": round(own / base - 1, 4), "rounds": rounds}
    return [{"op": "guard", "stage": stage, "precision": precision} | row for row in rows]


def main(argv: list[str] | None = None) -> None:
    parser = command_line(__doc__, rounds=9)
    parser.add_argument("--stages", type=int, nargs="+", default=[0, 1, 2, 3])
    arguments = parser.parse_args(argv)
    setting = Setting(configuration("tiny", 1, 2), "none", start_ranks())
    device = setting.device.type
    path = rows_of("guard", provenance(device)["device"], arguments.out)
    for stage, precision in PLACES:
        for row in measure(setting, stage, precision, arguments.rounds) if stage in arguments.stages else ():
            add_row(path, row, device)


if __name__ == "__main__":
    main()
