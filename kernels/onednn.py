"""Linear layers. On an AMD CPU oneDNN multiplies float32 matrices, elsewhere torch's own choice does.

torch hands float32 products on x86 to MKL, which leaves AVX-512 unused on CPUs that are not Intel's; oneDNN, which
torch brings along for convolutions, uses it. Same precision, another order of summation. Letters: R rows, I inputs,
O outputs.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor


@cache
def _mkl_is_slow() -> bool:
    """Whether this CPU is one on which MKL takes its slower path and torch has oneDNN."""
    about = Path("/proc/cpuinfo")
    if not torch.backends.mkldnn.is_available() or torch.backends.cpu.get_cpu_capability() != "AVX512":
        return False
    return about.exists() and "AuthenticAMD" in about.read_text()


def uses_onednn(x: Tensor, weight: Tensor) -> bool:
    """Whether `linear` gives this product to oneDNN."""
    if x.device.type != "cpu" or x.dtype != torch.float32 or weight.dtype != torch.float32:
        return False
    if x.ndim < 2 or not x.numel():
        return False
    if torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu"):
        return False
    return torch.backends.mkldnn.enabled and _mkl_is_slow()


def _product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (R,I) @ weight (O,I).T + bias. What is not dense in memory is copied; a transposed weight is dense."""
    weight = weight if weight.t().is_contiguous() else weight.contiguous()
    bias = None if bias is None else bias.contiguous()  # oneDNN would read the wrong numbers
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


class _OneDnnLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.bias = bias is not None
        return _product(x, weight, bias)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        wants_x, wants_weight, wants_bias = ctx.needs_input_grad
        dx = _product(grad, weight.t()) if wants_x else None
        dweight = _weight_grad(grad, x) if wants_weight else None
        return dx, dweight, grad.sum(0) if wants_bias else None


def _weight_grad(grad: Tensor, x: Tensor) -> Tensor:
    """grad (R,O).T @ x (R,I) -> (O,I). One operand has to be copied: the narrower one."""
    if grad.shape[1] <= x.shape[1]:
        return _product(grad.t().contiguous(), x.t())
    return _product(x.t().contiguous(), grad.t()).t()


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (...,I) @ weight (O,I).T + bias (O,) -> (...,O); `torch.nn.functional.linear`, differentiable once."""
    if not uses_onednn(x, weight):
        return F.linear(x, weight, bias)
    return _OneDnnLinear.apply(x.flatten(0, -2), weight, bias).unflatten(0, x.shape[:-1])
