"""Residual sum and LayerNorm, bias and GELU: the kernels against the reference."""

from functools import partial

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from bevt_ds import kernels
from bevt_ds.kernels import reference

EPS = 1e-5
SHAPES = [(3, 2, 5, 96), (2, 7, 100), (2, 41, 17), (2, 2, 1024)]
WIDE = [(4, 1, 3, 384), (3, 2048), (1, 8192)]
OPS = ("add_norm, sum", "add_norm, normed", "add_norm, both", "norm_add")


def parts(name):
    """(op of a provider, reference) of one case of OPS: functions of x, branch, weight, bias; scale=."""

    def one(run, **options):
        def call(x, branch, weight, bias, scale):
            if name == "norm_add":
                return run.norm_add(x, branch, scale, weight, bias, EPS, **options)
            total, normed = run.add_norm(x, branch, scale, weight, bias, EPS, **options)
            return {"sum": total + 0 * normed, "normed": normed, "both": total + 0.5 * normed}[name.split(", ")[1]]

        return call

    return one(kernels, provider="triton"), one(reference)


def values(shape, dtype, device):
    """x and branch, far from mean 0 and unlike each other, weight and bias."""
    x, branch = 1 + torch.randn(shape, device=device), 0.5 * torch.randn(shape, device=device)
    weight, bias = torch.randn(shape[-1], device=device), torch.randn(shape[-1], device=device)
    return [t.to(dtype) for t in (x, branch, weight, bias)]


def drop_path(samples, device):
    """One dropped sample where there are several, the others scaled."""
    return torch.tensor([1.25, 0.0, 1.25, 1.0][:samples], device=device)


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("scaled", [False, True], ids=["plain", "scaled"])
def test_residual_and_norm_match_reference(name, scaled, dtype, device, check_op, poisoned):
    """Output and every gradient; the sum's gradient alone, the norm's alone, and both."""
    op, plain = parts(name)
    for shape in SHAPES:
        scale = drop_path(shape[0], device) if scaled else None
        check_op(op, plain, values(shape, dtype, device), scale=scale)


def test_layer_norm_matches_reference(dtype, device, check_op, poisoned):
    """Also rows whose mean is a hundred times their spread, and the widest rows."""
    op = partial(kernels.layer_norm, eps=EPS, provider="triton")
    for shape, offset in [(SHAPES[1], 100), *((shape, 0) for shape in (*SHAPES, *WIDE))]:
        x, _, weight, bias = values(shape, dtype, device)
        check_op(op, partial(reference.layer_norm, eps=EPS), (x + offset, weight, bias))


def test_scaled_sum_matches_reference(dtype, device, check_op, poisoned):
    for shape in SHAPES:
        for scale in (None, drop_path(shape[0], device)):
            tensors = values(shape, dtype, device)[:2]
            check_op(partial(kernels.add_scaled, provider="triton"), reference.add_scaled, tensors, scale=scale)


def test_linear_gelu_matches_reference(dtype, device, check_op, poisoned):
    """Rows and channels that fill no tile, and more channels than a tile has."""
    for rows, channels in (((2, 3, 5), 100), ((37,), 16), ((4,), 1040)):
        x, weight = torch.randn(*rows, 24, device=device), torch.randn(channels, 24, device=device)
        tensors = [t.to(dtype) for t in (x, weight / 3, torch.randn(channels, device=device))]
        check_op(partial(kernels.linear_gelu, provider="triton"), reference.linear_gelu, tensors)


def test_gelu_far_from_zero_is_exact(device):
    """0 and u, with slopes 0 and 1, where exponentials underflow."""
    u = torch.tensor([[-60.0, -20, 0, 20, 60]], device=device, requires_grad=True)
    out = kernels.linear_gelu(u, torch.eye(5, device=device), torch.zeros(5, device=device), "triton")
    assert torch.equal(out, torch.tensor([[0.0, 0, 0, 20, 60]], device=device))
    (slope,) = torch.autograd.grad(out.sum(), u)
    assert torch.equal(slope, torch.tensor([[0.0, 0, 0.5, 1, 1]], device=device))


def test_dropped_sample_passes_unchanged(device):
    """Bit for bit, whatever its branch holds but NaN; and no gradient reaches the branch."""
    x, branch, weight, bias = values((3, 4, 20), torch.float32, device)
    branch.requires_grad_()
    scale = torch.tensor([0.0, 2.0, 0.0], device=device)
    total, _ = kernels.add_norm(x, branch, scale, weight, bias, EPS, "triton")
    (grad,) = torch.autograd.grad(total.sum(), branch)
    assert torch.equal(total[[0, 2]], x[[0, 2]])
    assert not grad[[0, 2]].any() and torch.equal(grad[1], torch.full_like(grad[1], 2))


def every_gradient(name, tensors, scale):
    """Output and gradients of one case."""
    leaves = [t.detach().requires_grad_() for t in tensors]
    out = parts(name)[0](*leaves, scale)
    return out.detach(), *torch.autograd.grad(out.sin().sum(), leaves)


