"""Counts what the host starts on the device in one training step, and for whom: on a CPU, without a GPU.

    python -m benchmarks.step_launches               # joint_swin_b's step and finetune_k400's, without and with graphs
    python -m benchmarks.step_launches --model tiny --frames 4 --size 64

The training program's own step runs, in bf16 under ZeRO-2, on one clip and one image, with networks as deep as they
are and narrower. Kernels that are ours are recorded and not launched: numbers mean nothing, counts do. Each counts one,
and each operator of PyTorch. On a GPU a multi-tensor operator over hundreds of tensors is several kernels, and some
products are two. Replaying a graph counts one.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import repeat
from typing import Any
from unittest.mock import patch

from bevt_ds.batch import Stream
from bevt_ds.kernels import dispatch, launches, ops
from bevt_ds.model import presets
from bevt_ds.model.tokenizers import dalle
from bevt_ds.runtime import graphs, tokenizer_graph
from bevt_ds.runtime.engine_setup import start_ranks

from .step_batch import resident_batch
from .step_finetune import FinetuneSetting, OurFinetuning, finetuning_configuration, labelled_batch
from .step_levers import Levers
from .step_parts import Operators
from .step_providers import Ours, Setting, Step, configuration

HOST = ("_record_function", "scalar_tensor", "_local_scalar_dense", "set_", "lift")  # start nothing on a device
SITES = {  # functions of ours and DeepSpeed's: the first of these that is on the stack says whose something is
    "tokenize": "tokenizer",
    "masked_cross_entropy": "head",
    "classification_loss": "head",
    "_filled": "gradients into buckets",
    "reduce_ipg_grads": "reduction of buckets",
    "grad_handling_hook": "gradients into buckets",
    "cast": "copies of the batch",
    "to": "copies of the batch",
    "backward": "backward pass",
    "forward": "forward pass",
    "step": "update",
    "train_step": "sums for the log line",
}
PARTS = tuple(dict.fromkeys(SITES.values()))
WARM_UP = (1, tokenizer_graph.SETTLED)  # steps before the one that is counted, without graphs and with them
WIDTH, IDS = 32, 64  # channels of the first stage and of the tokenizer's, for which no count changes; ids


class Launches(Operators):
    """Inside the block counts operators and our kernels: `found` by part, `names` by name."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()
        self.names: Counter[str] = Counter()

    def note(self, name: str) -> None:
        """One more launch, by the code that runs now."""
        self.found[_part()] += 1
        self.names[name] += 1

    def append(self, launch: launches.Launch) -> None:
        """In the place of the list in which our kernels' launches are recorded."""
        if all(launch.grid):
            self.note(launch.kernel.fn.__name__)

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        before = self.count
        result = super().__torch_dispatch__(function, types, args, kwargs)
        name = function.overloadpacket.__name__
        if self.count > before and not name.startswith(HOST):
            self.note(name)
        return result


def _part() -> str:
    """The part that the running code belongs to."""
    names, frame = set(), sys._getframe(2)
    while frame is not None:
        if frame.f_globals.get("__name__", "").startswith(("bevt_ds", "deepspeed")):
            names.add(frame.f_code.co_name)
        frame = frame.f_back
    return next((part for name, part in SITES.items() if name in names), "other")


class Replays:
    """In the place of what captures: a replay is one launch and computes nothing."""

    def __init__(self, note: Callable[[str], None]) -> None:
        self._note = note

    def warm_up(self, run: Callable[[], Any]) -> None:
        """Nothing: there are no libraries."""

    def capture(self, *runs: Callable[[], Any]) -> list[tuple[Callable[[], None], Any]]:
        """Each runs once, for its results' shapes."""
        return [(lambda: self._note("replayed graph"), run()) for run in runs]


