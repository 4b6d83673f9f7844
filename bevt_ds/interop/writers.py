"""Weights in the names of a target: pure functions from `Weights` to tensors, and how each kind of file is saved."""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from bevt_ds.errors import UserError
from bevt_ds.model.arch import SwinArch
from bevt_ds.model.containers import State
from bevt_ds.model.convert import INDEX, RENAMES, STEM, TABLE, Weights
from bevt_ds.model.layouts import BY_NAME, HUGGING_FACE, OFFICIAL, TIMM, VIDEO
from bevt_ds.model.tensor_file import write_tensors
from bevt_ds.model.weights import CONFIG, ENCODER, FORMAT, HEAD, TENSORS
from bevt_ds.model.windows import Size3, table_rows

OURS = "bevt_ds"


@dataclass(frozen=True)
class Written:
    """What goes into a target: tensors in its names, the layout they have, and what is left behind, with the reason."""

    state: State
    layout: str
    left_out: dict[str, str]


def to_ours(weights: Weights, parts: tuple[str, ...] = ()) -> Written:
    """In our names: everything, or the parts with these prefixes."""
    kept = {name: value for name, value in weights.state.items() if name.startswith(parts or "")}
    return Written(kept, OURS, _left_out(weights, kept, "the class has no such part"))


def to_official(weights: Weights) -> Written:
    """In the names and shapes of BEVT and Video Swin in mmaction, with `backbone.` and the index of each table."""
    require_pre_norm(weights, "the official model")
    arch = SwinArch.of(weights.arch)
    state = {_official_name(name): _official_shape(name, value, arch) for name, value in weights.state.items()}
    state |= _indices(state, arch.window)
    prefixed = {name if name.startswith("cls_head.") else f"backbone.{name}": value for name, value in state.items()}
    return Written(prefixed, OFFICIAL, {})


def to_torchvision(weights: Weights) -> Written:
    """As torchvision's SwinTransformer3d has it: encoder, classifier of clips if there is one, index of each table."""
    arch = SwinArch.of(weights.arch)
    require_pre_norm(weights, "torchvision's swin3d")
    kept = {name: value for name, value in weights.state.items() if name.startswith((ENCODER, HEAD))}
    state = {_official_name(name): _official_shape(name, value, arch) for name, value in kept.items()}
    state |= _indices(state, arch.window)
    return Written(BY_NAME[VIDEO].write(state), VIDEO, _left_out(weights, kept, "swin3d is encoder and classifier"))


def to_images(weights: Weights, layout: str) -> Written:
    """As a Swin of images has it, for weights that images alone decide: their stem, and one plane of each table."""
    arch = SwinArch.of(weights.arch)
    require_pre_norm(weights, layout)
    taken = (ENCODER, "image_embed.")
    kept = {n: v for n, v in weights.state.items() if n.startswith(taken) and not n.startswith(STEM)}
    state = {}
    for name, value in kept.items():
        name = name.removeprefix(ENCODER).replace("image_embed.", "patch_embed.")
        if name == "patch_embed.proj.weight":
            value = rearrange(value, "o (c h w) -> o c h w", h=arch.patch[1], w=arch.patch[2])
        state[name] = value[: table_rows((1, *arch.window[1:]))] if name.endswith(TABLE) else value
    reason = "a Swin of images has none"
    return Written(BY_NAME[layout].write(state), layout, _left_out(weights, kept, reason))


def to_timm(weights: Weights) -> Written:
    """For timm's own Swin where it can hold them, else for `bevt_swin_*`, which this project registers."""
    return to_images(weights, TIMM) if weights.still else to_ours(weights, (ENCODER, HEAD))


def to_hugging_face(weights: Weights) -> Written:
    """For transformers' own Swin where it can hold them, else for our class, which AutoModel finds."""
    if not weights.still:
        return to_ours(weights, (ENCODER, HEAD, "image_embed."))
    written = to_images(weights, HUGGING_FACE)
    state = {f"encoder.{name}" if name.startswith("layers.") else name: value for name, value in written.state.items()}
    return replace(written, state=state)


def require_pre_norm(weights: Weights, target: str) -> None:
    """Raises UserError for post-norm blocks, which only this project's classes have."""
    if SwinArch.of(weights.arch).norm != "pre":
        raise UserError(f"{weights.source} has norm=post, which {target} has not: use --to bevt, timm or hf.")


