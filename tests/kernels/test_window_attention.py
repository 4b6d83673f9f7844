"""The window attention kernels against the reference: values, gradients, isolation, determinism."""

from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from math import prod

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from bevt_ds import kernels
from bevt_ds.kernels import bias, configs, launches, reference

STILL = (0, 0, 0)
attend = partial(kernels.window_attention, provider="triton")


def test_window_attention_matches_reference(every_case, dtype, device, inputs, check_op, poisoned):
    """Output, dqkv and dtable, with every output element written."""
    heads = 1 if every_case.startswith("large-") else 2  # the interpreter takes a second a head of these
    qkv, table, windows = inputs(every_case, dtype, device, heads=heads)
    check_op(attend, reference.window_attention, (qkv, table), windows=windows)


@pytest.mark.parametrize("case", ["clip-shifted", "large-cut-in-time"])
def test_window_attention_head_dim_batch_and_scale(case, device, inputs, check_op, poisoned):
    """d = 32, three heads or two, two samples, a given scale."""
    heads = 3 if case == "clip-shifted" else 2
    qkv, table, windows = inputs(case, torch.float32, device, batch=2, heads=heads, d=32)
    check_op(attend, reference.window_attention, (qkv, table), windows=windows, scale=0.5)


@pytest.mark.parametrize("case", ["clip-shifted", "large-shifted"])
def test_window_attention_of_wide_heads(case, dtype, device, inputs, check_op, poisoned):
    """d = 64 has tiles of its own."""
    qkv, table, windows = inputs(case, dtype, device, heads=1, d=64)
    check_op(attend, reference.window_attention, (qkv, table), windows=windows)


def test_window_attention_with_a_float32_table(device, inputs):
    """A float32 table with float16 activations gives a float32 gradient."""
    qkv, table, windows = inputs("clip", torch.float16, device)
    table = table.float().requires_grad_()
    attend(qkv.requires_grad_(), table, windows).float().sum().backward()
    assert qkv.grad.dtype == torch.float16
    assert table.grad.dtype == torch.float32


def test_public_attention_launches_the_kernels(device, inputs):
    """Small windows take one kernel forward and one backward; for large ones dS is left in memory and read twice."""
    common = {"prepare_kernel": 1, "fold_pairs_kernel": 1}
    expected = {
        "clip": {f"window_attention_{direction}_small_kernel": 1 for direction in ("fwd", "bwd")},
        "large": {f"window_attention_{part}_kernel": 1 for part in ("fwd", "bwd_stats", "bwd_kv", "bwd_q")}
        | {"sum_scores_kernel": 1},
    }
    for case, own in expected.items():
        kernels.reset_launch_counts()
        qkv, table, windows = inputs(case, torch.float32, device)
        attend(qkv.requires_grad_(), table, windows).sum().backward()
        assert kernels.launch_counts() == common | own


@contextmanager
def tiles_of_scores(fwd, bwd_kv, dtype, device, kind):
    """Other options of the kernels that make scores."""
    name = launches.architecture(torch.device(device))
    with ExitStack() as stack:
        for kernel, options in (("fwd", fwd), ("bwd_kv", bwd_kv)):
            stack.enter_context(configs.replaced(name, (kernel, configs.kind(dtype, 16) + kind), options))
        yield


