"""How an operator is called: at once where no one looks on, through torch's dispatcher where someone does.

A custom operator costs the host many times what its launchers do. Only a compiler, a dispatch mode (fake tensors, FLOP
counts, selective checkpointing), subclasses of tensors and tensors without memory need one; without them the same
functions run in a plain autograd function.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from .once import differentiable_once, refuse, refuse_gradients

PLAIN = (Tensor, torch.nn.Parameter)
Result = tuple[Tensor, ...]


def is_direct(*tensors: Tensor) -> bool:
    """Whether nothing needs to see the operator that runs on these tensors."""
    if torch.compiler.is_compiling() or is_in_torch_dispatch_mode():
        return False
    return all(type(tensor) in PLAIN and not tensor.is_meta for tensor in tensors)


def without_gradient(name: str, run: Callable[..., Any], op: Any) -> Callable[..., Any]:
    """What to call for an operator that has no backward pass, and what runs it.

    RuntimeError where an argument wants a gradient: the operator's result would pass for a constant.
    """

    class Direct(torch.autograd.Function):
        """The operator without the dispatcher; autograd refuses vmap, whose tensors have no memory, in clear words."""

        @staticmethod
        def forward(_ctx: Any, *inputs: Any) -> Any:
            return run(*inputs)

    def call(*inputs: Any) -> Any:
        tensors = [value for value in inputs if isinstance(value, Tensor)]
        refuse_gradients(name, *tensors)
        return (Direct.apply if is_direct(*tensors) else op)(*inputs)

    return call


def custom_op(name: str, run: Callable[..., Any]) -> Any:
    """The operator bevt_ds::`name` whose implementation is `run`; its schema is that of the annotations."""
    return torch.library.custom_op(f"bevt_ds::{name}", run, mutates_args=())


def with_gradient(
    name: str,
    op: Any,
    run: Callable[..., Tensor | Result],
    backward_op: Any,
    run_backward: Callable[..., Tensor | Result],
    save: Callable[[Any, tuple, Result], tuple[Tensor | None, ...]],
    differentiate: Callable[..., tuple],
) -> Callable[..., Result]:
    """Register the gradient of an operator; returns what to call: it can be differentiated once, and returns a tuple.

    Args:
        name: of the public function.
        op, run: the operator and its implementation.
        backward_op, run_backward: the operator of its backward pass, and its implementation.
        save: from a context, the inputs and the results: sets the context's attributes, returns the tensors to keep.
        differentiate: from the backward pass as a function, the context, the tensors kept and the gradients of the
            results, None where a result has none: the gradients of the inputs.
    """

    def set_up(ctx: Any, inputs: tuple, output: Result) -> None:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*save(ctx, inputs, _tuple(output)))

    def backward(ctx: Any, *grads: Tensor | None) -> tuple:
        return differentiate(backward_op, ctx, ctx.saved_tensors, *grads)

    op.register_autograd(backward, setup_context=set_up)

    class Direct(torch.autograd.Function):
        """The operator without the dispatcher. The empty tensor leads autograd here and keeps nothing in memory."""

        @staticmethod
        def forward(*inputs: Any) -> Result:
            results = _tuple(run(*inputs))
            return results[0].new_empty(0), *results

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple, output: Result) -> None:
            link, *results = output
            ctx.set_materialize_grads(False)
            ctx.save_for_backward(link, *save(ctx, inputs, tuple(results)))

        @staticmethod
        def backward(ctx: Any, _link: None, *grads: Tensor | None) -> tuple:
            link, *saved = ctx.saved_tensors
            chosen = run_backward if is_direct(*(grad for grad in grads if grad is not None)) else backward_op
            if not torch.is_grad_enabled():
                return differentiate(chosen, ctx, saved, *grads)
            with torch.no_grad():  # under create_graph=True
                found = differentiate(chosen, ctx, saved, *grads)
            return refuse(name, link, found)

    def call(*inputs: Any) -> Result:
        tensors = [value for value in inputs if isinstance(value, Tensor)]
        if is_direct(*tensors):
            return Direct.apply(*inputs)[1:]
        return _tuple(op(*_once(name, inputs)))

    return call


def _tuple(results: Tensor | Result) -> Result:
    return (results,) if isinstance(results, Tensor) else tuple(results)


def _once(name: str, inputs: tuple) -> list[Any]:
    """The inputs of an operator, those that may want a gradient tied to the error of a second one."""
    places = [i for i, x in enumerate(inputs) if isinstance(x, Tensor) and x.is_floating_point()]
    result = list(inputs)
    for place, tensor in zip(places, differentiable_once(name, *(inputs[i] for i in places)), strict=True):
        result[place] = tensor
    return result
