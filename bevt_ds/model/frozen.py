"""Frozen networks of timm: what a tokenizer's loss, or the targets of a model, are made with."""

from __future__ import annotations

from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bevt_ds.errors import UserError

from .containers import contained, read_file


class FrozenFeatures(nn.Module):
    """Feature maps of a frozen network, from frames in [0,1], at the sizes that it has.

    Args:
        name: of timm's, with or without a tag.
        weights: a file of its weights; empty: they are random, as `describe` says.
        levels: the first so many of its feature maps; 0: all.
        seed: of random weights.

    Raises:
        UserError: no such network, one without feature maps, or weights that are not its.
    """

    def __init__(self, name: str, weights: str = "", levels: int = 0, seed: int = 0):
        super().__init__()
        if not timm.is_model(name):
            raise UserError(f"no network {name!r} in timm {timm.__version__}: timm.list_models() names those there are")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.network = timm.create_model(name, pretrained=False)
        if not hasattr(self.network, "forward_intermediates"):
            raise UserError(f"{name} of timm {timm.__version__} has no feature maps (forward_intermediates)")
        self.name, self.weights = name, weights
        if weights:
            _load(self.network, Path(weights), name)
        settings = self.network.pretrained_cfg
        every = len(self.network.feature_info)
        self.indices = list(range(min(levels, every) if levels else every))
        self.side = settings["input_size"][-1] if settings.get("fixed_input_size") else None
        for key in ("mean", "std"):
            self.register_buffer(key, torch.tensor(settings[key]).view(1, 3, 1, 1), persistent=False)
        self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> FrozenFeatures:
        """It stays as it is, in evaluation mode."""
        return super().train(False)

    def forward(self, frames: Tensor) -> list[Tensor]:
        """Frames (N,3,v,v), RGB in [0,1] -> feature maps (N,C,H,W), the finest first; resized for a fixed size."""
        x = (frames.to(self.mean.dtype) - self.mean) / self.std
        if self.side and x.shape[-1] != self.side:
            x = F.interpolate(x, size=(self.side, self.side), mode="bilinear", antialias=True)
        return self.network.forward_intermediates(
            x, indices=self.indices, stop_early=True, intermediates_only=True, output_fmt="NCHW"
        )

    def describe(self) -> str:
        """One line: which network, and where its weights are from."""
        return f"{self.name}, {f'weights of {self.weights}' if self.weights else 'random weights: none were named'}"


def _load(network: nn.Module, path: Path, name: str) -> None:
    """Copy a file's tensors, but for those of a classifier, which no feature map needs."""
    if not path.is_file():
        raise UserError(f"{path}: no such file of weights for {name}")
    try:
        _, state = contained(read_file(path))
    except UserError as error:
        raise UserError(f"{path} {error}") from error
    heads = network.pretrained_cfg.get("classifier") or ()
    heads = tuple(f"{head}." for head in ([heads] if isinstance(heads, str) else heads))
    state = {key.removeprefix("module."): value for key, value in state.items()}
    state = {key: value for key, value in state.items() if not key.startswith(heads)}
    own = {key: value for key, value in network.state_dict().items() if not key.startswith(heads)}
    odd = sorted(own.keys() ^ state.keys()) or [key for key in own if own[key].shape != state[key].shape]
    if odd:
        raise UserError(f"{path} does not hold {name} of timm's: {len(odd)} tensors differ, {odd[0]} among them")
    network.load_state_dict(state, strict=False)
