"""How operators are called: directly where no one looks on, through torch's dispatcher where someone does."""

from contextlib import contextmanager

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bevt_ds import kernels
from bevt_ds.kernels import geometry

OPERATORS = ("window_attention", "insert_mask_tokens", "gather_masked", "masked_cross_entropy")


def calls(device, inputs):
    """Per operator: a function of its differentiable arguments, which returns one tensor, and the arguments."""
    qkv, table, windows = inputs("clip-shifted", torch.float32, device)
    x, token = torch.randn(2, 2, 6, 4, 16, device=device), torch.randn(16, device=device)
    mask = torch.rand(2, 2, 3, 2, device=device) < 0.5
    rows, index = torch.randn(9, 16, device=device), torch.tensor([4, -1, 0, 8], device=device)
    head = [torch.randn(*n, device=device) for n in ((4, 16), (9, 16), (9,))]
    target = torch.tensor([1, 8, -100, 3], device=device)
    made = (
        (lambda *leaves: kernels.window_attention(*leaves, windows, provider="triton"), [qkv, table]),
        (lambda *leaves: kernels.insert_mask_tokens(*leaves, mask, provider="triton"), [x, token]),
        (lambda *leaves: kernels.gather_masked(*leaves, index, provider="triton"), [rows]),
        (lambda *leaves: kernels.masked_cross_entropy(*leaves, target, (2, 2), provider="triton")[0], head),
    )
    leaves = ([tensor.requires_grad_() for tensor in tensors] for _, tensors in made)
    return {name: (op, own) for name, (op, _), own in zip(OPERATORS, made, leaves, strict=True)}


class Seen(TorchDispatchMode):
    """The project's operators that the dispatcher runs."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "bevt_ds":
            self.names.append(func.name().partition("::")[2])
        return func(*args, **(kwargs or {}))


@contextmanager
def entered():
    """The calls into custom operators while it lasts, as torch.library makes them: of each, its name."""
    seen, real = [], torch._library.custom_ops.CustomOpDef.__call__

    def call(op, *args, **kwargs):
        seen.append(op._name)
        return real(op, *args, **kwargs)

    torch._library.custom_ops.CustomOpDef.__call__ = call
    try:
        yield seen
    finally:
        torch._library.custom_ops.CustomOpDef.__call__ = real


@pytest.mark.parametrize("name", OPERATORS)
def test_both_ways_of_a_call_give_equal_bits(name, device, inputs):
    """Directly no custom operator is entered; under a dispatch mode forward and backward are seen as operators."""
    op, leaves = calls(device, inputs)[name]

    def run():
        out = op(*leaves)
        return out.detach(), *torch.autograd.grad(out.square().sum(), leaves)

    with entered() as inside:
        direct = run()
    assert inside == []
    with entered() as inside, Seen() as seen:
        dispatched = run()
    assert len(seen.names) == 2
    assert seen.names == inside
    assert seen.names[0] == name
    assert all(torch.equal(a, b) for a, b in zip(direct, dispatched, strict=True))


@pytest.mark.parametrize("name", OPERATORS)
def test_second_derivative_is_refused_under_a_dispatch_mode_too(name, device, inputs):
    """Directly: see test_edge_cases."""
    op, leaves = calls(device, inputs)[name]
    with Seen():
        gradient = torch.autograd.grad(op(*leaves).sum(), leaves, create_graph=True)[0]
    with pytest.raises(RuntimeError, match=f"kernels.{name} has no second derivative"):
        torch.autograd.grad(gradient.sum(), leaves, allow_unused=True)


def test_forward_and_backward_prepare_the_table_once(device, inputs):
    """The backward pass reads what the forward pass prepared; without a gradient it is prepared once too."""
    op, leaves = calls(device, inputs)["window_attention"]
    op(*leaves).sum().backward()
    assert kernels.launch_counts()["prepare_kernel"] == 1
    with torch.no_grad():
        op(*leaves)
    assert kernels.launch_counts()["prepare_kernel"] == 2


def test_a_geometry_is_checked_and_derived_once(device, inputs, monkeypatch):
    """Later calls of the same geometry, forward and backward, make no new one."""
    op, leaves = calls(device, inputs)["window_attention"]
    op(*leaves).sum().backward()
    monkeypatch.setattr(geometry.Windows, "_check_axis", lambda *_: pytest.fail("the geometry was made again"))
    op(*leaves).sum().backward()


def test_memory_kept_for_the_backward_pass_is_the_same_both_ways(device, inputs):
    """A direct call keeps what the operator keeps, and an empty tensor."""
    for name, (op, leaves) in calls(device, inputs).items():
        kept = []
        for mode in (None, Seen()):
            sizes = []
            with torch.autograd.graph.saved_tensors_hooks(
                lambda t, sizes=sizes: sizes.append(t.untyped_storage().nbytes()) or t, lambda t: t
            ):
                if mode:
                    with mode:
                        op(*leaves)
                else:
                    op(*leaves)
            kept.append(sum(sizes))
        assert kept[0] == kept[1] > 0, name
