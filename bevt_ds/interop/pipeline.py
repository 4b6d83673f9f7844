"""From a path or frames to features or class probabilities in one call."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from bevt_ds.config.recipes import get_recipe
from bevt_ds.config.samples import LabelledDataConfig
from bevt_ds.config.schema import FinetuneConfig
from bevt_ds.data.files import centred, is_image, read_frames, read_image
from bevt_ds.data.plan import CHOICES
from bevt_ds.errors import UserError
from bevt_ds.eval.results import run_of, sampling_of, without_classifier
from bevt_ds.model.frozen_swin import FrozenModel, load_frozen

Task = Literal["auto", "features", "classes"]
TASKS = ("auto", "features", "classes")


class Pipeline:
    """What `pipeline` makes. Calling it gives class probabilities, best first, or features; see there."""

    def __init__(self, model: FrozenModel, data: LabelledDataConfig, short_side: int, classifies: bool, dense: bool):
        self.model, self.data, self.short_side = model, data, short_side
        self.classifies, self.dense = classifies, dense

    @torch.no_grad()
    def __call__(self, source: str | Path | np.ndarray | Tensor | Sequence[Any]) -> dict[str, float] | Tensor:
        """Of a video or image file, of frames uint8 (T,H,W,3), or of an image uint8 (H,W,3), in RGB.

        As many frames as the model takes are taken as they are; from more, or fewer, they are chosen as from a video's.

        Raises:
            UserError: the file, or the array, cannot be used.
        """
        pixels = self.pixels(source)[None].to(self.model.weight.device)
        if self.classifies:
            shares = self.model.probabilities(pixels)[0]
            return {self.model.classes[i]: float(shares[i]) for i in shares.argsort(descending=True).tolist()}
        if not self.dense:
            return self.model.pooled(pixels)[0].cpu()
        tokens = self.model.tokens(pixels)[0].float().cpu()
        return tokens if pixels.ndim == 5 else tokens[0]

    def pixels(self, source: str | Path | np.ndarray | Tensor | Sequence[Any]) -> Tensor:
        """What the model sees: float, normalised, a clip (3,T,S,S) or an image (3,S,S). Raises UserError as a call."""
        data = self.data
        choice = "spaced_segments" if data.sampling == "segments" else "spaced_clip"
        if isinstance(source, str | Path):
            image = is_image(source)
            frames = read_image(source)[None] if image else read_frames(source, data.frames, data.stride, choice)
        else:
            frames = as_levels(source)
            image = frames.ndim == 3
            if image:
                frames = frames[None]
            elif len(frames) != data.frames:
                frames = frames[CHOICES[choice](len(frames), data.frames, data.stride, (0, 1))]
        pixels = centred(frames, data.size, self.short_side)
        return pixels[:, 0] if image else pixels


def pipeline(
    weights: str | Path,
    task: Task = "auto",
    dense: bool = False,
    device: str | torch.device = "cpu",
    frames: int | None = None,
    stride: int | None = None,
    size: int | None = None,
    short_side: int | None = None,
) -> Pipeline:
    """A function from a path, or an array of frames, to class probabilities or features.

    Args:
        weights: what `from_pretrained` takes: a run's folder, a folder of weights, or a file of others.
        task: classes: probabilities by class name, a dict, the best first; features: float32 (C,), the mean over all
            tokens of the last stage; auto: classes where the weights have a classifier.
        dense: features of every token: (T',H',W',C), of an image (H',W',C).
        device: where the network computes, in float32.
        frames, stride, size, short_side: how a clip is sampled, see `load_clip`; by default as the run of the weights
            did, and without one as BEVT's recipes: of fine-tuning for a classifier, else of pretraining.

    Raises:
        UserError: weights that cannot be read, or that have no classifier; a number that cannot work.
    """
    if task not in TASKS:
        raise UserError(f"task={task!r}: choose one of {', '.join(TASKS)}.")
    data = sampling_of(str(weights))[1]
    model = load_frozen(weights).to(device)
    if task == "classes" and not model.classes:
        raise without_classifier(str(weights))
    classifies = bool(model.classes) and task != "features"
    if dense and classifies:
        raise UserError("dense=True gives features: say task='features' with it.")
    if model.classes and run_of(str(weights)) is None:
        data = get_recipe("finetune_k400", FinetuneConfig).data
    given = {"frames": frames, "stride": stride, "size": size}
    settings = {key: value for key, value in given.items() if value is not None}
    data = LabelledDataConfig(
        **{"sampling": data.sampling} | {key: settings.get(key, getattr(data, key)) for key in given}
    )
    return Pipeline(model, data, short_side or data.size, classifies, dense)


def as_levels(source: Any) -> np.ndarray:
    """Frames or an image as uint8 (T,H,W,3) or (H,W,3).

    Raises:
        UserError: another shape or type.
    """
    whole = isinstance(source, np.ndarray | Tensor)
    levels = np.asarray(source) if whole else np.stack([np.asarray(frame) for frame in source])
    if levels.dtype != np.uint8 or levels.ndim not in (3, 4) or levels.shape[-1] != 3 or 0 in levels.shape:
        raise UserError(
            f"frames have the shape {levels.shape} and type {levels.dtype}: wanted are uint8 (T,H,W,3), or an image's"
            " (H,W,3), in RGB."
        )
    return levels
