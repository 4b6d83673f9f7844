"""What the public methods of models and tokenizers take: shapes and types at every call, the values once.

Shapes and types cost nothing and hold under torch.compile. Values are read at a module's first call, and at every call
outside training for tensors in host memory: on a GPU reading them waits for the device, so that no later call does.

Shape letters as in `bevt_ds.batch`: B samples, T frames, H W pixels, h w the mask's grid, N frames of v x v pixels.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bevt_ds.batch import Batch, Stream
from bevt_ds.errors import UserError

NORMALISED = "normalised RGB, (level - MEAN) / STD of levels 0 to 255, as load_clip and load_image give it"
FAR = 10.0  # levels of 0 to 255 lie between -2.2 and 2.7 once they are normalised


@dataclass(frozen=True)
class Kind:
    """One kind of pixels: its name in messages, its shape, and what its values are."""

    name: str
    axes: tuple[str, ...]
    values: str

    @property
    def shape(self) -> str:
        """As messages write it: (B,3,T,H,W)."""
        return f"({','.join(self.axes)})"


CLIPS = Kind("clip", ("B", "3", "T", "H", "W"), NORMALISED)
IMAGES = Kind("image", ("B", "3", "H", "W"), NORMALISED)
FRAMES = Kind("frames", ("N", "3", "v", "v"), "RGB between 0 and 1")


def require_pixels(pixels: Any, kind: Kind) -> None:
    """Refuse what is no float tensor of the kind's shape.

    Raises:
        UserError: says what was given, what is wanted, and where it can be told how to get there.
    """
    wanted = f"{kind.name} must be a float tensor {kind.shape} of {kind.values}"
    if not isinstance(pixels, Tensor):
        raise UserError(f"{kind.name} is {_named(pixels)}: {wanted}.")
    if pixels.ndim != len(kind.axes) or pixels.shape[1] != 3:
        raise UserError(f"{kind.name} has the shape {tuple(pixels.shape)}: {wanted}{_remedy(pixels.shape, kind)}.")
    if not pixels.is_floating_point():
        raise UserError(f"{kind.name} holds {_dtype(pixels)}: {wanted}.")
    if 0 in pixels.shape[2:]:
        raise UserError(f"{kind.name} has the shape {tuple(pixels.shape)}, which holds no pixel: {wanted}.")


def require_multiples(pixels: Tensor, frames: int, side: int, needs: str) -> None:
    """Refuse clips, images or frames whose height and width are no multiple of `side`, or clips' length of `frames`."""
    height, width = pixels.shape[-2:]
    if height % side or width % side:
        raise UserError(f"frames of {height}x{width} pixels: {needs} needs multiples of {side}.")
    if pixels.ndim == 5 and pixels.shape[2] % frames:
        raise UserError(f"clips of {pixels.shape[2]} frames: {needs} needs a multiple of {frames}.")


def require_mask(mask: Any, shape: Sequence[int]) -> None:
    """Refuse a mask that is not bool or not of this shape, (B,t,h,w) or (B,h,w)."""
    wanted = f"mask must be a bool tensor {tuple(shape)}, True = masked: a cell is 16x16 pixels of 1 image or 2 frames"
    if not isinstance(mask, Tensor):
        raise UserError(f"mask is {_named(mask)}: {wanted}.")
    if mask.dtype != torch.bool:
        raise UserError(f"mask holds {_dtype(mask)}: {wanted}; mask.bool() makes one.")
    if tuple(mask.shape) != tuple(shape):
        raise UserError(f"mask has the shape {tuple(mask.shape)}: {wanted}.")


def require_keys(keys: Any, size: int) -> None:
    """Refuse sample keys that are not an int64 for each of `size` samples. None is allowed."""
    if keys is None:
        return
    if not isinstance(keys, Tensor) or keys.dtype != torch.int64 or tuple(keys.shape) != (size,):
        given = f"{_dtype(keys)} {tuple(keys.shape)}" if isinstance(keys, Tensor) else _named(keys)
        raise UserError(f"sample_keys is {given}: it must be an int64 tensor ({size},), or None.")


