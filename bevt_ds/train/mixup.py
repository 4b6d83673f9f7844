"""Mixup and cutmix of a micro-batch of clips: timm's, with the randomness of this project.

Letters: B clips, T frames, S pixels, K classes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from timm.data.mixup import Mixup
from torch import Tensor

from bevt_ds.rng import Use, generator


class Mixing:
    """Mixes each clip with the one at the mirrored place of its micro-batch (Zhang 2018; Yun 2019).

    What is drawn depends on the seed, the step, and which micro-batch of the step it is: any number of ranks mixes the
    same clips by the same shares, as long as train.micro_clips is the same.
    """

    def __init__(self, mixup: float, cutmix: float, classes: int, seed: int):
        """mixup, cutmix: alphas of their Beta distributions, 0 for none; with both, each batch takes one of the two."""
        self._mix = Mixup(mixup_alpha=mixup, cutmix_alpha=cutmix, label_smoothing=0.0, num_classes=classes)
        self._seed = seed

    def __call__(self, clips: Tensor, labels: Tensor, step: int, part: int) -> tuple[Tensor, Tensor]:
        """(clips, targets): clips (B,3,T,S,S) mixed in place, and what of each class is in them, float (B,K).

        labels: int64 (B,), B even. part: the micro-batch's number among all of the step.
        """
        frames = clips.flatten(1, 2)  # timm mixes (B,channels,height,width); a box then is the same in all frames
        with _numpy_seeded(self._seed, step, part):
            mixed, targets = self._mix(frames, labels)
        return mixed.view_as(clips), targets


@contextmanager
def _numpy_seeded(seed: int, step: int, part: int) -> Iterator[None]:
    """numpy's global generator, from which timm draws, in a state of its own inside the block."""
    before = np.random.get_state()
    np.random.seed(generator(seed, Use.MIXING, step, part).integers(1 << 32, size=4, dtype=np.uint32))
    try:
        yield
    finally:
        np.random.set_state(before)
