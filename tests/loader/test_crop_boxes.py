"""Crop boxes: only the part of a frame that a crop needs is converted to RGB, with equal pixels."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch

from bevt_ds.config.samples import DataConfig
from bevt_ds.data.decoding.geometry import Box, Crop, source_box
from bevt_ds.data.decoding.pool import DecodePool
from bevt_ds.data.decoding.video import RgbWriter, opened
from bevt_ds.data.decoding.worker import needed
from bevt_ds.data.limits import Limits
from bevt_ds.data.pixels.cpu_pixels import ClipPixels
from bevt_ds.data.plan import PlanEntry, StreamId, StreamPlan
from tests.loader.media import encode_clip, noise

S = 64
SIZES = [(90, 120), (97, 131), (150, 90), (200, 260), (64, 64)]  # enlarged, odd, upright, shrunk, as it is
FORMATS = {  # container, codec, pixel format, size, whether frames are cut
    "h264": ("mp4", "libx264", "yuv420p", (90, 120), True),
    "h264, full range": ("mp4", "libx264", "yuvj420p", (90, 120), True),
    "h264, 4:4:4": ("mp4", "libx264", "yuv444p", (90, 120), False),
    "mpeg4": ("avi", "mpeg4", "yuv420p", (90, 120), True),
    "vp9, odd": ("webm", "libvpx-vp9", "yuv420p", (91, 121), False),
}


def entries(count: int = 6) -> list[PlanEntry]:
    """As a plan draws them, and crops in the corners."""
    plan = StreamPlan(StreamId.VIDEO, [10], DataConfig(size=S, short_side=(100, 130), token_size=S // 2), 3, count)
    drawn = [plan.entry(0, slot) for slot in range(count)]
    corners = [(y, x) for y in (0.0, 1 - 2**-20) for x in (0.0, 1 - 2**-20)]
    return drawn + [replace(drawn[0], crop=corner) for corner in corners]


@pytest.fixture(scope="module")
def pixels() -> ClipPixels:
    return ClipPixels(S)


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_crop_equals_that_of_the_whole_frame(pixels: ClipPixels, height: int, width: int) -> None:
    frames = noise(2, height, width)
    for entry in entries():
        crop = Crop(entry.short_side, *entry.crop, S)
        box = source_box(height, width, crop)
        poisoned = np.where(np.random.default_rng(0).random(frames.shape) < 0.5, 0, 255).astype(np.uint8)
        part = np.s_[:, box.top : box.top + box.height, box.left : box.left + box.width]
        poisoned[part] = frames[part]
        whole, part = (pixels.crop(images, np.arange(2), crop, str(i)) for i, images in enumerate((frames, poisoned)))
        assert torch.equal(whole, part)


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_crop_boxes_are_even_and_inside_the_frame(height: int, width: int) -> None:
    for entry in entries():
        crop = Crop(entry.short_side, *entry.crop, S)
        box = source_box(height, width, crop)
        assert box.top % 2 == box.left % 2 == 0
        for start, length, whole in ((box.top, box.height, height), (box.left, box.width, width)):
            assert 0 <= start < start + length <= whole and (length % 2 == 0 or start + length == whole)
            assert length <= S * min(height, width) / crop.short_side + 10


@pytest.mark.parametrize("name", FORMATS)
def test_partial_rgb_conversion_equals_that_of_the_whole_frame(name: str) -> None:
    """But for a line at its edges, which no crop reads."""
    container, codec, pixel_format, size, is_cut = FORMATS[name]
    data, numbers = encode_clip(noise(3, *size), container, codec, pixel_format), np.arange(3)
    with opened(data, Limits()) as video:
        whole = video.frames(numbers)
    for box in (Box(10, 20, 40, 60), Box(0, 0, 44, 62), Box(50, 62, 40, 58)):
        with opened(data, Limits()) as video:
            part = video.decode_into(numbers, lambda count: np.full(count, 7, np.uint8), [box] * 3)
        np.testing.assert_array_equal(part[inside(box)], whole[inside(box)])
        assert ((part == 7).all(-1).mean() > 0.5) == is_cut


def inside(box: Box) -> tuple:
    """A box but for its edge, of images (N,H,W,3)."""
    return np.s_[:, box.top + 1 : box.top + box.height - 1, box.left + 1 : box.left + box.width - 1]


def test_clips_that_share_a_frame_share_a_crop_box() -> None:
    a, b = Box(0, 0, 10, 10), Box(4, 6, 10, 12)
    assert needed(np.array([[0, 1, 1], [1, 2, 3]]), [a, b]) == [a, Box(0, 0, 14, 18), b, b]
    assert needed(np.array([[0, 1]]), []) is None


@pytest.fixture
def pool() -> Iterator[DecodePool]:
    pool = DecodePool(1, 20.0, Limits())
    yield pool
    pool.close()


@pytest.mark.parametrize("name", FORMATS)
def test_workers_convert_only_the_crop_boxes(pool: DecodePool, pixels: ClipPixels, name: str) -> None:
    """Four clips of one video, after another that has filled the memory."""
    container, codec, pixel_format, size, _ = FORMATS[name]
    data, filler = (encode_clip(noise(20, *size, seed=s), container, codec, pixel_format) for s in (0, 1))
    crops = [Crop(e.short_side, *e.crop, S) for e in entries(4)[:4]]
    starts = [(0.0, 0.0), (0.1, 0.0), (0.2, 0.0), (0.9, 0.0)]

    def clips(data: bytes, needed: list[Crop] | None) -> list[torch.Tensor]:
        with pool.clips(data, starts, 6, 2, crops=needed) as decoded:
            rows = zip(decoded.places, crops, strict=True)
            return [pixels.crop(decoded.frames, places, crop).clone() for places, crop in rows]

    expected = clips(data, None)
    clips(filler, None)
    for one, other in zip(clips(data, crops), expected, strict=True):
        assert torch.equal(one, other)


def test_frame_writer_takes_a_box_for_each_frame() -> None:
    """Each frame's own, in any order."""
    data = encode_clip(noise(4, 90, 120), "mp4", "libx264")
    boxes = [Box(0, 0, 40, 40), Box(20, 30, 50, 60), Box(0, 0, 40, 40), Box(0, 0, 90, 120)]
    with opened(data, Limits()) as video:
        whole = video.frames(np.arange(4))
    writer = RgbWriter()
    with opened(data, Limits()) as video:
        for box, (i, frame) in zip(boxes, video.pick(np.arange(4)), strict=True):
            image = np.zeros((1, 90, 120, 3), np.uint8)
            writer.write(frame, image[0], box)
            np.testing.assert_array_equal(image[inside(box)], whole[i : i + 1][inside(box)])
