"""Where the time of a step goes, from torch's profiler: every microsecond belongs to one part.

Modules open a range around their forward pass, and an op belongs to the innermost range around it. In the backward
pass there are no ranges: each autograd node carries the sequence number of the forward op that made it, and takes that
op's part. What no range claims, Python between the ops included, is "other", so that the parts add up to the step.

On a GPU a part is the duration of the kernels that its ops launched, and "other" what remains of the step: idle time,
or less than nothing where kernels ran side by side. On a CPU it is the ops' own time, scaled from the profiled step to
the step as timed without the profiler. A compiled region is a part of its own, because its
ops cannot be told apart; so is the encoder where it is replayed as a graph.
"""

from __future__ import annotations

import re
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils._python_dispatch import TorchDispatchMode

from bevt_ds.model.layers import LinearGelu

PARTS = (
    "data wait",
    "tokenizer",
    "stems",
    "attention",
    "linears",
    "norm, activation, residual",
    "head and loss",
    "compiled",
    "optimizer",
    "communication",
    "other",
)
MARK = "part: "
LAUNCHES = ("cudaLaunchKernel", "cuLaunchKernel", "cudaGraphLaunch")  # of CUDA's runtime and driver
STEMS = ("encoder.patch_embed", "image_embed", "mask_token")
HEADS = ("video_decoder", "image_decoder", "lm_head", "encoder.norm")
COLLECTIVES = ("c10d::", "nccl", "gloo:", "record_param_comms")
NODE = "autograd::engine::evaluate_function: "
ACCUMULATE = NODE + "torch::autograd::AccumulateGrad"  # and ZeRO's hooks on it: the optimizer's bookkeeping


def part(name: str) -> record_function:
    """A range in which everything belongs to part `name`, except what a range inside it claims."""
    return record_function(MARK + name)


def part_of(name: str, module: nn.Module) -> str | None:
    """The part that a module's forward pass opens, by its name in the model and its kind; None: its parent's."""
    if name in STEMS:
        return "stems"
    if name in HEADS:
        return "head and loss"
    if re.fullmatch(r"encoder\.layers\.\d+", name) and is_compiled(module):
        return "compiled"
    if not name.startswith("encoder.layers.") or name.startswith(tuple(f"{n}." for n in (*STEMS, *HEADS))):
        return None
    if isinstance(module, nn.Linear | LinearGelu):
        return "linears"
    return "attention" if name.endswith(".attn") else "norm, activation, residual"


def is_compiled(module: nn.Module) -> bool:
    """Whether it, or anything in it, went through `nn.Module.compile`; such a module must get no hooks."""
    return any(child._compiled_call_impl is not None for child in module.modules())


@contextmanager
def marked(model: nn.Module | None) -> Iterator[None]:
    """Inside the block, modules of `model` open their part's range around their forward pass."""
    handles, open_ranges, compiled = [], [], []

    def enter(name: str) -> Callable:
        def hook(*_: Any) -> None:
            open_ranges.append(part(name))
            open_ranges[-1].__enter__()

        return hook

    def leave(*_: Any) -> None:
        open_ranges.pop().__exit__(None, None, None)

    for path, module in model.named_modules() if model else ():
        name = part_of(path, module)
        if name and (name == "compiled" or not path.startswith(tuple(compiled))):
            handles.append(module.register_forward_pre_hook(enter(name)))
            handles.append(module.register_forward_hook(leave))
        if name == "compiled":
            compiled.append(f"{path}.blocks.")
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def own_part(event: Any) -> tuple[str | None, Any]:
    """(the part of the innermost range around an event or of a collective, the autograd node it runs in)."""
    node = None
    while event is not None:
        if event.name.startswith(COLLECTIVES):
            return "communication", node
        if event.name.startswith(MARK):
            return event.name.removeprefix(MARK), node
        if event.name.startswith(NODE):
            node = event
            if event.name.startswith(ACCUMULATE):
                return "optimizer", node
        event = event.cpu_parent
    return None, node


def node_number(node: Any) -> int:
    """The sequence number that a backward node shares with its forward op."""
    numbers = [child.sequence_nr for child in node.cpu_children if child.sequence_nr >= 0]
    return node.sequence_nr if node.sequence_nr >= 0 else next(iter(numbers), -1)


