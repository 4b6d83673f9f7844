"""Maps of more than 2^31 values: what each kernel reads and writes at their far end.

The memory is mapped and, but for the ends, never touched; in the interpreter only the last program of a launch runs.
"""

import math

import pytest
import torch

from bevt_ds import kernels
from bevt_ds.kernels import (
    attention,
    attention_backward,
    bias_gelu,
    configs,
    conv_epilogues,
    launches,
    mask_tokens,
    norms,
    reference,
)

HALF, FAR = torch.float16, 2**31
WHOLE = ("prepare_kernel", "gather_kernel")  # small launches that the others' results come from
SUMS = ("sum_scores_kernel", "fold_pairs_kernel")  # over all windows: nothing large is addressed


@pytest.fixture(autouse=True)
def last_programs(monkeypatch, device):
    """On a GPU launches run as they are."""
    if device == "cuda":
        return
    from triton.runtime import interpreter

    builder = interpreter.interpreter_builder
    monkeypatch.setattr(interpreter.GridExecutor, "_restore_args_dev", lambda *_: None)  # it copies all of the memory

    def again(launch):
        name = launch.kernel.fn.__name__
        if name in WHOLE:
            launch.kernel[launch.grid](*launch.args, **launch.options)
        elif name not in SUMS:
            sizes = (*launch.grid, 1, 1)[:3]
            with monkeypatch.context() as patch:
                patch.setattr(builder, "set_grid_dim", lambda *_: setattr(builder, "grid_dim", sizes))
                patch.setattr(builder, "set_grid_idx", lambda *_: setattr(builder, "grid_idx", [n - 1 for n in sizes]))
                launch.kernel[(1,)](*launch.args, **launch.options)

    monkeypatch.setattr(launches.Launch, "again", again)


def far(*shape, device):
    """Memory for a map, and what its last rows hold."""
    x = torch.empty(shape, dtype=HALF, device=device)
    assert x.numel() > FAR
    tail = torch.randn(*([1] * (len(shape) - 2)), 8, shape[-1], device=device).to(HALF)
    x[tuple(slice(-n, None) for n in tail.shape)] = tail
    return x


def close(actual, expected):
    torch.testing.assert_close(actual.float(), expected.float(), rtol=2e-3, atol=2e-3)


def test_norms_reach_the_end_of_a_map(device):
    rows, channels = 250 * configs.PROGRAMS, configs.NORM_CHANNELS
    x, branch, dtotal = (far(rows, channels, device=device) for _ in range(3))
    weight, bias = (torch.randn(channels, device=device).to(HALF) for _ in range(2))
    scale = torch.full((rows,), 0.5, device=device)
    total, normed, stats = norms.launch_add_norm(x, branch, scale, weight, bias, 1e-5, False)
    end = [t[-1:].float().requires_grad_() for t in (x, branch)]
    expected = reference.add_norm(*end, scale[-1:], weight.float(), bias.float(), 1e-5)
    close(total[-1:], expected[0])
    close(normed[-1:], expected[1])
    del normed
    dvalue, dbranch, _ = norms.launch_add_norm_backward(dtotal, branch, total, scale, weight, stats)
    gradients = torch.autograd.grad(expected, end, [dtotal[-1:].float(), branch[-1:].float()])
    close(dvalue[-1:], gradients[0])
    close(dbranch[-1:], gradients[1])
    close(norms.launch_add_scaled(x, branch, scale)[-1], x[-1] + 0.5 * branch[-1])


def test_gelu_reaches_the_end_of_a_map(device):
    h, bias = far(520, 2**22, device=device), torch.randn(2**22, device=device).to(HALF)
    h[-1, -8:] = torch.arange(-4, 4)
    out = bias_gelu.launch_bias_gelu(h, bias)
    u = (h[-1, -8:].float() + bias[-8:].float()).requires_grad_()
    expected = torch.nn.functional.gelu(u)
    close(out[-1, -8:], expected)
    dh, _ = bias_gelu.launch_bias_gelu_backward(h, h, bias)
    close(dh[-1, -8:], torch.autograd.grad(expected, u, h[-1, -8:].float())[0])


