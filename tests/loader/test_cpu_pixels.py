"""Pixels made by torch on a CPU against DALI's graph and OpenCV."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from fractions import Fraction
from itertools import islice
from pathlib import Path

import av
import cv2
import numpy as np
import pytest
import torch
from nvidia.dali import Pipeline, fn, types

from bevt_ds.config.samples import DataConfig
from bevt_ds.data.decoding.geometry import Crop, cut
from bevt_ds.data.pixels.cpu_pixels import ClipPixels, ReusedMemory, compute_on_one_core
from bevt_ds.data.pixels.pipeline import STD, PixelPipeline
from bevt_ds.data.plan import PlanEntry, StreamId, StreamPlan
from bevt_ds.data.reading.deadline import DeadlineExecutor
from bevt_ds.shards.synthetic.scene import Extent, render
from tests.loader.media import clip_pixels, images_of, noise

S, V, CLIPS = 96, 48, 8
ROUNDING = 1e-3  # levels: single precision through normalising and back


@pytest.fixture(scope="module")
def graph() -> PixelPipeline:
    return PixelPipeline("video", CLIPS, S, V, threads=1)


def plan_entries(*short_side: int) -> list[PlanEntry]:
    """As a plan draws them, flips included."""
    config = DataConfig(size=S, short_side=short_side, token_size=V)
    plan = StreamPlan(StreamId.VIDEO, [10], config, seed=3, global_size=CLIPS)
    return [plan.entry(0, slot) for slot in range(CLIPS)]


def ours(frames: np.ndarray, entries: list[PlanEntry]) -> tuple[torch.Tensor, torch.Tensor]:
    return clip_pixels(ClipPixels(S), frames, entries)


def differences(graph: PixelPipeline, frames: np.ndarray, entries: list[PlanEntry]) -> tuple[np.ndarray, np.ndarray]:
    """How far the pixels and the views are from the graph's, in levels of 255."""
    pixels, view = ours(frames, entries)
    graph_pixels, graph_view = images_of(graph, [frames] * len(entries), entries)
    return (pixels - graph_pixels).abs().numpy() * np.reshape(STD, (3, 1, 1, 1)), (
        view - graph_view
    ).abs().numpy() * 255


@pytest.mark.parametrize(("height", "width"), [(120, 150), (150, 120), (97, 133), (96, 96)])
def test_cpu_crop_offsets_equal_dali(graph: PixelPipeline, height: int, width: int) -> None:
    """Without a resize the pixels are the very same, so every offset is."""
    pixels, view = differences(graph, noise(2, height, width), plan_entries(min(height, width), min(height, width)))
    assert pixels.max() < ROUNDING
    assert view.max() < 1 + ROUNDING and (view > 0.5).mean() < 1e-3  # a half may be rounded otherwise


