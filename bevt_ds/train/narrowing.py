"""Where a number stopped being finite: which samples of a micro-batch, and which layer of the network.

Pure functions of a model and of what computes a loss with it; replay.py gives them what a bundle holds.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

FORWARD, BACKWARD = "forward", "backward"
Sample = TypeVar("Sample")


@dataclass(frozen=True)
class Layer:
    """A module of the network. between: it is not its own doing, but that of what its parent does next to it."""

    name: str
    kind: str
    between: bool = False


@dataclass(frozen=True)
class Outcome:
    """What a micro-batch gave. way: where it was not finite; None: all is. parameters: whose gradient is not."""

    loss: float
    way: str | None
    layer: Layer | None = None
    parameters: tuple[str, ...] = ()


def run(model: nn.Module, compute: Callable[[], Tensor], fresh: bool = True) -> Outcome:
    """Compute a loss and its gradient; find the layer whose output or gradient is the first that is not finite.

    compute: the loss, a scalar, of a forward pass of `model`. fresh: gradients of before are dropped, not added to.
    """
    if fresh:
        model.zero_grad(set_to_none=True)
    with looking(model) as seen:
        loss = compute()
        if not is_finite(loss):
            return Outcome(float(loss.detach()), FORWARD, seen[0] if seen else None)
        seen.clear()  # a layer's output may be infinite and not matter, as under a mask
        loss.backward()
    bad = bad_gradients(model)
    return Outcome(float(loss.detach()), BACKWARD if bad else None, seen[0] if bad and seen else None, bad)


def bad_gradients(model: nn.Module) -> tuple[str, ...]:
    """Parameters whose gradient is not finite; where only the norm of all is not, the one with the largest norm."""
    graded = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    bad = tuple(name for name, gradient in graded.items() if not is_finite(gradient))
    if bad or not graded or is_finite(torch.stack([g.float().norm() for g in graded.values()]).norm()):
        return bad
    return (max(graded, key=lambda name: float(graded[name].double().norm())),)


def culprits(samples: Sequence[Sample], is_bad: Callable[[Sequence[Sample]], bool]) -> list[list[Sample]]:
    """The samples that are bad on their own, each in a list; a group that is bad together alone stays one list."""
    if not samples or not is_bad(samples):
        return []
    if len(samples) == 1:
        return [list(samples)]
    middle = len(samples) // 2
    found = [group for half in (samples[:middle], samples[middle:]) for group in culprits(half, is_bad)]
    return found or [list(samples)]


@contextmanager
def looking(model: nn.Module) -> Iterator[list[Layer]]:
    """Inside the block, the layers that make something that is not finite, in the order of time, forward and backward.

    A layer that is given something that is not finite, before another made it, is listed as `between`.
    """
    seen: list[Layer] = []

    def see(name: str, module: nn.Module, values: Any, between: bool) -> None:
        if not seen and not is_finite(values):
            seen.append(Layer(name, type(module).__name__, between))

    with ExitStack() as hooks, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Full backward hook is firing")  # of the first layers, as is wanted
        for name, module in model.named_modules():
            if name:  # the network itself takes and gives other things than tensors
                for handle in _hooks(name, module, see):
                    hooks.callback(handle.remove)
        for name, parameter in model.named_parameters():
            owner = model.get_submodule(name.rpartition(".")[0])
            note = lambda grad, n=name, m=owner: see(n, m, grad, False)  # noqa: E731
            if parameter.requires_grad:
                hooks.callback(parameter.register_hook(note).remove)
        yield seen


def _hooks(name: str, module: nn.Module, see: Callable[[str, nn.Module, Any, bool], None]) -> Iterator[Any]:
    """Hooks around a module's forward and backward pass; none changes anything."""
    yield module.register_forward_pre_hook(lambda m, inputs: see(name, m, inputs, True))
    yield module.register_forward_hook(lambda m, inputs, outputs: see(name, m, outputs, False))
    yield module.register_full_backward_pre_hook(lambda m, grads: see(name, m, grads, True))
    yield module.register_full_backward_hook(lambda m, ins, outs: see(name, m, ins, False))


def is_finite(values: Any) -> bool:
    """Whether all tensors of floats in nested tuples and lists are finite."""
    if isinstance(values, tuple | list):
        return all(map(is_finite, values))
    return not isinstance(values, Tensor) or not values.is_floating_point() or bool(torch.isfinite(values).all())
