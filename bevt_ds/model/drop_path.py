"""Stochastic depth whose decisions are a pure function of (sample key, block, branch).

A sample's decisions travel with the sample: they do not depend on its rank, its place in the batch or how often a
block is recomputed. Letters: B samples, L blocks.
"""

from __future__ import annotations

import torch
from torch import Tensor

BRANCHES = 2  # attention and MLP


def _signed(value: int) -> int:
    """A 64-bit pattern as torch's int64 writes it."""
    return value - (1 << 64) if value >> 63 else value


_GAMMA = _signed(0x9E3779B97F4A7C15)
_MULTIPLIERS = (_signed(0xBF58476D1CE4E5B9), _signed(0x94D049BB133111EB))


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical shift: torch's own drags the sign bit along."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def splitmix64(x: Tensor) -> Tensor:
    """The finaliser of SplitMix64 (Steele, Lea and Flood 2014) on int64 bit patterns, elementwise."""
    x = (x ^ _shift_right(x, 30)) * _MULTIPLIERS[0]
    x = (x ^ _shift_right(x, 27)) * _MULTIPLIERS[1]
    return x ^ _shift_right(x, 31)


def uniform(keys: Tensor, counters: Tensor) -> Tensor:
    """fp32 in [0, 1) from int64 keys and counters (broadcast), 24 random bits each."""
    mixed = splitmix64(splitmix64(keys) + (counters + 1) * _GAMMA)
    return _shift_right(mixed, 40).float() / (1 << 24)


def residual_scales(keys: Tensor, max_rate: float, blocks: int) -> Tensor:
    """(L, 2, B) fp32 factors of the residual branches: 0 where dropped, 1/(1-rate) where kept.

    The rate grows linearly over the blocks, from 0 to `max_rate`, as in the original. `keys` is int64 (B,).
    """
    rates = torch.linspace(0, max_rate, blocks, device=keys.device)[:, None, None]
    counters = torch.arange(blocks * BRANCHES, device=keys.device).view(blocks, BRANCHES, 1)
    return (uniform(keys, counters) >= rates) / (1 - rates)
