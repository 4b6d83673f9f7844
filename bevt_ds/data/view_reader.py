"""The views of samples without a look at their labels, with what a file of features says of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from bevt_ds.config.samples import LabelledDataConfig, ViewsConfig
from bevt_ds.data.decoding.images import check_image, image_decoder
from bevt_ds.data.labelled_reader import LabelledShards, ViewReader
from bevt_ds.data.ledger import Ledger, Skips
from bevt_ds.data.limits import BadSample
from bevt_ds.data.pixels.clip_pixels import as_frames
from bevt_ds.data.plan import LabelledEntry, StreamId, ViewPlan
from bevt_ds.data.reading.members import Member
from bevt_ds.data.stream import Resources


class Reasons(Ledger):
    """A ledger that keeps why the sample of each place cannot be used."""

    def __init__(self, stream: StreamId) -> None:
        super().__init__(stream, None, Skips())
        self.reasons: dict[tuple[int, int], str] = {}  # (step, slot) -> reason

    def reject(self, entry: LabelledEntry, member: Member, bad: BadSample, substitute: Member | None = None) -> None:
        """As Ledger's."""
        self.reasons.setdefault((entry.step, entry.slot), str(bad))  # of a substitute it is another's
        super().reject(entry, member, bad, substitute)


class UnlabelledViews(ViewReader):
    """All views of each video. A batch's label is 0 where the video can be read."""

    stream = StreamId.EVAL_VIDEO
    ledger: Reasons

    def __init__(
        self,
        plan: ViewPlan,
        data: LabelledShards,
        config: LabelledDataConfig,
        shared: Resources,
        device: torch.device,
        views: ViewsConfig,
    ) -> None:
        super().__init__(plan, data, config, shared, Reasons(self.stream), device, views=views)
        self.seconds: dict[tuple[int, int], list[list[float]]] = {}  # (step, slot) -> when each frame is shown, (k,T)

    def _note(self, entry: LabelledEntry, reply: Mapping[str, Any]) -> None:
        super()._note(entry, reply)
        self.seconds[entry.step, entry.slot] = reply["seconds"]


class UnlabelledImages(UnlabelledViews):
    """All crops of each image, as clips of one frame."""

    stream = StreamId.EVAL_IMAGE

    def _frames(self, entry: LabelledEntry) -> Tensor:
        data = self._read(entry)
        check_image(data, self.limits)
        return as_frames(image_decoder().decode(data)[None])
