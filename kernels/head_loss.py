"""Linear layer and cross-entropy over masked rows, without a second copy of the logits.

Letters as in reference.py. The products are the library's; the kernel turns a block of logits (R, V) into
losses, top-1 hits and, in place, gradients softmax - onehot. The incoming gradient is one number per
segment, so it scales rows of R x C matrices afterwards, never of R x V ones.

Below `CHUNK_BYTES` of logits the forward pass leaves their gradient behind. Above, both passes go through
the rows in chunks and the backward pass computes each chunk's logits again.
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

CHUNK_BYTES = 512 * 2**20  # of logits; BEVT's base step of 8 clips and 64 images needs 0.3 GB
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


def chunks(h: Tensor, weight: Tensor) -> Iterator[slice]:
    """Slices of rows whose logits take at most CHUNK_BYTES."""
    rows = max(1, CHUNK_BYTES // (weight.shape[0] * h.element_size()))
    return (slice(first, first + rows) for first in range(0, h.shape[0], rows))


def fits(h: Tensor, weight: Tensor) -> bool:
    """Whether all logits fit one chunk."""
    return h.shape[0] * weight.shape[0] * h.element_size() <= CHUNK_BYTES


def segment_sums(values: Tensor, segments: Sequence[int]) -> Tensor:
    """(R,) -> (S,): one sum per segment."""
    return torch.stack([part.sum() for part in values.split(list(segments))])


def membership(h: Tensor, segments: Sequence[int]) -> Tensor:
    """(R, S) in h's dtype: 1 where the row belongs to the segment; built without a host sync."""
    member = h.new_zeros((h.shape[0], len(segments)))
    for column, rows in enumerate(member.split(list(segments))):
        rows[:, column] = 1
    return member


def run_forward(
    h: Tensor,
    weight: Tensor,
    bias: Tensor,
    target: Tensor,
    segments: Sequence[int],
    keep_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss sums, hits, and d(loss)/d(logits) if asked for and within one chunk, else an empty tensor."""
    keep_grad = keep_grad and fits(h, weight)
    losses = h.new_empty(h.shape[0], dtype=torch.float32)
    hits = torch.empty_like(target)
    dlogits = h.new_empty((0, weight.shape[0]))
    for rows in chunks(h, weight):
        logits = torch.addmm(bias, h[rows], weight.t())
        losses[rows], hits[rows] = launch_cross_entropy(logits, target[rows], keep_grad)
        dlogits = logits if keep_grad else dlogits
    return segment_sums(losses, segments), segment_sums(hits, segments), dlogits


def gradients(
    dlogits: Tensor, h: Tensor, weight: Tensor, member: Tensor, dloss: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """dh, dweight, dbias of a chunk of rows from its unscaled dlogits; dbias in fp32."""
    scale = member.float() @ dloss[:, None]  # (R, 1)
    dh = (dlogits @ weight).mul_(scale)
    dweight = dlogits.t() @ (h * scale).to(h.dtype)
    return dh, dweight, dloss @ (member.t() @ dlogits).float()


def run_backward(
    dloss: Tensor,
    h: Tensor,
    weight: Tensor,
    bias: Tensor,
    target: Tensor,
    dlogits: Tensor,
    segments: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor]:
    """dh, dweight, dbias; `dlogits` is empty where the forward pass could not keep it."""
    member = membership(h, segments)
    if fits(h, weight):
        dh, dweight, dbias = gradients(dlogits, h, weight, member, dloss)
        return dh, dweight, dbias.to(bias.dtype)
    dh = torch.empty_like(h)
    dweight = torch.zeros_like(weight, dtype=torch.float32)
    dbias = torch.zeros_like(bias, dtype=torch.float32)
    for rows in chunks(h, weight):
        dlogits = torch.addmm(bias, h[rows], weight.t())
        launch_cross_entropy(dlogits, target[rows], True)
        dh[rows], part, bias_part = gradients(dlogits, h[rows], weight, member[rows], dloss)
        dweight += part
        dbias += bias_part
    return dh, dweight.to(weight.dtype), dbias.to(bias.dtype)


forward_op = custom_op("masked_cross_entropy", run_forward)
backward_op = custom_op("masked_cross_entropy_backward", run_backward)


@forward_op.register_fake
def _(h, weight, bias, target, segments, keep_grad):
    sums = h.new_empty(len(segments), dtype=torch.float32)
    rows = h.shape[0] if keep_grad and fits(h, weight) else 0
    return sums, target.new_empty(len(segments)), h.new_empty((rows, weight.shape[0]))


@backward_op.register_fake
def _(dloss, h, weight, bias, target, dlogits, segments):
    return torch.empty_like(h), torch.empty_like(weight), torch.empty_like(bias)


def save_for_backward(ctx, inputs, output) -> tuple[Tensor, ...]:
    """The inputs, and the logits' gradient where it exists."""
    *tensors, ctx.segments, _ = inputs
    return *tensors, output[2]


def differentiate(run, ctx, saved, dloss: Tensor, *_: None) -> tuple:
    """Gradients of the op's arguments; only the loss sums are differentiable."""
    return *run(dloss, *saved, ctx.segments), None, None, None


loss_once = with_gradient(
    "masked_cross_entropy", forward_op, run_forward, backward_op, run_backward, save_for_backward, differentiate
)


@register_flop_formula(torch.ops.bevt_ds.masked_cross_entropy)
def forward_flops(h, weight, *_, **__) -> int:
    """One product."""
    return 2 * h[0] * h[1] * weight[0]


@register_flop_formula(torch.ops.bevt_ds.masked_cross_entropy_backward)
def backward_flops(dloss, h, weight, *_, **__) -> int:
    """Two products; a recomputed one does not count."""
    return 4 * h[0] * h[1] * weight[0]


def masked_cross_entropy(
    h: Tensor, weight: Tensor, bias: Tensor, target: Tensor, segments: tuple[int, ...]
) -> tuple[Tensor, Tensor]:
    """`reference.masked_cross_entropy` by the kernel; under autocast in autocast's dtype."""
    device = h.device.type
    casts = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)  # the meta device has none
    dtype = torch.get_autocast_dtype(device) if casts else h.dtype
    h, weight, bias = (x.to(dtype) for x in (h, weight, bias))
    keep_grad = torch.is_grad_enabled() and any(x.requires_grad for x in (h, weight, bias))
    loss_sums, hits, _ = loss_once(h.contiguous(), weight, bias, target.contiguous(), segments, keep_grad)
    return loss_sums, hits
