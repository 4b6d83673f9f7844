"""Two ways from a vector to one of V ids: a codebook that follows the vectors, and a grid that needs none.

Letters: N positions, D numbers of a code, V ids. Everything here is fp32, whatever the network around it computes in.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bevt_ds.errors import UserError

STRETCH = 1e-3  # beyond the outermost levels, so that tanh reaches them


class Quantised(NamedTuple):
    """codes (N,D) have the gradient of the vectors; ids int64 (N,); distance (): how far the vectors are, summed."""

    codes: Tensor
    ids: Tensor
    distance: Tensor


class EMACodebook(nn.Module):
    """The nearest by angle of V unit vectors, each the moving average of the vectors that chose it.

    The averages are van den Oord et al. 2017 (appendix A.1), codes of unit length Yu et al. 2021 (ViT-VQGAN). A code
    that no vector of the global batch has chosen for `patience` steps is put where a vector is; at the beginning every
    code is of that kind, so that the first steps draw the codebook from the data.

    In training `forward` remembers what chose which code, and `update` moves the codes once a step.
    """

    def __init__(self, vocab_size: int, dim: int, decay: float = 0.99, patience: int = 100):
        super().__init__()
        self.vocab_size, self.decay, self.patience = vocab_size, decay, patience
        self.register_buffer("codebook", torch.zeros(vocab_size, dim))
        self.register_buffer("sums", torch.zeros(vocab_size, dim))  # the average of what chose a code, times its share
        self.register_buffer("idle", torch.full((vocab_size,), patience, dtype=torch.int64))  # steps without a vector
        self._pending: list[tuple[Tensor, Tensor]] = []  # vectors and ids of each micro-step
        self.init_weights()

    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Draw the codes again."""
        drawn = torch.empty(self.codebook.shape).normal_(generator=generator)
        self.codebook.copy_(F.normalize(drawn, dim=-1))
        self.sums.copy_(self.codebook)
        self.idle.fill_(self.patience)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> EMACodebook:
        """Keep fp32 where the network is put into another type: averages of 16 bits would not move."""
        before = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            if buffer.is_floating_point():
                setattr(self, name, buffer.to(getattr(self, name).device))
        return self

    def forward(self, vectors: Tensor) -> Quantised:
        """Vectors (N,D), of any length and type."""
        vectors = F.normalize(vectors.float(), dim=-1)
        ids = (vectors.detach() @ self.codebook.T).argmax(-1)
        codes = self.lookup(ids)
        if self.training:
            self._pending.append((vectors.detach(), ids))
        return Quantised(vectors + (codes - vectors).detach(), ids, (vectors - codes).square().sum())

    def lookup(self, ids: Tensor) -> Tensor:
        """Ids, any shape -> their codes, with D behind."""
        return F.embedding(ids, self.codebook)

    @torch.no_grad()
    def update(self, total: Callable[[Tensor], Tensor], rank: int, world: int, seed: int) -> None:
        """Move the codes by what has chosen them since the last call. Collective.

        Args:
            total: the sum of a tensor over all ranks.
            seed: of this step, the same on every rank: which vectors codes are put at.
        """
        vectors, ids = (torch.cat(parts) for parts in zip(*self._pending, strict=True))
        self._pending.clear()
        counts = torch.bincount(ids, minlength=self.vocab_size).float()
        sums = torch.zeros_like(self.sums).index_add_(0, ids, vectors)
        counts, sums = total(counts), total(sums)
        if not torch.isfinite(sums).all():  # the step is skipped too
            return
        self.sums.mul_(self.decay).add_(sums, alpha=1 - self.decay)
        self.idle.add_(1).masked_fill_(counts > 0, 0)
        self._revive(vectors, total, rank, world, seed)
        self.codebook.copy_(F.normalize(self.sums, dim=-1))

    def forget(self) -> None:
        """Drop what has been remembered for `update`."""
        self._pending.clear()

    def _revive(self, vectors: Tensor, total: Callable[[Tensor], Tensor], rank: int, world: int, seed: int) -> None:
        """Put codes that have been idle too long at vectors of the batch, each rank giving its share."""
        dead = (self.idle > self.patience).nonzero().flatten()
        if not len(dead):
            return
        draw = torch.rand(len(dead), generator=torch.Generator().manual_seed(seed)).double() * world
        mine = (draw.long() == rank).to(vectors.device)
        place = ((draw % 1) * len(vectors)).long().to(vectors.device)
        drawn = torch.where(mine[:, None], vectors[place.clamp(max=len(vectors) - 1)], 0)
        self.sums[dead] = total(drawn) * (1 - self.decay)
        self.idle[dead] = 0


class FSQ(nn.Module):
    """Finite scalar quantisation (Mentzer et al. 2023): each number is rounded to one of a few levels; no codebook.

    An id is the number that the levels spell, the first dimension changing fastest. There is nothing to collapse and
    nothing to keep; a code's numbers lie in [-1, 1].
    """

    def __init__(self, levels: Sequence[int]):
        super().__init__()
        if not levels or min(levels) < 2:
            raise UserError(f"levels {tuple(levels)}: every dimension needs at least two")
        self.levels, self.vocab_size = tuple(levels), math.prod(levels)

    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """There is nothing to draw."""

    def forward(self, vectors: Tensor) -> Quantised:
        """Vectors (N,D), D numbers of any size. Their distance is 0: nothing pulls them to their codes."""
        vectors, count = vectors.float(), self._per_dimension(self.levels, vectors)
        half = (count - 1) * (1 + STRETCH) / 2
        offset = (1 - count % 2) * 0.5  # an even number of levels has none at 0
        bounded = torch.tanh(vectors + torch.atanh(offset / half)) * half - offset
        digits = bounded.detach().round() + count // 2
        ids = (digits.long() * self._basis(vectors)).sum(-1)
        codes, smooth = _scaled(digits, count), _scaled(bounded + count // 2, count)
        return Quantised(smooth + (codes - smooth).detach(), ids, vectors.new_zeros(()))

    def lookup(self, ids: Tensor) -> Tensor:
        """Ids, any shape -> their codes, with D behind."""
        count = self._per_dimension(self.levels, ids)
        return _scaled(ids[..., None] // self._basis(ids) % count, count)

    def _basis(self, like: Tensor) -> Tensor:
        return self._per_dimension([math.prod(self.levels[:i]) for i in range(len(self.levels))], like)

    def _per_dimension(self, numbers: Sequence[int], like: Tensor) -> Tensor:
        return torch.tensor(numbers, device=like.device)

    def update(self, total: Callable[[Tensor], Tensor], rank: int, world: int, seed: int) -> None:
        """There is nothing to move."""

    def forget(self) -> None:
        """Nothing has been remembered."""


def _scaled(digits: Tensor, count: Tensor) -> Tensor:
    """Digits from 0 -> numbers in [-1, 1]."""
    half = count // 2
    return (digits - half) / half
