"""The mask token and row gather kernels against the reference."""

from functools import partial

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from bevt_ds import kernels
from bevt_ds.kernels import reference

insert = partial(kernels.insert_mask_tokens, provider="triton")
gather = partial(kernels.gather_masked, provider="triton")
# x (B, T, H, W, C) and mask (B, T, h, w): cells of several tokens, awkward widths, an image
SHAPES = [((2, 2, 6, 8, 20), (2, 2, 3, 2)), ((1, 1, 5, 5, 33), (1, 1, 5, 5)), ((1, 3, 4, 4, 520), (1, 3, 1, 2))]


@pytest.mark.parametrize(("tokens", "cells"), SHAPES)
def test_mask_token_insert_matches_reference(tokens, cells, dtype, device, check_op, poisoned):
    """Output, dx and dtoken."""
    x = torch.randn(tokens, device=device).to(dtype)
    token = torch.randn(tokens[-1], device=device).to(dtype)
    mask = torch.rand(cells, device=device) < 0.5
    check_op(insert, reference.insert_mask_tokens, (x, token), mask=mask)


def test_mask_token_insert_copies_bitwise_and_ignores_covered_tokens(device):
    """Kept tokens are copies; a masked token may be anything, NaN too, and gets no gradient."""
    x = torch.randn(1, 2, 4, 4, 20, device=device)
    mask = torch.rand(1, 2, 2, 2, device=device) < 0.5
    covered = reference.cell_mask(mask, (2, 4, 4))
    assert covered.any() and not covered.all()
    x[covered] = float("nan")
    x.requires_grad_()
    token = torch.randn(20, device=device)
    out = insert(x, token, mask)
    assert torch.equal(out[~covered], x[~covered])
    assert torch.equal(out[covered], token.expand(int(covered.sum()), -1))
    out.sum().backward()
    assert torch.equal(x.grad, (~covered)[..., None].float().expand_as(x))


@pytest.mark.parametrize("channels", [16, 100, 600])
def test_row_gather_matches_reference(channels, dtype, device, check_op, poisoned):
    """Rows and their scatter, padding at both ends and in between."""
    x = torch.randn(37, channels, device=device).to(dtype)
    index = torch.randperm(37, device=device)[:21]
    index[[0, 7, 20]] = -1
    check_op(gather, reference.gather_masked, (x,), index=index)


def test_row_gather_of_padding_or_no_rows(device):
    """A stream with nothing masked gathers zeros, or nothing, and its gradient is zero."""
    x = torch.randn(5, 16, device=device, requires_grad=True)
    for index in (torch.full((4,), -1, device=device), torch.empty(0, dtype=torch.int64, device=device)):
        out = gather(x, index)
        assert out.shape == (len(index), 16)
        (grad,) = torch.autograd.grad(out.sum(), x)
        assert not out.any() and not grad.any()


def test_mask_token_registration_and_compile(device):
    """opcheck of the four operators, one graph under torch.compile, recomputation."""
    from bevt_ds.kernels.mask_tokens import gather_op, insert_backward_op, insert_op, scatter_op

    x = torch.randn(1, 2, 4, 4, 16, device=device, requires_grad=True)
    token = torch.randn(16, device=device, requires_grad=True)
    mask = torch.rand(1, 2, 2, 2, device=device) < 0.5
    index = torch.tensor([3, -1, 0], device=device)
    rows = torch.randn(6, 16, device=device, requires_grad=True)
    torch.library.opcheck(insert_op, (x, token, mask))
    torch.library.opcheck(insert_backward_op, (x.detach(), mask))
    torch.library.opcheck(gather_op, (rows, index))
    torch.library.opcheck(scatter_op, (rows.detach()[:3], index, 6))

    def both(x, token, rows):
        return insert(x, token, mask).sin().sum() + gather(rows, index).sin().sum()

    expected = torch.autograd.grad(both(x, token, rows), (x, token, rows))
    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    for function in (compiled, partial(checkpoint, both, use_reentrant=False)):
        actual = torch.autograd.grad(function(x, token, rows), (x, token, rows))
        assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def test_mask_that_does_not_divide_the_tokens_is_named(device):
    """Cells that do not divide the tokens."""
    with pytest.raises(ValueError, match="does not divide"):
        insert(torch.zeros(1, 1, 6, 6, 16, device=device), torch.zeros(16), torch.zeros(1, 1, 4, 4) > 0)