@pytest.mark.parametrize("case", ["large-shifted", "large-cut-in-time", "large-by-number-cut"])
def test_bias_tile_gives_the_bits_of_the_gather(case, device, inputs, check_op, poisoned):
    """And both what the reference gives, with a small tile for the tokens that are left over."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float16
    qkv, table, windows = inputs(case, dtype, device, heads=1)
    options = (
        configs.scores(32, 32, 16, 4, 1, last=16) if device == "cpu" else configs.scores(64, 64, 16, 4, 2, last=16)
    )

    def run():
        leaves = qkv.clone().requires_grad_(), table.clone().requires_grad_()
        out = attend(*leaves, windows)
        return out.detach(), *torch.autograd.grad(out.square().sum(), leaves)

    with (
        tiles_of_scores(options, options, dtype, device, ""),
        tiles_of_scores(None, None, dtype, device, configs.TILED),
    ):
        gathered = run()
        assert "bias_tile_kernel" not in kernels.launch_counts()
        with tiles_of_scores(options, options, dtype, device, configs.TILED):
            assert all(torch.equal(a, b) for a, b in zip(gathered, run(), strict=True))
            assert kernels.launch_counts()["bias_tile_kernel"] == 2
            if case == "large-cut-in-time":
                check_op(attend, reference.window_attention, (qkv, table), windows=windows)


def test_bias_tile_is_made_where_the_table_is_of_the_activations_type_and_it_fits(device, inputs, monkeypatch):
    options = configs.scores(64, 32, 16, 4, 1)
    qkv, table, windows = inputs("large-shifted", torch.float16, device, heads=1)
    with tiles_of_scores(options, options, torch.float16, device, configs.TILED):
        made = []
        for precision, most in ((table, 2**20), (table.float(), 2**20), (table, 2)):
            kernels.reset_launch_counts()
            monkeypatch.setattr(bias, "BIAS_TILE_BYTES", most)
            attend(qkv.requires_grad_(), precision, windows).sum().backward()
            made.append(kernels.launch_counts().get("bias_tile_kernel", 0))
    assert made == [2, 0, 0]


def test_backward_in_parts_of_the_batch(device, inputs, check_op, poisoned, monkeypatch):
    """Where dS of all windows does not fit the memory set aside for it: three windows in parts of two and one."""
    from bevt_ds.kernels import attention_backward

    qkv, table, windows = inputs("large-cut-in-time", torch.float32, device, batch=3, heads=1)
    monkeypatch.setattr(attention_backward, "SCORES_BYTES", 2 * 4 * windows.tokens * windows.score_stride)
    check_op(attend, reference.window_attention, (qkv, table), windows=windows)
    assert kernels.launch_counts()["window_attention_bwd_kv_kernel"] == 2


@pytest.mark.parametrize("case", ["clip-shifted", "large-shifted"])
def test_window_attention_regions_are_isolated(case, device, inputs):
    """Changing one token changes, bitwise, nothing outside its region, forward or backward."""
    qkv, table, windows = inputs(case, torch.float32, device, heads=1)
    grid = tuple(qkv.shape[1:4])
    region = torch.arange(prod(grid)).view(1, *grid, 1)
    together = reference.same_region(grid, windows.window, windows.mask_shift)
    rolled = torch.roll(region, [-s for s in windows.shift], dims=(1, 2, 3))
    numbers = reference.partition(rolled, windows.window)[..., 0]
    window, token = -1, -1
    mine = numbers[window][together[window][token]]
    outside = torch.ones(prod(grid), dtype=torch.bool).index_fill_(0, mine, False)
    assert outside.any()

    def run(qkv):
        qkv = qkv.clone().requires_grad_()
        out = attend(qkv, table, windows)
        (dqkv,) = torch.autograd.grad((out * torch.linspace(0.5, 1.5, out.shape[-1], device=device)).sum(), qkv)
        return out.detach().flatten(0, 3).cpu(), dqkv.flatten(0, 3).cpu()

    changed = qkv.clone()
    changed.view(prod(grid), -1)[numbers[window][token]] += 1000
    for before, after in zip(run(qkv), run(changed), strict=True):
        assert torch.equal(before[outside], after[outside])
        assert not torch.equal(before[mine], after[mine])


@pytest.mark.parametrize("case", ["clip-shifted", "large-cut-in-time", "small-map-by-number"])
def test_window_attention_is_bitwise_repeatable(case, device, inputs):
    """No atomics: equal inputs, equal bits."""
    qkv, table, windows = inputs(case, torch.float32, device, heads=1)

    def run():
        leaves = qkv.clone().requires_grad_(), table.clone().requires_grad_()
        out = attend(*leaves, windows)
        return out.detach(), *torch.autograd.grad(out.square().sum(), leaves)

    first = run()
    for _ in range(100 if device == "cuda" else 1):
        assert all(torch.equal(a, b) for a, b in zip(first, run(), strict=True))


def test_window_attention_shift_equals_rolling_the_input(device, inputs):
    """Unmasked windows shifted by s are unshifted windows of the rolled map."""
    qkv, table, windows = inputs("rolled-unmasked", torch.float32, device)
    rolled = torch.roll(qkv, [-s for s in windows.shift], dims=(1, 2, 3))
    plain = attend(rolled, table, replace(windows, shift=STILL))
    assert torch.equal(torch.roll(plain, windows.shift, dims=(1, 2, 3)), attend(qkv, table, windows))


class Operators(TorchDispatchMode):
    """Names of the operators that run under it."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


