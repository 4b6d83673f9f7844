"""The gradient's norm and the decision over a step in a few operators, none of which the host waits for.

DeepSpeed 0.19.8 looks at each gradient alone: some ten small kernels for each parameter to find what is not finite, one
more for its norm, and the host reads three results of every step. Here all norms of a rank are one multi-tensor kernel;
a gradient that is not finite makes the total not finite; the total, over all ranks, gives AdamW's fused kernel a flag.
Norms are of fp32 and added up in DeepSpeed's order, so the clipped gradient is DeepSpeed's to the last bit on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

Norms = Callable[[], dict[str, float]]


def norms_of(gradients: list[Tensor]) -> Tensor:
    """The L2 norm of each tensor, fp32 (n,)."""
    return torch.stack(torch._foreach_norm(gradients, 2, dtype=torch.float32))


def flag_of(total: Tensor) -> Tensor:
    """1 where the norm is not a finite number, else 0: fp32, as AdamW's fused kernel takes it."""
    return (~torch.isfinite(total)).float()


class WholeGradient:
    """The gradient at ZeRO stage 0: whole, and the same on all ranks.

    Takes the place of clipping in DeepSpeed's engine, which takes each norm again and copies two numbers to the device.
    """

    def __init__(self, ds: Any, parameters: dict[str, nn.Parameter]) -> None:
        """ds: DeepSpeed's engine around torch's optimizer."""
        self._optimizer, self._parameters, self._most = ds.optimizer, parameters, ds.gradient_clipping()
        self.total, self.found_inf = torch.zeros(()), torch.zeros(())
        ds.clip_fp32_gradients = self._clip

    def look(self) -> None:
        """Measure the gradient, and tell the optimizer whether to leave the step out."""
        graded = {n: p.grad for n, p in self._parameters.items() if p.grad is not None}
        self._names, self._norms = list(graded), norms_of(list(graded.values()))
        self.total = self._norms.pow(2).sum().pow(0.5)
        self._optimizer.found_inf = self.found_inf = flag_of(self.total)

    def _clip(self) -> None:
        """DeepSpeed's `clip_fp32_gradients`, after `look`."""
        factor = torch.full_like(self.total, self._most) / (self.total + 1e-6)
        torch._foreach_mul_([p.grad for p in self._parameters.values() if p.grad is not None], factor.clamp(max=1.0))

    def by_parameter(self) -> Norms:
        """What gives the norms of this step by parameter."""
        names, norms = self._names, self._norms
        return lambda: dict(zip(names, norms.tolist(), strict=True))


