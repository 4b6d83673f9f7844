"""First derivatives only: what the ops say to whoever wants a second one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class _Refusal(torch.autograd.Function):
    """Gradients as they are, tied to the tensor `link`; whoever differentiates them gets an error."""

    @staticmethod
    def forward(ctx: Any, op: str, link: Tensor, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        ctx.op = op
        return tuple(None if grad is None else grad.view_as(grad) for grad in grads)

    @staticmethod
    def backward(ctx: Any, *_: Tensor | None) -> None:
        raise RuntimeError(
            f"bevt_ds.kernels.{ctx.op} has no second derivative: differentiate its gradients with"
            " bevt_ds.kernels.reference"
        )


def refuse(op: str, link: Tensor, grads: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    """The gradients that `op` returns under create_graph=True; `link` leads autograd to the op."""
    return _Refusal.apply(op, link, *(None if grad is None else grad.detach() for grad in grads))


class _Once(torch.autograd.Function):
    """Tensors as they are, and an empty one that leads autograd to them without keeping them in memory."""

    @staticmethod
    def forward(ctx: Any, op: str, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.op, link = op, tensors[0].new_empty(0)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(link)
        return link, *(tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, _link: None, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # under create_graph=True
            grads = refuse(ctx.op, *ctx.saved_tensors, grads)
        return None, *grads


def differentiable_once(op: str, *tensors: Tensor) -> tuple[Tensor, ...]:
    """The arguments of `op` that may want a gradient. A derivative of that gradient is a RuntimeError.

    Without this a kernel's gradient, computed outside autograd, would pass for a constant, and its derivative for zero.
    """
    # torch.compile refuses second derivatives by itself, and does not trace this.
    wanted = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    return _Once.apply(op, *tensors)[1:] if wanted and not torch.compiler.is_compiling() else tensors


def refuse_gradients(op: str, *tensors: Tensor | None) -> None:
    """RuntimeError where autograd records and one of the arguments wants a gradient that `op` does not give."""
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors):
        raise RuntimeError(
            f"bevt_ds.kernels.{op} gives no gradient of an argument that wants one: call it under torch.no_grad(), or"
            " detach the argument"
        )
