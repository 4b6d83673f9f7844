"""What a micro-batch keeps for its backward pass: the real model runs on torch's meta device, which computes nothing.

Shapes, lifetimes and operators are those of a GPU, Triton's included; there is no memory behind them. Letters: B
samples, T frames, S pixels a side, K masked cells, R masked output positions, C channels.
"""

from __future__ import annotations

import re
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from bevt_ds.batch import DTYPES, Batch, Stream
from bevt_ds.config.schema import Config, TrainingConfig
from bevt_ds.data.masks import ROW_BUCKET


@dataclass(frozen=True)
class Activations:
    """Bytes of one micro-batch. `saved`: kept at the end of the forward pass, by part of the network, pixels too.

    `peak`: the most that is alive at once in forward and backward pass: what is saved, what is computed again, and
    what an operator works on. A parameter's gradient leaves as soon as it is whole, as under ZeRO.
    """

    saved: dict[str, int]
    peak: int


class Alive(TorchDispatchMode):
    """Inside the block, follows the bytes of every storage that an operator makes, until it is freed.

    Those of `parameters` do not count.
    """

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        super().__init__()
        self.seen = {p.untyped_storage()._cdata for p in parameters}
        self.now = self.peak = 0

    def add(self, storage: torch.UntypedStorage) -> None:
        """Count a storage, once, until it is freed."""
        if storage._cdata not in self.seen:
            self.seen.add(storage._cdata)
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._remove, storage._cdata, storage.nbytes())

    def _remove(self, key: int, size: int) -> None:
        self.seen.discard(key)
        self.now -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in (result,) if isinstance(result, Tensor) else tree_iter(result):
            if isinstance(tensor, Tensor):
                self.add(tensor.untyped_storage())
        return result


@contextmanager
def counting_saved(model: nn.Module) -> Iterator[Counter[str]]:
    """Inside the block, bytes that autograd saves, by part of `model`: each storage once, parameters not at all."""
    saved: Counter[str] = Counter()
    known = {p.untyped_storage()._cdata for p in model.parameters()}
    kept: list[torch.UntypedStorage] = []  # holds on to them, so that no address is taken twice
    where = ["other"]

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in known:
            known.add(storage._cdata)
            kept.append(storage)
            saved[where[-1]] += storage.nbytes()
        return tensor

    handles = []
    for name, module in model.named_modules():
        if part := part_of(name):
            handles.append(module.register_forward_pre_hook(lambda *_, part=part: where.append(part)))
            handles.append(module.register_forward_hook(lambda *_: where.pop() and None))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield saved
    for handle in handles:
        handle.remove()


def part_of(name: str) -> str:
    """The part of the network, for a table, that the module of this name is; empty: a part of a part."""
    if found := re.fullmatch(r"encoder\.layers\.(\d+)(\.downsample)?", name):
        return f"stage {int(found[1]) + 1}"
    names = {"encoder.patch_embed": "stems", "image_embed": "stems", "mask_token": "stems"}
    names |= {"video_decoder": "decoders", "image_decoder": "decoders"}
    return (names | dict.fromkeys(("lm_head", "feature_head", "head"), "logits")).get(name, "")


def trace(model: nn.Module, *inputs: Batch | Tensor) -> Activations:
    """Run a model on the meta device, forward and backward. `inputs` are what its `forward` takes, there too."""
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    with Alive(model.parameters()) as alive, counting_saved(model) as saved:
        for tensor in tensors_of(inputs):
            alive.add(tensor.untyped_storage())
        output = model(*inputs)
        loss = output.float().sum() if isinstance(output, Tensor) else output.loss
        kept = Counter(saved)
        loss.backward()
    return Activations(dict(kept), alive.peak)


def tensors_of(inputs: Sequence[Batch | Tensor]) -> Iterator[Tensor]:
    """Every tensor of a micro-batch."""
    streams = [s for x in inputs if isinstance(x, Batch) for s in (x.video, x.image) if s is not None]
    values = [*inputs, *(value for stream in streams for value in vars(stream).values())]
    return (value for value in values if isinstance(value, Tensor))


def micro_batch(config: TrainingConfig, clips: int, images: int, dim: int = 0) -> tuple[Batch | Tensor, ...]:
    """What the model takes of a run, on the meta device: pixels in the compute dtype, expected numbers of masked cells.

    dim: numbers of a target that is a vector; 0: targets are ids. The tokenizer's view is not in it: it is gone when
    the network runs.
    """
    data, dtype = config.data, DTYPES[config.train.precision]
    with torch.device("meta"):
        keys = torch.empty(clips, dtype=torch.int64)
        if not isinstance(config, Config):
            return torch.empty(clips, 3, data.frames, data.size, data.size, dtype=dtype), keys
        cells = config.data.mask.ratio * (data.size // 16) ** 2
        tube = cells * data.frames / 2 * sum(config.data.mask.tube) / 2
        video = _stream(clips, (data.frames,), data.size, int(clips * tube), dtype, dim) if clips else None
        image = _stream(images, (), data.size, int(images * cells), dtype, dim) if images else None
        return (Batch(video, image),)


def _stream(count: int, frames: tuple[int, ...], size: int, cells: int, dtype: torch.dtype, dim: int) -> Stream:
    """Of clips whose frames go in pairs, or of images, without `frames`. Rows are padded as the loader pads them."""
    grid, time, pair = size // 16, tuple(f // 2 for f in frames), 2 if frames else 1
    rows = torch.empty(-(-cells * pair // ROW_BUCKET) * ROW_BUCKET, dtype=torch.int64)
    return Stream(
        pixels=torch.empty(count, 3, *frames, size, size, dtype=dtype),
        view=torch.empty(0, 3, size // 2, size // 2),
        mask=torch.empty(count, *time, grid, grid, dtype=torch.bool),
        rows=rows,
        cells=torch.empty(len(rows) // pair, dtype=torch.int64),
        token_rows=rows,
        sample_keys=torch.empty(count, dtype=torch.int64),
        count=len(rows),
        targets=torch.empty(len(rows), dim) if dim else rows,
    )
