"""Labelled videos on their way from the shards to micro-batches: of training clips, or of a test's views."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bevt_ds.batch import LabelledBatch
from bevt_ds.config.samples import LabelledDataConfig, ViewsConfig
from bevt_ds.data.labels import Classes
from bevt_ds.data.ledger import Ledger
from bevt_ds.data.limits import BadSample
from bevt_ds.data.pixels.clip_pixels import (
    as_frames,
    erased_box,
    normalised,
    random_box,
    resized,
    stacked_views,
    view_boxes,
    with_short_side,
)
from bevt_ds.data.pixels.randaugment import randaugment
from bevt_ds.data.plan import LabelledEntry, LabelledPlan, ViewPlan
from bevt_ds.data.reading.members import Shard
from bevt_ds.data.stream import PendingBatch, Resources, SampleReader, sample_name
from bevt_ds.rng import Use, sample_key

NO_LABEL = -1


@dataclass(frozen=True)
class LabelledShards:
    """Shards, and the class of each of their samples."""

    shards: Sequence[Shard]
    labels: Sequence[np.ndarray]  # int64 (samples,) for each shard

    @classmethod
    def of(cls, shards: Sequence[Shard], classes: Classes) -> LabelledShards:
        """UserError: a label that is no class."""
        return cls(shards, [classes.labels(shard) for shard in shards])

    @property
    def counts(self) -> list[int]:
        return [len(shard) for shard in self.shards]

    def label(self, entry: LabelledEntry) -> int:
        return int(self.labels[entry.shard][entry.member])


class LabelledReader(SampleReader):
    """What training clips and views have in common: a video is decoded and its frames copied, then augmented."""

    plan: LabelledPlan | ViewPlan
    config: LabelledDataConfig

    def __init__(
        self,
        plan: LabelledPlan | ViewPlan,
        data: LabelledShards,
        config: LabelledDataConfig,
        shared: Resources,
        ledger: Ledger,
        device: torch.device,
    ) -> None:
        stride = 1 if config.sampling == "segments" else config.stride  # segments are as far apart as a video is long
        super().__init__(plan, data.shards, config, shared, ledger, stride)
        self.data, self.device = data, device

    def _frames(self, entry: LabelledEntry) -> Tensor:
        """The frames of all clips of a video, clip by clip: uint8 (k*T,3,H,W). BadSample: it cannot be decoded."""
        config, data = self.config, self._read(entry)
        with self.shared.pool.clips(data, entry.positions, config.frames, config.stride, entry.choice) as decoded:
            frames = decoded.frames[decoded.places.reshape(-1)]
        self._note(entry, decoded.reply)
        return as_frames(frames)

    def _name(self, entry: LabelledEntry) -> str:
        return sample_name(self._member(entry))


class TrainingReader(LabelledReader):
    """Training clips: one of each video, augmented. `begin` starts on a micro-batch, `finish` waits for it."""

    plan: LabelledPlan

    def finish(self, pending: PendingBatch) -> LabelledBatch:
        """The micro-batch: pixels on the device, the rest on the host."""
        clips = [self._settled(pending, i) for i in range(len(pending.samples))]
        self.ledger.accept(len(clips))
        with self.shared.times.measured("copy"):
            pixels = normalised(torch.stack(clips), self.device)
            self._erase(pixels, pending.entries)
        keys = [sample_key(self.plan.seed, self.plan.stream, pending.step, slot) for slot in pending.slots]
        return LabelledBatch(
            pixels=pixels,
            labels=torch.tensor([self.data.label(entry) for entry in pending.entries]),
            sample_keys=torch.tensor(keys),
            keys=tuple(map(self._name, pending.entries)),
            count=self.plan.global_size,
        )

    def _sample(self, pending: PendingBatch, i: int, group: list[LabelledEntry]) -> Tensor:
        """The clip, augmented: uint8 (T,3,S,S)."""
        (entry,), config, size = group, self.config, self.config.size
        frames, draw = self._frames(entry), partial(self.plan.generator, step=entry.step, slot=entry.slot)
        with self.shared.cores, self.shared.times.measured("augment"):
            frames = with_short_side(frames, config.short_side)
            box = random_box(draw(Use.CROP), *frames.shape[-2:], config.crop_area, config.crop_aspect)
            clip = resized(box.of(frames), size, size)
            if draw(Use.FLIP).random() < config.flip:
                clip = clip.flip(-1)
            if config.randaugment[0]:
                images = np.ascontiguousarray(clip.permute(0, 2, 3, 1).numpy())
                clip = as_frames(randaugment(draw(Use.RANDAUGMENT), images, *config.randaugment))
        return clip

    def _erase(self, pixels: Tensor, entries: Sequence[LabelledEntry]) -> None:
        """Random erasing in place, after normalisation: zero is the mean colour. The same box in all frames."""
        for clip, entry in zip(pixels, entries, strict=True):
            rng = self.plan.generator(Use.ERASING, entry.step, entry.slot)
            if rng.random() < self.config.erasing and (box := erased_box(rng, self.config.size)):
                box.of(clip).zero_()


class ViewReader(LabelledReader):
    """All views of each video, for testing. A video that cannot be read is listed and left out: its label is -1."""

    plan: ViewPlan

    def __init__(self, *arguments: Any, views: ViewsConfig) -> None:
        super().__init__(*arguments)
        self.views, self._remote = views, False  # shards are fetched when their turn comes

    def finish(self, pending: PendingBatch) -> LabelledBatch:
        """The micro-batch: pixels on the device, the rest on the host. Its size is that of `pending.slots`."""
        size, config = len(pending.slots), self.config
        views = torch.zeros(
            (size, self.views.clips * self.views.crops, config.frames, 3, config.size, config.size), dtype=torch.uint8
        )
        labels, keys = torch.full((size,), NO_LABEL), [""] * size
        for i, entry in enumerate(pending.entries):
            try:
                views[i] = self._second_try(pending, i)
            except BadSample as bad:
                self.ledger.reject(entry, self._member(entry), bad)
                continue
            self.ledger.accept(1)
            labels[i], keys[i] = self.data.label(entry), self._name(entry)
        with self.shared.times.measured("copy"):
            pixels = normalised(views, self.device)
        sample_keys = torch.tensor([pending.step * self.plan.global_size + slot for slot in pending.slots])
        return LabelledBatch(pixels, labels, sample_keys, tuple(keys), self.plan.videos(pending.step))

    def _second_try(self, pending: PendingBatch, i: int) -> Tensor:
        """The views of a video, at the second try if what failed the first may have passed."""
        try:
            return pending.samples[i].result()
        except BadSample as bad:
            if not bad.transient:
                raise
        return self._start(pending, i, self._group(pending, i)).result()

    def _sample(self, pending: PendingBatch, i: int, group: list[LabelledEntry]) -> Tensor:
        """The views of a video: uint8 (V,T,3,S,S)."""
        frames = self._frames(group[0])
        with self.shared.cores, self.shared.times.measured("augment"):
            frames = with_short_side(frames, self.views.short_side)
            boxes = view_boxes(*frames.shape[-2:], self.config.size, self.views.crops)
            return stacked_views(frames, boxes, self.views.clips)
