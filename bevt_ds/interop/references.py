"""What other libraries' models make of a state dict, next to what ours does: the ground of every comparison.

Inputs are float64, so that a difference is a mistake and not rounding, and just so large that no stage is smaller than
its window: there the libraries differ on purpose (see `small_windows` of SwinArch).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import torch
from einops import rearrange, repeat
from torch import Tensor, nn

from bevt_ds.errors import UserError
from bevt_ds.interop.writers import save_folder
from bevt_ds.model.arch import SwinArch
from bevt_ds.model.containers import State
from bevt_ds.model.convert import Weights, listed
from bevt_ds.model.layers import PatchEmbed
from bevt_ds.model.layouts import HUGGING_FACE, IMAGES, TIMM, VIDEO
from bevt_ds.model.video_swin import VideoSwin

RECOMPUTED = re.compile(r"relative_position_index$|attn_mask$|^head\.|^classifier\.")


class Outputs(NamedTuple):
    """What a model says of the input: features after the last norm (B,T',H',W',C), and logits where it classifies."""

    features: Tensor
    logits: Tensor | None = None


def probe(weights: Weights) -> Tensor:
    """The input of a comparison: a clip (1,3,T,H,W), or for weights of images alone an image (1,3,H,W). float64."""
    arch = SwinArch.of(weights.arch)
    merged = 1 << (len(arch.depths) - 1)
    time, *space = (p * w for p, w in zip(arch.patch, arch.window, strict=True))
    size = [extent * merged for extent in space] if weights.still else [time, *(extent * merged for extent in space)]
    return torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@torch.no_grad()
def ours(weights: Weights, pixels: Tensor) -> Outputs:
    """Of our encoder: strictly loaded, a tensor that is missing is named in a UserError."""
    arch = SwinArch.of(weights.arch)
    encoder = VideoSwin(**arch.arguments()).double().eval()
    _load(encoder, _part(weights.state, "encoder."), "this project's VideoSwin")
    stem = None
    if pixels.ndim == 4:
        stem = PatchEmbed((1, *arch.patch[1:]), arch.embed_dim)
        _load(stem, _part(weights.state, "image_embed."), "this project's image_embed")
    features = encoder.features_of(pixels, stem, weights.arch.get("image_windows", "swin"))
    features, head = features.movedim(1, -1), _part(weights.state, "head.")
    if stem or not head:
        return Outputs(features)
    weight, bias = head["weight"].double(), head["bias"].double()
    return Outputs(features, nn.functional.linear(features.mean((1, 2, 3)), weight, bias))


@torch.no_grad()
def outputs_of(layout: str, state: State, arch: Mapping[str, object], pixels: Tensor) -> Outputs | None:
    """Of the library whose layout it is; None where that library is not installed.

    A classifier of images is left out, as it is in reading. An image goes to a model of clips as a still clip.

    Raises:
        UserError: the library's model lacks a tensor, by name, or cannot hold one.
    """
    library, build = REFERENCES[layout]
    if not find_spec(library):
        return None
    try:
        return build(state, SwinArch.of(arch), pixels)
    except RuntimeError as error:  # how torch and transformers say that shapes differ
        raise UserError(f"{layout} cannot hold these weights: {' '.join(str(error).split())}") from error


def _swin3d(state: State, arch: SwinArch, pixels: Tensor) -> Outputs:
    from torchvision.models.video.swin_transformer import SwinTransformer3d

    head = state.get("head.weight")
    sizes = (arch.embed_dim, list(arch.depths), list(arch.num_heads), list(arch.window), arch.mlp_ratio)
    classes = 1 if head is None else len(head)
    model = _load(SwinTransformer3d(list(arch.patch), *sizes, num_classes=classes), state, "torchvision's swin3d")
    clip = pixels if pixels.ndim == 5 else repeat(pixels, "b c h w -> b c t h w", t=arch.patch[0])
    features = model.norm(model.features(model.patch_embed(clip)))
    return Outputs(features, None if head is None else model.head(features.mean((1, 2, 3))))


def _swin(state: State, arch: SwinArch, pixels: Tensor) -> Outputs:
    from torchvision.models import SwinTransformer

    sizes = (arch.embed_dim, list(arch.depths), list(arch.num_heads), list(arch.window[1:]), arch.mlp_ratio)
    model = _load(SwinTransformer(list(arch.patch[1:]), *sizes, num_classes=1), _headless(state), "torchvision's swin")
    return Outputs(model.norm(model.features(pixels)).unsqueeze(1))


def _timm(state: State, arch: SwinArch, pixels: Tensor) -> Outputs:
    from timm.models.swin_transformer import SwinTransformer

    model = SwinTransformer(
        img_size=pixels.shape[-2:],
        patch_size=arch.patch[1],
        window_size=arch.window[1:],
        embed_dim=arch.embed_dim,
        depths=arch.depths,
        num_heads=arch.num_heads,
        mlp_ratio=arch.mlp_ratio,
        num_classes=0,
    )
    return Outputs(_load(model, _headless(state), "timm's Swin").forward_features(pixels).unsqueeze(1))


def _hugging_face(state: State, arch: SwinArch, pixels: Tensor) -> Outputs:
    """Loaded from a folder, as everyone does: the library has other names in memory than in files."""
    from transformers import SwinModel

    config = {"model_type": "swin", "dtype": "float32", **swin_config(arch, pixels.shape[-1])}
    state = {re.sub(r"^layers\.", "encoder.layers.", name): value for name, value in _headless(state).items()}
    with TemporaryDirectory() as folder:
        save_folder(Path(folder) / "swin", state, config, {})
        model, report = SwinModel.from_pretrained(
            Path(folder) / "swin", add_pooling_layer=False, output_loading_info=True, dtype=torch.float32
        )
    _require_all(report["missing_keys"], "Hugging Face's Swin")
    side = pixels.shape[-1] // (arch.patch[1] << len(arch.depths) - 1)
    return Outputs(rearrange(model.double().eval()(pixels).last_hidden_state, "b (h w) c -> b 1 h w c", w=side))


def swin_config(arch: SwinArch, size: int) -> dict[str, object]:
    """transformers' SwinConfig for images of `size` pixels."""
    return {
        "image_size": size,
        "patch_size": arch.patch[1],
        "embed_dim": arch.embed_dim,
        "depths": list(arch.depths),
        "num_heads": list(arch.num_heads),
        "window_size": arch.window[1],
        "mlp_ratio": arch.mlp_ratio,
    }


REFERENCES: dict[str, tuple[str, Callable[[State, SwinArch, Tensor], Outputs]]] = {
    VIDEO: ("torchvision", _swin3d),
    IMAGES: ("torchvision", _swin),
    TIMM: ("timm", _timm),
    HUGGING_FACE: ("transformers", _hugging_face),
}


def difference(first: Outputs, second: Outputs) -> float:
    """The largest difference of features, and of logits where both have them, over the first's largest (at least 1)."""
    pairs = [(a, b) for a, b in zip(first, second, strict=True) if a is not None and b is not None]
    if any(a.shape[-1] != b.shape[-1] for a, b in pairs):
        return float("inf")
    return max(float((a - b).abs().max() / a.abs().max().clamp_min(1)) for a, b in pairs)


def _part(state: State, prefix: str) -> State:
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def _headless(state: State) -> State:
    return {name: value for name, value in state.items() if not name.startswith(("head.", "classifier."))}


def _load(model: nn.Module, state: State, name: str) -> nn.Module:
    """`state` in a model, float64 and in evaluation mode; only what a model recomputes, and a head, may be missing."""
    missing, _ = model.load_state_dict(state, strict=False)
    _require_all(missing, name)
    return model.double().eval()


def _require_all(missing: Iterable[str], name: str) -> None:
    if missing := [key for key in missing if not RECOMPUTED.search(key)]:
        raise UserError(f"{name} needs {listed(missing)}, which the weights lack")