@contextmanager
def recorded(found: Launches) -> Iterator[None]:
    """Inside the block, our kernels are recorded into `found` in place of running, as for an H100."""
    recording = launches.Recording("sm_90", False, found)
    with (
        patch.object(launches, "_recording", [recording]),
        patch.object(ops, "_runs_kernels", lambda provider, x: True),
        patch.object(dalle, "resolve", lambda provider, device: "triton"),
        patch.object(dispatch, "is_in_torch_dispatch_mode", lambda: False),
        patch.object(graphs, "difference", lambda *_: None),
        patch.object(tokenizer_graph, "DIFFERENT", 1.0),
        patch.object(Stream, "__post_init__", lambda self: None),  # a check on the host
    ):
        yield


def count_step(step: Step, batch: Any, found: Launches, warm_up: int) -> Launches:
    """What a step starts after some that make the optimizer's state and capture; replays are noted in `found`."""
    with recorded(found):
        for _ in range(warm_up):
            step(repeat(batch))
        found.found.clear()
        found.names.clear()
        with found:
            step(repeat(batch))
    return found


def pretraining(model: str, frames: int, size: int, with_graphs: bool = False) -> Launches:
    """Of a joint step on one clip and one image, DALL-E's tokenizer included."""
    config = configuration(model, 1, 1, IDS)
    data = replace(config.data, size=size, token_size=size // 2, short_side=(size, size), frames=frames)
    config, found = replace(config, data=data), Launches()
    with narrow(model):
        ours = Ours(Setting(config, "none", start_ranks()), Levers(), precision="bf16")
    targets = ours.task.targets
    targets.encoder = dalle.DalleTokenizer(WIDTH, IDS)
    if with_graphs:
        replay(ours.task.engine, found)
        replays = Replays(found.note)
        targets.encoder = tokenizer_graph.ReplayedTokenizer(
            targets.encoder, "on", replays, ours.task.ranks.all_hold, print
        )
        targets.after_fill = targets.encoder.after_micro_step
    return count_step(ours, resident_batch(1, 1, frames, size, 0, data.mask), found, WARM_UP[with_graphs])


def finetuning(model: str, frames: int, size: int, with_graphs: bool = False) -> Launches:
    """Of a fine-tuning step on one clip."""
    config = finetuning_configuration(model, 1)
    data = replace(config.data, size=size, short_side=(size, size), frames=frames)
    setting, found = FinetuneSetting(replace(config, data=data), start_ranks()), Launches()
    with narrow(model):
        ours = OurFinetuning(setting, precision="bf16")
    if with_graphs:
        replay(ours.task.engine, found)
    return count_step(ours, labelled_batch(setting.config, setting.classes), found, WARM_UP[with_graphs])


@contextmanager
def narrow(model: str) -> Iterator[None]:
    """Inside the block the model of this name is WIDTH wide."""
    sizes = presets.SIZES[model]
    heads = tuple(WIDTH // 32 << stage for stage in range(len(sizes.depths)))
    with patch.dict(presets.SIZES, {model: replace(sizes, embed_dim=WIDTH, num_heads=heads)}):
        yield


def replay(engine: Any, found: Launches) -> None:
    """Give the encoder graphs whose replays are noted."""
    engine.module.encoder.replay = graphs.Graphs("on", Replays(found.note), lambda holds: holds, print)


def table(columns: dict[str, Launches]) -> str:
    """Markdown: a row for each part."""
    parts = [name for name in (*PARTS, "other") if any(column.found[name] for column in columns.values())]
    rows = [(name, *(str(column.found[name]) for column in columns.values())) for name in parts]
    rows.append(("**in all**", *(f"**{column.found.total()}**" for column in columns.values())))
    lines = [("", *columns), ("---",) * (len(columns) + 1), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default="swin_b")
    parser.add_argument("--frames", type=int, default=16)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--names", action="store_true", help="by name of operator or kernel too")
    arguments = parser.parse_args()
    shape = arguments.model, arguments.frames, arguments.size
    columns = {}
    for name, graphed in (("graphs off", False), ("graphs on", True)):
        columns[f"pretraining, {name}"] = pretraining(*shape, graphed)
        columns[f"fine-tuning, {name}"] = finetuning(*shape, graphed)
    print(table(columns))
    for name, column in columns.items() if arguments.names else ():
        print(f"\n{name}:", ", ".join(f"{count} {key}" for key, count in column.names.most_common()))


if __name__ == "__main__":
    main()
