"""Resuming anywhere, as often as one likes, on any number of ranks: each epoch has each sample once."""

from __future__ import annotations

import random
from collections import Counter

from bevt_ds.config.samples import DataConfig
from bevt_ds.data.plan import StreamId, StreamPlan, slots_of

RUNS, RESUMES = 400, 25
SIZES = (1, 2, 3, 4, 6, 8)  # samples of a step


def handed_out(plan: StreamPlan, step: int, world: int) -> dict[int, tuple[int, int]]:
    """Slot -> sample, of a step that `world` ranks do, each in micro-steps of one sample or of all its share."""
    share = plan.global_size // world
    micro_size = 1 if step % 2 else share
    parts = [(m, rank) for m in range(share // micro_size) for rank in range(world)]
    slots = [slot for micro_step, rank in parts for slot in slots_of(micro_step, rank, world, micro_size)]
    assert sorted(slots) == list(range(plan.global_size))
    return {slot: (entry.shard, entry.member) for slot in slots if (entry := plan.entry(step, slot))}


def next_stop(rng: random.Random, step: int, total: int, size: int) -> int:
    """Where a run is killed next: soon, at once, or at the end of an epoch."""
    ends = [end // size for end in (total * (step * size // total + 1), total * (step * size // total + 2))]
    return max(step, rng.choice([step, step + 1, step + rng.randint(0, 3), rng.choice(ends)]))


def test_no_sample_is_lost_or_repeated_over_ten_thousand_resumes() -> None:
    rng, resumes = random.Random(0), 0
    for seed in range(RUNS):
        counts, size = [rng.randint(1, 4) for _ in range(rng.randint(1, 3))], rng.choice(SIZES)
        config = DataConfig(shuffle_window=rng.randint(1, 4))
        committed, ledger = 0, {}
        for _ in range(RESUMES):
            plan = StreamPlan(StreamId.IMAGE, counts, config, seed, size)  # nothing but the step is carried over
            world = rng.choice([n for n in range(1, 9) if size % n == 0])
            killed = next_stop(rng, committed, sum(counts), size)
            for step in range(committed, killed):
                ledger[step] = handed_out(plan, step, world)
            committed, resumes = rng.randint(committed, killed), resumes + 1  # the last commit may be older
        shown = [ledger[step][slot] for step in range(len(ledger)) for slot in range(size)]
        total, everything = sum(counts), {(s, m) for s, n in enumerate(counts) for m in range(n)}
        for first in range(0, len(shown), total):
            epoch = Counter(shown[first : first + total])
            assert set(epoch.values()) == {1}, (seed, first)
            assert len(epoch) < total or set(epoch) == everything, (seed, first)
        assert len(shown) == len(ledger) * size
    assert resumes == RUNS * RESUMES == 10_000
