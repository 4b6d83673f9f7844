"""Targets that are features of a frozen network, in place of ids: what SALT and MVD regress at masked positions.

Letters: B samples, T frames, H W pixels, h = H/16 and w = W/16 the mask grid, F frames or images with a masked cell, R
rows (masked output positions, padded), D features.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bevt_ds.batch import MEAN, STD, Batch, Stream
from bevt_ds.errors import UserError

from .arch import SwinArch
from .frozen import FrozenFeatures
from .frozen_swin import FrozenModel, load_frozen

CELL = 16  # pixels


class Teacher(Protocol):
    """A frozen network that gives a vector for every output position."""

    dim: int

    def rows(self, stream: Stream) -> Tensor:
        """(R,D) at the rows of a stream; at padding rows anything finite."""
        ...

    def describe(self) -> str:
        """Which network it is."""
        ...


class ImageTeacher(nn.Module):
    """A network of timm's, on each frame alone.

    Its last feature map with at least h x w cells is taken, averaged to the mask grid; where it has none so fine, its
    finest, interpolated.

    Args:
        name, weights, seed: see FrozenFeatures.
        size: of the frames, H = W.

    Raises:
        UserError: see FrozenFeatures.
    """

    def __init__(self, name: str, weights: str = "", size: int = 224, seed: int = 0):
        super().__init__()
        self.network = FrozenFeatures(name, weights, seed=seed)
        for key, levels in (("shift", MEAN), ("scale", STD)):  # from normalised pixels to [0,1]
            self.register_buffer(key, torch.tensor(levels).view(3, 1, 1) / 255, persistent=False)
        with torch.no_grad():
            maps = self.network(torch.zeros(1, 3, size, size))
        fine = [i for i, x in enumerate(maps) if x.shape[-1] >= size // CELL]
        self.level = max(fine, default=0)
        self.dim = maps[self.level].shape[1]
        self.network.indices = self.network.indices[: self.level + 1]

    def rows(self, stream: Stream) -> Tensor:
        """See Teacher. Frames without a masked cell are not looked at."""
        grid, number = tuple(stream.mask.shape[-2:]), len(stream.view)
        if not number:
            return stream.pixels.new_zeros((len(stream.rows), self.dim))
        pixels = stream.pixels.movedim(2, 1).flatten(0, 1) if stream.pixels.ndim == 5 else stream.pixels
        # those with a masked cell, in order; their number is known on the host, so that nothing waits for the device
        places = (stream.view_places.flatten() < 0).to(torch.int8).argsort(stable=True)[:number]
        maps = self.network(pixels[places].to(self.scale) * self.scale + self.shift)[self.level].float()
        finer = maps.shape[-1] >= grid[-1]
        maps = F.adaptive_avg_pool2d(maps, grid) if finer else F.interpolate(maps, grid, mode="bilinear")
        return maps.movedim(1, -1).flatten(0, 2).index_select(0, stream.token_rows)

    def describe(self) -> str:
        return self.network.describe()


class SwinTeacher(nn.Module):
    """A Video Swin that sees the whole clip or image, up to its last stage but one, whose cells are those of the mask.

    Args:
        network: is cut off behind that stage.
        source: of its weights.

    Raises:
        UserError: its cells are of another size.
    """

    def __init__(self, network: FrozenModel, source: str):
        super().__init__()
        arch, level = SwinArch.of(network.arch), len(network.arch["depths"]) - 2
        self.source, self.frames, self.dim = source, arch.patch[0], arch.embed_dim << level
        if arch.patch != (2, CELL >> level, CELL >> level):
            raise UserError(
                f"teacher.weights={source} has patches of {arch.patch} and {level + 2} stages: a teacher needs patches"
                f" of 2 frames, and cells of {CELL}x{CELL} pixels in its last stage but one"
            )
        encoder = network.encoder
        encoder.layers, encoder.depths = encoder.layers[: level + 1], encoder.depths[: level + 1]
        encoder.layers[level].downsample = nn.Identity()
        self.network = network

    def train(self, mode: bool = True) -> SwinTeacher:
        """It stays as it is, in evaluation mode."""
        return super().train(False)

    def rows(self, stream: Stream) -> Tensor:
        """See Teacher. The frames of a cell have the same target: the network has one token for both."""
        maps = self.network.stages(stream.pixels)[-1].float()
        if stream.pixels.ndim == 5:
            maps = maps.repeat_interleave(self.frames, 1)
        return maps.flatten(0, 3).index_select(0, stream.rows.clamp(min=0))

    def describe(self) -> str:
        return f"a Video Swin, weights of {self.source}"


def load_teacher(
    name: str = "", weights: str = "", size: int = 224, seed: int = 0, kernels: str = "auto"
) -> ImageTeacher | SwinTeacher:
    """A teacher by its name in timm, or without a name the Video Swin at `weights`.

    Args:
        weights: a file of timm's network, empty for random ones; or what `init_from` takes.
        size: of the frames.
        seed: of random weights.
        kernels: provider of the Video Swin's.

    Raises:
        UserError: neither is given, or what is given does not exist or fit.
    """
    if name:
        return ImageTeacher(name, weights, size, seed)
    if not weights:
        raise UserError("a teacher has a name, of a network of timm's, or weights, of a run of ours")
    if not Path(weights).exists():
        raise UserError(f"teacher.weights={weights}: no such file or folder")
    return SwinTeacher(load_frozen(weights, kernels), weights)


@torch.no_grad()
def with_features(teacher: Teacher, batch: Batch) -> Batch:
    """The batch with `targets` filled in: float32 (R,D), each of mean 0 and variance 1 over its D features."""

    def filled(stream: Stream | None) -> Stream | None:
        if stream is None:
            return None
        return replace(stream, targets=F.layer_norm(teacher.rows(stream).float(), (teacher.dim,)))

    return Batch(filled(batch.video), filled(batch.image))
