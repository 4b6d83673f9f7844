"""Residual sum with norm, and linear layer with GELU, as others do them and as we do."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from bevt_ds import kernels

from .kernels_masked import BASE_STEP, SMALL_STEP, MaskedCase
from .kernels_providers import Job, leaf

EPS = 1e-5


def eager_add_norm(x: Tensor, branch: Tensor, scale: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Drop path, sum and LayerNorm as PyTorch's operators."""
    total = x + branch * scale.to(branch.dtype)[:, None, None, None, None]
    return total, F.layer_norm(total, weight.shape, weight, bias, EPS)


def eager_linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """As PyTorch's operators."""
    return F.gelu(F.linear(x, weight, bias))


def add_norm_job(case: MaskedCase, device: str, dtype: torch.dtype, run: Callable) -> Job:
    """Over the clips' maps of stage 1."""
    grid = (case.clips, 8, 4 * case.side, 4 * case.side, case.width)
    x, branch = (leaf(*grid, device=device, dtype=dtype) for _ in range(2))
    weight, bias = (leaf(case.width, device=device, dtype=dtype) for _ in range(2))
    scale = torch.full((case.clips,), 1.25, device=device)
    return Job(lambda: run(x, branch, scale, weight, bias), (x, branch, weight, bias))


def linear_gelu_job(case: MaskedCase, device: str, dtype: torch.dtype, run: Callable) -> Job:
    """The first layer of an MLP of stage 1, over the clips; the product is part of it."""
    x = leaf(case.clips, 8, 4 * case.side, 4 * case.side, case.width, device=device, dtype=dtype)
    weight = leaf(4 * case.width, case.width, device=device, dtype=dtype, scale=case.width**-0.5)
    bias = leaf(4 * case.width, device=device, dtype=dtype)
    return Job(lambda: (run(x, weight, bias),), (x, weight, bias))


def fused_jobs(device: str) -> Iterator[tuple[str, MaskedCase, str, Callable[..., Job]]]:
    """(op, case, provider's name, maker of the job); a CPU compiles nothing."""
    case, provider = (BASE_STEP, "triton") if device == "cuda" else (SMALL_STEP, "torch")
    for op, job, eager, ours in (
        ("add_norm", add_norm_job, eager_add_norm, partial(kernels.add_norm, eps=EPS, provider=provider)),
        ("linear_gelu", linear_gelu_job, eager_linear_gelu, partial(kernels.linear_gelu, provider=provider)),
    ):
        yield op, case, "eager", partial(job, run=eager)
        if device == "cuda":
            yield op, case, "compile", partial(job, run=torch.compile(eager, dynamic=False))
        yield op, case, "bevt_ds", partial(job, run=ours)


def check_fused(device: str, dtype: torch.dtype) -> None:
    """Raises unless our outputs and gradients are those of eager PyTorch, to a few roundings of the largest value."""
    found: dict[tuple[str, str], tuple[Tensor, ...]] = {}
    for op, _, name, make in fused_jobs(device):
        torch.manual_seed(0)
        job = make(SMALL_STEP, device, dtype)
        outputs = job.forward()
        found[op, name] = (*outputs, *job.backward(outputs))
    for (op, name), tensors in found.items():
        for actual, expected in zip(tensors, found[op, "eager"], strict=True):
            bound = 32 * torch.finfo(dtype).eps * float(expected.detach().abs().max())
            torch.testing.assert_close(
                actual, expected, rtol=0, atol=bound, msg=lambda m, o=op, n=name: f"{o} {n}: {m}"
            )
