"""Both providers at edge cases: empty batches, targets outside the vocabulary, second derivatives."""

from functools import partial

import pytest
import torch

from bevt_ds import kernels

STILL, PROVIDERS = (0, 0, 0), ("torch", "triton")


@pytest.fixture(params=PROVIDERS)
def provider(request):
    """The tests run on both."""
    return request.param


def calls(provider, device, batch):
    """(op, its differentiable arguments, the rest of the call) for `batch` samples; each returns one tensor."""

    def leaf(*shape):
        return torch.randn(*shape, device=device, requires_grad=True)

    def attend(window, qkv, table):
        shift = tuple(size // 2 for size in window)
        windows = kernels.Windows(tuple(qkv.shape[1:4]), window, window, shift, shift)
        return kernels.window_attention(qkv, table, windows, provider=provider)

    rows = 3 * batch
    index, target = torch.arange(rows, device=device), torch.arange(rows, device=device)
    mask = torch.eye(2, dtype=torch.bool, device=device).expand(batch, 1, 2, 2)
    head = kernels.masked_cross_entropy
    scale = torch.ones(batch, device=device)
    sums = {"scale": scale, "provider": provider}
    return {
        "layer_norm": (partial(kernels.layer_norm, provider=provider), (leaf(batch, 4, 16), leaf(16), leaf(16))),
        "add_norm": (
            lambda x, branch, w, b: kernels.add_norm(x, branch, weight=w, bias=b, **sums)[1],
            (leaf(batch, 4, 16), leaf(batch, 4, 16), leaf(16), leaf(16)),
        ),
        "norm_add": (
            lambda x, branch, w, b: kernels.norm_add(x, branch, weight=w, bias=b, **sums),
            (leaf(batch, 4, 16), leaf(batch, 4, 16), leaf(16), leaf(16)),
        ),
        "add_scaled": (partial(kernels.add_scaled, **sums), (leaf(batch, 4, 16), leaf(batch, 4, 16))),
        "linear_gelu": (
            partial(kernels.linear_gelu, provider=provider),
            (leaf(batch, 4, 16), leaf(20, 16), leaf(20)),
        ),
        "window_attention": (partial(attend, (1, 2, 2)), (leaf(batch, 1, 4, 4, 3, 2, 16), leaf(9, 2))),
        "window_attention, large": (partial(attend, (2, 6, 6)), (leaf(batch, 2, 6, 6, 3, 1, 16), leaf(363, 1))),
        "insert_mask_tokens": (
            partial(kernels.insert_mask_tokens, mask=mask, provider=provider),
            (leaf(batch, 1, 4, 4, 16), leaf(16)),
        ),
        "gather_masked": (partial(kernels.gather_masked, index=index, provider=provider), (leaf(rows, 16),)),
        "masked_cross_entropy": (
            lambda h, w, b: head(h, w, b, target, (rows,), provider)[0],
            (leaf(rows, 16), leaf(9, 16), leaf(9)),
        ),
    }


def test_empty_batch_gives_an_empty_result_and_zero_gradients(provider, device):
    for name, (op, leaves) in calls(provider, device, batch=0).items():
        out = op(*leaves)
        gradients = torch.autograd.grad(out.sum(), leaves)
        assert not out.any(), name
        assert [g.shape for g in gradients] == [x.shape for x in leaves], name
        assert not any(g.any() for g in gradients), name


def test_gather_of_padding_rows_only(provider, device):
    rows = torch.zeros(0, 16, device=device, requires_grad=True)
    out = kernels.gather_masked(rows, torch.full((3,), -1, device=device), provider)
    assert torch.equal(out, torch.zeros(3, 16, device=device))
    assert torch.autograd.grad(out.sum(), rows)[0].shape == (0, 16)


@pytest.mark.parametrize("power", [1, 2], ids=["linear loss", "quadratic loss"])
def test_second_derivatives_raise_one_error(provider, device, power):
    """Also where the incoming gradient is a constant, so that the kernels' gradients would pass for constants."""
    for name, (op, leaves) in calls(provider, device, batch=1).items():
        gradients = torch.autograd.grad((op(*leaves) ** power).sum(), leaves, create_graph=True)
        plain = torch.autograd.grad((op(*leaves) ** power).sum(), leaves)
        for gradient, expected in zip(gradients, plain, strict=True):
            assert torch.equal(gradient, expected), name
            with pytest.raises(RuntimeError, match=rf"kernels.{name.split(',')[0]} has no second derivative"):
                torch.autograd.grad(gradient.sum(), leaves, retain_graph=True, allow_unused=True)


@pytest.mark.parametrize("wrong", [9, 10**9, -1, -101, 2**40])
def test_target_outside_the_vocabulary_makes_the_loss_nan(provider, device, wrong):
    """In its segment only; its row has no gradient, and what the other rows give is unchanged."""
    h, weight, bias = (torch.randn(*n, device=device, requires_grad=True) for n in ((6, 16), (9, 16), (9,)))
    target = torch.tensor([0, 8, 3, 4, -100, 1], device=device)

    def run(target):
        losses, hits = kernels.masked_cross_entropy(h, weight, bias, target, (3, 3), provider)
        return losses.detach(), hits, *torch.autograd.grad(losses.sum(), (h, weight, bias))

    changed = run(target.index_fill(0, torch.tensor([1], device=device), wrong))
    ignored = run(target.index_fill(0, torch.tensor([1], device=device), -100))
    assert changed[0].isnan().tolist() == [True, False]
    assert changed[0][1] == ignored[0][1]
    for actual, expected in zip(changed[1:], ignored[1:], strict=True):
        assert torch.equal(actual, expected)
    assert not changed[2][1].any()
