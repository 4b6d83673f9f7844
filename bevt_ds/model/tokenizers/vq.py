"""A tokenizer that is trained here: convolutions to one code for 8x8 pixels, and back.

The idea is PeCo's (Dong et al. 2021): reconstruct frames as a frozen network sees them, so that an id stands for what a
patch shows rather than for its exact pixels. train/tokenizing.py trains it; perceptual.py is the frozen network.
Letters: N frames, v pixels a side, h = w = v/8, D numbers of a code, V ids.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from bevt_ds.errors import UserError
from bevt_ds.folders import weights_of

from ..inputs import require_frames
from ..weights import CONFIG, TENSORS, PretrainedMixin
from .dalle_decoder import require_ids
from .quantise import FSQ, EMACodebook

STAGES = 3  # each halves the side: 8 pixels a code
GROUP = 8  # channels that a norm takes together


class VQOutput(NamedTuple):
    """frames (N,3,v,v), the reconstruction around [0,1]; ids int64 (N,h,w); distance (): see Quantised."""

    frames: Tensor
    ids: Tensor
    distance: Tensor


class Residual(nn.Module):
    """Two convolutions of 3x3 around the identity, a norm and SiLU before each."""

    def __init__(self, width: int):
        super().__init__()
        self.norm1, self.norm2 = (nn.GroupNorm(width // GROUP, width) for _ in range(2))
        self.conv1, self.conv2 = (nn.Conv2d(width, width, 3, padding=1) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        """(N,C,H,W) -> the same shape."""
        return x + self.conv2(F.silu(self.norm2(self.conv1(F.silu(self.norm1(x))))))


class VQTokenizer(PretrainedMixin, nn.Module):
    """Encoder, quantiser and decoder. `forward` is for training, `encode` and `decode` are the tokenizer.

    Args:
        width: channels at half the side; twice as many at each of the next two halvings.
        blocks: residual blocks after each halving, and as many on the way back.
        code_dim: D, of the codebook.
        codes: V, of the codebook.
        levels: of finite scalar quantisation, which then takes the codebook's place; its D is their number.
        decay, patience: of the codebook, see EMACodebook.
    """

    def __init__(
        self,
        *,
        width: int = 128,
        blocks: int = 2,
        code_dim: int = 32,
        codes: int = 8192,
        levels: tuple[int, ...] = (),
        decay: float = 0.99,
        patience: int = 100,
    ):
        super().__init__()
        if width < GROUP or width % GROUP:
            raise UserError(f"width={width}: must be a multiple of {GROUP}")
        self.arch = {"width": width, "blocks": blocks, "code_dim": code_dim, "codes": codes, "levels": list(levels)}
        self.arch |= {"decay": decay, "patience": patience}
        self.quantiser = FSQ(levels) if levels else EMACodebook(codes, code_dim, decay, patience)
        self.vocab_size = self.quantiser.vocab_size
        dim, widths = len(levels) or code_dim, [width << i for i in range(STAGES)]
        halved = [nn.Conv2d(a, b, 4, stride=2, padding=1) for a, b in zip([3, *widths], widths, strict=False)]
        down = [[conv, *_residuals(conv.out_channels, blocks)] for conv in halved]
        self.encoder = nn.Sequential(*sum(down, []), *_end(widths[-1], dim, 1))
        doubled = [nn.Conv2d(b, 4 * a, 3, padding=1) for a, b in zip([3, *widths], widths, strict=False)]
        up = [[*_residuals(conv.in_channels, blocks), conv, nn.PixelShuffle(2)] for conv in reversed(doubled)]
        self.decoder = nn.Sequential(nn.Conv2d(dim, widths[-1], 3, padding=1), *sum(up, []))

    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Draw all weights and codes again: He's for convolutions, small ones where a residual block ends."""
        ends = {id(m.conv2) for m in self.modules() if isinstance(m, Residual)}
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                fan = module.weight[0].numel()
                nn.init.normal_(
                    module.weight, std=(0.1 if id(module) in ends else 1.0) * fan**-0.5, generator=generator
                )
                nn.init.zeros_(module.bias)
        self.quantiser.init_weights(generator)

    @classmethod
    def from_folder(cls, path: str | Path) -> Self:
        """Frozen, as a tokenizer: from a run's folder, a checkpoint's, or a folder of weights.

        Raises:
            UserError: no such folder, or it holds something else.
        """
        folder = weights_of(path, "tokenizer.weights")
        try:
            config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
            state = load_file(folder / TENSORS)
        except (OSError, ValueError, SafetensorError) as error:
            raise UserError(f"{folder} is no trained tokenizer: {error}") from error
        if config.get("model") != cls.__name__:
            raise UserError(f"{folder} is no trained tokenizer: it holds a {config.get('model', 'network of others')}")
        model = cls(**config["arch"])
        model.take(state, folder)
        return model.requires_grad_(False).eval()

    def take(self, state: dict[str, Tensor], source: Path) -> None:
        """Copy these tensors. UserError: they are of another network."""
        own = self.state_dict()
        odd = sorted(own.keys() ^ state.keys()) or [n for n in own if own[n].shape != state[n].shape]
        if odd:
            raise UserError(f"{source} is a tokenizer of other sizes: {len(odd)} tensors differ, {odd[0]} among them")
        self.load_state_dict(state)

    def forward(self, frames: Tensor) -> VQOutput:
        """Frames (N,3,v,v), RGB in [0,1] -> their reconstruction through ids, with a gradient."""
        vectors = self._vectors(frames)
        quantised = self.quantiser(vectors.flatten(0, 2))
        codes = quantised.codes.view(vectors.shape).movedim(-1, 1)
        frames = self._frames(codes.to(vectors.dtype))
        return VQOutput(frames, quantised.ids.view(vectors.shape[:3]), quantised.distance)

    @torch.no_grad()
    def encode(self, frames: Tensor) -> Tensor:
        """Frames (N,3,v,v), float RGB in [0,1] -> ids (N,h,w), int64. UserError: see `inputs`."""
        require_frames(frames, self)
        vectors = self._vectors(frames)
        return self.quantiser(vectors.flatten(0, 2)).ids.view(vectors.shape[:3])

    @torch.no_grad()
    def decode(self, ids: Tensor) -> Tensor:
        """Ids (N,h,w), int64 in [0,V) -> frames (N,3,8h,8w), float RGB in [0,1]. UserError: other ids."""
        require_ids(ids, self.vocab_size)
        codes = self.quantiser.lookup(ids).movedim(-1, 1)
        return self._frames(codes).clamp(0, 1)

    def _vectors(self, frames: Tensor) -> Tensor:
        return self.encoder(2 * frames - 1).movedim(1, -1)

    def _frames(self, codes: Tensor) -> Tensor:
        return (self.decoder(codes) + 1) / 2


def _residuals(width: int, blocks: int) -> list[nn.Module]:
    return [Residual(width) for _ in range(blocks)]


def _end(width: int, out: int, size: int) -> list[nn.Module]:
    return [nn.GroupNorm(width // GROUP, width), nn.SiLU(), nn.Conv2d(width, out, size, padding=size // 2)]


def build(weights: str | None, **options: Any) -> VQTokenizer:
    """What `load_tokenizer("vq", weights)` calls."""
    if not weights:
        raise UserError("the vq tokenizer needs tokenizer.weights: the folder of a run of bevt_ds/train_tokenizer.py")
    return VQTokenizer.from_folder(weights, **options)