def test_mask_tokens_and_gather_reach_the_end_of_a_map(device):
    x, token = far(1, 1, 4 * configs.PROGRAMS, 2048, 512, device=device), torch.randn(512, device=device).to(HALF)
    mask = torch.zeros(1, 1, 4 * configs.PROGRAMS, 1024, dtype=torch.bool, device=device)
    mask[..., -1, -2] = True
    out = mask_tokens.launch_insert(x, token, mask)
    expected = x[0, 0, -1, -8:].clone()
    expected[-4:-2] = token
    assert torch.equal(out[0, 0, -1, -8:], expected)
    dx, _ = mask_tokens.launch_insert_backward(x, mask)
    expected[-4:-2] = 0
    assert torch.equal(dx[0, 0, -1, -8:], expected)

    features = x.view(-1, 512)
    index = torch.tensor([len(features) - 1, -1, len(features) - 3], device=device)
    taken = mask_tokens.launch_gather(features, index)
    assert torch.equal(taken, torch.stack([features[-1], torch.zeros_like(token), features[-3]]))
    grid, tile = mask_tokens.blocks(len(index), 512)
    launches.launch(mask_tokens.scatter_kernel, grid, taken, index, dx, len(index), **tile)
    assert torch.equal(dx.view(-1, 512)[[-1, -3]], taken[[0, 2]])


def test_epilogues_reach_the_end_of_a_map(device):
    """The last program has the last 256 channels."""
    x = far(1, 1024, 1026, 2048, device=device).permute(0, 3, 1, 2)
    bias = torch.randn(2048, device=device).to(HALF)
    end = x[:, -256:, -2:, -2:], bias[-256:]
    found = [conv_epilogues.launch_bias_relu(x, bias), *conv_epilogues.launch_residual_relu(x, None, x, bias, 0.5, 2)]
    expected = [reference.bias_relu(*end), *reference.residual_relu(end[0], None, *end, 0.5, 2)]
    for actual, same in zip(found, expected, strict=True):
        assert torch.equal(actual[0, -256:, -1, -1], same[0, :, -1, -1])


@pytest.mark.parametrize("side", [8, 9], ids=["one tile", "many tiles"])
def test_attention_reaches_the_end_of_a_batch(side, device, monkeypatch):
    if side == 8:  # 11 windows for each program
        monkeypatch.setattr(configs, "SMALL_PROGRAMS", {"fwd_small": 2**15, "bwd_small": 2**15})
    window, still, heads = (1, side, side), (0, 0, 0), 2
    windows = kernels.Windows((1, 8 * side, 8 * side), window, window, still, still)
    batch = 256 * math.ceil(FAR / (256 * 64 * side * side * 3 * heads * 32))
    qkv = torch.empty(batch, *windows.grid, 3, heads, 32, dtype=HALF, device=device)
    dout = torch.empty(batch, *windows.grid, heads * 32, dtype=HALF, device=device)
    assert qkv.numel() > FAR
    for x in (qkv, dout):
        x[-1] = torch.randn(x.shape[1:], device=device).to(HALF)
    table = torch.randn(windows.table_rows, heads, device=device)
    out, lse, *tables = attention.launch_forward(qkv, table, windows, 0.2)
    dqkv, _ = attention_backward.launch_backward(dout, qkv, *tables, out, lse, windows, 0.2, table.dtype)

    def last(x):  # window of the last head
        return x[-1:, :, -side:, -side:, ..., -32:].float()

    one = last(qkv)[..., -1:, :].requires_grad_()
    expected = reference.window_attention(
        one, table[:, -1:], kernels.Windows(window, window, window, still, still), 0.2
    )
    close(last(out), expected)
    close(last(dqkv)[..., -1:, :], torch.autograd.grad(expected, one, last(dout))[0])
