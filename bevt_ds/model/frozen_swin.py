"""A network for inference alone: the parts of weights that see clips and images, whatever layout they came in."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from bevt_ds.errors import UserError
from bevt_ds.folders import weights_of

from .arch import SwinArch
from .convert import Weights, listed
from .layers import PatchEmbed
from .video_swin import VideoSwin
from .weights import load_weights, read_weights


class FrozenModel(nn.Module):
    """Encoder, the images' stem and the classifier where the weights have them, in evaluation mode.

    `classes` are the names of the classifier's classes, their numbers where the weights name none; empty without one.
    """

    def __init__(self, weights: Weights, kernels: str = "auto"):
        super().__init__()
        arch = SwinArch.of(weights.arch)
        self.arch, number = weights.arch, weights.arch.get("num_classes", 0)
        self.encoder = VideoSwin(**arch.arguments(), kernels=kernels)
        has_stem = any(name.startswith("image_embed.") for name in weights.state)
        stem = (1, *arch.patch[1:]), arch.embed_dim
        self.image_embed = PatchEmbed(*stem, kernels=kernels) if has_stem else None
        self.head = nn.Linear(arch.width, number) if number else None
        self.classes = tuple(weights.arch.get("classes") or map(str, range(number)))
        self.requires_grad_(False).eval()

    @property
    def weight(self) -> Tensor:
        """A parameter: its device and dtype are the model's."""
        return self.encoder.norm.weight

    def tokens(self, pixels: Tensor) -> Tensor:
        """Clips (B,3,T,H,W) -> (B,T',H',W',C), images (B,3,H,W) -> (B,1,H',W',C), after the last norm.

        Images go through their own stem and windows where the weights have them, else as still clips.
        """
        return self.encoder.norm(self.stages(pixels)[-1])

    def stages(self, pixels: Tensor) -> list[Tensor]:
        """As `tokens`, of every stage, before merging and norm."""
        policy = self.arch.get("image_windows", "swin")
        return self.encoder.stages_of(pixels.to(self.weight), self.image_embed, policy)

    def pooled(self, pixels: Tensor) -> Tensor:
        """Clips or images -> the mean over tokens, float32 (B,C)."""
        return self.tokens(pixels).flatten(1, 3).float().mean(1)

    def probabilities(self, clips: Tensor) -> Tensor:
        """Clips (B,3,T,H,W), or images as still clips -> float32 (B,K). Only with a classifier."""
        means = self.encoder.features_of(clips.to(self.weight)).mean((2, 3, 4))
        return self.head(means).float().softmax(-1)


def load_frozen(path: str | Path, kernels: str = "auto", dtype: torch.dtype = torch.float32) -> FrozenModel:
    """The network that `path` means, as `from_pretrained` takes it; prints what was loaded.

    Raises:
        UserError: no such weights, or they lack a tensor, by name.
    """
    weights = read_weights(weights_of(path, "weights"))
    model = FrozenModel(weights, kernels)
    report = load_weights(model, weights)
    if report.fresh:
        raise UserError(f"{path} lacks {listed(report.fresh)}: nothing can be said with weights that were not trained.")
    print(report)
    return model.to(dtype)
