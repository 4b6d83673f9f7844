"""What surrounds a frozen network's convolutions: the kernels against the reference, bit for bit."""

import pytest
import torch

from bevt_ds.kernels import conv_epilogues, launch_counts, reference


def maps(count, channels, dtype, device, height=6, width=4):
    """Channels-last maps of two images."""
    made = (torch.randn(2, channels, height, width, device=device).to(dtype) for _ in range(count))
    return [x.contiguous(memory_format=torch.channels_last) for x in made]


def same(actual, expected):
    """Equal bits and channels-last memory."""
    assert actual.is_contiguous(memory_format=torch.channels_last)
    return actual.dtype == expected.dtype and torch.equal(actual, expected)


@pytest.mark.parametrize("channels", [20, 64, 300])
def test_bias_and_relu_give_the_same_bits(channels, dtype, device, poisoned):
    (h,), bias = maps(1, channels, dtype, device), torch.randn(channels, device=device).to(dtype)
    h[0, 0, 0, 0] = float("nan")
    actual, expected = conv_epilogues.bias_relu(h, bias), reference.bias_relu(h, bias)
    assert actual[0, 0, 0, 0].isnan() and expected[0, 0, 0, 0].isnan()
    assert same(actual.nan_to_num(), expected.nan_to_num())


@pytest.mark.parametrize("pool", [1, 2])
@pytest.mark.parametrize("biased", [False, True], ids=["identity", "convolved"])
def test_residual_sum_gives_the_same_bits(pool, biased, dtype, device, poisoned):
    """The sum, its pooling and its ReLU, from maps in either layout."""
    for channels in (20, 300):
        x, branch = maps(2, channels, dtype, device)
        bias, x_bias = (torch.randn(channels, device=device).to(dtype) for _ in range(2))
        case = (x_bias if biased else None, branch, bias, 1 / 64, pool)
        expected = reference.residual_relu(x, *case)
        for given in (x, x.contiguous()):
            assert all(same(*pair) for pair in zip(conv_epilogues.residual_relu(given, *case), expected, strict=True))
    assert launch_counts() == {"residual_relu_kernel": 4}


@pytest.mark.parametrize("half", [False, True])
def test_pixels_are_scaled_to_the_same_bits(half, device, poisoned):
    """Channels behind the colours are zeros."""
    frames = torch.rand(2, 3, 10, 7, device=device)
    actual = conv_epilogues.scale_pixels(frames, 0.8, 0.1, 8, half)
    assert same(actual, reference.scale_pixels(frames, 0.8, 0.1, 8, half))
    assert not actual[:, 3:].any()


def test_registration_of_convolutions_epilogues(device):
    x, branch = maps(2, 20, torch.float32, device)
    bias = torch.randn(20, device=device)
    torch.library.opcheck(conv_epilogues.bias_relu_op, (x, bias))
    torch.library.opcheck(conv_epilogues.residual_relu_op, (x, None, branch, bias, 0.5, 1))
    torch.library.opcheck(conv_epilogues.residual_relu_op, (x, bias, branch, bias, 0.5, 2))
    torch.library.opcheck(conv_epilogues.scale_pixels_op, (torch.rand(1, 3, 4, 4, device=device), 0.8, 0.1, 8, True))


def test_no_images_give_empty_maps(device):
    x, bias = torch.zeros(0, 20, 4, 4, device=device), torch.zeros(20, device=device)
    assert conv_epilogues.residual_relu(x, None, x, bias, 0.5, 2)[0].shape == (0, 20, 2, 2)
    assert conv_epilogues.bias_relu(x, bias).shape == x.shape
    assert conv_epilogues.scale_pixels(x[:, :3], 1.0, 0.0, 8, False).shape == (0, 8, 4, 4)


def test_epilogues_from_strided_memory_give_the_same_bits(device):
    """Every second value of larger maps and biases."""

    def strided(x):
        return torch.stack([x, x], dim=-1)[..., 0]

    h, bias = torch.randn(2, 20, 4, 6, device=device), torch.randn(20, device=device)
    spread = strided(h), strided(bias)
    assert same(conv_epilogues.bias_relu(*spread), conv_epilogues.bias_relu(h, bias))
    for pair in zip(
        conv_epilogues.residual_relu(*spread, *spread, 0.5, 2),
        conv_epilogues.residual_relu(h, bias, h, bias, 0.5, 2),
        strict=True,
    ):
        assert same(*pair)
    frames = h[:, :3]
    assert same(*(conv_epilogues.scale_pixels(x, 0.8, 0.1, 8, False) for x in (strided(frames), frames)))


def epilogues(wants):
    """(epilogue, its tensors, the rest): tensor number `wants` of each wants a gradient."""
    h, bias = torch.randn(2, 20, 4, 6), torch.randn(20)
    calls = [
        (conv_epilogues.scale_pixels, [h[:, :3]], (0.8, 0.1, 8, True)),
        (conv_epilogues.bias_relu, [h, bias], ()),
        (conv_epilogues.residual_relu, [h, bias, h, bias], (0.5, 2)),
    ]
    for call, tensors, rest in calls:
        if wants < len(tensors):
            tensors[wants] = tensors[wants].clone().requires_grad_()
            yield call, tensors, rest


@pytest.mark.parametrize("wants", range(4))
def test_epilogues_refuse_an_argument_that_wants_a_gradient(wants, device):
    """Their results would pass for constants. Under no_grad they run."""
    found = list(epilogues(wants))
    assert found
    for call, tensors, rest in found:
        for arrange in (torch.Tensor.to, lambda x, _: x.to("meta")):  # at once, and through the dispatcher
            given = [arrange(x, device) for x in tensors]
            with pytest.raises(RuntimeError, match="gives no gradient of an argument that wants one"):
                call(*given, *rest)
            with torch.no_grad():
                call(*given, *rest)


def test_vmap_over_an_epilogue_is_an_error(device):
    for call, tensors, rest in epilogues(0):
        stacked = [torch.stack([x.detach().to(device)] * 2) for x in tensors]
        with pytest.raises(RuntimeError, match="vmap"):
            torch.func.vmap(lambda *x, call=call, rest=rest: call(*x, *rest))(*stacked)
