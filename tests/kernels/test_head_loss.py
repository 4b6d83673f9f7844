"""The masked cross-entropy kernel against the reference."""

import weakref
from functools import partial

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from bevt_ds import kernels
from bevt_ds.kernels import reference

loss_of = partial(kernels.masked_cross_entropy, provider="triton")
SEGMENTS = (13, 0, 10)


def inputs(dtype, device, rows=23, channels=24, vocabulary=100):
    """h, weight, bias, and targets with padding in both segments."""
    h = torch.randn(rows, channels, device=device).to(dtype)
    weight = torch.randn(vocabulary, channels, device=device).to(dtype) / channels**0.5
    bias = torch.randn(vocabulary, device=device).to(dtype)
    target = torch.randint(vocabulary, (rows,), device=device)
    target[[3, 12, 22]] = -100
    return (h, weight, bias), target


@pytest.fixture(params=["one chunk", "chunks"])
def chunked(request, monkeypatch):
    """Both ways through the logits; a chunk of the second takes 3 or 7 rows."""
    from bevt_ds.kernels import head_loss

    if request.param == "chunks":
        monkeypatch.setattr(head_loss, "CHUNK_BYTES", 3000)
    return request.param


@pytest.mark.parametrize("block", [128, 32])
def test_head_loss_matches_reference(block, dtype, device, check_op, chunked, poisoned, monkeypatch):
    """Loss sums and the gradients of h, weight, bias, with the columns in one block or in four."""
    from bevt_ds.kernels import head_loss

    monkeypatch.setattr(head_loss, "cross_entropy_tiles", lambda vocabulary: {"BLOCK": block})
    tensors, target = inputs(dtype, device)
    check_op(loss_of, reference.masked_cross_entropy, tensors, target=target, segments=SEGMENTS)


def test_head_hits_equal_argmax(dtype, device):
    """Also where several logits are equal: the first one counts."""
    (h, weight, bias), target = inputs(dtype, device)
    weight[60:] = weight[:40]
    bias[60:] = bias[:40]
    logits = torch.nn.functional.linear(h, weight, bias)
    target[:10] = logits[:10].argmax(-1)
    target[10] = 60 + logits[10, :40].argmax()
    _, hits = loss_of(h, weight, bias, target, SEGMENTS)
    _, expected = reference.masked_cross_entropy(h, weight, bias, target, SEGMENTS)
    assert hits.tolist() == expected.tolist()
    assert hits[0] >= 9


def test_head_loss_ignores_padding_rows(device, chunked):
    """Whatever a padding row holds, the loss, the hits and the other gradients are the same bitwise."""
    tensors, target = inputs(torch.float32, device)

    def run(h):
        leaves = [x.clone().requires_grad_() for x in (h, *tensors[1:])]
        losses, hits = loss_of(*leaves, target, SEGMENTS)
        return losses.detach(), hits, *torch.autograd.grad(losses.sum(), leaves)

    changed = tensors[0].clone()
    changed[target == -100] = 7.0
    for before, after in zip(run(tensors[0]), run(changed), strict=True):
        assert torch.equal(before, after)


def test_head_loss_segments_have_independent_gradients(device):
    """The gradient of one segment's loss does not depend on the other's rows."""
    tensors, target = inputs(torch.float32, device)
    leaves = [x.requires_grad_() for x in tensors]
    losses, _ = loss_of(*leaves, target, SEGMENTS)
    (dh,) = torch.autograd.grad(losses[0], leaves[0])
    assert dh[:12].abs().sum() > 0
    assert not dh[13:].any()


def test_head_loss_second_backward_and_no_grad(device):
    """The kept gradients survive a backward pass, and evaluation keeps none."""
    from bevt_ds.kernels.head_loss import forward_op

    tensors, target = inputs(torch.float32, device)
    leaves = [x.requires_grad_() for x in tensors]
    loss = loss_of(*leaves, target, SEGMENTS)[0].sum()
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    second = torch.autograd.grad(loss, leaves)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    with torch.no_grad():
        assert not any(kept.numel() for kept in forward_op(*tensors, target, SEGMENTS, False)[2:])


def test_head_loss_registration_compile_and_flops(device):
    """opcheck, one graph, recomputation, and three products' worth of FLOPs."""
    from bevt_ds.kernels.head_loss import backward_op, forward_op

    tensors, target = inputs(torch.float32, device)
    leaves = tuple(x.requires_grad_() for x in tensors)
    torch.library.opcheck(forward_op, (*leaves, target, list(SEGMENTS), True))
    with torch.no_grad():
        losses, _, *gradients = forward_op(*tensors, target, SEGMENTS, True)
    torch.library.opcheck(backward_op, (torch.ones_like(losses), *gradients, list(SEGMENTS)))

    def plain(h, weight, bias):
        return loss_of(h, weight, bias, target, SEGMENTS)[0].sum()

    expected = torch.autograd.grad(plain(*leaves), leaves)
    compiled = torch.compile(plain, fullgraph=True, backend="aot_eager")
    for function in (compiled, partial(checkpoint, plain, use_reentrant=False)):
        actual = torch.autograd.grad(function(*leaves), leaves)
        assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
    with FlopCounterMode(display=False) as counter:
        plain(*leaves).backward()
    assert counter.get_total_flops() == 6 * 23 * 24 * 100


def test_head_loss_segments_must_cover_the_rows(device):
    """Row counts that do not sum to R."""
    tensors, target = inputs(torch.float32, device)
    with pytest.raises(ValueError, match="do not sum"):
        loss_of(*tensors, target, (13, 11))


class Allocated(TorchDispatchMode):
    """Bytes of the tensors that operators make under it, now and at most."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.alive = set()

    def free(self, key, size):
        self.alive.discard(key)
        self.now -= size

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            storage = tensor.untyped_storage()
            if storage._cdata not in self.alive:
                self.alive.add(storage._cdata)
                self.now += storage.nbytes()
                weakref.finalize(storage, self.free, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return out


def test_masked_head_of_the_base_step_needs_less_than_300_mb(monkeypatch):
    """8 clips and 64 images of Swin-B in bf16, from the gather to the features' gradient; 418 MB when all logits were
    kept. Counted on the meta device: the features, the weight and their like are not in it."""
    from bevt_ds.kernels import head_loss, mask_tokens

    for module in (head_loss, mask_tokens):
        monkeypatch.setattr(module, "launch", lambda *_, **__: None)
    bf16 = {"dtype": torch.bfloat16, "device": "meta"}
    features, weight, bias = (
        torch.empty(37632, 1024, **bf16),
        torch.empty(8192, 1024, **bf16),
        torch.empty(8192, **bf16),
    )
    index, segments = torch.empty(15680, dtype=torch.int64, device="meta"), (9408, 6272)
    with Allocated() as memory:
        h = mask_tokens.launch_gather(features, index)
        sums, _, *kept = head_loss.run_forward(h, weight, bias, index, segments, True)
        forward = memory.peak
        dh, *_ = head_loss.run_backward(sums, *kept, segments)
        mask_tokens.launch_scatter(dh, index, len(features))
    assert 190e6 < forward < 250e6
    assert memory.peak < 300e6


def test_all_rows_ignored_give_zeros(device, chunked):
    """No masked cell: a loss of zero, no hit, and gradients of zero."""
    tensors, target = inputs(torch.float32, device)
    leaves = [x.requires_grad_() for x in tensors]
    losses, hits = loss_of(*leaves, target.fill_(-100), SEGMENTS)
    assert not losses.any() and not hits.any()
    assert not any(grad.any() for grad in torch.autograd.grad(losses.sum(), leaves))