def parts_of_events(events: Iterable[Any], cost: Callable[[Any], float]) -> dict[str, float]:
    """Sum of `cost` over the events of each part."""
    events = sorted(events, key=lambda event: event.time_range.start)
    homes = [own_part(event) for event in events]
    # Ops that make no node carry the next node's number: the last one that carries it made it.
    makers = {
        event.sequence_nr: name
        for event, (name, node) in zip(events, homes, strict=True)
        if node is None and event.sequence_nr >= 0 and not event.name.startswith(MARK)
    }
    sums: dict[str, float] = defaultdict(float)
    for event, (name, node) in zip(events, homes, strict=True):
        if name is None and node is not None:
            name = makers.get(node_number(node))
        sums[name or "other"] += cost(event)
    return dict(sums)


def kernels_of(event: Any) -> list[Any]:
    """Kernels that an op launched itself; ranges, copies and fills are none."""
    return [k for k in event.kernels if not k.name.startswith((MARK, "Memcpy", "Memset"))]


def covered(spans: Iterable[tuple[float, float]]) -> float:
    """The length of the union of intervals (start, end)."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def busy_ms(events: Iterable[Any]) -> float:
    """Milliseconds in which the device does anything, of all events of a trace."""
    kind = torch.autograd.DeviceType.CUDA
    work = [e.time_range for e in events if e.device_type == kind and not e.name.startswith(MARK)]
    return 1e-3 * covered((span.start, span.end) for span in work)


def launch_calls(events: Iterable[Any]) -> int:
    """How often the host told the device to run something. A replayed graph is one, whatever kernels are in it."""
    return sum(event.name.startswith(LAUNCHES) for event in events)


class Operators(TorchDispatchMode):
    """Counts what PyTorch runs inside the block, backward pass included: each would be a launch or more on a GPU.

    Operators are counted as the device's library gets them, autograd functions and composite operators taken apart;
    views and allocations are not counted, for they run nothing.
    """

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        name = function.overloadpacket.__name__
        self.count += not (function.is_view or "empty" in name or name in ("_unsafe_view", "promote_types"))
        return function(*args, **(kwargs or {}))


def count_operators(run: Callable[[], object]) -> int:
    """Operators of one step; nothing in it may be compiled."""
    with Operators() as operators:
        run()
    return operators.count


def profile_step(run: Callable[[], None], marks: nn.Module | None, device: str, step_ms: float) -> dict[str, Any]:
    """Milliseconds by part, adding up to `step_ms`, and kernels and launches, of one step. `run` must have warmed up.

    `launches` are the kernels that ran, `launch_calls` what the host launched; they differ by graphs. `idle_share`: of
    the step, in which the device does nothing. On a CPU nothing is launched: there it is the operators that count,
    unless some are compiled.

    `marks` is the model whose modules name the parts; None for a compiled one, which must not be touched.
    """
    gpu = device == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if gpu else [])]
    with marked(marks), profile(activities=activities) as trace:
        began = time.perf_counter()
        run()
        if gpu:
            torch.cuda.synchronize()
        profiled_ms = 1e3 * (time.perf_counter() - began)
    events = [e for e in trace.events() if e.device_type == torch.autograd.DeviceType.CPU and not e.is_async]
    if gpu:
        sums = parts_of_events(events, lambda e: sum(k.duration for k in e.kernels if not k.name.startswith(MARK)))
        wait = [e for e in events if e.name == f"{MARK}data wait"]
        sums["data wait"] = sum(e.time_range.elapsed_us() for e in wait)
        scale = 1e-3
    else:
        sums = parts_of_events(events, lambda e: e.self_cpu_time_total)
        scale = 1e-3 * step_ms / profiled_ms
    times = {name: round(scale * sums.get(name, 0.0), 3) for name in PARTS if name != "other"}
    other = step_ms - sum(times.values())
    counts = {
        "launches": sum(len(kernels_of(e)) for e in events) if gpu else None,
        "launch_calls": launch_calls(events) if gpu else None,
        "idle_share": round(max(0.0, 1 - busy_ms(trace.events()) / step_ms), 4) if gpu else None,
    }
    operators = None if gpu or marks is None or is_compiled(marks) else count_operators(run)
    return {"parts": times | {"other": round(other, 3)}, "operators": operators} | counts
