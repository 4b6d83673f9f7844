"""Windowed attention as others do it, and as we do.

A provider turns a case into a `Job`: `run()` gives the outputs, `leaves` and `grads` make its backward pass. The linear
layers before and after are left out everywhere, but what they force is not: the original partitions x before the
qkv layer, so its job moves x into windows too.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from bevt_ds import kernels
from bevt_ds.kernels import reference
from bevt_ds.kernels.reference import partition, relative_position_index, same_region, unpartition

from .kernels_cases import HEAD_DIM, Case


@dataclass
class Job:
    """Something to time."""

    run: Callable[[], tuple[Tensor, ...]]
    leaves: tuple[Tensor, ...]
    grads: tuple[Tensor, ...] = field(default=())

    def __post_init__(self) -> None:
        # With a graph, as it will be timed: without one a compiler would make a version that is never used again.
        self.grads = tuple(torch.randn_like(out) for out in self.run())

    def forward(self) -> tuple[Tensor, ...]:
        """With a graph, as training runs it."""
        return self.run()

    def backward(self, outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Gradients of the leaves; may be called again."""
        return torch.autograd.grad(outputs, self.leaves, self.grads, retain_graph=True)

    def both(self) -> None:
        """A forward and a backward pass."""
        torch.autograd.grad(self.run(), self.leaves, self.grads)


