"""Shared by the kernel tests: the device, the tolerance, poisoned memory, and inputs.

Without a GPU the kernels run in Triton's interpreter, which multiplies bfloat16 wrongly: that is tested on a GPU only.
"""

import pytest
import torch

from bevt_ds import kernels

STILL = (0, 0, 0)
# grid, window, table_window, shift, mask_shift: BEVT's combinations in small, and awkward remainders; True: the bias
# goes by a token's number
CASES = {
    "clip": ((2, 4, 6), (2, 4, 3), (2, 4, 3), STILL, STILL),
    "clip-shifted": ((2, 8, 6), (2, 4, 3), (2, 4, 3), (0, 2, 1), (0, 2, 1)),
    "long-clip-shifted": ((4, 4, 4), (2, 2, 2), (2, 2, 2), (1, 1, 1), (1, 1, 1)),
    "long-clip-last-stage": ((4, 3, 3), (2, 3, 3), (2, 3, 3), (1, 0, 0), (1, 0, 0)),
    "short-clip": ((1, 4, 4), (1, 2, 2), (3, 2, 2), STILL, STILL),
    "window-below-table": ((2, 2, 3), (2, 2, 3), (3, 4, 5), STILL, STILL),
    "image-official-unshifted": ((1, 6, 6), (1, 3, 3), (4, 3, 3), STILL, (0, 1, 1)),
    "image-official-last-stage": ((1, 7, 7), (1, 7, 7), (2, 7, 7), (0, 3, 3), (0, 3, 3)),
    "rolled-unmasked": ((1, 4, 6), (1, 2, 3), (1, 2, 3), (0, 1, 2), STILL),
    "rolled-and-cut-elsewhere": ((2, 4, 4), (2, 4, 4), (2, 4, 4), (1, 1, 2), (0, 2, 1)),
    "large": ((2, 7, 7), (2, 7, 7), (2, 7, 7), STILL, STILL),
    "large-shifted": ((2, 7, 14), (2, 7, 7), (3, 7, 7), (0, 0, 3), (0, 0, 3)),
    "large-cut-in-time": ((5, 4, 4), (5, 4, 4), (5, 4, 4), STILL, (2, 0, 0)),
    "large-rolled": ((1, 9, 9), (1, 9, 9), (1, 9, 9), (0, 4, 2), STILL),
    "small-map-by-number": ((2, 3, 3), (2, 3, 3), (2, 4, 5), STILL, STILL, True),
    "small-map-by-number-shifted": ((4, 3, 4), (2, 3, 2), (3, 4, 3), (1, 0, 1), (1, 0, 1), True),
    "large-by-number-cut": ((4, 6, 5), (4, 6, 5), (4, 7, 7), STILL, (2, 0, 0), True),
}

KERNEL_DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * torch.cuda.is_available()


def pytest_generate_tests(metafunc):
    """`dtype` runs over what the kernels compute correctly here, `every_case` over the geometries."""
    if "dtype" in metafunc.fixturenames:
        metafunc.parametrize("dtype", KERNEL_DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
    if "every_case" in metafunc.fixturenames:
        metafunc.parametrize("every_case", CASES)


@pytest.fixture(scope="session")
def device() -> str:
    """Where kernels run."""
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Every test starts from the same random numbers and counts its own launches."""
    torch.manual_seed(0)
    kernels.reset_launch_counts()


@pytest.fixture(scope="session")
def inputs():
    """Makes the arguments of window_attention for a case."""

    def make(case, dtype, device, batch=1, heads=2, d=16):
        """qkv, table and the windows of a case."""
        windows = kernels.Windows(*CASES[case])
        qkv = torch.randn(batch, *windows.grid, 3, heads, d, device=device).to(dtype)
        table = torch.randn(windows.table_rows, heads, device=device).to(dtype)
        return qkv, table, windows

    return make


@pytest.fixture
def poisoned(monkeypatch) -> None:
    """Fresh memory is full of NaN, or of the largest integer, so that an element no one writes is loud."""

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
