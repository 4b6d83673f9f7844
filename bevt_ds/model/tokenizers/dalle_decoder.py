"""The decoder of OpenAI's DALL-E dVAE: ids to the frames that they stand for. Pretraining does not need it.

Source of the architecture: openai/DALL-E@5be4b23, dall_e/decoder.py and dall_e/utils.py. N frames, V ids.
"""

from __future__ import annotations

from pathlib import Path
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bevt_ds.errors import UserError

from .dalle import GROUPS, Block, Conv, DalleTokenizer, first_size, read_state, take, unmap_pixels

CHANNELS = 3
SIDES = (1, 3, 3, 3)  # of the convolutions of a block: the encoder's the other way round
PARTS = 2  # of the output: location and scale of each channel's distribution; only the first is shown
PART, KEY = "decoder", "tokenizer.decoder"


class DalleDecoder(nn.Module):
    """Frozen dVAE decoder, in fp32 on every device; the original has half precision on a GPU."""

    def __init__(self, n_hid: int = 256, n_init: int = 128, vocab_size: int = 8192):
        super().__init__()
        self.vocab_size = vocab_size
        widths = [n_init, *(n_hid << g for g in reversed(range(GROUPS)))]
        blocks = {"input": Conv(vocab_size, n_init, 1)}
        for g in range(1, GROUPS + 1):
            pair = Block(widths[g - 1], widths[g], SIDES), Block(widths[g], widths[g], SIDES)
            blocks[f"group_{g}"] = nn.ModuleDict({f"block_{i}": b for i, b in enumerate(pair, 1)})
        blocks["output"] = nn.ModuleDict({"conv": Conv(n_hid, PARTS * CHANNELS, 1)})
        self.blocks = nn.ModuleDict(blocks)
        self.requires_grad_(False).eval()

    @classmethod
    def from_file(cls, path: str | Path) -> Self:
        """Read OpenAI's decoder.pkl, without running anything in it, or a .safetensors file with the same names.

        Raises UserError for a file that is missing or holds anything else.
        """
        state = read_state(Path(path), PART, KEY)
        n_hid = first_size(path, PART, state, f"blocks.group_{GROUPS}.block_1.res_path.conv_4.w")
        n_init, vocab_size = (first_size(path, PART, state, "blocks.input.w", axis) for axis in (0, 1))
        with torch.device("meta"):
            model = cls(n_hid, n_init, vocab_size)
        return take(model, path, PART, state)

    @torch.no_grad()
    def forward(self, ids: Tensor) -> Tensor:
        """Ids (N,h,w), int64 -> frames (N,3,8h,8w), fp32 RGB in [0,1]."""
        first = self.blocks["input"]
        x = F.embedding(ids, first.w[:, :, 0, 0].T).movedim(-1, 1) + first.b[:, None, None]  # of a one-hot input
        for g in range(1, GROUPS + 1):
            for block in self.blocks[f"group_{g}"].values():
                x = block(x)
            if g < GROUPS:
                x = F.interpolate(x, scale_factor=2, mode="nearest")
        return unmap_pixels(self.blocks["output"]["conv"](x.relu())[:, :CHANNELS].sigmoid())


class DalleAutoencoder(DalleTokenizer):
    """The tokenizer with the decoder: `encode` is the same, and `decode` shows what ids stand for."""

    decoder: DalleDecoder

    @classmethod
    def from_files(cls, encoder: str | Path, decoder: str | Path) -> Self:
        """Read both parts; see `from_file` of each. UserError: also where their vocabularies differ."""
        model, part = cls.from_file(encoder), DalleDecoder.from_file(decoder)
        if model.vocab_size != part.vocab_size:
            raise UserError(
                f"{encoder} has {model.vocab_size:,} ids and {decoder} {part.vocab_size:,}: they are not of one dVAE"
            )
        model.decoder = part
        return model

    def decode(self, ids: Tensor) -> Tensor:
        """Ids (N,h,w), int64 in [0,V) -> frames (N,3,8h,8w), fp32 RGB in [0,1]. UserError: other ids."""
        require_ids(ids, self.vocab_size)
        return self.decoder(ids)


def require_ids(ids: Tensor, vocab_size: int) -> None:
    """Refuse what a decoder does not take. UserError: another type or shape, or ids that there are not."""
    if ids.ndim != 3 or ids.dtype != torch.int64:
        raise UserError(f"ids are {ids.dtype} of shape {tuple(ids.shape)}: they must be int64 (N,h,w)")
    if ids.numel() and not ids.is_meta and not (int(ids.min()) >= 0 and int(ids.max()) < vocab_size):
        raise UserError(f"ids reach from {int(ids.min())} to {int(ids.max())}: there are 0 to {vocab_size - 1}")
