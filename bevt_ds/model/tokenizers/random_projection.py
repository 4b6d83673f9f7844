"""A tokenizer without weights: a fixed random projection and a fixed random codebook.

The idea is BEST-RQ's (Chiu et al. 2022, for speech), here on patches of images. Letters: N images, v pixels a side.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from bevt_ds.errors import UserError
from bevt_ds.rng import Use, generator

from ..inputs import require_frames

POOL = 2  # pixels averaged along each axis first: finer detail is mostly the codec's noise
PATCH = 4  # averages a patch has along each axis: 8 pixels of the view, 16 of the network's, one mask cell
DIM = 16  # BEST-RQ's codebook dimension
COLOUR = 0.5  # weight of a patch's mean colour, which otherwise decides most ids alone
FLAT = 1e-2  # pixel deviations below this are noise, not contrast


class RandomProjectionTokenizer(nn.Module):
    """Nearest code, by angle, of a patch's random projection. The same seed gives the same ids on any machine."""

    def __init__(self, vocab_size: int = 8192, seed: int = 0):
        super().__init__()
        if vocab_size < 2:
            raise UserError(f"tokenizer.vocab_size={vocab_size}: a codebook needs at least two codes")
        self.vocab_size = vocab_size
        draw = generator(seed, Use.TOKENIZER)
        projection = draw.standard_normal((3 * PATCH * PATCH, DIM), dtype=np.float32)
        codebook = draw.standard_normal((vocab_size, DIM), dtype=np.float32)
        self.register_buffer("projection", torch.from_numpy(projection))
        self.register_buffer("codebook", F.normalize(torch.from_numpy(codebook), dim=-1))

    def encode(self, frames: Tensor) -> Tensor:
        """Frames (N,3,v,v), float RGB in [0,1] -> ids (N,v/8,v/8), int64. Raises UserError for others: see `inputs`."""
        require_frames(frames, self)
        return self(frames)

    def forward(self, frames: Tensor) -> Tensor:
        """`encode`, as a module that can be compiled.

        An image's brightness and contrast are taken out first; then each patch is its mean colour and what differs
        from it.
        """
        mean, deviation = frames.mean((2, 3), keepdim=True), frames.std((1, 2, 3), keepdim=True)
        x = F.avg_pool2d((frames - mean) / (deviation + FLAT), POOL)
        patches = rearrange(x, "n c (h ph) (w pw) -> n h w c (ph pw)", ph=PATCH, pw=PATCH)
        patches = patches - (1 - COLOUR) * patches.mean(-1, keepdim=True)
        return (patches.flatten(3) @ self.projection @ self.codebook.T).argmax(-1)