def require_batch(batch: Any, dim: int = 0) -> None:
    """Refuse what is no Batch with a stream, or has one without targets or with pixels of another shape.

    dim: numbers of a target that is a vector; 0: targets are ids.
    """
    if not isinstance(batch, Batch):
        raise UserError(f"batch is {_named(batch)}: it must be a bevt_ds.Batch; forward_video takes tensors.")
    if batch.video is None and batch.image is None:
        raise UserError("batch has neither video nor image: give at least one Stream.")
    for stream, kind in ((batch.video, CLIPS), (batch.image, IMAGES)):
        if stream is not None:
            _require_stream(stream, kind)
            _require_targets(stream, dim)


def look_at_values(pixels: Tensor, kind: Kind, module: nn.Module) -> None:
    """Read the values of pixels that passed `require_pixels`, where it is time to: see above.

    Raises:
        UserError: normalised pixels are far from any that levels of 0 to 255 give, or frames far from 0 to 1.
    """
    seen = getattr(module, "pixels_seen", False) and (module.training or not pixels.is_cpu)
    if torch.compiler.is_compiling() or seen or type(pixels) is not Tensor or pixels.is_meta or not pixels.numel():
        return
    if pixels.is_cuda and torch.cuda.is_current_stream_capturing():
        return
    low, high = (value.item() for value in pixels.detach().aminmax())
    extent = f"{kind.name} has values from {low:.4g} to {high:.4g}"
    if kind is FRAMES and (low < -0.5 or high > 1.5):
        raise UserError(f"{extent}: a tokenizer takes {kind.values}; levels of 0 to 255 must be divided by 255.")
    if kind is not FRAMES and max(-low, high) > FAR:
        raise UserError(f"{extent}: it must hold {kind.values}.")
    if kind is not FRAMES and low >= 0 and 0 < high <= 1:
        warnings.warn(f"{extent}, as if it were RGB between 0 and 1: it must hold {kind.values}.", stacklevel=3)
    module.pixels_seen = True


def require_frames(frames: Any, tokenizer: nn.Module) -> None:
    """Refuse frames that a tokenizer of 8x8 patches does not take, by shape, type and range."""
    require_pixels(frames, FRAMES)
    require_multiples(frames, 1, 8, "a tokenizer")
    look_at_values(frames, FRAMES, tokenizer)


def _require_stream(stream: Any, kind: Kind) -> None:
    if not isinstance(stream, Stream):
        raise UserError(f"batch has {_named(stream)} as a stream: it must be a bevt_ds.Stream or None.")
    require_pixels(stream.pixels, kind)
    if stream.targets is None:
        raise UserError("batch has no targets yet: fill them with bevt_ds.model.tokenizers.tokenize(tokenizer, batch).")


def _require_targets(stream: Stream, dim: int) -> None:
    targets, wanted = stream.targets, (len(stream.rows), dim) if dim else (len(stream.rows),)
    if tuple(targets.shape) != wanted or targets.is_floating_point() != bool(dim):
        how = "with_features(teacher, batch)" if dim else "tokenize(tokenizer, batch)"
        raise UserError(
            f"targets are {_dtype(targets)} {tuple(targets.shape)}: this BEVT predicts {'features' if dim else 'ids'},"
            f" {wanted}; {how} fills them in."
        )


def _remedy(shape: torch.Size, kind: Kind) -> str:
    """What to do with pixels of this shape, as the end of a sentence; empty where it cannot be told."""
    axes, name = len(kind.axes), kind.name
    if len(shape) == axes - 1 and shape[0] == 3:
        return f"; {name}[None] makes a batch of one"
    if kind is FRAMES and len(shape) == 5 and shape[1] == 3:
        return f"; {name}.movedim(2, 1).flatten(0, 1) takes the frames out of clips"
    if len(shape) != axes:
        return ""
    if shape[2] == 3 and axes == 5:
        return f"; {name}.movedim(2, 1) puts channels before time"
    return f"; {name}.movedim(-1, 1) puts channels second" if shape[-1] == 3 else ""


def _dtype(value: Tensor) -> str:
    return str(value.dtype).removeprefix("torch.")


def _named(value: Any) -> str:
    return "None" if value is None else f"a {type(value).__name__}"
