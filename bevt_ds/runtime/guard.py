"""Leaves out a step whose loss or gradient is not finite: on all ranks alike, at every ZeRO stage and precision.

At stages 0 to 2 the decision is made on the device: AdamW's fused kernel takes a flag and then changes neither weights
nor moments nor its count of steps, and no one waits for the host. Left to DeepSpeed, which reads the gradient's norm,
summed over the ranks, in every step: fp16, whose loss scale lives on the host; bf16 at stage 1, whose optimizer is
another; stage 3; optimizers on the host.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from bevt_ds.runtime.flat_norms import ShardedGradient, WholeGradient, shorten_norms


@dataclass(frozen=True)
class Verdict:
    """Whether a step was left out. The same on every rank.

    ready: the point of the device's work at which `flag` has arrived on the host; None: it is there.
    scaling: the loss scale of fp16 was still to be lowered: that its gradient overflows is then in the ordinary way.
    norms: gives the gradient's L2 norm by parameter, over all ranks and micro-steps, of a step left out. Collective.
    """

    flag: bool | Tensor
    ready: torch.cuda.Event | None = None
    scaling: bool = False
    norms: Callable[[], dict[str, float]] = field(default=dict)

    def is_skipped(self) -> bool:
        """Wait for the device to have done the step, if it must be."""
        if self.ready:
            self.ready.synchronize()
        return bool(self.flag)


class Guard:
    """What an engine knows of its last step: left out or not."""

    def __init__(self, ds: Any, whole_gradient: Callable[[nn.Parameter], Tensor | None]) -> None:
        """ds: DeepSpeed's engine. whole_gradient: of a parameter, as it has been reduced so far; collective."""
        self._optimizer, self._whole_gradient = ds.optimizer, whole_gradient
        self._parameters = {n: p for n, p in ds.module.named_parameters() if p.requires_grad}
        self._gradient = _on_device(ds, self._parameters)
        self._scaling, self.loss_scale = False, 1.0
        self._norms: dict[str, float] = {}
        # 1 where the last step was left out, else 0; on the device where the decision is, so that no one waits for it.
        self.skipped: int | Tensor = 0
        if not self._gradient:
            shorten_norms(self._optimizer)
            self._look_before_clearing()

    @property
    def on_device(self) -> bool:
        """Whether the device decides; DeepSpeed then neither knows nor counts what is left out."""
        return self._gradient is not None

    @property
    def total(self) -> Tensor | None:
        """The gradient's global L2 norm of the last step, before clipping; None where DeepSpeed has it."""
        return self._gradient.total if self._gradient else None

    def before_step(self) -> None:
        """Before the update: at stage 0, look at the gradient, which is the same on all ranks."""
        self._norms, scaler = {}, getattr(self._optimizer, "loss_scaler", None)
        self.loss_scale = float(getattr(scaler, "cur_scale", 1.0))
        if getattr(scaler, "dynamic", False):
            self._scaling = scaler.cur_scale > scaler.min_scale
            scaler.raise_error_at_min_scale = False  # its exception names neither step nor sample
        if isinstance(self._gradient, WholeGradient):
            self._gradient.look()

    def after_step(self) -> Verdict:
        """What has become of the step."""
        if not self._gradient:
            self.skipped, norms = int(self._optimizer.overflow), self._norms
            return Verdict(bool(self.skipped), scaling=self._scaling, norms=lambda: norms)
        flag, norms = self._gradient.found_inf, self._gradient.by_parameter()
        if flag.device.type != "cuda":
            self.skipped = int(flag)
            return Verdict(bool(self.skipped), norms=norms)
        self.skipped = flag
        copy, arrived = flag.to("cpu", non_blocking=True), torch.cuda.Event()
        arrived.record()
        return Verdict(copy, arrived, norms=norms)

    def _look_before_clearing(self) -> None:
        """DeepSpeed clears the gradient of a step that it leaves out. Take the norms when it is about to."""
        name = "_update_scale" if hasattr(self._optimizer, "_update_scale") else "clear_hp_grads"
        clear: Callable[..., None] = getattr(self._optimizer, name)

        def look_and_clear(*arguments: Any) -> None:
            if self._optimizer.overflow and not self._norms:
                self._norms.update({n: self._norm(p) for n, p in self._parameters.items()})
            clear(*arguments)

        setattr(self._optimizer, name, look_and_clear)

    def _norm(self, parameter: nn.Parameter) -> float:
        gradient = self._whole_gradient(parameter)
        return float("nan") if gradient is None else float(gradient.float().norm())


def _on_device(ds: Any, parameters: dict[str, nn.Parameter]) -> WholeGradient | ShardedGradient | None:
    """The gradient where AdamW's fused kernel can take the decision; else None."""
    stage = ds.zero_optimization_stage()
    if stage == 0:
        return WholeGradient(ds, parameters)
    sharded = stage < 3 and hasattr(ds.optimizer, "averaged_gradients")  # bf16 at stage 1 has another optimizer
    scaled = any(p.dtype is torch.float16 for p in parameters.values())
    fused = isinstance(getattr(ds.optimizer, "optimizer", None), torch.optim.AdamW)
    return ShardedGradient(ds.optimizer, parameters) if sharded and fused and not scaled else None
