"""The torch provider (every CPU's) against the reference."""

from functools import partial
from itertools import islice, product

import pytest
import torch

from bevt_ds import kernels
from bevt_ds.kernels import reference, torch_ops

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
STILL = (0, 0, 0)
attend = partial(kernels.window_attention, provider="torch")


@pytest.mark.parametrize("low", DTYPES, ids=str)
def test_torch_window_attention_matches_reference(every_case, low, device, inputs, check_op):
    """Output, dqkv and dtable."""
    qkv, table, windows = inputs(every_case, low, device, batch=2)
    check_op(attend, reference.window_attention, (qkv, table), windows=windows)


@pytest.mark.parametrize("low", DTYPES, ids=str)
def test_torch_mask_tokens_and_gather_match_reference(low, device, check_op):
    """Output and gradients; x of the first also as the permuted view that a convolution leaves."""
    x = torch.randn(2, 20, 2, 6, 8, device=device).to(low).permute(0, 2, 3, 4, 1)
    token, mask = torch.randn(20, device=device).to(low), torch.rand(2, 2, 3, 2, device=device) < 0.5
    insert = partial(kernels.insert_mask_tokens, provider="torch")
    assert torch.equal(insert(x, token, mask), reference.insert_mask_tokens(x, token, mask))
    check_op(insert, reference.insert_mask_tokens, (x, token), mask=mask)
    rows, index = torch.randn(9, 20, device=device).to(low), torch.tensor([4, -1, 0, 8, -1], device=device)
    gather = partial(kernels.gather_masked, provider="torch")
    check_op(gather, reference.gather_masked, (rows,), index=index)


@pytest.mark.parametrize("low", DTYPES, ids=str)
def test_torch_masked_cross_entropy_matches_reference(low, device, check_op):
    """Loss sums and gradients; hits are those of the reference."""
    h, weight, bias = (torch.randn(*n, device=device).to(low) for n in ((12, 8), (30, 8), (30,)))
    target = torch.randint(30, (12,), device=device)
    target[[2, 11]] = -100
    loss_of = partial(kernels.masked_cross_entropy, provider="torch")
    rest = {"target": target, "segments": (5, 7)}
    check_op(loss_of, reference.masked_cross_entropy, (h, weight, bias), **rest)
    arguments = (h, weight, bias, target, (5, 7))
    assert torch.equal(loss_of(*arguments)[1], reference.masked_cross_entropy(*arguments)[1])


def test_torch_ops_compile_into_one_graph(device, inputs):
    """torch.compile needs no break."""
    qkv, table, windows = inputs("clip-shifted", torch.float32, device)
    index = torch.tensor([3, -1, 0], device=device)

    def all_ops(qkv, table):
        out = attend(qkv, table, windows)
        rows = kernels.gather_masked(out.flatten(0, 3), index, "torch")
        target = torch.zeros(3, dtype=torch.int64, device=rows.device)
        return kernels.masked_cross_entropy(rows, rows, rows[:, 0], target, (2, 1), "torch")[0].sum()

    leaves = qkv.requires_grad_(), table.requires_grad_()
    expected = torch.autograd.grad(all_ops(*leaves), leaves)
    compiled = torch.compile(all_ops, fullgraph=True, backend="aot_eager")
    actual = torch.autograd.grad(compiled(*leaves), leaves)
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_torch_ops_train_after_inference_mode(device, inputs):
    """What is cached during an evaluation serves a later backward pass."""
    qkv, table, windows = inputs("window-below-table", torch.float32, device)
    torch_ops._bias_rows.cache_clear()
    with torch.inference_mode():
        attend(qkv, table, windows)
    attend(qkv.requires_grad_(), table.requires_grad_(), windows).sum().backward()
    assert table.grad.abs().sum() > 0


@pytest.mark.parametrize("window", [(2, 3, 4), (8, 7, 7)])
def test_bias_rows_are_numbered_by_query_minus_key(window):
    """The row of every offset, counted up by hand: the table's last axis is the fastest, its first row the offset
    of the window's first token as query and its last as key."""
    windows = kernels.Windows(window, window, window, STILL, STILL)
    rows = torch_ops._bias_rows(windows, torch.device("cpu")).view(windows.tokens, windows.tokens)
    places = list(product(*(range(extent) for extent in window)))
    offsets = list(product(*(range(1 - extent, extent) for extent in window)))
    row_of = {offset: row for row, offset in enumerate(offsets)}
    assert rows[0, -1] == 0
    for q, k in islice(product(range(len(places)), repeat=2), 0, None, 37):
        offset = tuple(a - b for a, b in zip(places[q], places[k], strict=True))
        assert rows[q, k] == row_of[offset]


def test_attention_table_and_sizes_must_fit(device, inputs):
    """A table of another window is named with the shape that is needed."""
    qkv, table, windows = inputs("clip", torch.float32, device)
    with pytest.raises(ValueError, match=r"bias_table has shape \(104, 2\)"):
        attend(qkv, table[:-1], windows)
    with pytest.raises(ValueError, match=r"qkv has a map of \(1, 4, 6\) tokens"):
        attend(qkv[:, :1], table, windows)
