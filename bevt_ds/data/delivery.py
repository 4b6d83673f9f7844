"""Batches on their way to a GPU: made on a stream of their own, beside what the training step computes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


class Aside:
    """The CUDA stream of a thread that makes batches for `device`; on a CPU there is none.

    Without it what that thread starts would go to the stream on which the training step computes: each would wait for
    all that the other has started.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    @contextmanager
    def making(self) -> Iterator[None]:
        """What the block starts on the GPU is done when the block ends."""
        if self._stream is None:
            yield
            return
        with torch.cuda.stream(self._stream):
            yield
            self._stream.synchronize()


def used_here(*parts: Any) -> None:
    """Tell CUDA's allocator that the caller's stream uses the tensors of these streams or batches, or None.

    They were made on another stream, for which their memory would be free again as soon as nothing refers to them.
    """
    for part in parts:
        for value in vars(part).values() if part is not None else ():
            if isinstance(value, Tensor) and value.is_cuda:
                value.record_stream(torch.cuda.current_stream(value.device))
