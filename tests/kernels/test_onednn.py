"""Linear layers by oneDNN: torch's own results in float32, and torch's own code wherever they would not be."""

import pytest
import torch
import torch.nn.functional as F

from bevt_ds import kernels
from bevt_ds.kernels import onednn


@pytest.fixture
def slow_mkl(monkeypatch):
    """Whatever this machine's CPU is, it counts as one on which oneDNN is faster."""
    if not torch.backends.mkldnn.is_available():
        pytest.skip("this torch comes without oneDNN")
    monkeypatch.setattr(onednn, "_mkl_is_slow", lambda: True)


@pytest.mark.parametrize("shape", [(7, 5, 24), (5, 24), (3, 2, 4, 4, 24)], ids=str)
@pytest.mark.parametrize("outputs", [8, 72], ids=["narrower", "wider"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_values_and_gradients(slow_mkl, shape, outputs, bias):
    """Against float64: at most four times torch's own float32 error and a rounding of the largest value."""
    torch.manual_seed(0)
    x, weight, offset = torch.randn(shape), torch.randn(outputs, 24), torch.randn(outputs)
    grad = torch.randn(*shape[:-1], outputs)

    def results(function, dtype):
        leaves = [t.to(dtype).requires_grad_() for t in (x, weight, offset)[: 2 + bias]]
        out = function(*leaves)
        return out.detach(), *torch.autograd.grad(out, leaves, grad.to(dtype))

    assert onednn.uses_onednn(x, weight)
    ways = (kernels.linear, x.dtype), (F.linear, x.dtype), (F.linear, torch.float64)
    for ours, same, exact in zip(*(results(*way) for way in ways), strict=True):
        allowed = 4 * (same - exact).abs().max() + torch.finfo(x.dtype).eps * exact.abs().max()
        assert (ours - exact).abs().max() <= allowed


def test_strided_input_and_partial_gradients(slow_mkl):
    """A slice along the tokens, as windows that were padded leave it; frozen weights want no gradient."""
    torch.manual_seed(0)
    wide = torch.randn(2, 6, 8, requires_grad=True)
    weight, bias = torch.randn(16, 8), torch.randn(16)
    out = kernels.linear(wide[:, 1:5], weight, bias)
    torch.testing.assert_close(out, F.linear(wide[:, 1:5], weight, bias))
    (grad,) = torch.autograd.grad(out.sum(), wide)
    torch.testing.assert_close(grad[:, 1:5], weight.sum(0).expand(2, 4, 8))
    assert not grad[:, (0, 5)].any()


def test_strided_weights(slow_mkl):
    """Weight and bias may be slices, transposes and broadcasts of others."""
    torch.manual_seed(0)
    x, wide = torch.randn(5, 8), torch.randn(32, 9)
    bias = torch.randn(16, 2)[:, 1]
    for weight in (wide[::2, 1:], torch.randn(8, 16).t(), torch.randn(1, 8).expand(16, 8)):
        torch.testing.assert_close(kernels.linear(x, weight, bias), F.linear(x, weight, bias))
    torch.testing.assert_close(kernels.linear(x, wide[:16, :8], bias[:1].expand(16)), x @ wide[:16, :8].T + bias[0])


def test_torch_does_the_rest(slow_mkl):
    """Other types, autocast, nothing at all, and what the user switched off."""
    x, weight = torch.randn(4, 8), torch.randn(6, 8)
    assert onednn.uses_onednn(x, weight)
    assert not onednn.uses_onednn(x.double(), weight.double())
    assert not onednn.uses_onednn(x.bfloat16(), weight.bfloat16())
    assert not onednn.uses_onednn(x[:0], weight)
    assert kernels.linear(x[:0], weight).shape == (0, 6)
    assert kernels.linear(x[0], weight).shape == (6,)
    with torch.autocast("cpu", torch.bfloat16):
        assert not onednn.uses_onednn(x, weight)
        assert kernels.linear(x, weight).dtype == torch.bfloat16
    with torch.backends.mkldnn.flags(enabled=False):
        assert not onednn.uses_onednn(x, weight)


def test_intel_keeps_torchs_choice(monkeypatch, tmp_path):
    """The rule looks at the CPU's maker alone, so that the same machine always computes alike."""
    about = tmp_path / "cpuinfo"
    monkeypatch.setattr(onednn, "Path", lambda _: about)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    for maker, slow in (("GenuineIntel", False), ("AuthenticAMD", True)):
        about.write_text(f"vendor_id\t: {maker}\n")
        assert onednn._mkl_is_slow.__wrapped__() is slow
