"""A model on one video file: class probabilities, or pooled features."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from bevt_ds.data.files import load_clip
from bevt_ds.eval.features import features_of
from bevt_ds.model.bevt import BEVT
from bevt_ds.model.classifier import VideoClassifier
from bevt_ds.model.video_swin import VideoSwin


@torch.no_grad()
def predict(
    classifier: VideoClassifier, path: str | Path, top: int = 5, frames: int = 32, stride: int = 2, size: int = 224
) -> list[tuple[str, float]]:
    """The most probable classes of the clip in the middle of a video file: (name, probability), the best first.

    A classifier without class names gives their numbers. frames, stride, size: as it was trained, see `load_clip`.
    The model computes in evaluation mode on its own device, and is left in the mode that it was in.

    Raises:
        UserError: the file cannot be used.
    """
    with _evaluating(classifier) as weight:
        clip = load_clip(path, frames, stride, size)[None].to(weight)
        probabilities = classifier(clip)[0].float().softmax(-1)
    names = classifier.arch["classes"] or [str(i) for i in range(len(probabilities))]
    best = probabilities.topk(min(top, len(probabilities)))
    return [(names[i], share) for share, i in zip(best.values.tolist(), best.indices.tolist(), strict=True)]


@torch.no_grad()
def features(
    model: VideoSwin | BEVT | VideoClassifier, path: str | Path, frames: int = 16, stride: int = 8, size: int = 224
) -> Tensor:
    """The mean over all tokens of the encoder's last stage for the clip in the middle of a video file: float32 (C,).

    As a linear probe takes them. frames, stride, size: as the model was trained, see `load_clip`.

    Raises:
        UserError: the file cannot be used.
    """
    encoder = model if isinstance(model, VideoSwin) else model.encoder
    with _evaluating(encoder) as weight:
        clip = load_clip(path, frames, stride, size)[None].to(weight)
        return features_of(encoder, weight.dtype, "linear")(clip)[0]


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[Tensor]:
    """The model in evaluation mode for the block, then as it was; gives a parameter, for device and dtype."""
    mode = model.training
    try:
        model.eval()
        yield next(model.parameters())
    finally:
        model.train(mode)
