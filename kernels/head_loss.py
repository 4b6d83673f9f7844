"""Linear layer and cross-entropy over masked rows, with the logits of a part of the rows in memory at a time.

Letters as in reference.py. The products are the library's; the kernel turns a block of logits (R, V) into
losses, top-1 hits and, in place, gradients softmax - onehot.

The incoming gradient is one number per segment. So the forward pass makes the gradients of each segment's loss, chunk
of rows by chunk, and the backward pass only weights them: logits are made once and never kept.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .configs import cross_entropy_tiles
from .dispatch import custom_op, with_gradient
from .launches import launch

CHUNK_BYTES = 64 * 2**20  # of logits: 4,096 rows of a vocabulary of 8,192 in 16 bits, enough for a matrix product
IGNORE = tl.constexpr(-100)


@triton.jit
def cross_entropy_kernel(logits, target, losses, hits, V: tl.constexpr, BLOCK: tl.constexpr, WRITE_GRAD: tl.constexpr):
    """One row of logits (R, V) per program: losses (R,), hits (R,), and softmax - onehot in its place.

    Ignored rows give zeros, any other target outside the vocabulary a loss of NaN and no gradient. A hit needs the
    target to be the first of the largest logits, as argmax does.
    """
    row = tl.program_id(0)
    wanted = tl.load(target + row)
    counts = (wanted >= 0) & (wanted < V)
    logits += row.to(tl.int64) * V
    high = tl.full([], float("-inf"), tl.float32)
    total = tl.full([], 0.0, tl.float32)
    chosen = tl.full([], 0.0, tl.float32)
    best = tl.full([], 0, tl.int64)
    for first in range(0, V, BLOCK):
        v = first + tl.arange(0, BLOCK)
        x = tl.load(logits + v, mask=v < V, other=float("-inf")).to(tl.float32)
        block_high = tl.max(x, 0)
        first_best = tl.min(tl.where(x == block_high, v, V), 0).to(tl.int64)
        best = tl.where(block_high > high, first_best, best)
        new_high = tl.maximum(high, block_high)
        total = total * tl.exp(high - new_high) + tl.sum(tl.exp(x - new_high), 0)
        chosen += tl.sum(tl.where(v == wanted, x, 0.0), 0)
        high = new_high
    lse = high + tl.log(total)
    other = tl.where(wanted == IGNORE, 0.0, float("nan"))
    tl.store(losses + row, tl.where(counts, lse - chosen, other))
    tl.store(hits + row, (counts & (best == wanted)).to(tl.int64))
    if WRITE_GRAD:
        for first in range(0, V, BLOCK):
            v = first + tl.arange(0, BLOCK)
            x = tl.load(logits + v, mask=v < V, other=float("-inf")).to(tl.float32)
            grad = tl.exp(x - lse) - tl.where(v == wanted, 1.0, 0.0)
            grad = tl.where(counts, grad, 0.0).to(logits.dtype.element_ty)
            tl.store(logits + v, grad, mask=v < V)


def launch_cross_entropy(logits: Tensor, target: Tensor, write_grad: bool) -> tuple[Tensor, Tensor]:
    """Losses fp32 and hits int64 of the rows; with `write_grad`, logits become their gradient."""
    rows, vocabulary = logits.shape
    losses = logits.new_empty(rows, dtype=torch.float32)
    hits = torch.empty_like(target)
    launch(
        cross_entropy_kernel, (rows,),
        logits, target, losses, hits, V=vocabulary, WRITE_GRAD=write_grad,
        **cross_entropy_tiles(vocabulary),
    )  # fmt: skip
    return losses, hits


def chunks(h: Tensor, weight: Tensor, segments: Sequence[int]) -> Iterator[tuple[int, slice]]:
    """(segment, rows of it), in equal parts of a segment whose logits take at most CHUNK_BYTES."""
    most = max(1, CHUNK_BYTES // (weight.shape[0] * h.element_size()))
    end = 0
    for segment, count in enumerate(segments):
        first, end = end, end + count
        rows = triton.cdiv(count, triton.cdiv(count, most)) if count else 1
        yield from ((segment, slice(n, min(n + rows, end))) for n in range(first, end, rows))


def segment_sums(values: Tensor, segments: Sequence[int]) -> Tensor:
    """(R,) -> (S,): one sum per segment."""
    return torch.stack([part.sum() for part in values.split(list(segments))])


def run_chunk(
    h: Tensor, weight: Tensor, bias: Tensor, target: Tensor, results: tuple[Tensor, Tensor], grads: tuple[Tensor, ...]
) -> None:
    """Fills losses and hits of a chunk of rows; `grads`, if there are any: fills dh, adds to dweight and dbias."""
    logits = torch.addmm(bias, h, weight.t())
    losses, hits = launch_cross_entropy(logits, target, bool(grads))
    results[0].copy_(losses)
    results[1].copy_(hits)
    if grads:
        dh, dweight, dbias = grads
        torch.mm(logits, weight, out=dh)
        dweight += logits.t() @ h
        dbias += logits.sum(0, dtype=torch.float32)


def run_forward(
    h: Tensor,
    weight: Tensor,
    bias: Tensor,
    target: Tensor,
    segments: Sequence[int],
    keep_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss sums, hits, and if asked for the gradients of the segments' losses: dh (R, C), and in fp32 dweight (S, V, C)
    and dbias (S, V); else empty tensors."""
    results = (h.new_empty(h.shape[0], dtype=torch.float32), torch.empty_like(target))
    dh, dweight, dbias = (x.zero_() for x in empty_gradients(h, weight, segments, keep_grad))
    for segment, rows in chunks(h, weight, segments):
        grads = (dh[rows], dweight[segment], dbias[segment]) if keep_grad else ()
        run_chunk(h[rows], weight, bias, target[rows], tuple(x[rows] for x in results), grads)
    return *(segment_sums(x, segments) for x in results), dh, dweight, dbias


