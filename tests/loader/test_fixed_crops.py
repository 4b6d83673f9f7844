"""data.crops: each sample has so many crops, which follow from its key, and take turns by epoch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from bevt_ds.config.recipes import joint_swin_b
from bevt_ds.config.samples import DataConfig
from bevt_ds.config.validate import validate
from bevt_ds.data.plan import PlanEntry, StreamId, StreamPlan
from bevt_ds.errors import UserError
from bevt_ds.train.tokens import EveryCrop

KEYS = [("a", "b", "c"), ("d", "e")]
TREATMENT = ("start", "phase", "short_side", "crop", "flip", "jitter")


def plan(stream: StreamId = StreamId.IMAGE, keys=KEYS, seed: int = 0, size: int = 5, **data) -> StreamPlan:
    config = replace(DataConfig(), **{"crops": 3, **data})
    return StreamPlan(stream, [len(row) for row in keys], config, seed, size, keys)


def crops(plan: StreamPlan, steps: int) -> dict[tuple[str, int], set[tuple]]:
    """By key and number of the crop, what the slots of so many steps do to it."""
    found: dict[tuple[str, int], set[tuple]] = {}
    for entry in (plan.entry(step, slot) for step in range(steps) for slot in range(plan.global_size)):
        place = plan.keys[entry.shard][entry.member], entry.crop_number
        found.setdefault(place, set()).add(treatment(entry))
    return found


def treatment(entry: PlanEntry) -> tuple:
    return tuple(getattr(entry, name) for name in TREATMENT)


def test_each_epoch_takes_the_next_crop_of_every_sample() -> None:
    for epoch in range(7):  # five slots a step are an epoch here
        entries = [plan().entry(epoch, slot) for slot in range(5)]
        assert {entry.crop_number for entry in entries} == {epoch % 3}
        assert len({(entry.shard, entry.member) for entry in entries}) == 5


@pytest.mark.parametrize("stream", [StreamId.VIDEO, StreamId.IMAGE])
def test_crop_follows_from_the_key_and_its_number_alone(stream: StreamId) -> None:
    found = crops(plan(stream), 6)
    assert len(found) == 15 and all(len(each) == 1 for each in found.values())
    assert len(set.union(*found.values())) == 15  # no two crops are alike
    for seed, size, keys in ((9, 5, KEYS), (0, 2, [("e",), ("b", "a"), ("d", "c")])):
        assert crops(plan(stream, keys, seed, size), 8 * 5 // size).items() >= found.items()


def test_another_kind_has_other_crops() -> None:
    images, clips = crops(plan(), 3), crops(plan(StreamId.VIDEO), 3)
    assert not set.union(*images.values()) & {(*each[:5], (1.0, 1.0, 1.0)) for each in set.union(*clips.values())}
    assert all(images[place] != clips[place] for place in images)


def test_clips_of_a_video_share_a_window_of_its_time_and_take_turns_in_groups() -> None:
    pairs = plan(StreamId.VIDEO, size=10, clips_per_video=2, crops=4)
    for epoch in range(4):
        for slot in range(0, 10, 2):
            both = [pairs.entry(epoch, slot), pairs.entry(epoch, slot + 1)]
            assert [entry.crop_number for entry in both] == [2 * (epoch % 2), 2 * (epoch % 2) + 1]
            assert both[0].start == both[1].start and both[0].crop != both[1].crop
    with pytest.raises(UserError, match="data.crops=3: must be a multiple of data.clips_per_video=2"):
        base = joint_swin_b()
        validate(replace(base, data=replace(base.data, crops=3, clips_per_video=2)))


def test_substitute_has_its_own_crop_of_the_slots_turn() -> None:
    own, other = (plan().entry(1, 2, attempt) for attempt in (0, 1))
    fixed = crops(plan(), 6)
    assert other.crop_number == own.crop_number == 1
    assert fixed[plan().keys[other.shard][other.member], 1] == {treatment(other)}


def test_crops_are_those_of_the_files_written_so_far() -> None:
    """Where this changes, kept ids are of other crops: raise bevt_ds.data.tokens.FORMAT."""
    start, _, side, crop, flip, jitter, number = plan().fixed_crop(0, 0, 1)
    assert (side, flip, number) == (297, False, 1)
    assert (start, *crop, *jitter) == pytest.approx(
        (0.329309, 0.193722, 0.676417, 0.696816, 1.229493, 0.889591), abs=1e-6
    )


def test_every_crop_is_made_in_the_order_of_the_shards() -> None:
    """Each once; what is fetched ahead is what is read now and next."""
    every = EveryCrop(StreamId.IMAGE, [3, 2], replace(DataConfig(), crops=3), 0, 4, KEYS)
    entries = [every.entry(step, slot) for step, slots in enumerate(every.steps()) for slot in slots]
    places = [(entry.shard, entry.member, entry.crop_number) for entry in entries]
    members = [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)]
    assert places == [(*member, crop) for member in members for crop in range(3)]
    windows = [every.order.shards_in(*every.window_at(step)) for step in range(4)]
    assert windows == [[0, 1], [0, 1], [0, 1], [1]]


def test_masks_and_held_out_views_are_as_without() -> None:
    assert (plan().masks(3) == plan(crops=0).masks(3)).all()
    held_out = plan(StreamId.EVAL_IMAGE).entry(0, 1)
    assert held_out == plan(StreamId.EVAL_IMAGE, crops=0).entry(0, 1)


@pytest.mark.parametrize("take", [lambda p: p.entry(4, 3), lambda p: p.entry(4, 3, 2)])
def test_without_fixed_crops_the_seed_draws_them(take: Callable[[StreamPlan], PlanEntry]) -> None:
    drawn = [treatment(take(plan(crops=0, seed=seed, keys=keys))) for seed, keys in ((0, KEYS), (1, KEYS))]
    assert drawn[0] != drawn[1] and treatment(take(plan(crops=0))) == drawn[0]