@pytest.mark.parametrize("name", OPS)
def test_repeats_and_strides_change_no_bit(name, device):
    """The same from memory in another order, and twice: more rows than one program sums over."""
    tensors = values((3, 6, 11, 36), torch.float32, device)
    strided = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in tensors[:2]]
    strided += [torch.stack([t, t], 1)[:, 0] for t in tensors[2:]]
    assert not any(t.is_contiguous() for t in strided)
    scale = drop_path(3, device)
    first = every_gradient(name, tensors, scale)
    for other in (tensors, strided):
        assert all(torch.equal(a, b) for a, b in zip(first, every_gradient(name, other, scale), strict=True))


def test_gelu_from_strided_memory_changes_no_bit(device):
    x, weight, bias = (torch.randn(n, device=device) for n in ((5, 7, 24), (40, 24), (40,)))
    bias.requires_grad_()
    outs = []
    for rows in (x, x.transpose(0, 1).contiguous().transpose(0, 1)):
        out = kernels.linear_gelu(rows, weight, bias, "triton")
        outs.append((out.detach(), *torch.autograd.grad(out.sin().sum(), bias)))
    assert all(torch.equal(a, b) for a, b in zip(*outs, strict=True))


def test_sum_takes_the_wider_type(device):
    """As PyTorch's own sum: a low-precision branch on a float32 residual."""
    x, branch, weight, bias = values((2, 3, 20), torch.float32, device)
    branch = branch.half().requires_grad_()
    for provider in ("torch", "triton"):
        total, normed = kernels.add_norm(x, branch, drop_path(2, device), weight, bias, EPS, provider)
        assert total.dtype == normed.dtype == torch.float32
        assert torch.autograd.grad(normed.sum(), branch)[0].dtype == torch.float16


def test_norm_registration_and_compile(device):
    """opcheck of the operators, one graph under torch.compile, recomputation."""
    from bevt_ds.kernels.bias_gelu import bias_gelu_backward_op, bias_gelu_op
    from bevt_ds.kernels.norms import (
        add_norm_backward_op,
        add_norm_op,
        add_scaled_op,
        layer_norm_op,
        norm_add_op,
    )

    tensors = [t.requires_grad_() for t in values((2, 3, 20), torch.float32, device)]
    x, branch, weight, bias = tensors
    scale = drop_path(2, device)
    rest = (weight, bias, EPS)
    torch.library.opcheck(layer_norm_op, (x, None, None, *rest, False))
    torch.library.opcheck(add_norm_op, (x, branch, scale, *rest, False))
    torch.library.opcheck(add_norm_op, (x, branch, None, *rest, False))
    torch.library.opcheck(norm_add_op, (x, branch, scale, *rest, True))
    plain = [t.detach() for t in tensors]
    stats = torch.ones(2, 6, device=device)
    for case in ((plain[0], plain[1], scale), (None, plain[1], None), (plain[0], None, scale)):
        torch.library.opcheck(add_norm_backward_op, (*case[:2], plain[1], case[2], plain[2], stats))
    torch.library.opcheck(add_scaled_op, (x, branch, scale))
    torch.library.opcheck(add_scaled_op, (None, plain[1], scale))
    torch.library.opcheck(bias_gelu_op, (x, bias))
    torch.library.opcheck(bias_gelu_backward_op, (plain[0], plain[1], plain[3]))

    def run(x, branch, weight, bias):
        first, normed = kernels.add_norm(x, branch, scale, weight, bias, EPS, "triton")
        post = kernels.norm_add(first, normed, None, weight, bias, EPS, "triton")
        last = kernels.add_scaled(post, kernels.layer_norm(branch, weight, bias, EPS, "triton"), scale, "triton")
        return kernels.linear_gelu(last, last.flatten(0, 1).detach(), bias[:6], "triton").sin().sum()

    expected = torch.autograd.grad(run(*tensors), tensors)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for function in (compiled, partial(checkpoint, run, use_reentrant=False)):
        actual = torch.autograd.grad(function(*tensors), tensors)
        assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def test_shapes_that_do_not_fit_are_named(device):
    x, weight = torch.zeros(2, 3, 16, device=device), torch.ones(16, device=device)
    with pytest.raises(ValueError, match=r"a sum of \(2, 3, 16\) and \(2, 16\), scale None"):
        kernels.add_norm(x, x[:, 0], None, weight, weight, EPS, "triton")
    with pytest.raises(ValueError, match=r"a sum of .*, scale \(3,\)"):
        kernels.norm_add(x, x, torch.ones(3, device=device), weight, weight, EPS, "torch")
    with pytest.raises(ValueError, match=r"the weight has shape \(8,\)"):
        kernels.layer_norm(x, weight[:8], weight[:8], EPS, "torch")
    with pytest.raises(ValueError, match="up to 16384 channels: use kernels='torch'"):
        kernels.layer_norm(*[torch.zeros(20000, device=device)] * 3, EPS, "triton")