def empty_gradients(
    h: Tensor, weight: Tensor, segments: Sequence[int], keep_grad: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Memory for what the forward pass keeps."""
    (vocabulary, channels), parts = weight.shape, len(segments) if keep_grad else 0
    dh = h.new_empty((h.shape[0] if keep_grad else 0, channels))
    return dh, *(h.new_empty((parts, *n), dtype=torch.float32) for n in ((vocabulary, channels), (vocabulary,)))


def run_backward(
    dloss: Tensor,
    dh: Tensor,
    dweight: Tensor,
    dbias: Tensor,
    segments: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor]:
    """dh, dweight, dbias of the sum of losses weighted by dloss (S,), in dh's dtype."""
    scaled = torch.empty_like(dh)
    for weight, part, out in zip(dloss, dh.split(list(segments)), scaled.split(list(segments)), strict=True):
        torch.mul(part, weight, out=out)
    return scaled, *(weighted_sum(dloss, x).to(dh.dtype) for x in (dweight, dbias))


def weighted_sum(weights: Tensor, values: Tensor) -> Tensor:
    """Sum of values (S, ...) over S. Not a matrix product, which may round to TF32."""
    total = values[0] * weights[0]
    for weight, value in zip(weights[1:], values[1:], strict=True):
        total.addcmul_(value, weight)
    return total


forward_op = custom_op("masked_cross_entropy", run_forward)
backward_op = custom_op("masked_cross_entropy_backward", run_backward)


@forward_op.register_fake
def _(h, weight, bias, target, segments, keep_grad):
    sums = h.new_empty(len(segments), dtype=torch.float32)
    return sums, target.new_empty(len(segments)), *empty_gradients(h, weight, segments, keep_grad)


@backward_op.register_fake
def _(dloss, dh, dweight, dbias, segments):
    return torch.empty_like(dh), *(x.new_empty(x.shape[1:], dtype=dh.dtype) for x in (dweight, dbias))


def save_for_backward(ctx, inputs, output) -> tuple[Tensor, ...]:
    """The segments' gradients; of the inputs nothing."""
    ctx.segments = inputs[4]
    return output[2:]


def differentiate(run, ctx, saved, dloss: Tensor, *_: None) -> tuple:
    """Gradients of the op's arguments; only the loss sums are differentiable."""
    return *run(dloss, *saved, ctx.segments), None, None, None


loss_once = with_gradient(
    "masked_cross_entropy", forward_op, run_forward, backward_op, run_backward, save_for_backward, differentiate
)


@register_flop_formula(torch.ops.bevt_ds.masked_cross_entropy)
def forward_flops(h, weight, bias, target, segments, keep_grad, **_) -> int:
    """One product, and two more for the gradients."""
    return (6 if keep_grad else 2) * h[0] * h[1] * weight[0]


@register_flop_formula(torch.ops.bevt_ds.masked_cross_entropy_backward)
def backward_flops(*_, **__) -> int:
    """No product."""
    return 0


def masked_cross_entropy(
    h: Tensor, weight: Tensor, bias: Tensor, target: Tensor, segments: tuple[int, ...]
) -> tuple[Tensor, Tensor]:
    """`reference.masked_cross_entropy` by the kernel; under autocast in autocast's dtype."""
    device = h.device.type
    casts = device != "meta" and torch.is_autocast_enabled(device)  # meta has none, for which torch raises
    dtype = torch.get_autocast_dtype(device) if casts else h.dtype
    h, weight, bias = (x.to(dtype) for x in (h, weight, bias))
    keep_grad = torch.is_grad_enabled() and any(x.requires_grad for x in (h, weight, bias))
    loss_sums, hits, *_ = loss_once(h.contiguous(), weight, bias, target.contiguous(), segments, keep_grad)
    return loss_sums, hits
