"""Probes of frozen features: how well a small classifier does on what an encoder has learned.

Letters: B clips, T tokens, C channels, K classes, N training videos.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bevt_ds.config.schema import ProbeConfig
from bevt_ds.eval.features import Features
from bevt_ds.progress import progress_bar
from bevt_ds.rng import Use, generator
from bevt_ds.runtime.distributed import Ranks

HEAD_WIDTH = 64  # channels of an attention head


class AttentiveProbe(nn.Module):
    """A learned query attends to all tokens of a clip; then an MLP and a linear layer.

    The attentive probe of V-JEPA (Bardes et al. 2024, arXiv:2404.08471) in spirit: one pre-norm cross-attention block.
    It can pick the tokens that matter, where a mean over tokens cannot.
    """

    def __init__(self, dim: int, classes: int) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.zeros(1, 1, dim))
        self.norm_tokens, self.norm_pooled, self.norm_out = (nn.LayerNorm(dim) for _ in range(3))
        self.attention = nn.MultiheadAttention(dim, max(dim // HEAD_WIDTH, 1), batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))
        self.head = nn.Linear(dim, classes)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B,T,C) -> logits (B,K)."""
        x = self.norm_tokens(tokens.float())
        query = self.query.expand(len(x), -1, -1)
        y = query + self.attention(query, x, x, need_weights=False)[0]
        y = y + self.mlp(self.norm_pooled(y))
        return self.head(self.norm_out(y[:, 0]))


class LinearProbe(nn.Module):
    """A linear layer on features standardised by the training set's mean and deviation.

    That is the batch normalisation without affine parameters in front of MAE's linear probe (He et al. 2022,
    arXiv:2111.06377, appendix A.1), with the statistics of all training features in place of a running estimate.
    """

    def __init__(self, mean: Tensor, deviation: Tensor, classes: int) -> None:
        super().__init__()
        self.register_buffer("mean", mean)
        self.register_buffer("scale", (deviation.square() + 1e-6).rsqrt())
        self.head = nn.Linear(len(mean), classes)

    def forward(self, features: Tensor) -> Tensor:
        """(B,C) -> logits (B,K)."""
        return self.head((features.float() - self.mean) * self.scale)


class NearestNeighbours:
    """Votes of the `k` training features with the largest cosine, weighted by exp(cosine / temperature).

    Weighted k-NN of Wu et al. 2018 (arXiv:1805.01978) as DINO evaluates with it (k 20, temperature 0.07).
    """

    def __init__(self, features: Tensor, labels: Tensor, classes: int, k: int, temperature: float) -> None:
        self.features, self.labels = F.normalize(features.float(), dim=-1), labels
        self.classes, self.k, self.temperature = classes, min(k, len(features)), temperature

    def probabilities(self, queries: Tensor) -> Tensor:
        """(B,C) -> (B,K), the shares of the votes."""
        cosines, nearest = (F.normalize(queries.float(), dim=-1) @ self.features.T).topk(self.k)
        weights = (cosines / self.temperature).softmax(-1)
        return weights.new_zeros(len(queries), self.classes).scatter_add_(1, self.labels[nearest], weights)


def init_probe(probe: nn.Module, seed: int) -> None:
    """Draw a probe's parameters: weights and query from a normal distribution of deviation 0.02, biases 0, norms 1."""
    draws = torch.Generator().manual_seed(seed)
    norms = {id(p) for m in probe.modules() if isinstance(m, nn.LayerNorm) for p in m.parameters()}
    for parameter in probe.parameters():
        if id(parameter) not in norms:
            if parameter.ndim > 1:
                nn.init.trunc_normal_(parameter, std=0.02, generator=draws)
            else:
                nn.init.zeros_(parameter)


def moments(features: Features, ranks: Ranks) -> tuple[Tensor, Tensor]:
    """Mean and deviation (C,) of pooled features over all ranks. Collective."""
    values = features.values.double()
    sums = torch.stack([values.sum(0), values.square().sum(0)]).to(ranks.device)
    mean, square = ranks.sum(sums) / features.total
    return mean.float(), (square - mean.square()).clamp_min(0).sqrt().float()


def train_probe(probe: nn.Module, features: Features, options: ProbeConfig, ranks: Ranks) -> None:
    """AdamW with a cosine to 0. Collective.

    Each batch is drawn from the videos of all ranks; a rank computes the gradient of those that it holds. So the ranks
    change nothing but the order of sums.
    """
    probe.to(ranks.device).train()
    optimizer = torch.optim.AdamW(probe.parameters(), lr=options.lr, weight_decay=options.weight_decay)
    an_epoch = math.ceil(features.total / options.batch)
    epochs = max(options.epochs, math.ceil(options.least_steps / an_epoch))
    steps = epochs * an_epoch
    rows_of = torch.full((features.total,), -1)
    rows_of[features.places] = torch.arange(len(features.places))
    batches = epochs_of_batches(features.total, options.batch, epochs, options.seed)
    bar = progress_bar(batches, desc="probe", total=steps, unit="step", disable=not ranks.is_main)
    for step, chosen in enumerate(bar):
        for group in optimizer.param_groups:
            group["lr"] = options.lr * 0.5 * (1 + math.cos(math.pi * step / steps))
        mine = rows_of[chosen]
        mine = mine[mine >= 0]
        logits = probe(features.values[mine].to(ranks.device))
        loss = F.cross_entropy(logits, features.labels[mine].to(ranks.device), reduction="sum") / len(chosen)
        optimizer.zero_grad(set_to_none=False)
        loss.backward()
        for parameter in probe.parameters():
            ranks.sum(parameter.grad)
        optimizer.step()
    probe.eval()


def epochs_of_batches(total: int, batch: int, epochs: int, seed: int) -> Iterator[Tensor]:
    """Places int64 (up to batch,) of each step; every epoch holds each place once, in an order of its own."""
    for epoch in range(epochs):
        order = torch.from_numpy(generator(seed, Use.PROBE, epoch).permutation(total))
        yield from order.split(batch)