def test_cpu_resized_sizes_equal_dali(entry: Callable) -> None:
    """Where the exact length ends in a half it depends on the precision."""
    lengths = ((h, w, s) for h in range(100, 400, 4) for w in (h + 7, h * 16 // 9, 426) for s in range(256, 321))
    cases = [case for case in lengths if case[1] > case[0] and Fraction(case[1] * case[2], case[0]) % 1 == 0.5]
    graph = Pipeline(batch_size=len(cases), num_threads=1, device_id=None, prefetch_queue_depth=1, exec_dynamic=True)
    with graph:
        images = fn.external_source(name="images", dtype=types.UINT8, layout="HWC")
        side = fn.external_source(name="side", dtype=types.FLOAT, ndim=0)
        graph.set_outputs(fn.resize(images, resize_shorter=side, subpixel_scale=False, interp_type=types.INTERP_NN))
    graph.build()
    graph.feed_input("images", [np.zeros((h, w, 1), np.uint8) for h, w, _ in cases])
    graph.feed_input("side", [np.float32(s) for *_, s in cases])
    (resized,) = graph.run()
    for i, (h, w, s) in enumerate(cases):
        assert cut(h, w, Crop(s, 0.0, 0.0, S))[:2] == resized.at(i).shape[:2]
    assert len(cases) > 100


@pytest.mark.parametrize("size", [(120, 150), (400, 600)])
def test_cpu_resize_of_drawn_images_is_close_to_dali(graph: PixelPipeline, size: tuple[int, int]) -> None:
    """Enlarged and shrunk."""
    frames = render(np.random.default_rng(0), Extent(height=size[0], width=size[1], frames=2))
    for difference in differences(graph, frames, plan_entries(128, 160)):
        assert difference.mean() < 0.25 and difference.max() < 20


@pytest.mark.parametrize("name", ["arm_wrestling", "dog", "goat", "part_0"])
def test_cpu_resize_of_real_clips_is_close_to_dali(media_folder: Path, name: str) -> None:
    """At the recipe's sizes, all of them enlarged: the bounds are 1.5 times what was measured."""
    with av.open(str(media_folder / f"{name}.mp4")) as container:
        frames = np.stack([f.to_ndarray(format="rgb24") for f in islice(container.decode(video=0), 0, 40, 20)])
    config = DataConfig()
    plan = StreamPlan(StreamId.VIDEO, [10], config, seed=3, global_size=CLIPS)
    entries = [plan.entry(0, slot) for slot in range(CLIPS)]
    graph = PixelPipeline("video", CLIPS, 224, 112, threads=1)
    mine = clip_pixels(ClipPixels(224), frames, entries)
    for a, b, scale in zip(mine, images_of(graph, [frames] * CLIPS, entries), (57.0, 255.0), strict=True):
        difference = (a - b).abs() * scale
        assert difference.mean() < 0.35 and difference.max() < 12


@pytest.mark.parametrize("side", [96, 224, 36, 50])
def test_cpu_token_view_equals_opencv_lanczos4(entry: Callable, side: int) -> None:
    """The same taps; OpenCV sums them as integers, so that a half may be rounded otherwise."""
    crop = noise(6, side, side)  # more frames than are filtered at a time
    _, view = clip_pixels(ClipPixels(side), crop, [entry(short_side=side, flip=False)])
    half = side // 2
    reference = np.stack([cv2.resize(frame, (half, half), interpolation=cv2.INTER_LANCZOS4) for frame in crop])
    difference = np.abs(view[0].permute(0, 2, 3, 1).numpy() * 255 - reference)
    assert difference.max() < 1 + ROUNDING and (difference > 0.5).mean() < 1e-3


@pytest.mark.parametrize("kind", [ClipPixels, PixelPipeline])
def test_cpu_token_views_are_made_of_masked_frames_only(kind: type, graph: PixelPipeline) -> None:
    """In their order, whatever their number: a run that wraps around the end, all, none, and every second frame."""
    frames, entries = noise(10, 100, 130), plan_entries(100, 130)[:4]
    masked = np.array([[t in (0, 1, 2, 8, 9) for t in range(10)], [True] * 10, [False] * 10, [True, False] * 5])
    if kind is ClipPixels:
        (every, views), (same, some) = (clip_pixels(ClipPixels(S), frames, entries, m) for m in (None, masked))
    else:
        every, views = images_of(graph, [frames] * 4, entries)
        same, some = graph.run([frames] * 4, entries, masked)
    assert torch.equal(every, same) and torch.equal(some, views[torch.from_numpy(masked)])


def test_cpu_crop_to_the_last_row_is_still_resized(graph: PixelPipeline, entry: Callable) -> None:
    """Torch would take 120 rows, made of 120 rows, for no resize."""
    view = entry(short_side=144, crop=(0.5, 0.5))
    assert cut(120, 150, Crop(144, 0.5, 0.5, S)).top + S == 120
    pixels, _ = differences(graph, render(np.random.default_rng(0), Extent(height=120, width=150, frames=1)), [view])
    assert pixels.mean() < 0.25


@pytest.mark.parametrize(("size", "mean"), [((120, 150), 3.0), ((300, 400), 0.3)])
def test_cpu_downscaling_equals_opencv(entry: Callable, size: tuple[int, int], mean: float) -> None:
    """Noise, the hardest case: the same kernel where it is shrunk, another where it is enlarged."""
    frames, view = noise(2, *size), entry(short_side=140, crop=(0.3, 0.7))
    height, width, top, left = cut(*size, Crop(140, 0.3, 0.7, S))
    reference = np.stack([cv2.resize(f, (width, height), interpolation=cv2.INTER_CUBIC) for f in frames]).astype(int)
    crop = ClipPixels(S).crop(frames, np.arange(2), Crop(view.short_side, *view.crop, S))
    assert np.abs(crop.numpy() - reference[:, top : top + S, left : left + S]).mean() < mean


def test_cpu_pixels_of_clips_sharing_one_decode(entry: Callable) -> None:
    """Frames in a row, spread, and repeated; and nothing refers to the worker's memory afterwards."""
    images, pixels = noise(6, S, S), ClipPixels(S)
    expected, places = images.copy(), np.array([[2, 3, 4], [0, 2, 5], [4, 5, 4]])
    crops = [pixels.crop(images, rows, Crop(S, 0.5, 0.5, S), f"crop {i}") for i, rows in enumerate(places)]
    images[:] = 0
    for crop, rows in zip(crops, places, strict=True):
        np.testing.assert_array_equal(crop, expected[rows])


def test_cpu_pixels_of_non_consecutive_frames() -> None:
    """Of frames that do not follow one another only the part that the crop needs is copied, over what was there."""
    images, pixels, rows = noise(6, 120, 150), ClipPixels(S), np.array([5, 0, 2])
    for e in plan_entries(100, 150):
        crop = Crop(e.short_side, *e.crop, S)
        apart = pixels.crop(images, rows, crop, "apart")
        assert torch.equal(apart, pixels.crop(images[rows], np.arange(3), crop, "together"))


def test_cpu_pixels_do_not_depend_on_the_rest_of_the_batch() -> None:
    frames, entries = noise(2, 120, 150), plan_entries(100, 130)
    together = ours(frames, entries)
    for i, e in enumerate(entries):
        for alone, one in zip(ours(frames, [e]), together, strict=True):
            assert torch.equal(alone[0], one[i])


def test_compute_on_one_core_leaves_other_threads_alone() -> None:
    def elsewhere() -> int:
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(torch.get_num_threads).result()

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        with closing(DeadlineExecutor(2)) as executor:
            compute_on_one_core(executor)
            assert [executor.submit(torch.get_num_threads).result() for _ in range(4)] == [1] * 4
        assert torch.get_num_threads() == elsewhere() == 3
    finally:
        torch.set_num_threads(before)


def test_pixel_buffers_are_reused_only_when_unreferenced() -> None:
    memory = ReusedMemory()
    first = memory.floats(2, 3)
    place, part = first.data_ptr(), first[1:]
    del first
    assert memory.floats(2, 3).data_ptr() != place  # a part of it is in use
    assert memory.floats(3, 2).data_ptr() != place
    del part
    both = [memory.floats(2, 3) for _ in range(2)]
    assert place in [tensor.data_ptr() for tensor in both]
