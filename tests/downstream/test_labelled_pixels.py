"""Augmentation of labelled clips equals OpenCV, timm and imgaug, or their formulas."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import auto_augment

from bevt_ds.config.samples import LabelledDataConfig
from bevt_ds.data.pixels import clip_pixels as px
from bevt_ds.data.pixels.randaugment import OPERATIONS, randaugment
from bevt_ds.data.plan import LabelledPlan
from bevt_ds.rng import Use, generator


def drawn_image(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Waves with noise on top: uint8 (H,W,3)."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    waves = np.stack([np.sin(x / 7), np.cos(y / 5), np.sin((x + y) / 9)], axis=-1)
    return np.clip(128 + 80 * waves + rng.normal(0, 30, waves.shape), 0, 255).astype(np.uint8)


@pytest.mark.parametrize(
    ("source", "size"),
    [((240, 320), (256, 341)), ((360, 640), (256, 455)), ((97, 130), (224, 224)), ((512, 512), (256, 256))],
)
def test_resize_equals_opencv_but_for_rounding(source: tuple[int, int], size: tuple[int, int]) -> None:
    image = drawn_image(*source)
    theirs = cv2.resize(image, size[::-1], interpolation=cv2.INTER_LINEAR).astype(int)
    ours = px.resized(px.as_frames(image[None]), *size)[0].permute(1, 2, 0).numpy()
    assert np.abs(ours - theirs).max() <= 1
    assert np.abs(ours - theirs).mean() <= (0.4 if source == (512, 512) else 0.26)


@pytest.mark.parametrize(
    ("source", "size"),
    [((240, 320), (256, 341)), ((720, 1280), (256, 455)), ((641, 360), (456, 256)), ((256, 9), None)],
)
def test_short_side_rounds_as_mmcv(source: tuple[int, int], size: tuple[int, int] | None) -> None:
    """mmcv's rounding of the long side: to the nearest, halves up."""
    frames = torch.zeros(1, 3, *source, dtype=torch.uint8)
    side = 256 if size else 9
    assert px.with_short_side(frames, side).shape[-2:] == (size or source)


def boxes(height: int, width: int, area: tuple[float, float], aspect: tuple[float, float], n: int) -> np.ndarray:
    """int64 (n,4)."""
    rngs = (generator(0, Use.CROP, 4, 0, slot) for slot in range(n))
    return np.array([px.random_box(rng, height, width, area, aspect) for rng in rngs])


def test_random_resized_crop_areas_and_aspects() -> None:
    top, left, height, width = boxes(256, 340, (0.08, 1.0), (0.75, 4 / 3), 3000).T
    assert (top >= 0).all() and (left >= 0).all() and (top + height <= 256).all() and (left + width <= 340).all()
    shares, aspects = height * width / (256 * 340), width / height
    assert 0.078 <= shares.min() < 0.1 and 0.95 < shares.max() <= 1
    # a side is rounded by half a pixel, of at least sqrt(0.08 * 256 * 340 * 0.75) = 72
    assert aspects.min() >= 0.75 * (1 - 1 / 72) and aspects.max() <= 4 / 3 * (1 + 1 / 72)
    small = shares < 0.5  # always fits: both are as drawn
    assert abs(np.log(aspects[small]).mean()) < 0.02  # 5 standard errors of a mean of 1,300
    assert set(np.unique(top[height == 256])) <= {0}


def test_random_resized_crop_falls_back_to_the_centred_square() -> None:
    assert boxes(40, 400, (1.0, 1.0), (1.0, 1.0), 1)[0].tolist() == [0, 180, 40, 40]


def test_random_resized_crop_may_be_the_whole_frame() -> None:
    assert boxes(60, 80, (1.0, 1.0), (4 / 3, 4 / 3), 1)[0].tolist() == [0, 0, 60, 80]


def test_normalisation_equals_the_original_formula() -> None:
    clips = torch.randint(256, (2, 5, 3, 8, 8), dtype=torch.uint8)
    mean, std = torch.tensor([123.675, 116.28, 103.53]), torch.tensor([58.395, 57.12, 57.375])
    expected = ((clips.movedim(2, -1) - mean) / std).permute(0, 4, 1, 2, 3)
    torch.testing.assert_close(px.normalised(clips, "cpu"), expected)
    assert px.normalised(clips[None], "cpu").shape == (1, 2, 3, 5, 8, 8)


