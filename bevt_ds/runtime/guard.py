"""Leaves out a step whose loss or gradient is not finite: on all ranks alike, at every ZeRO stage and precision.

Stages 1 to 3 of DeepSpeed look at the gradient's norm, summed over the ranks, in every step, and leave the step out
where it is not finite; the host waits for that number anyway. Stage 0 does not look. There the decision is made on
the device: AdamW's fused kernel takes a flag and then changes neither weights nor moments nor its count of steps.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Verdict:
    """Whether a step was left out. The same on every rank.

    ready: the point of the device's work at which `flag` has arrived on the host; None: it is there.
    scaling: the loss scale of fp16 was still to be lowered: that its gradient overflows is then in the ordinary way.
    """

    flag: bool | Tensor
    ready: torch.cuda.Event | None = None
    scaling: bool = False

    def is_skipped(self) -> bool:
        """Wait for the device to have done the step, if it must be."""
        if self.ready:
            self.ready.synchronize()
        return bool(self.flag)


class Guard:
    """What an engine knows of its last step: left out or not, and if so, the gradient's norms."""

    def __init__(self, ds: Any, whole_gradient: Callable[[nn.Parameter], Tensor | None]) -> None:
        """ds: DeepSpeed's engine. whole_gradient: of a parameter, as it has been reduced so far; collective."""
        self._optimizer, self._whole_gradient = ds.optimizer, whole_gradient
        self._parameters = {n: p for n, p in ds.module.named_parameters() if p.requires_grad}
        self._own = ds.zero_optimization_stage() == 0
        self._scaling, self.loss_scale = False, 1.0
        self._norms: dict[str, float] = {}
        self.total: Tensor | None = None  # the gradient's norm, at stage 0
        # 1 where the last step was left out, else 0; on the device at stage 0 on a GPU, so that no one waits for it.
        self.skipped: int | Tensor = 0
        if not self._own:
            self._look_before_clearing()

    def before_step(self) -> None:
        """Before the update: at stage 0, look at the gradient, which is the same on all ranks."""
        self._norms, scaler = {}, getattr(self._optimizer, "loss_scaler", None)
        self.loss_scale = float(getattr(scaler, "cur_scale", 1.0))
        if getattr(scaler, "dynamic", False):
            self._scaling = scaler.cur_scale > scaler.min_scale
            scaler.raise_error_at_min_scale = False  # its exception names neither step nor sample
        if self._own:
            graded = {n: p.grad for n, p in self._parameters.items() if p.grad is not None}
            self._names, self._by_parameter = list(graded), torch.stack(torch._foreach_norm(list(graded.values())))
            self.total = torch.linalg.vector_norm(self._by_parameter)
            self._optimizer.found_inf = (~torch.isfinite(self.total)).float()

    def after_step(self) -> Verdict:
        """What has become of the step."""
        if not self._own:
            self.skipped = int(self._optimizer.overflow)
            return Verdict(bool(self.skipped), scaling=self._scaling)
        flag = self._optimizer.found_inf
        if flag.device.type != "cuda":
            self.skipped = int(flag)
            return Verdict(bool(self.skipped))
        self.skipped = flag
        copy, arrived = flag.to("cpu", non_blocking=True), torch.cuda.Event()
        arrived.record()
        return Verdict(copy, arrived)

    def norms(self) -> dict[str, float]:
        """The gradient's L2 norm by parameter, over all ranks and micro-steps; of a step that was left out."""
        return dict(zip(self._names, self._by_parameter.tolist(), strict=True)) if self._own else self._norms

    def _look_before_clearing(self) -> None:
        """DeepSpeed clears the gradient of a step that it leaves out. Take the norms when it is about to."""
        name = "_update_scale" if hasattr(self._optimizer, "_update_scale") else "clear_hp_grads"
        clear: Callable[..., None] = getattr(self._optimizer, name)

        def look_and_clear(*arguments: Any) -> None:
            if self._optimizer.overflow and not self._norms:
                self._norms = {n: self._norm(p) for n, p in self._parameters.items()}
            clear(*arguments)

        setattr(self._optimizer, name, look_and_clear)

    def _norm(self, parameter: nn.Parameter) -> float:
        gradient = self._whole_gradient(parameter)
        return float("nan") if gradient is None else float(gradient.float().norm())