TARGETS: dict[str, Callable[[Weights], Written]] = {
    "bevt": to_ours,
    "torchvision": to_torchvision,
    "timm": to_timm,
    "hf": to_hugging_face,
    "official": to_official,
}


def _left_out(weights: Weights, kept: Mapping[str, Tensor], reason: str) -> dict[str, str]:
    return {name: reason for name in weights.state if name not in kept}


def _official_name(name: str) -> str:
    theirs, ours = max((pair for pair in RENAMES if name.startswith(pair[1])), key=lambda pair: len(pair[1]))
    return theirs + name[len(ours) :]


def _official_shape(name: str, value: Tensor, arch: SwinArch) -> Tensor:
    t, h, w = arch.patch
    match name:
        case "encoder.patch_embed.proj.weight":
            return rearrange(value, "o (c t h w) -> o c t h w", t=t, h=h, w=w)
        case "image_embed.proj.weight":
            return rearrange(value, "o (c h w) -> o c h w", h=h, w=w)
        case "image_decoder.upsample.weight":
            return value.squeeze(2)
        case "mask_token.token":
            return value.view(1, 1, -1)
    return value


def _indices(state: State, window: Size3) -> State:
    """The row of the table for each pair of a window's tokens: int64 (N,N), for each table."""
    t, h, w = window
    places = torch.tensor(list(product(range(t), range(h), range(w))))
    offsets = places[:, None] - places[None] + torch.tensor([t - 1, h - 1, w - 1])
    index = offsets @ torch.tensor([(2 * h - 1) * (2 * w - 1), 2 * w - 1, 1])
    return {name.replace(TABLE, INDEX): index.clone() for name in state if name.endswith(TABLE)}


# Files


def config_of(weights: Weights, written: Written) -> dict[str, Any]:
    """config.json of a folder of ours: what `bevt_ds.model.weights` reads."""
    parts = {name.split(".")[0] + "." for name in written.state}
    model = "VideoClassifier" if parts == {ENCODER, HEAD} else "VideoSwin" if parts == {ENCODER} else "BEVT"
    arch = {key: value for key, value in weights.arch.items() if key not in _of_heads(parts)}
    fresh = [prefix for prefix in weights.may_be_fresh if prefix not in parts]
    known = {"format": FORMAT, "model": model, "streams": ["video", "image"], "arch": arch}
    return known | ({"fresh": fresh} if fresh else {}) | ({"still": True} if weights.still else {})


def _of_heads(parts: set[str]) -> set[str]:
    """Arguments that say nothing without their part."""
    absent = set() if HEAD in parts else {"num_classes", "classes", "dropout"}
    return (
        absent
        | (set() if "lm_head." in parts else {"vocab_size"})
        | (set() if "feature_head." in parts else {"target_dim"})
    )


def save_folder(folder: Path, state: State, config: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
    """config.json, with `facts` under "converted", and model.safetensors."""
    folder.mkdir(parents=True)
    text = json.dumps({**config, "converted": facts}, indent=1)
    (folder / CONFIG).write_text(text + "\n", encoding="utf-8")
    save_tensors(folder / TENSORS, state, facts)


def save_tensors(path: Path, state: State, facts: Mapping[str, Any]) -> None:
    """A .safetensors file, with `facts` in its metadata."""
    write_tensors(path, state, {"format": "pt", "converted": json.dumps(facts)})


def save_state_dict(path: Path, state: State, facts: Mapping[str, Any], container: str) -> None:
    """A .pth file: the tensors alone, or under `container` if it is named.

    `facts` are in `_metadata` of the state dict, or in `meta`.
    torch keeps module versions in `_metadata` and ignores other entries, so that the file loads strictly.
    """
    if path.suffix == ".safetensors":
        return save_tensors(path, state, facts)
    ordered = OrderedDict((name, value.detach().clone()) for name, value in state.items())
    ordered._metadata = OrderedDict(converted=dict(facts))  # type: ignore[attr-defined]
    torch.save({container: ordered, "meta": {"converted": dict(facts)}} if container else ordered, path)


def require_new(path: Path) -> None:
    """Raises UserError where `path` exists."""
    if path.exists():
        raise UserError(f"{path} exists: choose another name or remove it first.")
