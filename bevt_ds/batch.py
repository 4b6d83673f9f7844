"""What one micro-step trains on: plain tensors, made by the data side, read by the model.

Shape letters: B samples, T frames, H W pixels, K masked cells of the micro-batch (padded), R their output positions
(2K for clips, whose cells span two frames; K for images), F frames, or images, that hold a masked cell, h = H/16 and
w = W/16 the mask grid, v = H/2 the side of the tokenizer's image, S the side of a square crop.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from bevt_ds.errors import UserError

IGNORE = -100  # the target of a padding row
MEAN = (123.675, 116.28, 103.53)  # of 8-bit RGB: pixels are (level - MEAN) / STD (PT configuration of the original)
STD = (58.395, 57.12, 57.375)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}  # by the name of a precision
Part = TypeVar("Part", "Stream", "LabelledBatch")


@dataclass(frozen=True)
class Stream:
    """One modality of a micro-batch: clips or images.

    The index tensors are built on the host, so that nothing on the device depends on how many cells are masked.
    """

    pixels: Tensor  # clips (B,3,T,H,W), images (B,3,H,W); float, normalised RGB
    view: Tensor  # (F,3,v,v): the tokenizer's images of the same crops, in order; float RGB in [0,1]
    mask: Tensor  # bool, True = masked: clips (B,T/2,h,w), images (B,h,w)
    rows: Tensor  # int64 (R,): masked positions in the flattened output, (B,T,h,w) or (B,h,w), cell by cell; -1 pads
    cells: Tensor  # int64 (K,): masked cells in the flattened mask; -1 pads. A cell's frames are side by side in rows
    token_rows: Tensor  # int64 (R,): where each row's id lies in the flattened ids (F,h,w); 0 for padding
    sample_keys: Tensor  # int64 (B,): bevt_ds.rng.sample_key of each sample
    count: int  # masked cells of this modality in the GLOBAL batch: the loss's denominator
    targets: Tensor | None = (
        None  # int64 (R,): token ids, IGNORE for padding; or float (R,D): features. Filled in later
    )
    keys: tuple[str, ...] = ()  # "shard/key" of each sample

    def __post_init__(self) -> None:
        """UserError: rows that are not those of the cells. Checked on the host only, where they are made."""
        if self.rows.device.type != "cpu":
            return
        plane, frames = self.mask.shape[-2:].numel(), len(self.rows) // max(len(self.cells), 1)
        first = self.cells // plane * (frames * plane) + self.cells % plane
        rows = first[:, None] + plane * torch.arange(frames)
        if not torch.equal(self.rows, torch.where(self.cells[:, None] < 0, -1, rows).flatten()):
            raise UserError("Stream.rows must hold all frames of a masked cell side by side, in the order of its cells")

    @property
    def view_places(self) -> Tensor:
        """int64 (B,T) or (B,1): where each frame, or image, lies in `view`; -1: it has no masked cell and no view."""
        plane = self.mask.shape[-2:].numel()
        masked = self.mask.reshape(len(self.mask), -1, plane).any(-1)
        frames = self.pixels.shape[2] if self.pixels.ndim == 5 else 1
        masked = masked.repeat_interleave(frames // masked.shape[1], 1)
        return (masked.flatten().cumsum(0).view_as(masked) - 1).masked_fill(~masked, -1)

    def with_pixels(self, pixels: Tensor, view: Tensor) -> Stream:
        """The same stream with other pixels; its rows, which have been checked, are not looked at again."""
        made = copy(self)
        vars(made).update(pixels=pixels, view=view)
        return made

    def only(self, samples: Sequence[int]) -> Stream:
        """The same stream with these of its samples alone, on the host. `view` and `count` stay as they are."""
        cells_each, places = self.mask[0].numel(), {sample: i for i, sample in enumerate(samples)}
        moved = torch.full((len(self.mask),), -1)
        moved[list(places)] = torch.tensor(list(places.values()))
        owner = torch.where(self.cells < 0, 0, self.cells // cells_each)
        kept = (self.cells >= 0) & (moved[owner] >= 0)
        shift = (moved[owner] - owner)[kept]  # in samples
        cells, frames = self.cells[kept] + shift * cells_each, len(self.rows) // max(len(self.cells), 1)
        by_cell = lambda rows: rows.unflatten(0, (-1, frames))[kept] if len(self.cells) else rows[:, None]  # noqa: E731
        rows = by_cell(self.rows) + shift[:, None] * cells_each * frames
        chosen = {"pixels": self.pixels, "mask": self.mask, "sample_keys": self.sample_keys}
        return replace(
            self,
            **{name: value[list(samples)] for name, value in chosen.items()},
            rows=rows.flatten(),
            cells=cells,
            token_rows=by_cell(self.token_rows).flatten(),
            targets=None if self.targets is None else by_cell(self.targets).flatten(0, 1),
            keys=tuple(self.keys[i] for i in samples) if self.keys else (),
        )

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Stream:
        """The same stream with every tensor on `device`."""
        return _moved([self], device, non_blocking)[0]


@dataclass(frozen=True)
class Batch:
    """One micro-batch. Either stream may be absent: stage 1 is the same program with no clips."""

    video: Stream | None
    image: Stream | None

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """The same batch with every tensor on `device`. The index tensors of both streams go there in one copy."""
        moved = iter(_moved([s for s in (self.video, self.image) if s is not None], device, non_blocking))
        return Batch(*(None if s is None else next(moved) for s in (self.video, self.image)))

    def cast(self, dtype: torch.dtype) -> Batch:
        """The same batch with the network's pixels in `dtype`; the tokenizer's view keeps its own."""
        cast = lambda s: None if s is None else replace(s, pixels=s.pixels.to(dtype))  # noqa: E731
        return Batch(cast(self.video), cast(self.image))


@dataclass(frozen=True)
class LabelledBatch:
    """Videos and their classes: a micro-batch of a fine-tuning step, or all views of a few videos.

    V views: clips along time, and of each its crops; the crop changes fastest.
    """

    pixels: Tensor  # training: clips (B,3,T,S,S); testing: views (B,V,3,T,S,S); float, normalised RGB
    labels: Tensor  # int64 (B,); -1: padding, or a video that cannot be read
    sample_keys: Tensor  # int64 (B,): bevt_ds.rng.sample_key of each sample
    keys: tuple[str, ...]  # "shard/key" of each sample; "" where the label is -1
    count: int  # samples in the GLOBAL batch: the loss's denominator

    def to(self, device: torch.device | str, non_blocking: bool = False) -> LabelledBatch:
        """The same batch with every tensor on `device`."""
        return _moved([self], device, non_blocking)[0]

    def only(self, samples: Sequence[int]) -> LabelledBatch:
        """The same batch with these of its samples alone; `count` stays as it is."""
        chosen = {"pixels": self.pixels, "labels": self.labels, "sample_keys": self.sample_keys}
        keys = tuple(self.keys[i] for i in samples)
        return replace(self, **{name: value[list(samples)] for name, value in chosen.items()}, keys=keys)

    def cast(self, dtype: torch.dtype) -> LabelledBatch:
        """The same batch with its pixels in `dtype`."""
        return replace(self, pixels=self.pixels.to(dtype))


def denormalised(pixels: Tensor) -> np.ndarray:
    """What a clip (3,T,H,W) or an image (3,H,W) looked like before it was normalised: (T,H,W,3) in [0,1], T = 1."""
    levels = rearrange(pixels.float().cpu().view(3, -1, *pixels.shape[-2:]), "c t h w -> t h w c").numpy()
    return (levels * np.float32(STD) + np.float32(MEAN)) / 255


def _moved(parts: Sequence[Part], device: torch.device | str, non_blocking: bool) -> list[Part]:
    """The streams or batches with every tensor on `device`; index tensors leave the host together."""
    device = torch.device(device)
    tensors = [value for part in parts for value in vars(part).values() if isinstance(value, Tensor)]
    leaving = [t for t in tensors if t.device.type == "cpu" != device.type and not t.is_floating_point()]
    sent = _sent_together(leaving, device, non_blocking) if leaving else {}

    def there(tensor: Tensor) -> Tensor:
        return sent[id(tensor)] if id(tensor) in sent else tensor.to(device, non_blocking=non_blocking)

    return [
        replace(part, **{name: there(value) for name, value in vars(part).items() if isinstance(value, Tensor)})
        for part in parts
    ]


def _sent_together(tensors: Sequence[Tensor], device: torch.device, non_blocking: bool) -> dict[int, Tensor]:
    """{id of a host tensor: the same on `device`}: views of one buffer, page-locked for a GPU, that is copied once.

    Alone each of them is some KB, and a copy of that costs what starting it does.
    """
    tensors = sorted(tensors, key=lambda t: t.itemsize, reverse=True)  # each starts at a multiple of its item's size
    sizes = [t.nbytes for t in tensors]
    buffer = torch.empty(sum(sizes), dtype=torch.uint8, pin_memory=device.type == "cuda")
    torch.cat([t.flatten().view(torch.uint8) for t in tensors], out=buffer)
    places = buffer.to(device, non_blocking=non_blocking).split(sizes)
    return {id(t): place.view(t.dtype).view(t.shape) for t, place in zip(tensors, places, strict=True)}
