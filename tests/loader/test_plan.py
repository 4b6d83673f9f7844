"""The sample plan: epochs, ranks, determinism, and ranges of its random numbers."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bevt_ds.config.samples import DataConfig
from bevt_ds.data.plan import SampleOrder, StreamId, StreamPlan, clip_frames, slots_of
from bevt_ds.rng import Use, generator, sample_key

COUNTS = (5, 1, 9, 3, 4)
# Shard, member, short side, flip; crop and jitter; drop-path key: of slot 2 in step 3 of the images, seed 5.
PINNED = (
    (2, 1, 267, False),
    (0.4988534450531006, 0.43630003929138184, 1.2140185973836357, 0.8256492030039041, 0.7944917371669995),
    9115844014687262992,
)


def plan(stream: StreamId = StreamId.VIDEO, seed: int = 0, global_size: int = 6, **data) -> StreamPlan:
    return StreamPlan(stream, COUNTS, replace(DataConfig(), **data), seed, global_size)


@settings(max_examples=50, deadline=None)
@given(
    counts=st.lists(st.integers(1, 12), min_size=1, max_size=9),
    window=st.integers(1, 12),
    seed=st.integers(0, 99),
)
def test_epoch_holds_each_sample_once(counts: list[int], window: int, seed: int) -> None:
    order = SampleOrder(counts, seed, StreamId.IMAGE, window)
    everything = {(s, m) for s, n in enumerate(counts) for m in range(n)}
    for epoch in range(3):
        first = epoch * order.total
        assert {order.at(p) for p in range(first, first + order.total)} == everything


@pytest.mark.parametrize("seed", [0, 7, 2**64 - 1])
@pytest.mark.parametrize("counters", [(), (1,), (5, 2**63, 9)])
def test_random_numbers_equal_numpy_philox(seed: int, counters: tuple[int, ...]) -> None:
    """Seed and use are the key, the counters its counter: as numpy makes them when told so in full."""
    key = np.array([seed, Use.CROP], dtype=np.uint64)
    counter = np.array([0, *counters, *([0] * (3 - len(counters)))], dtype=np.uint64)
    expected = np.random.Generator(np.random.Philox(key=key, counter=counter))
    np.testing.assert_array_equal(generator(seed, Use.CROP, *counters).random(9), expected.random(9))


def test_shuffle_window_holds_few_shards() -> None:
    order = SampleOrder([10] * 12, 0, StreamId.VIDEO, 3)
    for first in range(0, 120, 30):
        assert len({order.at(p)[0] for p in range(first, first + 30)}) == 3


def test_plan_knows_the_next_shards_ahead() -> None:
    order = SampleOrder([10] * 7, 0, StreamId.VIDEO, 3)
    for position in range(0, 140, 7):
        now = order.shards_in(*order.window_at(position))
        assert order.at(position)[0] in now and order.at(position + 10)[0] in now


def test_each_epoch_shuffles_shards_and_samples_again() -> None:
    def epochs(counts: list[int], window: int) -> list[tuple]:
        order, n = SampleOrder(counts, 0, StreamId.VIDEO, window), sum(counts)
        return [tuple(order.at(p) for p in range(e * n, e * n + n)) for e in range(4)]

    assert len(set(epochs([1] * 9, 1))) == 4  # the order of the shards alone
    assert len(set(epochs([9], 1))) == 4  # that of a shard's samples alone
    windows = [tuple(m for s, m in epochs([9] * 4, 1)[0] if s == shard) for shard in range(4)]
    assert len(set(windows)) == 4


def test_plan_reads_within_its_shuffle_window() -> None:
    """data.shuffle_window shards at a time, and storage hears of those in which a step begins."""
    for k in (1, 2):
        narrow = plan(shuffle_window=1, clips_per_video=k)
        shards = [narrow.entry(*divmod(i, 6)).shard for i in range(0, 22 * k, k)]
        assert sum(a != b for a, b in pairwise(shards)) == len(COUNTS) - 1
        windows = [narrow.order.shards_in(*narrow.window_at(step))[0] for step in range(12)]
        assert windows == [narrow.entry(step, 0).shard for step in range(12)]


def test_order_differs_between_epochs_and_streams() -> None:
    sequences = {
        tuple(SampleOrder(COUNTS, seed, stream, 2).at(p) for p in range(first, first + 22))
        for seed, stream, first in [(0, 0, 0), (0, 0, 22), (0, 1, 0), (1, 0, 0)]
    }
    assert len(sequences) == 4


@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_plan_slots_are_split_over_ranks(world: int) -> None:
    dealt = [
        slot
        for micro_step in range(48 // (world * 2))
        for rank in range(world)
        for slot in slots_of(micro_step, rank, world, micro_size=2)
    ]
    assert dealt == list(range(48))


def test_plan_entries_are_functions_of_seed_step_and_slot() -> None:
    forward = [plan().entry(step, slot) for step in range(4) for slot in range(6)]
    backward = [plan().entry(step, slot) for step in reversed(range(4)) for slot in reversed(range(6))]
    assert forward == backward[::-1]
    assert len({(e.shard, e.member) for e in forward[:22]}) == 22


def test_plan_entries_equal_pinned_values() -> None:
    """Pinned values: a run that is resumed with another version must meet the same samples."""
    first = plan(StreamId.IMAGE, seed=5).entry(3, 2)
    assert (first.shard, first.member, first.short_side, first.flip) == PINNED[0]
    assert first.crop + first.jitter == pytest.approx(PINNED[1], abs=1e-12)
    assert sample_key(5, StreamId.IMAGE, 3, 2) == PINNED[2]


def test_random_crops_and_flips_cover_their_ranges() -> None:
    config = DataConfig(short_side=(20, 22), flip=0.25)
    entries = [StreamPlan(StreamId.IMAGE, COUNTS, config, 0, 2000).entry(0, slot) for slot in range(2000)]
    assert {e.short_side for e in entries} == {20, 21, 22}
    assert 0.2 < np.mean([e.flip for e in entries]) < 0.3
    jitter = np.array([e.jitter for e in entries])
    assert jitter.min() > 0.6 and jitter.max() < 1.4 and np.abs(jitter.mean(0) - 1).max() < 0.02
    crops = np.array([e.crop for e in entries], dtype=np.float32)
    assert crops.min() >= 0 and crops.max() < 1  # in single precision too


def test_strong_colour_jitter_stays_positive() -> None:
    factors = [plan(StreamId.IMAGE, image_jitter=(0.0, 1.5, 3.0)).entry(s, 0).jitter for s in range(200)]
    low, high = np.min(factors, axis=0), np.max(factors, axis=0)
    assert low.min() >= 0 and (low[0], high[0]) == (1, 1) and 2 < high[1] <= 2.5 and 3 < high[2] <= 4


def test_no_jitter_for_clips_and_no_augmentation_for_held_out() -> None:
    assert plan(StreamId.VIDEO).entry(0, 0).jitter == (1.0, 1.0, 1.0)
    held_out = plan(StreamId.EVAL_IMAGE).entry(0, 1)
    assert (held_out.crop, held_out.flip, held_out.jitter) == ((0.5, 0.5), False, (1.0, 1.0, 1.0))
    assert held_out.short_side == 256


def test_substitutes_are_other_samples_with_the_same_treatment() -> None:
    original = plan().entry(2, 1)
    substitutes = [plan().entry(2, 1, attempt) for attempt in range(1, 30)]
    assert len({(e.shard, e.member) for e in substitutes}) > 10
    assert substitutes == [plan().entry(2, 1, attempt) for attempt in range(1, 30)]
    others = {(e.shard, e.member) for e in (plan().entry(s, slot, 1) for s in range(9) for slot in (0, 5))}
    assert len(others) > 10  # two bad samples do not share theirs
    for e in substitutes:
        assert 0 <= e.member < COUNTS[e.shard]
        same = replace(e, attempt=0, shard=original.shard, member=original.member)
        assert same == original


@pytest.mark.parametrize(("stream", "shape", "frames"), [(0, (6, 8, 14, 14), 2), (1, (6, 14, 14), 1)])
def test_plan_masks_have_the_shape_of_their_stream(stream: int, shape: tuple, frames: int) -> None:
    masks = plan(StreamId(stream)).masks(4)
    assert masks.shape == shape
    assert plan(StreamId(stream)).frames_per_cell == frames
    assert (masks != plan(StreamId(stream)).masks(5)).any()
    assert (masks != plan(StreamId(stream + 2)).masks(4)).any()  # the held-out stream's


@settings(max_examples=200, deadline=None)
@given(
    start=st.integers(0, (1 << 24) - 1).map(lambda n: n / (1 << 24)),
    total=st.integers(1, 400),
    frames=st.integers(1, 32),
    stride=st.integers(1, 8),
)
def test_clip_frame_numbers(start: float, total: int, frames: int, stride: int) -> None:
    numbers = clip_frames(start, total, frames, stride)
    assert len(numbers) == frames and numbers.min() >= 0 and numbers.max() < total
    assert (np.diff(numbers) % total == stride % total).all()
    if total >= frames * stride:
        assert numbers[0] + frames * stride <= total  # the original's starts are 0 .. total - span
    else:
        assert numbers[0] == 0


def test_every_clip_start_is_possible() -> None:
    starts = {int(clip_frames(i / 1000, 21, 8, 2)[0]) for i in range(1000)}
    assert starts == set(range(6))
