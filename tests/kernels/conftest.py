"""Shared by the kernel tests: the device, the tolerance, poisoned memory, and inputs.

Without a GPU the kernels run in Triton's interpreter, which must be chosen before triton is imported.
The interpreter multiplies bfloat16 wrongly, so bfloat16 is tested on a GPU only.
"""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from bevt_ds import kernels

KERNEL_DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * torch.cuda.is_available()


def pytest_generate_tests(metafunc):
    """`dtype` runs over what the kernels compute correctly here."""
    if "dtype" in metafunc.fixturenames:
        metafunc.parametrize("dtype", KERNEL_DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))


@pytest.fixture(scope="session")
def device() -> str:
    """Where kernels run."""
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Every test starts from the same random numbers and counts its own launches."""
    torch.manual_seed(0)
    kernels.reset_launch_counts()


@pytest.fixture
def poisoned(monkeypatch) -> None:
    """Fresh memory is full of NaN, or of the largest integer, so that an element nobody writes is loud."""

    def fill(allocate):
        def poisoning(*args, **kwargs):
            out = allocate(*args, **kwargs)
            bad = float("nan") if out.is_floating_point() else torch.iinfo(out.dtype).max
            return out.fill_(bad)

        return poisoning

    monkeypatch.setattr(torch, "empty", fill(torch.empty))
    monkeypatch.setattr(torch, "empty_like", fill(torch.empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", fill(torch.Tensor.new_empty))


@pytest.fixture(scope="session")
def assert_as_exact():
    """The tolerance: at most `factor` times the error of PyTorch in the same precision, against float64.

    The floor, four roundings of the largest value, is for results that PyTorch happens to get exactly.
    """

    def check(actual, same_precision, exact, factor, name):
        assert actual.shape == exact.shape, name
        assert actual.dtype == same_precision.dtype, name
        floor = 4 * torch.finfo(actual.dtype).eps * exact.abs().max()
        allowed = factor * (same_precision.double() - exact).abs().max() + floor
        error = (actual.double() - exact).abs().max()
        assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g}"

    return check


@pytest.fixture(scope="session")
def check_op(assert_as_exact, device):
    """Runs an op and its gradients three ways, and compares: op against reference in the same precision and in
    float64. `tensors` are the differentiable arguments; `rest` completes the call."""

    def run(function, tensors, grad, rest):
        leaves = [x.detach().clone().requires_grad_() for x in tensors]
        out = function(*leaves, **rest)
        out = out[0] if isinstance(out, tuple) else out
        return out.detach(), torch.autograd.grad(out, leaves, grad.to(out.dtype))

    def check(op, reference, tensors, **rest):
        with torch.no_grad():
            out = reference(*tensors, **rest)
            out = out[0] if isinstance(out, tuple) else out
        grad = torch.randn(out.shape, device=device).to(out.dtype)
        actual = run(op, tensors, grad, rest)
        same = run(reference, tensors, grad, rest)
        exact = run(reference, [x.double() for x in tensors], grad.double(), rest)
        assert_as_exact(actual[0], same[0], exact[0], 2, "output")
        for i, gradients in enumerate(zip(actual[1], same[1], exact[1], strict=True)):
            assert_as_exact(*gradients, 3, f"gradient of argument {i}")

    return check
