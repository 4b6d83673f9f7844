"""data.clips_per_video: several clips from one decode of a video."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
import torch

from bevt_ds.config.samples import DataConfig
from bevt_ds.config.schema import Config
from bevt_ds.config.validate import validate
from bevt_ds.data.decoding.pool import DecodePool
from bevt_ds.data.limits import BadSample
from bevt_ds.data.loader import Loader, OneRank
from bevt_ds.data.plan import StreamId, StreamPlan, clip_frames
from bevt_ds.errors import UserError

COUNTS = (5, 3, 4)


@pytest.fixture
def paired(config: Config) -> Config:
    return replace(config, data=replace(config.data, clips_per_video=2))


def test_one_clip_per_video_keeps_the_plan() -> None:
    once = StreamPlan(StreamId.VIDEO, COUNTS, DataConfig(), 0, 6).entry(3, 2)
    assert once.phase == 0.0
    others = StreamPlan(StreamId.IMAGE, COUNTS, DataConfig(clips_per_video=2), 0, 6)
    assert others.clips_per_sample == 1  # of images there is nothing to decode twice
    held_out = StreamPlan(StreamId.EVAL_VIDEO, COUNTS, DataConfig(clips_per_video=2), 0, 6)
    assert held_out.clips_per_sample == 1  # each held-out video counts once


def test_clips_of_a_group_share_a_video_and_differ_in_crop_and_mask() -> None:
    plan = StreamPlan(StreamId.VIDEO, COUNTS, DataConfig(clips_per_video=3), 0, 6)
    entries = [plan.entry(step, slot) for step in range(6) for slot in range(6)]
    groups = [entries[i : i + 3] for i in range(0, 36, 3)]
    for group in groups:
        assert len({(e.shard, e.member, e.start) for e in group}) == 1
        assert len({e.phase for e in group}) == len({e.crop for e in group}) == 3
    assert len({(g[0].shard, g[0].member) for g in groups}) == 12  # an epoch shows each video in one group
    assert all((plan.masks(0)[0] != plan.masks(0)[i]).any() for i in (1, 2))
    again = [plan.entry(2, slot, attempt=1) for slot in range(3)]
    assert len({(e.shard, e.member) for e in again}) == 1


def test_clip_phases_stay_within_the_span() -> None:
    for phase in np.linspace(0, 0.999, 7):
        numbers = clip_frames(0.9999, 100, 8, 4, phase)
        assert numbers[0] - clip_frames(0.9999, 100, 8, 4)[0] == int(4 * phase)
        assert (np.diff(numbers) == 4).all() and numbers.max() < 100


def test_grouped_clips_equal_single_decodes(paired: Config, monkeypatch) -> None:
    decodes = []
    real = DecodePool.clips
    monkeypatch.setattr(
        DecodePool,
        "clips",
        lambda self, data, starts, *a, **k: decodes.append(starts) or real(self, data, starts, *a, **k),
    )
    with Loader(paired) as loader:
        batches = list(islice(loader, 4))
        plan = loader._reader._readers[StreamId.VIDEO].plan
    assert all(len(starts) == 2 for starts in decodes)
    views = torch.cat([b.video.view for b in batches])
    assert not torch.equal(views[0], views[1])
    solo = replace(paired, data=replace(paired.data, clips_per_video=1))
    real_entry = StreamPlan.entry

    def same_entry(self, *arguments):
        return real_entry(plan if self.stream == plan.stream else self, *arguments)

    monkeypatch.setattr(StreamPlan, "entry", same_entry)
    with Loader(solo) as loader:
        alone = torch.cat([b.video.view for b in islice(loader, 4)])
    assert torch.equal(views, alone)


def test_grouped_clips_do_not_depend_on_ranks_or_resume(paired: Config) -> None:
    with Loader(paired) as loader:
        whole = list(islice(loader, 6))
    dealt = []
    for rank in range(2):
        with Loader(paired, OneRank(rank, 2)) as loader:
            dealt.append(list(islice(loader, 3)))
    with Loader(paired, start_step=1) as loader:
        later = list(islice(loader, 2))
    for i, batch in enumerate(whole):
        assert torch.equal(dealt[i % 2][i // 2].video.pixels, batch.video.pixels)
    assert torch.equal(later[0].video.pixels, whole[2].video.pixels)


def test_bad_video_is_replaced_for_all_its_clips(paired: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    real, seen = DecodePool.clips, []

    def first_is_bad(self, data, starts, *arguments, **more):
        seen.append(starts)
        if len(seen) == 1:
            raise BadSample("spoilt")
        return real(self, data, starts, *arguments, **more)

    monkeypatch.setattr(DecodePool, "clips", first_is_bad)
    with Loader(paired) as loader:
        batch = next(loader)
        assert loader.bad_samples == 1
    assert batch.video.pixels.shape[0] == 2


def test_clips_of_a_group_stay_on_one_rank(paired: Config, with_data: Callable) -> None:
    with pytest.raises(UserError, match="train.micro_clips=2: must be a multiple of data.clips_per_video=3"):
        validate(with_data(clips_per_video=3))