def leaf(*shape: int, device: str, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    """Random values: zeros would raise the clocks."""
    return (scale * torch.randn(shape, device=device)).to(dtype).requires_grad_()


def rolled(x: Tensor, shift: tuple[int, int, int], sign: int) -> Tensor:
    """torch.roll where there is something to roll."""
    return torch.roll(x, [sign * s for s in shift], dims=(1, 2, 3)) if any(shift) else x


def materialised_mask(case: Case, device: str) -> Tensor | None:
    """The original's additive mask, (windows, N, N), or None."""
    if not any(case.windows.mask_shift):
        return None
    allowed = same_region(case.windows.grid, case.windows.window, case.windows.mask_shift).to(device)
    return torch.zeros(allowed.shape, device=device).masked_fill(~allowed, -100.0)


def back_to_map(out: Tensor, case: Case) -> Tensor:
    """(B * windows, N, C) -> the map."""
    return rolled(unpartition(out, case.windows.window, case.windows.grid), case.windows.shift, 1)


def original_core(qkv: Tensor, table: Tensor, index: Tensor, mask: Tensor | None, unbind: bool) -> Tensor:
    """The steps of the original between its linear layers, (B * windows, N, 3C) -> (B * windows, N, C)."""
    tokens, heads = qkv.shape[1], table.shape[1]
    qkv = qkv.reshape(len(qkv), tokens, 3, heads, -1).permute(2, 0, 3, 1, 4)
    q, k, v = qkv.unbind(0) if unbind else (qkv[0], qkv[1], qkv[2])
    attention = (q * HEAD_DIM**-0.5) @ k.transpose(-2, -1)
    bias = table[index.view(-1)].view(tokens, tokens, heads).permute(2, 0, 1).contiguous()
    attention = attention + bias[None]
    if mask is not None:
        attention = attention.view(-1, len(mask), heads, tokens, tokens) + mask[None, :, None]
        attention = attention.view(-1, heads, tokens, tokens)
    return (attention.softmax(-1) @ v).transpose(1, 2).reshape(len(qkv[0]), tokens, -1)


def original(case: Case, device: str, dtype: torch.dtype, unbind: bool = False, compiled: bool = False) -> Job:
    """The original under autocast: x leaves its LayerNorm in fp32, the qkv layer writes the low precision."""
    windows, width = case.windows, case.heads * HEAD_DIM
    x = leaf(case.batch, *windows.grid, width, device=device, dtype=torch.float32)
    qkv = leaf(case.batch * windows.whole, windows.tokens, 3 * width, device=device, dtype=dtype)
    table = leaf(windows.table_rows, case.heads, device=device, dtype=torch.float32, scale=0.02)
    index = relative_position_index(windows.window, windows.table_window).to(device)
    mask = materialised_mask(case, device)

    def core(x: Tensor, qkv: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast(device, dtype, enabled=dtype != torch.float32):
            out = original_core(qkv, table, index, mask, unbind)
        return back_to_map(out, case), partition(rolled(x, windows.shift, -1), windows.window)

    if compiled:
        torch._dynamo.reset()
        core = torch.compile(core, dynamic=False)
    return Job(lambda: core(x, qkv, table), (x, qkv, table))


def partitioned(qkv: Tensor, case: Case) -> Tensor:
    """(B, T, H, W, 3, h, d) -> (3, B * windows, h, N, d)."""
    return partition(rolled(qkv, case.windows.shift, -1), case.windows.window).permute(2, 0, 3, 1, 4)


def arguments(case: Case, device: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """qkv as our op takes it, and a float32 table."""
    qkv = leaf(case.batch, *case.windows.grid, 3, case.heads, HEAD_DIM, device=device, dtype=dtype)
    return qkv, leaf(case.windows.table_rows, case.heads, device=device, dtype=torch.float32, scale=0.02)


def sdpa(case: Case, device: str, dtype: torch.dtype, backend: SDPBackend | None = None) -> Job:
    """scaled_dot_product_attention with bias and mask in one tensor whose gradient is asked for, by the backend that
    PyTorch chooses or by a given one; RuntimeError where that cannot run it."""
    qkv, table = arguments(case, device, dtype)
    tokens = case.windows.tokens
    index = relative_position_index(case.windows.window, case.windows.table_window).to(device)
    mask = materialised_mask(case, device)

    def run() -> tuple[Tensor]:
        q, k, v = partitioned(qkv, case)
        bias = table[index.view(-1)].view(tokens, tokens, -1).permute(2, 0, 1)[None]
        bias = bias.expand(len(q), -1, -1, -1) if mask is None else (bias + mask[:, None]).repeat(case.batch, 1, 1, 1)
        with nullcontext() if backend is None else sdpa_kernel(backend):
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias.to(dtype))
        return (back_to_map(out.transpose(1, 2).flatten(2), case),)

    return Job(run, (qkv, table))


def flex(case: Case, device: str, dtype: torch.dtype, options: dict | None = None) -> Job:
    """FlexAttention, one window a batch entry, the bias gathered from the table in its score_mod; `options` are its
    kernel_options."""
    from torch.nn.attention.flex_attention import flex_attention

    qkv, table = arguments(case, device, dtype)
    windows = case.windows
    index = relative_position_index(windows.window, windows.table_window).to(device)
    code = index[:, 0] - index[0, 0]
    allowed = same_region(windows.grid, windows.window, windows.mask_shift).to(device)
    region = allowed.int().argmax(-1)  # the first token of each token's region

    def score_mod(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        biased = score + table[code[q] - code[k] + windows.table_rows // 2, h]
        if not any(windows.mask_shift):
            return biased
        window = b % windows.whole
        return torch.where(region[window, q] == region[window, k], biased, -float("inf"))

    torch._dynamo.reset()
    compiled = torch.compile(flex_attention, dynamic=False)

    def run() -> tuple[Tensor]:
        q, k, v = (x.contiguous() for x in partitioned(qkv, case))
        out = compiled(q, k, v, score_mod=score_mod, kernel_options=options)
        return (back_to_map(out.transpose(1, 2).flatten(2), case),)

    return Job(run, (qkv, table))


def ours(case: Case, device: str, dtype: torch.dtype, provider: str) -> Job:
    """bevt_ds.kernels.window_attention."""
    qkv, table = arguments(case, device, dtype)
    return Job(lambda: (kernels.window_attention(qkv, table, case.windows, provider=provider),), (qkv, table))


FORCED = {
    "sdpa_cudnn": partial(sdpa, backend=SDPBackend.CUDNN_ATTENTION),
    "sdpa_efficient": partial(sdpa, backend=SDPBackend.EFFICIENT_ATTENTION),
    "sdpa_flash": partial(sdpa, backend=SDPBackend.FLASH_ATTENTION),
    "sdpa_math": partial(sdpa, backend=SDPBackend.MATH),
}
GPU_PROVIDERS = {
    "eager": original,
    "eager_unbind": partial(original, unbind=True),
    "compile": partial(original, compiled=True),
    "sdpa": sdpa,
    **FORCED,
    "flex": flex,
    "flex_flash": partial(flex, options={"BACKEND": "FLASH"}),
    "bevt_ds": partial(ours, provider="triton"),
}
CPU_PROVIDERS = {
    "eager": original,
    "eager_unbind": partial(original, unbind=True),
    "sdpa": sdpa,
    **FORCED,
    "bevt_ds": partial(ours, provider="torch"),
}


Results = tuple[Tensor, ...]  # output, gradients of qkv and of the table


def results_of(function: Callable, inputs: Results, windows: kernels.Windows, dtype: torch.dtype) -> Results:
    """Of an attention in some precision; inputs: qkv, table, gradient of the output."""
    leaves = [x.to(dtype).requires_grad_() for x in inputs[:2]]
    out = function(*leaves, windows)
    return out.detach(), *torch.autograd.grad(out, leaves, inputs[2].to(dtype))


@dataclass(frozen=True)
class Standard:
    """One sample of a case, what attention of it must give, and how far off that may be."""

    case: Case
    inputs: Results
    exact: Results
    allowed: tuple[float, ...]

    @classmethod
    def of(cls, case: Case, device: str, dtype: torch.dtype) -> Standard:
        """Allowed is twice, for gradients three times, the error of the reference in the same precision."""
        shape = (1, *case.windows.grid)
        qkv = torch.randn(*shape, 3, case.heads, HEAD_DIM, device=device).to(dtype)
        table = torch.randn(case.windows.table_rows, case.heads, device=device).to(dtype)
        inputs = (qkv, table, torch.randn(*shape, case.heads * HEAD_DIM, device=device).to(dtype))
        same = results_of(reference.window_attention, inputs, case.windows, dtype)
        exact = results_of(reference.window_attention, inputs, case.windows, torch.float64)
        floors = [4 * torch.finfo(dtype).eps * e.abs().max() for e in exact]
        errors = [(s - e).abs().max() for s, e in zip(same, exact, strict=True)]
        allowed = [k * error + floor for k, error, floor in zip((2, 3, 3), errors, floors, strict=True)]
        return cls(case, inputs, exact, tuple(float(a) for a in allowed))

    def check(self, actual: Results) -> None:
        """Raises AssertionError unless all are within what is allowed; NaN is not."""
        names = ("out", "dqkv", "dtable")
        for name, allowed, a, e in zip(names, self.allowed, actual, self.exact, strict=True):
            error = (a - e).abs().max()
            if not error <= allowed:
                raise AssertionError(f"{self.case.name} {a.dtype}: {name} is off by {error:.3g}, allowed {allowed:.3g}")


def check_correct(case: Case, device: str, dtype: torch.dtype, provider: str) -> None:
    """Raises unless output and gradients of one sample are as exact as the tests want."""
    standard = Standard.of(case, device, dtype)
    attend = partial(kernels.window_attention, provider=provider)
    standard.check(results_of(attend, standard.inputs, case.windows, dtype))
