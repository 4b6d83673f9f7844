"""Labelled videos on their way from the shards to micro-batches: of training clips, or of a test's views."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from bevt_ds.batch import LabelledBatch
from bevt_ds.config.schema import LabelledDataConfig, ViewsConfig
from bevt_ds.data.decoding.pool import Load
from bevt_ds.data.labelled_plan import LabelledEntry, LabelledPlan, ViewPlan
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
from bevt_ds.data.reading.members import Shard
from bevt_ds.data.stream import Resources, SampleReader, ShortVideos, Ticket, sample_name
from bevt_ds.rng import Use

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

    def name(self, entry: LabelledEntry) -> str:
        """`shard/key` of a sample."""
        return sample_name(self.shards[entry.shard].member(entry.member))


def _stride(config: LabelledDataConfig) -> int:
    """Frames from one of a clip to the next, at least: segments are as far apart as the video is long."""
    return 1 if config.sampling == "segments" else config.stride


class ClipReader(SampleReader):
    """Training clips: one of each video, augmented. `begin` starts on a micro-batch, `finish` waits for it."""

    def __init__(
        self,
        plan: LabelledPlan,
        data: LabelledShards,
        config: LabelledDataConfig,
        shared: Resources,
        augmenters: ThreadPoolExecutor,
        ledger: Ledger,
        device: torch.device,
    ) -> None:
        super().__init__(plan, data.shards, config, shared, ledger, _stride(config))
        self.data, self.augmenters, self.device = data, augmenters, device

    def finish(self, ticket: Ticket) -> LabelledBatch:
        """The micro-batch: pixels on the device, the rest on the host."""
        clips = [clip for i in range(len(ticket.payloads)) for clip in self._settled(ticket, i)]
        self.ledger.accept(len(clips))
        with self.shared.times.measured("copy"):
            pixels = normalised(torch.stack(clips), self.device)
            self._erase(pixels, ticket.entries)
        keys = [self.plan.key(ticket.step, slot) for slot in ticket.slots]
        return LabelledBatch(
            pixels=pixels,
            labels=torch.tensor([self.data.label(entry) for entry in ticket.entries]),
            sample_keys=torch.tensor(keys),
            keys=tuple(self.data.name(entry) for entry in ticket.entries),
            count=self.plan.global_size,
        )

    def _load(self, load: Load, group: list[LabelledEntry]) -> Future:
        entry, config = group[0], self.config
        read = self.shared.reading(load)
        decoded = self.shared.pool.clips(read, entry.positions, config.frames, config.stride, entry.choice)
        return self.augmenters.submit(self._augmented, decoded, entry)

    def _augmented(self, decoded: Future, entry: LabelledEntry) -> list[Tensor]:
        """The entry's clip once it is decoded: uint8 (T,3,S,S), in a list. BadSample: it cannot be."""
        frames = as_frames(self._unpacked(decoded.result(), entry)[0])
        draw = partial(self.plan.generator, step=entry.step, slot=entry.slot)
        config, size = self.config, self.config.size
        with self.shared.times.measured("augment"):
            frames = with_short_side(frames, config.short_side)
            box = random_box(draw(Use.CROP), *frames.shape[-2:], config.crop_area, config.crop_aspect)
            clip = resized(box.of(frames), size, size)
            if draw(Use.FLIP).random() < config.flip:
                clip = clip.flip(-1)
            if config.randaugment[0]:
                pictures = np.ascontiguousarray(clip.permute(0, 2, 3, 1).numpy())
                clip = as_frames(randaugment(draw(Use.RANDAUGMENT), pictures, *config.randaugment))
        return [clip]

    def _erase(self, pixels: Tensor, entries: Sequence[LabelledEntry]) -> None:
        """Random erasing in place, after normalisation: zero is the mean colour. The same box in all frames."""
        for clip, entry in zip(pixels, entries, strict=True):
            rng = self.plan.generator(Use.ERASING, entry.step, entry.slot)
            if rng.random() < self.config.erasing and (box := erased_box(rng, self.config.size)):
                box.of(clip).zero_()


class ViewReader:
    """All views of each video, for testing. A video that cannot be read is listed and left out: its label is -1."""

    def __init__(
        self,
        plan: ViewPlan,
        data: LabelledShards,
        config: LabelledDataConfig,
        views: ViewsConfig,
        shared: Resources,
        augmenters: ThreadPoolExecutor,
        ledger: Ledger,
        device: torch.device,
    ) -> None:
        self.plan, self.data, self.config, self.views = plan, data, config, views
        self.shared, self.augmenters, self.ledger, self.device = shared, augmenters, ledger, device
        self.short = ShortVideos(config.frames, _stride(config))

    def begin(self, step: int, slots: range) -> Ticket:
        entries = [entry for slot in slots if (entry := self.plan.entry(step, slot))]
        return Ticket(step, slots, entries, [self._load(entry) for entry in entries])

    def finish(self, ticket: Ticket) -> LabelledBatch:
        """The micro-batch: pixels on the device, the rest on the host. Its size is that of `ticket.slots`."""
        size, config = len(ticket.slots), self.config
        views = torch.zeros(
            (size, self.views.clips * self.views.crops, config.frames, 3, config.size, config.size), dtype=torch.uint8
        )
        labels, keys = torch.full((size,), NO_LABEL), [""] * size
        for i, (entry, payload) in enumerate(zip(ticket.entries, ticket.payloads, strict=True)):
            try:
                views[i] = self._result(entry, payload)
            except BadSample as bad:
                self.ledger.reject(entry, self.data.shards[entry.shard].member(entry.member), bad)
                continue
            self.ledger.accept(1)
            labels[i], keys[i] = self.data.label(entry), self.data.name(entry)
        with self.shared.times.measured("copy"):
            pixels = normalised(views, self.device)
        sample_keys = torch.tensor([ticket.step * self.plan.global_size + slot for slot in ticket.slots])
        return LabelledBatch(pixels, labels, sample_keys, tuple(keys), self.plan.videos(ticket.step))

    def _result(self, entry: LabelledEntry, payload: Future) -> Tensor:
        """The views of a video, at the second try if what failed the first may have passed."""
        try:
            return payload.result()
        except BadSample as bad:
            if not bad.transient:
                raise
        return self._load(entry).result()

    def _load(self, entry: LabelledEntry) -> Future:
        config, shared = self.config, self.shared
        load = partial(shared.storage.read, self.data.shards[entry.shard].member(entry.member), shared.times)
        read = shared.reading(load)
        decoded = shared.pool.clips(read, entry.positions, config.frames, config.stride, entry.choice)
        return self.augmenters.submit(self._viewed, decoded, entry)

    def _viewed(self, decoded: Future, entry: LabelledEntry) -> Tensor:
        """The views of the entry's video once it is decoded: uint8 (V,T,3,S,S)."""
        reply, clips = decoded.result()
        self.short.look_at(self.data.name(entry), reply["total"])
        with self.shared.times.measured("augment"):
            frames = with_short_side(as_frames(clips.reshape(-1, *clips.shape[2:])), self.views.short_side)
            boxes = view_boxes(*frames.shape[-2:], self.config.size, self.views.crops)
            return stacked_views(frames, boxes, len(clips))
