"""Frame numbers and crops of labelled clips equal those that the original's classes chose."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bevt_ds.config.samples import LabelledDataConfig, ViewsConfig
from bevt_ds.data.pixels.clip_pixels import Box, view_boxes
from bevt_ds.data.plan import CHOICES, LabelledPlan, ViewPlan

GOLDEN: dict[str, Any] = json.loads((Path(__file__).parents[1] / "data/golden/clip_indices.json").read_text())
FRAMES = 32


def planned(total: int, sampling: str, clips: int) -> list[list[int]]:
    """Frame numbers of every clip that a test plans of a video."""
    config = LabelledDataConfig(sampling=sampling, frames=FRAMES, stride=2)
    entry = ViewPlan([1], config, ViewsConfig(clips=clips), 1).entry(0, 0)
    positions = json.loads(json.dumps(entry.positions))  # as they reach the decode worker
    return [CHOICES[entry.choice](total, FRAMES, 2, position).tolist() for position in positions]


@pytest.mark.parametrize(
    ("name", "sampling", "clips"),
    [
        ("k400_test_32x2_4clips", "dense", 4),
        ("k400_val_32x2_1clip", "dense", 1),
        ("ssv2_test_uniform32", "segments", 1),
    ],
)
def test_frames_of_test_clips_equal_the_original(name: str, sampling: str, clips: int) -> None:
    """Those of one clip stand without a list around them."""
    for total, expected in GOLDEN[name].items():
        assert planned(int(total), sampling, clips) == (expected if clips > 1 else [expected]), total


@pytest.mark.parametrize(("name", "crops"), [("three_crop_boxes", 3), ("center_crop_box", 1)])
def test_crops_of_test_clips_equal_the_original(name: str, crops: int) -> None:
    for image, expected in GOLDEN[f"{name}_x0y0x1y1_by_height_x_width"].items():
        height, width = map(int, image.split("x"))
        boxes = [corners(box) for box in view_boxes(height, width, 224, crops)]
        assert boxes == (expected if crops > 1 else [expected]), image


def corners(box: Box) -> list[int]:
    return [box.left, box.top, box.left + box.width, box.top + box.height]


def test_three_crops_of_a_larger_frame_are_centred() -> None:
    assert [box[:2] for box in view_boxes(256, 341, 224, 3)] == [(16, 0), (16, 116), (16, 58)]


def trained(total: int, sampling: str, draws: int) -> np.ndarray:
    """Frame numbers of the first `draws` slots of a plan: int64 (draws, frames)."""
    plan = LabelledPlan([7], LabelledDataConfig(sampling=sampling, frames=FRAMES, stride=2), 5, draws)
    entries = [plan.entry(0, slot) for slot in range(draws)]
    return np.array([CHOICES[e.choice](total, FRAMES, 2, e.positions[0]) for e in entries])


@pytest.mark.parametrize("total", [20, 33, 120, 301])
def test_training_draws_every_frame_of_a_segment_and_no_other(total: int) -> None:
    """The original's bounds, both inclusive: round(i (N-1)/32) and round((i+1) (N-1)/32), halves to even."""
    first = np.array([round(i * (total - 1) / FRAMES) for i in range(FRAMES)])
    last = np.array([round((i + 1) * (total - 1) / FRAMES) for i in range(FRAMES)])
    numbers = trained(total, "segments", 400)
    np.testing.assert_array_equal(numbers.min(0), first)
    np.testing.assert_array_equal(numbers.max(0), last)
    # a segment has at most 10 frames: the chance that 400 draws miss one is below 32 * 10 * 0.9^400 < 1e-15
    assert all(len(set(column)) == b - a + 1 for column, a, b in zip(numbers.T, first, last, strict=True))


def test_training_clip_starts_anywhere_that_holds_it() -> None:
    """300 frames hold starts 0 to 236 of a span of 64; 4,000 draws miss one of them with a chance below 1e-4."""
    numbers = trained(300, "dense", 4000)
    assert set(numbers[:, 0]) == set(range(237)) and (np.diff(numbers, axis=1) == 2).all()


@given(st.integers(1, 400), st.sampled_from(["dense", "segments"]), st.integers(1, 10))
def test_test_clips_of_any_video_are_inside_and_in_order(total: int, sampling: str, clips: int) -> None:
    """Every frame is there, and clips follow each other in time."""
    numbers = np.array(planned(total, sampling, clips))
    assert numbers.shape == (clips, FRAMES) and numbers.min() >= 0 and numbers.max() < total
    assert (np.diff(numbers[:, 0]) >= 0).all()
    assert (trained(total, sampling, 3) < total).all()


@pytest.mark.parametrize(("counts", "group"), [((3, 1, 4), 3), ((1,), 4), ((2, 2), 2)])
def test_test_plan_holds_every_video_once(counts: tuple[int, ...], group: int) -> None:
    plan = ViewPlan(counts, LabelledDataConfig(), ViewsConfig(), group)
    entries = [plan.entry(step, slot) for step in range(plan.steps) for slot in range(group)]
    found = [(entry.shard, entry.member) for entry in entries if entry]
    assert found == [(shard, member) for shard, count in enumerate(counts) for member in range(count)]
    assert sum(plan.videos(step) for step in range(plan.steps)) == sum(counts)
