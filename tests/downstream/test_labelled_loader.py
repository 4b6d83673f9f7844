"""Labelled batches: the same for any number of ranks and after any resume, each video with its own label."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from itertools import islice, pairwise
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from bevt_ds.batch import LabelledBatch
from bevt_ds.config.samples import LabelledDataConfig, ViewsConfig
from bevt_ds.config.schema import FinetuneTrainConfig
from bevt_ds.data import labelled_loader
from bevt_ds.data.decoding.pool import DecodePool
from bevt_ds.data.decoding.video import opened
from bevt_ds.data.labelled_loader import LabelledLoader
from bevt_ds.data.limits import BadSample, Limits
from bevt_ds.data.loader import LEDGER, OneRank
from bevt_ds.data.pixels.clip_pixels import random_box
from bevt_ds.data.plan import LabelledPlan
from bevt_ds.errors import UserError
from bevt_ds.rng import Use
from tests.batches import assert_same
from tests.loader.media import repacked

TRAIN = FinetuneTrainConfig(global_clips=6, micro_clips=1, seed=3)
VIEWS = ViewsConfig(clips=2, crops=3, short_side=72, micro_videos=2)


def take(config: LabelledDataConfig, batches: int, **arguments) -> list[LabelledBatch]:
    with LabelledLoader(config, TRAIN, **arguments) as loader:
        return list(islice(loader, batches))


def views(config: LabelledDataConfig, **arguments) -> list[LabelledBatch]:
    return list(labelled_loader.test_batches(config, VIEWS, **arguments))


@pytest.fixture(scope="module")
def batches(labelled: LabelledDataConfig) -> list[LabelledBatch]:
    """Two steps of one rank."""
    return take(labelled, 12)


def test_labelled_batch_shapes_dtypes_and_count(labelled: LabelledDataConfig) -> None:
    with LabelledLoader(labelled, replace(TRAIN, micro_clips=3)) as loader:
        batch = next(loader)
        assert loader.classes.names == ("run", "sit", "walk")
        assert (loader.videos, loader.steps_an_epoch, loader.micro_steps) == (11, 1, 2)
        assert loader.wait_seconds() > 0 and "bottleneck" in loader.bottleneck()
    assert batch.pixels.shape == (3, 3, 8, 64, 64) and batch.pixels.dtype == torch.float32
    assert batch.pixels.is_contiguous() and batch.labels.dtype == batch.sample_keys.dtype == torch.int64
    assert batch.count == 6 and len(batch.keys) == 3
    assert batch.cast(torch.bfloat16).to("cpu").pixels.dtype == torch.bfloat16


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_labelled_batches_on_a_gpu_equal_those_on_a_cpu(labelled, batches) -> None:
    for on_cpu, on_gpu in zip(batches, take(labelled, 12, device="cuda:0"), strict=True):
        assert {on_gpu.pixels.device, on_gpu.labels.device, on_gpu.sample_keys.device} == {torch.device("cuda", 0)}
        torch.testing.assert_close(on_gpu.pixels.cpu(), on_cpu.pixels)
        assert torch.equal(on_gpu.labels.cpu(), on_cpu.labels) and on_gpu.keys == on_cpu.keys


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_get_disjoint_shares_of_the_labelled_batch(labelled, batches, world: int) -> None:
    by_rank = [take(labelled, 12 // world, ranks=OneRank(rank, world)) for rank in range(world)]
    assert_same([by_rank[i % world][i // world] for i in range(12)], batches)


def test_labelled_loader_started_at_a_later_step_gives_the_same_batches(labelled, batches) -> None:
    assert_same(take(replace(labelled, workers=2, threads=2, prefetch=1), 6, start_step=1), batches[6:])


def test_labelled_order_differs_between_epochs(labelled: LabelledDataConfig) -> None:
    """Shard by shard, where data.shuffle_window is 1."""
    plan = LabelledPlan([4, 4, 3], replace(labelled, shuffle_window=1), TRAIN.seed, 1)
    epochs = [[plan.entry(step, 0) for step in range(first, first + 11)] for first in (0, 11, 22)]
    orders = {tuple((e.shard, e.member) for e in epoch) for epoch in epochs}
    assert len(orders) == 3 and all(len(set(order)) == 11 for order in orders)
    assert all(sum(a.shard != b.shard for a, b in pairwise(epoch)) == 2 for epoch in epochs)


def test_labelled_epoch_shows_every_video_once_with_its_label(batches: list[LabelledBatch]) -> None:
    keys = [batch.keys[0] for batch in batches[:11]]
    assert len(set(keys)) == 11
    for batch in batches:
        number = int(batch.keys[0][-2:])
        assert batch.labels.tolist() == [(2 + number) % 3]
        assert batch.keys[0] == f"train-{number // 4:06d}.tar/clip-{number:02d}"
    assert len({int(batch.sample_keys) for batch in batches}) == 12


def test_segment_sampling_spans_the_whole_video(labelled: LabelledDataConfig) -> None:
    """8 of 20 frames from all over the video, so its two ends differ more than those of a dense clip of 8."""
    plain = replace(labelled, randaugment=(0, 0), erasing=0.0, crop_area=(1.0, 1.0), crop_aspect=(1.3, 1.4))
    span = [
        sum(float((b.pixels[:, :, 0] - b.pixels[:, :, -1]).abs().mean()) for b in take(config, 12))
        for config in (replace(plain, stride=1), replace(plain, sampling="segments"))
    ]
    assert span[1] > 1.2 * span[0]


MEAN, STD = np.array([123.675, 116.28, 103.53]), np.array([58.395, 57.12, 57.375])


def levels(pixels: torch.Tensor) -> np.ndarray:
    """Normalised (3,T,S,S) -> levels of 255, (T,S,S,3)."""
    return pixels.permute(1, 2, 3, 0).numpy() * STD + MEAN


def decoded(video: bytes) -> np.ndarray:
    """Every frame: uint8 (N,H,W,3)."""
    with opened(video, Limits()) as file:
        return file.frames(np.arange(20))


@pytest.mark.parametrize(("flip", "least", "most"), [(0.0, 0, 0), (0.5, 1, 5), (1.0, 6, 6)])
def test_training_pixels_equal_the_original_steps_in_opencv(labelled, labelled_videos, flip, least, most: int) -> None:
    """Two resizes, each within a level; see clip_pixels.py. Never a flip where direction is the label."""
    plain = replace(labelled, randaugment=(0, 0), erasing=0.0, flip=flip)
    plan = LabelledPlan([4, 4, 3], plain, TRAIN.seed, TRAIN.global_clips)
    flips = 0
    for slot, batch in enumerate(take(plain, 6)):
        entry = plan.entry(0, slot)
        video = decoded(labelled_videos[f"clip-{4 * entry.shard + entry.member:02d}.mp4"])
        frames = [cv2.resize(frame, (96, 72)) for frame in video[int(entry.positions[0][0] * 5) :: 2][:8]]
        box = random_box(plan.generator(Use.CROP, 0, slot), 72, 96, plain.crop_area, plain.crop_aspect)
        crops = [f[box.top : box.top + box.height, box.left : box.left + box.width] for f in frames]
        expected = np.stack([cv2.resize(crop, (64, 64)) for crop in crops]).astype(float)
        flipped = plan.generator(Use.FLIP, 0, slot).random() < flip
        difference = np.abs(levels(batch.pixels[0]) - (expected[:, :, ::-1] if flipped else expected))
        assert difference.max() < 2.01 and difference.mean() < 0.5
        flips += flipped
    assert least <= flips <= most


def test_test_views_equal_the_original_steps_in_opencv(labelled, labelled_videos) -> None:
    """20 frames hold starts 0 to 4 of a span of 16: the middles of their halves are 1 and 3."""
    batch = next(labelled_loader.test_batches(labelled, replace(VIEWS, short_side=66)))
    for video, name in zip(batch.pixels, labelled_videos, strict=False):
        frames = decoded(labelled_videos[name])
        for view, (start, left) in zip(video, [(s, x) for s in (1, 3) for x in (0, 24, 12)], strict=True):
            resized = [cv2.resize(frame, (88, 66)) for frame in frames[start::2][:8]]
            expected = np.stack([frame[1:65, left : left + 64] for frame in resized]).astype(float)
            difference = np.abs(levels(view) - expected)
            assert difference.max() < 1.01 and difference.mean() < 0.3


def test_random_erasing_blackens_one_box_in_all_frames(labelled: LabelledDataConfig) -> None:
    always, never = (take(replace(labelled, erasing=p), 3) for p in (1.0, 0.0))
    for erased, whole in zip(always, never, strict=True):
        changed = (erased.pixels != whole.pixels)[0].any(0)  # (T,S,S)
        assert 0.015 * 64**2 < int(changed[0].sum()) <= 64**2 / 3 + 64
        assert torch.equal(changed, changed[:1].expand_as(changed))
        assert (erased.pixels[0][:, changed] == 0).all()


@pytest.mark.parametrize("world", [1, 3])
def test_validation_shows_every_video_once(labelled: LabelledDataConfig, world: int) -> None:
    by_rank = [views(labelled, rank=rank, world=world) for rank in range(world)]
    assert len({len(part) for part in by_rank}) == 1
    order = [batch for step in zip(*by_rank, strict=True) for batch in step]
    keys = [key for batch in order for key in batch.keys]
    labels = torch.cat([batch.labels for batch in order])
    assert keys[:7] == [f"val-{i // 4:06d}.tar/clip-{i:02d}" for i in range(7)] and set(keys[7:]) == {""}
    assert labels[:7].tolist() == [(2 + i) % 3 for i in range(7)] and set(labels[7:].tolist()) == {-1}
    assert all(batch.pixels.shape == (2, 6, 3, 8, 64, 64) for batch in order)
    assert [batch.count for batch in by_rank[0]] == ([2, 2, 2, 1] if world == 1 else [6, 1])


def test_test_views_do_not_depend_on_ranks_and_differ_from_each_other(labelled: LabelledDataConfig) -> None:
    alone = torch.cat([batch.pixels for batch in views(labelled)])[:7]
    shared = [views(labelled, rank=rank, world=3) for rank in range(3)]
    together = torch.cat([shared[i % 3][i // 3].pixels for i in range(6)])[:7]
    assert torch.equal(alone, together)
    video = alone[0]
    assert all(not torch.equal(video[i], video[j]) for i in range(6) for j in range(i))


def test_single_test_crop_is_the_middle_one_of_three(labelled: LabelledDataConfig) -> None:
    three = next(labelled_loader.test_batches(labelled, VIEWS))
    one = next(labelled_loader.test_batches(labelled, replace(VIEWS, crops=1)))
    assert torch.equal(one.pixels, three.pixels[:, 2::3])


def test_video_shorter_than_the_clip_is_repeated(labelled, caplog) -> None:
    long = replace(labelled, frames=24, stride=1)  # of 20 frames
    video = views(long)[0].pixels[0, 0]
    assert torch.equal(video[:, 20:], video[:, :4]) and not torch.equal(video[:, 20:], video[:, 4:8])
    assert len(caplog.messages) == 1 and "has 20 frames, and a clip spans 24" in caplog.messages[0]
    assert take(long, 1)[0].pixels.shape == (1, 3, 24, 64, 64)
    assert len(caplog.messages) == 2


def test_video_as_long_as_the_clip_gives_no_warning(labelled, caplog) -> None:
    dense = (20, 1), (10, 2)  # the last frame of the latter is the 19th
    exact = [replace(labelled, frames=frames, stride=stride) for frames, stride in dense]
    for config in (*exact, replace(labelled, frames=20, sampling="segments")):
        with closing(labelled_loader.test_batches(config, VIEWS)) as batches:
            next(batches)
    assert caplog.messages == []


@pytest.fixture
def damaged(labelled: LabelledDataConfig, labelled_shards: Path, tmp_path: Path) -> Callable[[str, int], str]:
    """The shards of a split in one tar, in which a video is cut after half of its bytes."""

    def build(split: str, broken: int) -> str:
        cut = lambda name, data: data[: len(data) // (2 if name == f"clip-{broken:02d}.mp4" else 1)]  # noqa: E731
        return repacked(labelled_shards.glob(f"{split}-*.tar"), tmp_path / f"{split}-000000.tar", cut)

    return build


def test_bad_training_video_is_replaced_and_listed(labelled, damaged, tmp_path) -> None:
    config = replace(labelled, train=damaged("train", 4))
    whole = take(config, 12, folder=tmp_path)
    events = [json.loads(line) for line in (tmp_path / LEDGER).read_text().splitlines()]
    assert {event["key"] for event in events} == {"clip-04"} and events[0]["stream"] == "labelled"
    for batch in whole:
        number = int(batch.keys[0][-2:])
        assert number != 4 and batch.labels.tolist() == [(2 + number) % 3]
    assert_same(take(config, 6, start_step=1), whole[6:])


def test_bad_validation_video_is_left_out_and_listed(labelled, damaged, tmp_path) -> None:
    found = views(replace(labelled, val=damaged("val", 4)), folder=tmp_path)
    events = [json.loads(line) for line in (tmp_path / LEDGER).read_text().splitlines()]
    assert [event["key"] for event in events] == ["clip-04"] and events[0]["stream"] == "test"
    assert sum(int((batch.labels >= 0).sum()) for batch in found) == 6
    assert found[2].labels.tolist() == [-1, (2 + 5) % 3] and found[2].keys[0] == ""


def test_validation_video_that_timed_out_is_tried_again(labelled, monkeypatch) -> None:
    real, asked = DecodePool.clips, []

    def first_takes_long(self: DecodePool, *arguments, **named):
        asked.append(arguments)
        if len(asked) > 1:
            return real(self, *arguments, **named)
        raise BadSample("not decoded within 20 s", transient=True)

    monkeypatch.setattr(DecodePool, "clips", first_takes_long)
    assert sum(int((batch.labels >= 0).sum()) for batch in views(labelled)) == 7 and len(asked) == 8


def test_closing_the_labelled_loader_ends_threads_and_processes(labelled: LabelledDataConfig) -> None:
    before = threading.active_count()
    loader = LabelledLoader(labelled, TRAIN)
    next(loader)
    pids = loader.worker_pids
    loader.close()
    loader.close()
    assert pids and not any(Path(f"/proc/{pid}").exists() for pid in pids)
    assert threading.active_count() == before


def test_abandoned_test_batches_end_their_processes(labelled: LabelledDataConfig) -> None:
    before = threading.active_count()
    batches = labelled_loader.test_batches(labelled, VIEWS)
    next(batches)
    assert threading.active_count() > before
    batches.close()
    assert threading.active_count() == before


def test_labelled_fingerprint_depends_on_labels(labelled, pack_labelled, tmp_path) -> None:
    others = pack_labelled(tmp_path, "train", ["run", "sit", "walk", "walk"] + ["sit"] * 7)
    prints = set()
    for train in (labelled.train, labelled.train, others):
        with LabelledLoader(replace(labelled, train=train), TRAIN) as loader:
            prints.add(loader.fingerprint)
    assert len(prints) == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train": ""}, "data.train is empty"),
        ({"train": "nothing-*.tar"}, "no file matches"),
        ({"short_side": 60}, "data.short_side=60: a side below data.size=64 cannot hold the crop"),
        ({"size": 50}, "data.size=50: must be a multiple of 32"),
        ({"frames": 0}, "data.frames=0"),
        ({"crop_area": (0.5, 0.1)}, r"data.crop_area=\(0.5, 0.1\)"),
        ({"crop_aspect": (0.0, 1.0)}, "data.crop_aspect"),
        ({"flip": 1.5}, r"data.flip=1.5: must be in \[0, 1\]"),
        ({"randaugment": (4, 31)}, r"data.randaugment=\(4, 31\): must be in \[0, 30\]"),
        ({"decoder": "gpu"}, "data.decoder=gpu"),
    ],
)
def test_labelled_data_mistakes_are_named_before_reading(labelled, changes: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        LabelledLoader(replace(labelled, **changes), TRAIN)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"short_side": 32}, "views.short_side=32: a side below data.size=64"),
        ({"crops": 2}, "views.crops=2: must be 1 or 3"),
        ({"clips": 0}, "views.clips=0"),
        ({"micro_videos": 0}, "views.micro_videos=0"),
    ],
)
def test_impossible_views_are_named(labelled: LabelledDataConfig, changes: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        next(labelled_loader.test_batches(labelled, replace(VIEWS, **changes)))


def test_labelled_batch_sizes_that_do_not_divide_are_refused(labelled: LabelledDataConfig) -> None:
    with pytest.raises(UserError, match="with 4 ranks|multiple of the 4 ranks"):
        LabelledLoader(labelled, TRAIN, OneRank(0, 4))