class ShardedGradient:
    """The gradient at ZeRO stages 1 and 2: each rank has some parameters' parts, in DeepSpeed's groups.

    Takes the place of three of DeepSpeed's methods, which its `step` calls: the search for what is not finite, the
    norm, and clipping.
    """

    def __init__(self, optimizer: Any, parameters: dict[str, nn.Parameter]) -> None:
        """optimizer: DeepSpeed's, around torch's."""
        self._optimizer, self._names = optimizer, list(parameters)
        self._number = {id(parameter): number for number, parameter in enumerate(parameters.values())}
        self.total, self.found_inf = torch.zeros(()), torch.zeros(())
        self._factor: Tensor | None = None
        optimizer.check_grad_overflow, optimizer.compute_grad_norm = True, False
        optimizer.check_overflow, optimizer.unscale_and_clip_grads = self._look, self._clip

    def _look(self, partition_gradients: bool = True) -> None:
        """DeepSpeed's `check_overflow`, at the beginning of a step. Collective. To DeepSpeed no step is left out."""
        optimizer, clip = self._optimizer, self._optimizer.clip_grad
        optimizer.overflow = False
        groups = [list(self._parts(i)) for i in range(len(optimizer.bit16_groups))]
        gradients = [gradient for group in groups for _, gradient in group]
        self._numbers = [number for group in groups for number, _ in group]
        device = optimizer.single_partition_of_fp32_groups[0].device
        self._norms = norms_of(gradients) if gradients else torch.zeros(0, device=device)
        squares = self._norms.pow(2).split([len(group) for group in groups])
        sums = torch.stack([part.sum() for part in squares])
        torch.distributed.all_reduce(sums, group=optimizer.dp_process_group)
        self.total = torch.linalg.vector_norm(sums.pow(0.5))
        optimizer.optimizer.found_inf = self.found_inf = flag_of(self.total)
        self._factor = 1.0 / torch.clamp((self.total + 1e-6) / clip, min=1.0) if clip > 0 else None

    def _parts(self, group: int) -> Iterator[tuple[int, Tensor]]:
        """Of each parameter's part on this rank, the parameter's number and the gradient."""
        optimizer = self._optimizer
        parts = (part for part in optimizer.averaged_gradients[group] if not getattr(part, "_zero_padding", False))
        for parameter, part in zip(optimizer.params_in_partition[group], parts, strict=False):  # none: one of zeros
            yield self._number[id(parameter)], part

    def _clip(self, gradients: list[Tensor], _norm: None) -> None:
        """DeepSpeed's `unscale_and_clip_grads`, of one group."""
        for gradient in gradients if self._factor is not None else ():
            gradient.mul_(self._factor)

    def by_parameter(self) -> Norms:
        """What gives the norms of this step by parameter. Collective."""
        names, numbers, norms, group = self._names, self._numbers, self._norms, self._optimizer.dp_process_group

        def gather() -> dict[str, float]:
            index = torch.tensor(numbers, dtype=torch.int64, device=norms.device)
            squares = torch.zeros(len(names), device=norms.device).index_add_(0, index, norms.square())
            torch.distributed.all_reduce(squares, group=group)
            return dict(zip(names, squares.sqrt().tolist(), strict=True))

        return gather


@contextmanager
def own_shards(optimizer: Any) -> Iterator[None]:
    """While DeepSpeed reads its own shards, which it refuses if they were clipped and it takes no norm itself."""
    takes_norm = getattr(optimizer, "compute_grad_norm", True)
    optimizer.compute_grad_norm = True
    try:
        yield
    finally:
        optimizer.compute_grad_norm = takes_norm


def shorten_norms(optimizer: Any) -> None:
    """Make DeepSpeed's own norm one multi-tensor kernel instead of one kernel for each parameter.

    It gets the norms in place of the gradients: their L2 norm is the same but for rounding.
    """
    if hasattr(optimizer, "get_grad_norm_direct"):
        _shorten_partitions(optimizer)
    elif hasattr(optimizer, "get_grads_for_norm"):
        _shorten_whole(optimizer)


def _shorten_whole(optimizer: Any) -> None:
    """Of DeepSpeed's bf16 optimizer, where every rank has the whole fp32 gradient and updates a part of it.

    Only that part is clipped, at once, instead of all parameters one by one.
    """
    gradients = optimizer.get_grads_for_norm

    def replaced(for_clipping: bool = False) -> Any:
        if for_clipping:
            return optimizer.fp32_groups_gradient_flat_partition
        plain, experts = gradients()
        return [norms_of(plain)], experts

    optimizer.get_grads_for_norm = replaced


def _shorten_partitions(optimizer: Any) -> None:
    """Of the optimizers of stages 1 to 3, where a rank has the gradient of its part alone."""
    norm_of_group = optimizer.get_grad_norm_direct

    def norm(gradients: Any, parameters: Any, norm_type: float = 2) -> Tensor:
        gradients, parameters = list(gradients), list(parameters)
        if norm_type != 2 or not gradients or not parameters:
            return norm_of_group(gradients, parameters, norm_type)
        return norm_of_group([norms_of(gradients)], parameters[:1], norm_type)

    optimizer.get_grad_norm_direct = norm
