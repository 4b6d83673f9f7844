"""Randomness as a pure function of counters: the same key gives the same numbers on any rank, worker or resume."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
from numpy.random.bit_generator import ISeedSequence

from bevt_ds.errors import UserError


class Use(IntEnum):
    """What a random number is for. Two uses never share a stream; never renumber, or old runs change."""

    SHARD_ORDER = 0
    SAMPLE_ORDER = 1
    CLIP_START = 2
    CROP = 3
    FLIP = 4
    JITTER = 5
    MASK = 6
    DROP_PATH = 7
    SYNTHETIC = 9
    SUBSTITUTE = 10
    TOKENIZER = 11
    RANDAUGMENT = 12
    ERASING = 13
    PROBE = 14
    MIXING = 15


@dataclass(frozen=True)
class _Key(ISeedSequence):
    """Philox's key as its seed: passed as the key, numpy would ask the system for entropy that is never used."""

    words: tuple[int, int]

    def generate_state(self, n_words: int, dtype: type = np.uint32) -> np.ndarray:
        return np.array(self.words, dtype=dtype)


def generator(seed: int, use: Use, *counters: int) -> np.random.Generator:
    """A numpy generator keyed by (seed, use) and up to three counters, such as (stream, step, slot).

    UserError: the seed is negative or has more than 64 bits.

    Philox4x64 is counter-based: the key and counter are the whole state, nothing is shared or advanced elsewhere.
    """
    if not 0 <= seed < 1 << 64:
        raise UserError(f"seed={seed}: must be at least 0 and below 2**64")
    if len(counters) > 3:
        raise ValueError(f"at most three counters, got {len(counters)}")
    words = [0, *counters, *([0] * (3 - len(counters)))]
    return np.random.Generator(np.random.Philox(_Key((seed, use)), counter=np.array(words, dtype=np.uint64)))


def key_number(key: str) -> int:
    """A counter of 63 bits from the key of a sample in its shard: the same everywhere and for ever."""
    return int.from_bytes(hashlib.blake2b(key.encode("utf-8", "surrogateescape"), digest_size=8).digest()) >> 1


def sample_key(seed: int, stream: int, step: int, slot: int) -> int:
    """A 63-bit key for one sample of one step, from which the model derives its drop-path decisions."""
    return int(generator(seed, Use.DROP_PATH, stream, step, slot).integers(0, 2**63 - 1))
