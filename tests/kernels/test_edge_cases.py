"""Both providers at edge cases: empty batches, targets outside the vocabulary, second derivatives."""

from contextlib import ExitStack
from functools import partial

import pytest
import torch

from bevt_ds import kernels

STILL, PROVIDERS = (0, 0, 0), ("torch", "triton")


@pytest.fixture(params=PROVIDERS)
def provider(request):
    """The tests run on both."""
    return request.param


def strided(x):
    """Its values as every second one of a larger tensor."""
    return torch.stack([x, x], dim=-1)[..., 0]


def calls(provider, device, batch, arrange=lambda x: x):
    """(op, its differentiable arguments, the rest of the call) for `batch` samples; each returns one tensor.

    `arrange`: what is done to the memory of the arguments without a gradient.
    """

    def leaf(*shape):
        return torch.randn(*shape, device=device, requires_grad=True)

    def attend(window, qkv, table):
        shift = tuple(size // 2 for size in window)
        windows = kernels.Windows(tuple(qkv.shape[1:4]), window, window, shift, shift)
        return kernels.window_attention(qkv, table, windows, provider=provider)

    rows = 3 * batch
    index, target = (arrange(torch.arange(rows, device=device)) for _ in range(2))
    mask = arrange(torch.eye(2, dtype=torch.bool, device=device).expand(batch, 1, 2, 2))
    head = kernels.masked_cross_entropy
    scale = arrange(torch.ones(batch, device=device))
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


def test_rows_that_are_all_ignored_or_padding_give_zeros(provider, device):
    h, weight, bias = (torch.randn(*n, device=device, requires_grad=True) for n in ((6, 16), (9, 16), (9,)))
    ignored = torch.full((6,), -100, device=device)
    losses, hits = kernels.masked_cross_entropy(h, weight, bias, ignored, (4, 2), provider)
    rows = kernels.gather_masked(h, torch.full((5,), -1, device=device), provider)
    assert not losses.any() and not hits.any() and not rows.any() and len(rows) == 5
    assert not any(grad.any() for grad in torch.autograd.grad(losses.sum(), (h, weight, bias)))
    assert not torch.autograd.grad(rows.sum(), h)[0].any()


def test_mask_without_a_masked_cell_changes_nothing(provider, device):
    x, token = (torch.randn(*n, device=device, requires_grad=True) for n in ((1, 2, 4, 4, 16), (16,)))
    mask = torch.zeros(1, 2, 2, 2, dtype=torch.bool, device=device)
    out = kernels.insert_mask_tokens(x, token, mask, provider)
    dx, dtoken = torch.autograd.grad(out.sum(), (x, token))
    assert torch.equal(out, x) and torch.equal(dx, torch.ones_like(x)) and not dtoken.any()


def test_arguments_that_are_not_contiguous_give_the_same(provider, device):
    """Each argument as every second element of a larger tensor; libraries multiply such matrices in another order."""
    spread = calls(provider, device, 2, strided)
    for name, (op, leaves) in calls(provider, device, 2).items():
        views = [strided(x).detach().requires_grad_() for x in leaves]
        assert not any(view.is_contiguous() for view in views), name
        expected, out = op(*leaves), spread[name][0](*views)
        grad = torch.randn(*out.shape, 2, device=device)[..., 0]
        found = (out, *torch.autograd.grad(out, views, grad))
        for a, b in zip(found, (expected, *torch.autograd.grad(expected, leaves, grad)), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_arguments_that_want_no_gradient(provider, device):
    """A table, a token, a weight that is frozen: the other gradients are the same. And nothing is kept in no_grad."""
    for name, (op, leaves) in calls(provider, device, batch=1).items():
        expected = torch.autograd.grad(op(*leaves).sum(), leaves)
        frozen = [leaves[0], *(x.detach() for x in leaves[1:])]
        assert torch.equal(torch.autograd.grad(op(*frozen).sum(), frozen[0])[0], expected[0]), name
        if len(leaves) > 1:
            only = [leaves[0].detach(), *leaves[1:]]
            found = torch.autograd.grad(op(*only).sum(), only[1:])
            assert all(torch.equal(a, b) for a, b in zip(found, expected[1:], strict=True)), name
        with torch.no_grad():
            assert not op(*leaves).requires_grad, name


def test_a_scale_that_wants_a_gradient_is_refused(provider, device):
    """Sums give none of it; under no_grad it may be any tensor."""
    x, weight = torch.randn(2, 4, 16, device=device), torch.ones(16, device=device)
    scale = torch.ones(2, device=device, requires_grad=True)
    for name, rest in (("add_norm", (weight, weight)), ("norm_add", (weight, weight)), ("add_scaled", ())):
        run = partial(getattr(kernels, name), x, x, scale, *rest, provider=provider)
        with pytest.raises(RuntimeError, match=f"kernels.{name} gives no gradient of an argument"):
            run()
        with torch.no_grad():
            run()


def test_under_autocast_attention_follows_its_input_and_the_head_takes_autocasts_type(provider, device):
    dtype = torch.float16
    ops = calls(provider, device, batch=1)
    with torch.autocast(device, dtype):
        attend, (qkv, table) = ops["window_attention"]
        out = attend(qkv.to(dtype), table)
        assert out.dtype == dtype
        dqkv, dtable = torch.autograd.grad(out.float().sum(), (qkv, table))
        assert (dqkv.dtype, dtable.dtype) == (torch.float32, torch.float32)
        head, leaves = ops["masked_cross_entropy"]
        loss = head(*leaves)
        assert loss.dtype == torch.float32
        assert all(g.dtype == torch.float32 for g in torch.autograd.grad(loss.sum(), leaves))


def test_under_autocast_every_op_computes_the_same_and_gives_gradients_of_its_arguments_types(provider, device):
    """From float32 arguments. Only products take autocast's type, as everywhere in PyTorch."""
    for name, (op, leaves) in calls(provider, device, batch=1).items():
        expected = op(*leaves)
        with torch.autocast(device, torch.float16):
            out = op(*leaves)
        assert out.dtype == (torch.float16 if name == "linear_gelu" else torch.float32), name
        found = (out, *torch.autograd.grad(out.float().sum(), leaves))
        for a, b in zip(found, (expected, *torch.autograd.grad(expected.sum(), leaves)), strict=True):
            torch.testing.assert_close(
                a.float(), b, rtol=2e-2, atol=2e-2, msg=lambda text, name=name: f"{name}: {text}"
            )


def test_norms_under_autocast_stay_in_the_type_of_their_rows(provider, device):
    """Half-precision rows, as a linear layer leaves them, and float32 weights."""
    x, weight = torch.randn(2, 3, 16, device=device).half(), torch.ones(16, device=device)
    with torch.autocast(device, torch.float16):
        normed = [kernels.layer_norm(x, weight, weight, provider=provider)]
        normed += kernels.add_norm(x, x, None, weight, weight, provider=provider)
        normed += [kernels.norm_add(x, x, None, weight, weight, provider=provider)]
    assert [out.dtype for out in normed] == [torch.float16] * 4


def test_vmap_over_a_kernel_is_an_error_that_says_so(device):
    for name, (op, leaves) in calls("triton", device, batch=1).items():
        stacked = [torch.stack([x.detach(), x.detach()]) for x in leaves]
        with pytest.raises(RuntimeError, match="vmap"):
            torch.func.vmap(op)(*stacked)
            pytest.fail(f"{name} ran")


@pytest.mark.parametrize(("window", "batch"), [((8, 7, 7), 24), ((1, 7, 7), 160)], ids=["clips", "images"])
def test_batches_of_more_than_2_31_values_launch_with_numbers_that_fit(window, batch):
    """Kernels get 32-bit numbers, and number samples in 64 bits; one sample with so many values is refused."""
    from bevt_ds.kernels import attention, attention_backward, launches

    windows = kernels.Windows((window[0], 224, 224), window, window, (0, 3, 3), (0, 3, 3))
    qkv = torch.empty(batch, *windows.grid, 3, 24, 32, dtype=torch.bfloat16, device="meta")
    table = torch.empty(windows.table_rows, 24, device="meta")
    assert qkv.numel() > 2**31
    with launches.record("sm_90") as recorded:
        out, lse, *tables = attention.launch_forward(qkv, table, windows, 1.0)
        attention_backward.launch_backward(out, qkv, *tables, out, lse, windows, 1.0, table.dtype)
    assert len(recorded) >= 3
    for launch in recorded:
        numbers = [n for n in (*launch.grid, *launch.args) if isinstance(n, int)]
        assert min(numbers) >= 0 and max(numbers) < 2**31, launch.kernel
    sample = torch.empty(1, window[0], 7 * 1200, 7 * 1200, 3, 1, 16, device="meta")
    large = kernels.Windows(tuple(sample.shape[1:4]), window, window, STILL, STILL)
    with pytest.raises(ValueError, match="more than 2\\^31 values"):
        kernels.window_attention(sample, torch.empty(large.table_rows, 1, device="meta"), large, provider="triton")


@pytest.mark.parametrize("window", [(1, 32, 32), (3, 11, 31)], ids=["1024 tokens", "1023 tokens"])
def test_largest_windows(window, device, check_op, poisoned):
    """In large tiles, which the interpreter takes less time for."""
    from bevt_ds.kernels import configs, reference

    windows = kernels.Windows(window, window, window, STILL, (0, window[1] // 2, 0))
    qkv = torch.randn(1, *window, 3, 1, 16, device=device)
    with ExitStack() as stack:
        for kernel in ("fwd", "bwd_kv", "bwd_q") if device == "cpu" else ():
            options = (configs.tiles if kernel == "bwd_q" else configs.scores)(128, 128, 128, 4, 1)
            stack.enter_context(configs.replaced("interpreter", (kernel, "fp32"), options))
        attend = partial(kernels.window_attention, provider="triton")
        table = torch.randn(windows.table_rows, 1, device=device)
        check_op(attend, reference.window_attention, (qkv, table), windows=windows)
