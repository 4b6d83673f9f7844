"""The perceptual loss: how far two frames are apart for a frozen network (Zhang et al. 2018, no learnt weights)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ..frozen import FrozenFeatures


def perceptual_distance(network: FrozenFeatures, frames: Tensor, others: Tensor) -> Tensor:
    """Squared distance of unit feature vectors, the mean over positions and then over maps, summed over frames.

    frames, others (N,3,v,v), RGB around [0,1] -> (), from 0 to 4 N, with the gradient of `others`.
    """
    seen = network(frames.detach())
    pairs = zip(seen, network(others), strict=True)
    parts = [(F.normalize(a.float()) - F.normalize(b.float())).square().sum(1).mean((1, 2)).sum() for a, b in pairs]
    return sum(parts) / len(parts)
