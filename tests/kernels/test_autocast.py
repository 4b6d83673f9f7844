"""Under autocast on a GPU, outputs have the dtypes of PyTorch's own functions. Fake tensors show it without a GPU."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from bevt_ds import kernels
from bevt_ds.kernels import ops

HALF, SINGLE = torch.bfloat16, torch.float32
SHAPE = (2, 3, 8)


@contextmanager
def autocast_on_a_gpu() -> Iterator[None]:
    """What `torch.autocast("cuda", torch.bfloat16)` sets; it refuses where there is no GPU."""
    before = torch.get_autocast_dtype("cuda")
    torch.set_autocast_enabled("cuda", True)
    torch.set_autocast_dtype("cuda", HALF)
    try:
        yield
    finally:
        torch.set_autocast_enabled("cuda", False)
        torch.set_autocast_dtype("cuda", before)


@pytest.fixture(params=["triton", "torch"])
def provider(request, monkeypatch) -> str:
    """On a GPU that is said to be there."""
    monkeypatch.setattr(ops, "resolve", lambda provider, device: provider)
    return request.param


@pytest.mark.parametrize("scaled", [False, True])
def test_norms_under_autocast_have_the_dtypes_of_layer_norm(provider, scaled):
    for x_dtype, branch_dtype in product((HALF, SINGLE), repeat=2):
        with FakeTensorMode(), autocast_on_a_gpu():
            x, branch = (torch.empty(SHAPE, dtype=d, device="cuda") for d in (x_dtype, branch_dtype))
            weight = torch.empty(8, device="cuda")
            scale = torch.empty(2, device="cuda") if scaled else None
            norm = partial(F.layer_norm, normalized_shape=(8,), weight=weight, bias=weight)
            total, normed = kernels.add_norm(x, branch, scale, weight, weight, provider=provider)
            assert total.dtype == (x + branch).dtype
            assert normed.dtype == norm(total).dtype == SINGLE
            assert kernels.layer_norm(x, weight, weight, provider=provider).dtype == norm(x).dtype
            behind = kernels.norm_add(x, branch, scale, weight, weight, provider=provider)
            assert behind.dtype == (x + norm(branch)).dtype == SINGLE
            assert kernels.linear_gelu(x, torch.empty(4, 8, device="cuda"), weight[:4], provider).dtype == HALF


def test_norms_without_autocast_keep_the_dtype(provider):
    with FakeTensorMode():
        x, weight = torch.empty(SHAPE, dtype=HALF, device="cuda"), torch.empty(8, dtype=HALF, device="cuda")
        total, normed = kernels.add_norm(x, x, None, weight, weight, provider=provider)
        behind = kernels.norm_add(x, x, None, weight, weight, provider=provider)
        plain = kernels.layer_norm(x, weight, weight, provider=provider)
    assert {t.dtype for t in (total, normed, behind, plain)} == {HALF}
