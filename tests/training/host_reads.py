"""What a GPU would make the host wait for, found on a CPU: numbers read out of tensors, and calls of synchronize."""

from __future__ import annotations

import sys
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from torch.utils._python_dispatch import TorchDispatchMode

READS = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.equal.default, torch.ops.aten.nonzero.default)


class HostReads(TorchDispatchMode):
    """`places`: of each read inside the block, the function that asked for it; `operators`: how many ran."""

    def __init__(self) -> None:
        super().__init__()
        self.places: list[str] = []
        self.operators = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        self.operators += not function.is_view
        if function in READS:
            self.places.append(_asker())
        return function(*args, **(kwargs or {}))

    def __enter__(self) -> HostReads:
        self._real = get_accelerator().synchronize
        get_accelerator().synchronize = lambda *_: self.places.append("synchronize")
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        get_accelerator().synchronize = self._real
        super().__exit__(*error)


def _asker() -> str:
    """The innermost function that is neither torch's nor this file's."""
    frame = sys._getframe(1)
    while frame.f_globals["__name__"].startswith(("torch", __name__)):
        frame = frame.f_back
    return frame.f_code.co_name
