"""A CUDA stream of the loader's own, and what CUDA's allocator must know of what is made on it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from bevt_ds.batch import Batch, LabelledBatch, Stream


class SideStream:
    """A CUDA stream on which batches for a GPU are made, next to what the training step computes.

    Without it what the loader's thread starts would go to the stream on which the training step computes: each would
    wait for all that the other has started.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)

    @contextmanager
    def context(self) -> Iterator[None]:
        """What the block starts on the GPU is done when the block ends."""
        with torch.cuda.stream(self._stream):
            yield
            self._stream.synchronize()


def record_stream(batch: Batch | Stream | LabelledBatch) -> None:
    """Tell CUDA's allocator that the caller's stream uses the tensors of a batch, or of its streams.

    They were made on another stream, for which their memory would be free again as soon as nothing refers to them.
    """
    for value in vars(batch).values():
        if isinstance(value, Stream):
            record_stream(value)
        elif isinstance(value, torch.Tensor) and value.is_cuda:
            value.record_stream(torch.cuda.current_stream(value.device))
