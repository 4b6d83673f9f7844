"""Streams whose micro-batches go through DALI's graph: images, and all that a GPU prepares."""

from __future__ import annotations

import logging
from functools import cached_property, partial
from typing import Any

import numpy as np
from torch import Tensor

from bevt_ds.data.decoding.images import check_image, image_decoder
from bevt_ds.data.decoding.split import Split
from bevt_ds.data.decoding.video import fits_gpu
from bevt_ds.data.limits import BadSample
from bevt_ds.data.pixels.pipeline import PixelPipeline
from bevt_ds.data.plan import PlanEntry, clip_frames
from bevt_ds.data.stream import PendingBatch, StreamReader

log = logging.getLogger(__name__)
NVDEC, WORKERS = "NVDEC", "workers"  # the lanes of a split
MOST_REFUSALS = 20  # batches in a row, after which DALI's decoder gets no more


class GraphReader(StreamReader):
    """A thread reads each sample, and the graph makes the pixels of the whole micro-batch."""

    def __init__(
        self,
        *arguments: Any,
        pixels: PixelPipeline,
        split: Split | None = None,
        **more: Any,
    ) -> None:
        """split: deals clips out to the GPU's decoder and the workers. What the first refuses a worker decodes."""
        super().__init__(*arguments, **more)
        self.pixels, self.split = pixels, split
        self._refusals, self._refused = 0, -1  # batches in a row that DALI refused and the CPU decoded; the last one

    def _sample(self, pending: PendingBatch, i: int, group: list[PlanEntry]) -> list:
        """What the graph takes for each clip, or for the image.

        DALI's decoder takes a video's file and frame numbers, once a worker has looked at it and decoded a frame. What
        is not for it is decoded by the worker.
        """
        if pending.ids is not None:
            self._take_ids(pending, i, group)
        data = self._read(group[0])
        if self.plan.kind == "image":
            check_image(data, self.limits)
            return [data]
        if self.split:
            works = {NVDEC: partial(self._gpu_frames, data, group), WORKERS: partial(self._frames, data, group)}
            return self.split.run(works) or self._frames(data, group)
        if not self.pixels.dali_decoder:
            return self._frames(data, group)
        reply = self.shared.pool.describe(data)
        if (total := reply["frames"]) < self._span:
            self._note_short(group[0], total)
        if not fits_gpu(reply):
            return self._frames(data, group)
        frames, stride = self.config.frames, self.config.stride
        return [(data, clip_frames(e.start, total, frames, stride, e.phase)) for e in group]

    def _frames(self, data: bytes, group: list[PlanEntry]) -> list[np.ndarray | Tensor]:
        """The frames of each clip, decoded by a worker: uint8 (T,H,W,3)."""
        starts = [(entry.start, entry.phase) for entry in group]
        with self.shared.pool.clips(data, starts, self.config.frames, self.config.stride) as decoded:
            clips = list(map(self.pixels.placed, decoded.copied()))
        self._note(group[0], decoded.reply)
        return clips

    def _gpu_frames(self, data: bytes, group: list[PlanEntry]) -> list[np.ndarray | Tensor]:
        """The same, decoded on the GPU. GpuRefusal."""
        starts = [(entry.start, entry.phase) for entry in group]
        clips, reply = self.shared.gpu.clips(data, starts, self.config.frames, self.config.stride)
        self._note(group[0], reply)
        return list(map(self.pixels.placed, clips))

    def _pixels(self, pending: PendingBatch) -> tuple[Tensor, Tensor]:
        clips: list = []
        for i in range(len(pending.samples)):
            clips += self._settled(pending, i)
            self.ledger.end_row()
        if pending.refusal:  # by the graph of another process; the samples are counted
            return self._run(self._as_frames(pending), pending.entries, pending.masked)
        pixels = self._accepted(pending, clips) or self._run(self._as_frames(pending), pending.entries, pending.masked)
        self.ledger.accept(len(pending.samples))
        return pixels

    def _accepted(self, pending: PendingBatch, clips: list) -> tuple[Tensor, Tensor] | None:
        """Pixels and view; None where DALI's decoder refuses one of the clips, or gets no more."""
        if self._refusals >= MOST_REFUSALS and self.pixels.dali_decoder:
            return None
        try:
            return self._run(clips, pending.entries, pending.masked)
        except BadSample as bad:  # DALI does not say which
            pending.refusal = str(bad)
            return None

    def _run(self, clips: list, entries: list[PlanEntry], masked: np.ndarray) -> tuple[Tensor, Tensor]:
        """Through the graph; clips that arrive as frames, though DALI decodes, go through one without a decoder."""
        pipelines = [self._pipeline(clip) for clip in clips]
        if all(pipeline is pipelines[0] for pipeline in pipelines):
            return pipelines[0].run(clips, entries, masked)
        samples = zip(pipelines, clips, entries, masked, strict=True)
        return self.pixels.joined([p.run([clip], [entry], frames[None]) for p, clip, entry, frames in samples])

    def _pipeline(self, clip: Any) -> PixelPipeline:
        return self._frames_pixels if self.pixels.dali_decoder and isinstance(clip, np.ndarray) else self.pixels

    @cached_property
    def _frames_pixels(self) -> PixelPipeline:
        return self.pixels.without_decoder()

    def _as_frames(self, pending: PendingBatch) -> list[np.ndarray]:
        """All samples decoded without DALI's decoder of videos, or its GPU's of images; substitutes for bad ones."""
        bad, executor = self.ledger.bad, self.shared.storage.executor
        for i, sample in enumerate(pending.samples):
            pending.samples[i] = executor.submit(self._decoded, sample.result(), self._group(pending, i))
        clips: list[np.ndarray] = []
        for i in range(len(pending.samples)):
            while True:
                settled = self._settled(pending, i)
                try:
                    clips += self._decoded(settled, self._group(pending, i))
                    break
                except BadSample as refused:
                    self._substitute(pending, i, refused)
            self.ledger.end_row()
        if pending.refusal:
            self._note_refusal(pending, is_fault=self.ledger.bad == bad)
        return clips

    def _note_refusal(self, pending: PendingBatch, is_fault: bool) -> None:
        """Count a batch that DALI has refused. is_fault: though nothing is wrong with any of its samples."""
        if pending.number > self._refused + 1:  # it has taken others since
            self._refusals = 0
        self._refused = pending.number
        if is_fault:
            self._refusals += 1
            self._say(pending.refusal)

    def _decoded(self, clips: list, group: list[PlanEntry]) -> list[np.ndarray]:
        """A sample's frames, or its image, by the CPU, if they are not decoded yet. BadSample."""
        if isinstance(clips[0], bytes):
            return [image_decoder().decode(clips[0])]
        return self._frames(clips[0][0], group) if isinstance(clips[0], tuple) else clips

    def _say(self, refusal: str) -> None:
        if self._refusals in (1, MOST_REFUSALS):
            what = "decodes no more" if self._refusals > 1 else "refuses a batch that the CPU decodes"
            log.warning("DALI's decoder of %ss %s: %s", self.plan.kind, what, refusal)
