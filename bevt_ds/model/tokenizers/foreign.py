"""Image tokenizers of others, as ours: a folder of Hugging Face's transformers, or a TorchScript file as Cosmos'.

What they share: `encode` takes images scaled around 0 and gives, among other things, integers, one for each cell of a
grid. The grid need not be the mask's: see `GridTokenizer`. N frames, v pixels a side, g = v/8 cells a side of the mask.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn

from bevt_ds.errors import UserError

from ..inputs import require_frames

PATCH = 8  # pixels of the view for one cell of the mask
HALF = 0.5
SIZES = ("num_embeddings", "codebook_size", "vocab_size")  # what configurations call the number of ids


class GridTokenizer(nn.Module):
    """Ids on the mask's grid, from a network whose ids lie on a grid of its own.

    Args:
        encode: images (N,3,s,s), scaled by mean and std -> anything with an integer tensor in it: (N,G,G), (N,G*G) or
            (N*G*G,).
        vocab_size: how many ids there are.
        network: where `encode` computes; it is frozen.
        mean, std: of each channel; by default frames lie in [-1,1].
        side: the frames are resized to it; 0: as they are. A network with an id for 16x16 pixels has a grid of 14 for
            side 224, as one for 8x8 has for the view's 112.

    Where G is not g, one of the two must divide the other: of k x k ids of a finer grid the one below and right of
    their centre is taken, and an id of a coarser grid stands for all its cells.
    """

    def __init__(
        self,
        encode: Callable[[Tensor], Any],
        vocab_size: int,
        network: nn.Module,
        mean: tuple[float, ...] = (HALF, HALF, HALF),
        std: tuple[float, ...] = (HALF, HALF, HALF),
        side: int = 0,
    ):
        super().__init__()
        self.vocab_size, self.side, self._encode, self.network = vocab_size, side, encode, network
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1))
        self.requires_grad_(False).eval()

    @torch.no_grad()
    def encode(self, frames: Tensor) -> Tensor:
        """Frames (N,3,v,v), float RGB in [0,1] -> ids (N,g,g), int64. UserError: a grid that does not divide."""
        require_frames(frames, self)
        number, cells = len(frames), frames.shape[-1] // PATCH
        if self.side and self.side != frames.shape[-1]:
            frames = F.interpolate(frames, (self.side, self.side), mode="bicubic", antialias=True).clamp(0, 1)
        ids = as_grid(next(integers(self._encode((frames - self.mean) / self.std)), None), number)
        return fitted(ids, cells)


def integers(output: Any) -> Iterator[Tensor]:
    """The integer tensors in what a network returns: itself, or in tuples, lists and mappings, in their order."""
    if isinstance(output, Tensor):
        if not output.is_floating_point() and output.dtype != torch.bool:
            yield output
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from integers(value)
    elif isinstance(output, tuple | list):
        for value in output:
            yield from integers(value)


def as_grid(ids: Tensor | None, number: int) -> Tensor:
    """Ids of `number` frames, (N,G,G) in any shape -> (N,G,G), int64. UserError: there are none, or no square grid."""
    if ids is None:
        raise UserError("the tokenizer's network gives no integers: it has no ids")
    side = round((ids.numel() / number) ** 0.5)
    if side * side * number != ids.numel():
        raise UserError(f"the tokenizer's network gives ids {tuple(ids.shape)} of {number} frames: no square grid")
    return ids.reshape(number, side, side).long()


def fitted(ids: Tensor, cells: int) -> Tensor:
    """Ids (N,G,G) -> (N,g,g). UserError: neither grid divides the other."""
    side = ids.shape[-1]
    if side % cells == 0:
        k = side // cells
        return rearrange(ids, "n (h a) (w b) -> n h w a b", a=k, b=k)[..., k // 2, k // 2].contiguous()
    if cells % side == 0:
        return repeat(ids, "n h w -> n (h a) (w b)", a=cells // side, b=cells // side)
    raise UserError(
        f"the tokenizer's grid is {side}x{side} and the mask's {cells}x{cells}, and neither divides the other: set"
        f" tokenizer.side to the pixels a side at which it gives {cells}x{cells}"
    )


def from_hugging_face(weights: str | None, side: int = 0) -> GridTokenizer:
    """A folder that `save_pretrained` of transformers wrote, of a class whose `encode` gives ids.

    Nothing is downloaded and no code of the folder is run. mean and std are those of preprocessor_config.json, if any.

    Raises:
        UserError: no such folder, transformers is not installed, or it has no such class.
    """
    folder = Path(weights or "")
    config = _json(folder / "config.json")
    if not weights or not config:
        raise UserError(f"tokenizer.weights={weights or ''}: no folder with a config.json of Hugging Face's")
    try:
        import transformers
    except ImportError as error:
        raise UserError("tokenizer.name=huggingface needs transformers: pip install transformers") from error
    name = (config.get("architectures") or ["?"])[0]
    kind = getattr(transformers, name, None)
    size = next((config[key] for key in SIZES if key in config), None)
    if not hasattr(kind, "encode") or size is None:
        raise UserError(
            f"{folder} holds a {name}, which is no image tokenizer of transformers {transformers.__version__}: it has"
            f" no `encode`, or its config.json none of {', '.join(SIZES)}"
        )
    try:
        network = kind.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"{folder} cannot be read as a {name}: {error}") from error
    values = _json(folder / "preprocessor_config.json")
    scale = {key: tuple(values[f"image_{key}"]) for key in ("mean", "std") if f"image_{key}" in values}
    return GridTokenizer(network.encode, size, network, side=side, **scale)


def from_torchscript(weights: str | None, vocab_size: int, side: int = 0) -> GridTokenizer:
    """A TorchScript file, such as encoder.jit of Cosmos' discrete image tokenizers: images in [-1,1] -> (ids, codes).

    Raises:
        UserError: no such file, or it holds something else.
    """
    if not weights or not Path(weights).is_file():
        raise UserError(f"tokenizer.weights={weights or ''}: no TorchScript file, such as Cosmos' encoder.jit")
    try:
        network = torch.jit.load(weights, map_location="cpu")
    except RuntimeError as error:
        raise UserError(f"{weights} is no TorchScript file: {str(error).splitlines()[0]}") from error
    return GridTokenizer(network, vocab_size, network, side=side)


def _json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty where there is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
