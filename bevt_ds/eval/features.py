"""Features of a frozen encoder: extracted once, kept in memory where they were made, and measures of them.

Letters: n videos of this rank, N videos of all ranks, V views of a video, T tokens, C channels, K classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from bevt_ds.batch import LabelledBatch
from bevt_ds.errors import UserError
from bevt_ds.runtime.distributed import Ranks

Encode = Callable[[Tensor], Tensor]  # clips (B*V,3,T,H,W) -> features (B*V,T,C), or pooled (B*V,C)


@dataclass(frozen=True)
class Features:
    """This rank's share of a split's features, on the CPU; the split is the same however it is spread over ranks."""

    values: Tensor  # (n,T,C), or pooled (n,C)
    labels: Tensor  # int64 (n,)
    places: Tensor  # int64 (n,): where each video stands among the N of all ranks, in the order of their keys
    total: int  # N


def features_of(encoder: nn.Module, dtype: torch.dtype, kind: str) -> Encode:
    """Clips -> what a probe of this kind takes: all tokens of the last stage (B,T,C), or their mean (B,C)."""

    def tokens(clips: Tensor) -> Tensor:
        return rearrange(encoder.forward_features(clips.to(dtype)), "b c t h w -> b (t h w) c")

    return tokens if kind == "attentive" else lambda clips: pooled(tokens(clips))


def extract(encode: Encode, batches: Iterable[LabelledBatch], ranks: Ranks, most_bytes: int) -> Features:
    """Encode the first view of every video once; padding and unreadable videos are left out. Collective.

    Raises:
        UserError: no video at all, or a rank's features would take more memory than `most_bytes`.
    """
    values, labels, keys, size = [], [], [], 0
    with torch.no_grad():
        for batch in batches:
            real = batch.labels >= 0
            kept = encode(batch.pixels[:, 0])[real].cpu()
            size += kept.numel() * kept.element_size()
            _require_room(size, most_bytes, len(keys) + len(kept), ranks)
            values.append(kept)
            labels.append(batch.labels[real].cpu())
            keys += [key for key in batch.keys if key]
    everyone = sorted((key, r, i) for r, theirs in enumerate(ranks.gather(keys)) for i, key in enumerate(theirs))
    if not everyone:
        raise UserError("no labelled video of the probe can be read: `bevt shards check` says why.")
    place_of = {entry: place for place, entry in enumerate(everyone)}
    places = torch.tensor([place_of[key, ranks.rank, i] for i, key in enumerate(keys)], dtype=torch.int64)
    return Features(torch.cat(values), torch.cat(labels), places, len(everyone))


def gathered(features: Features, ranks: Ranks) -> Features:
    """The features of all ranks on every rank, in the order of their places. Collective."""
    parts = ranks.gather((features.values, features.labels, features.places))
    values, labels, places = (torch.cat(column) for column in zip(*parts, strict=True))
    order = places.argsort()
    return Features(values[order], labels[order], places[order], features.total)


def pooled(tokens: Tensor) -> Tensor:
    """The mean over tokens: (B,T,C) -> float32 (B,C)."""
    return tokens.float().mean(1)


def feature_rank(values: Tensor) -> float:
    """The effective rank of features (N,C): exp of the entropy of their normalised singular values.

    1 where all features point the same way, min(N,C) where all directions are used alike. RankMe of Garrido et al. 2023
    (arXiv:2210.02885), without its small constant: the entropy of a zero share is zero.
    """
    singular = torch.linalg.svdvals(values.double())
    shares = singular / singular.sum()
    return float(torch.special.entr(shares).sum().exp())


def ridge_predictions(train: Tensor, labels: Tensor, queries: Tensor, classes: int, strength: float = 0.1) -> Tensor:
    """Class scores (M,K) of queries (M,C) by ridge regression on one-hot labels of `train` (N,C), in closed form.

    Features are standardised by the training ones, so that `strength` is a share of their mean eigenvalue. In fp64 on
    the CPU and without an iteration, so that it is the same each time.
    """
    mean, scale = train.double().mean(0), train.double().std(0, correction=0).clamp_min(1e-12)
    x, q = (train - mean) / scale, (queries - mean) / scale
    targets = F.one_hot(labels, classes).double()
    centre = targets.mean(0)
    gram = x.T @ x + strength * len(x) * torch.eye(x.shape[1], dtype=torch.float64)
    return q @ torch.linalg.solve(gram, x.T @ (targets - centre)) + centre


def _require_room(size: int, most: int, videos: int, ranks: Ranks) -> None:
    if size > most:
        raise UserError(
            f"the features of {videos} videos take {size / 1e9:.1f} GB on rank {ranks.rank}, and more are to come:"
            f" probe.cache_bytes={most} is the limit of a rank. Raise it, start more ranks, name fewer training shards,"
            " or use probe.kind=linear, which keeps one vector a video."
        )
