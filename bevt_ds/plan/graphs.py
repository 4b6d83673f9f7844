"""What CUDA graphs of the encoder keep: the network runs on the meta device with a stand-in for what captures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_iter

from bevt_ds.batch import Batch
from bevt_ds.runtime.graphs import Captured

from .activations import Alive


class Made(Alive):
    """Follows what is made inside the block alone: a view of what was there before has its memory."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        self.seen |= {x.untyped_storage()._cdata for x in tree_iter((args, kwargs)) if isinstance(x, Tensor)}
        return super().__torch_dispatch__(func, types, args, kwargs)


class Pools:
    """In the place of `Graphs`: runs as written, and counts the bytes that a graph of each call would keep.

    A graph keeps its inputs and the gradients of its outputs, and a pool of memory as large as all that is alive at
    once in both passes; the gradients of its parameters stay in the pool.
    """

    def __init__(self) -> None:
        self.bytes = 0
        self._parameters: list[nn.Parameter] = []

    def __call__(
        self, name: str, function: Callable[..., Sequence[Tensor]], inputs: Sequence[Tensor], module: nn.Module
    ) -> Sequence[Tensor]:
        """function(*inputs)."""
        self._parameters = [p for p in module.parameters() if p.requires_grad]
        captured = Captured(function, inputs, self._parameters, self)
        self.bytes += sum(x.numel() * x.element_size() for x in (*captured.inputs, *captured.gradients))
        return function(*inputs)

    def warm_up(self, run: Callable[[], Any]) -> None:
        """Nothing: there are no libraries on the meta device."""

    def capture(self, *runs: Callable[[], Any]) -> list[tuple[Callable[[], Any], Any]]:
        """Each once, in memory of their own."""
        with Made(self._parameters) as made:
            results = [(run, run()) for run in runs]
        self.bytes += made.peak
        return results


def graph_bytes(model: nn.Module, *inputs: Batch | Tensor) -> int:
    """Of a BEVT or a classifier on the meta device, in training mode; `inputs` are what its `forward` takes, there."""
    pools = Pools()
    model.encoder.replay = pools
    model(*inputs)
    return pools.bytes