def test_attention_block_runs_no_other_operator(device, inputs):
    """From qkv to out and back our two operators alone move data: no roll, no copy, no permute."""
    qkv, table, windows = inputs("clip-shifted", torch.float32, device)
    leaves = qkv.requires_grad_(), table.requires_grad_()
    grad = torch.randn(*qkv.shape[:4], 32, device=device)
    with Operators() as seen:
        out = attend(*leaves, windows)
        torch.autograd.grad(out, leaves, grad)
    ours = [name for name in seen.names if name not in ("aten::detach", "aten::view", "aten::new_empty")]
    assert ours == ["bevt_ds::window_attention", "bevt_ds::window_attention_backward"]


def test_window_attention_registration(device, inputs):
    """Schema, fake tensors and autograd agree with the implementation."""
    from bevt_ds.kernels.attention import backward_op, forward_op

    qkv, table, windows = inputs("clip", torch.float32, device)
    settings = (windows.settings(), 0.25)
    torch.library.opcheck(forward_op, (qkv.requires_grad_(), table.requires_grad_(), *settings))
    with torch.no_grad():
        results = forward_op(qkv, table, *settings)
        tensors = (torch.randn_like(results[0]), qkv.detach(), table.detach(), *results)
    torch.library.opcheck(backward_op, (*tensors, *settings))


def test_window_attention_flop_formula(device, inputs):
    """Forward 4 N d per token and head, backward 2.5 times that."""
    from torch.utils.flop_counter import FlopCounterMode

    qkv, table, windows = inputs("clip", torch.float32, device)
    with FlopCounterMode(display=False) as counter:
        attend(qkv.requires_grad_(), table, windows).sum().backward()
    tokens, heads, d = qkv[..., 0, 0, 0].numel(), 2, 16
    forward = 4 * tokens * prod(windows.window) * heads * d
    assert counter.get_total_flops() == forward * 7 // 2


def test_window_attention_under_compile_and_checkpointing(device, inputs):
    """One graph under torch.compile, and recomputation give the eager gradients bitwise."""
    qkv, table, windows = inputs("clip", torch.float32, device)

    def plain(x, y):
        return attend(x, y, windows).sin()

    def gradients(function):
        leaves = qkv.clone().requires_grad_(), table.clone().requires_grad_()
        return torch.autograd.grad(function(*leaves).sum(), leaves)

    expected = gradients(plain)
    compiled = torch.compile(plain, fullgraph=True, backend="aot_eager")
    recomputed = partial(checkpoint, plain, use_reentrant=False)
    for function in (compiled, recomputed):
        assert all(torch.equal(a, b) for a, b in zip(expected, gradients(function), strict=True))


def test_window_attention_with_a_table_emptied_by_zero3(device, inputs):
    """ZeRO-3 empties a parameter after its module ran, and fills it again before the backward pass."""
    qkv, table, windows = inputs("clip", torch.float32, device)
    expected = torch.nn.Parameter(table.clone())
    attend(qkv, expected, windows).sum().backward()
    parameter = torch.nn.Parameter(table.clone())
    loss = attend(qkv, parameter, windows).sum()
    parameter.data = torch.empty(0, device=device)
    parameter.data = table.clone()
    loss.backward()
    assert torch.equal(parameter.grad, expected.grad)


def test_unsupported_head_width_is_named(device, inputs):
    """Their tiles are for 16 and 32."""
    qkv, table, windows = inputs("clip", torch.float32, device, d=8)
    with pytest.raises(ValueError, match="not 8: use kernels='torch'"):
        attend(qkv, table, windows)
