"""Moving a micro-batch to the device: one copy of all index tensors, none on a CPU."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.step_batch import resident_batch
from bevt_ds.batch import Batch, LabelledBatch, Stream, _sent_together


class Copies(TorchDispatchMode):
    """The tensors that are copied to another device inside the block."""

    def __init__(self) -> None:
        super().__init__()
        self.copied: list[Tensor] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if function is torch.ops.aten._to_copy.default:
            self.copied.append(args[0])
        return function(*args, **(kwargs or {}))


def tensors(*parts: Stream | LabelledBatch) -> Iterator[tuple[str, Tensor]]:
    for part in parts:
        yield from ((f.name, v) for f in fields(part) if isinstance(v := getattr(part, f.name), Tensor))


@pytest.fixture(scope="module")
def batch() -> Batch:
    return resident_batch(2, 3, 4, 64)


def on_device(stream: Stream) -> Stream:
    """As the loader delivers to a GPU: images there, index tensors on the host; `meta` stands for the GPU."""
    return replace(stream, pixels=stream.pixels.to("meta"), view=stream.view.to("meta"))


def test_index_tensors_reach_the_device_in_one_copy(batch: Batch) -> None:
    delivered = Batch(on_device(batch.video), on_device(batch.image))
    with Copies() as copies:
        moved = delivered.to("meta", non_blocking=True)
    index = [t for _, t in tensors(batch.video, batch.image) if not t.is_floating_point()]
    assert len(index) == 10
    assert [t.nbytes for t in copies.copied] == [sum(t.nbytes for t in index)]
    for (name, ours), (_, original) in zip(
        tensors(moved.video, moved.image), tensors(batch.video, batch.image), strict=True
    ):
        assert (ours.shape, ours.dtype, ours.device.type) == (original.shape, original.dtype, "meta"), name
    assert moved.video.pixels is delivered.video.pixels
    assert (moved.video.count, moved.image.count) == (batch.video.count, batch.image.count)


def test_copy_to_device_of_one_stream_and_of_labelled_clips(batch: Batch) -> None:
    labelled = LabelledBatch(
        torch.zeros(2, 3, device="meta"), torch.tensor([4, -1]), torch.tensor([7, 8]), ("a", ""), 2
    )
    for part in (on_device(batch.video), labelled, Batch(None, on_device(batch.image))):
        with Copies() as copies:
            part.to("meta")
        assert len(copies.copied) == 1
    assert Batch(None, batch.image).to("meta").video is None


def test_batch_is_not_copied_on_a_cpu(batch: Batch) -> None:
    with Copies() as copies:
        same = batch.to("cpu", non_blocking=True)
    assert copies.copied == []
    pairs = zip(tensors(same.video, same.image), tensors(batch.video, batch.image), strict=True)
    assert all(ours is original for (_, ours), (_, original) in pairs)


def test_copy_to_device_keeps_values_and_dtypes(batch: Batch) -> None:
    """A buffer on the host stands for the device's; int64 must lie aligned behind any number of bools."""
    index = [t for _, t in tensors(batch.video, batch.image) if not t.is_floating_point()]
    odd = [torch.tensor([True, False, True]), torch.empty(0, dtype=torch.int64), torch.arange(6).view(2, 3).t()]
    everything = [*odd, *index]
    sent = _sent_together(everything, torch.device("cpu"), non_blocking=True)
    for original in everything:
        ours = sent[id(original)]
        assert torch.equal(ours, original) and ours.dtype == original.dtype
    assert len({t.untyped_storage().data_ptr() for t in sent.values()}) == 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_batch_values_on_a_gpu(batch: Batch) -> None:
    moved = batch.to("cuda", non_blocking=True)
    for (name, ours), (_, original) in zip(
        tensors(moved.video, moved.image), tensors(batch.video, batch.image), strict=True
    ):
        assert ours.is_cuda and torch.equal(ours.cpu(), original), name