def test_random_erasing_areas_and_aspects() -> None:
    found = [px.erased_box(generator(1, Use.ERASING, 4, 0, slot), 224) for slot in range(2000)]
    height, width = np.array([box[2:] for box in found if box]).T
    shares, aspects = height * width / 224**2, height / width
    assert 0.019 < shares.min() < 0.025 and 0.32 < shares.max() < 0.337
    assert 0.29 < aspects.min() < 0.32 and 3.1 < aspects.max() < 3.45
    assert all(box.top + box.height <= 224 and box.left + box.width <= 224 for box in found if box)


def test_test_views_are_ordered_by_clip_then_crop() -> None:
    frames = torch.arange(2 * 3 * 3 * 4 * 6, dtype=torch.int64).view(6, 3, 4, 6)  # two clips of three frames
    found = px.view_boxes(4, 6, 4, 3)
    views = px.stacked_views(frames, found, clips=2)
    assert views.shape == (6, 3, 3, 4, 4)
    for view, (clip, crop) in zip(views, [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)], strict=True):
        assert torch.equal(view, found[crop].of(frames[3 * clip : 3 * clip + 3]))


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("magnitude", [0, 3, 7, 9])
def test_randaugment_operations_equal_timm(name: str, magnitude: int, monkeypatch: pytest.MonkeyPatch) -> None:
    image = Image.fromarray(drawn_image(48, 64))
    for sign in (-1, 1):
        # timm draws the sign itself
        monkeypatch.setattr(auto_augment, "_randomly_negate", lambda value, sign=sign: sign * value)
        level = auto_augment.LEVEL_TO_ARG[name]
        arguments = level(magnitude, {}) if level else ()
        theirs = auto_augment.NAME_TO_OP[name](
            image, *arguments, fillcolor=(128, 128, 128), resample=Image.Resampling.BILINEAR
        )
        np.testing.assert_array_equal(OPERATIONS[name](image, sign * magnitude / 10), theirs)  # timm's are of 10


def test_randaugment_at_the_largest_magnitude() -> None:
    """timm's posterize asks Pillow for no bits at 10, which it refuses."""
    for operation in OPERATIONS.values():
        assert operation(Image.fromarray(drawn_image(48, 64)), 1.0).size == (64, 48)


def test_randaugment_magnitudes_equal_imgaug(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seven of thirty, as the original's recipe means it: its RandAugment turns an image by 30 * 7 / 30 degrees."""
    angles: list[float] = []
    monkeypatch.setitem(OPERATIONS, "Rotate", lambda image, level: angles.append(30 * level) or image)
    for slot in range(8):
        randaugment(generator(0, Use.RANDAUGMENT, 4, 0, slot), drawn_image(8, 8)[None], 20, 7)
    assert {round(angle, 9) for angle in angles} == {-7.0, 7.0}


def test_randaugment_is_the_same_for_all_frames_and_repeatable() -> None:
    frames = np.stack([drawn_image(48, 64)] * 3)
    found = [randaugment(generator(0, Use.RANDAUGMENT, 4, 0, slot), frames, 4, 7) for slot in range(8)]
    again = randaugment(generator(0, Use.RANDAUGMENT, 4, 0, 5), frames, 4, 7)
    np.testing.assert_array_equal(again, found[5])
    assert all((clip == clip[:1]).all() and clip.dtype == np.uint8 for clip in found)
    assert all((found[i] != found[j]).any() for i in range(8) for j in range(i))


def test_random_numbers_of_augmentations_are_independent() -> None:
    plan = LabelledPlan([5], LabelledDataConfig(), 0, 4)
    uses = (Use.CLIP_START, Use.CROP, Use.FLIP, Use.RANDAUGMENT, Use.ERASING)
    first = {float(plan.generator(use, step, slot).random()) for use in uses for step in range(3) for slot in range(4)}
    assert len(first) == 5 * 3 * 4
