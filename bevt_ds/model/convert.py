"""Other people's checkpoints in our names: pure functions on dictionaries of tensors, no files.

Facts about the formats: xyzforever/BEVT@8881b21 (names of swin_transformer_bevt.py, its `inflate_weights`, and the
loader of swin_transformer.py that resizes bias tables). A key of a checkpoint is either translated, or expected to be
of no use for a stated reason, or an error.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from math import isqrt, prod
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor

from bevt_ds.errors import UserError

from .containers import State
from .layouts import identify
from .windows import Size3, table_rows

TABLE = "relative_position_bias_table"
INDEX = "relative_position_index"
SPATIAL_WINDOW = (7, 7)  # of every published configuration of clips; a checkpoint need not say it
STATE_IT = ': state its window in a config.json next to it: {"format": "bevt_ds", "arch": {"window": [T, H, W]}}'
INFLATED_TIME = 8  # tokens of time in the window of what was 2-D: the joint stage's

RENAMES = (  # official name or prefix, ours
    ("mask_token", "mask_token.token"),
    ("patch_embed.", "encoder.patch_embed."),
    ("patch_embed_2d.", "image_embed."),
    ("layers.", "encoder.layers."),
    ("norm.", "encoder.norm."),
    ("fpn.0.", "image_decoder.upsample."),
    ("lm_down.", "image_decoder.reduce."),
    ("fpn_s.0.", "video_decoder.upsample."),
    ("lm_down_st.0.", "video_decoder.reduce."),
    ("fpn_t.0.", "video_decoder.unfold."),
    ("cls_head.lm_head.", "lm_head."),
    ("cls_head.fc_cls.", "head."),
)

EXPECTED_UNUSED = (  # pattern of an official name, why it is not loaded
    (r"\.relative_position_index$|\.attn_mask$", "recomputed from the window's size"),
    (r"^data_preprocessor\.", "mean and spread of pixels"),
    (r"^norm\d\.", "norm of an earlier stage, for a detector"),
    (r"^(neck|rpn_head|roi_head|bbox_head|mask_head|decode_head|auxiliary_head)\.", "a detector's"),
    (r"^decoder\.", "SimMIM's decoder of pixels"),
    (r"^(steps|n_averaged)$", "counter of running averages"),
    (r"^cls_head\.vae_encoder\.", "the tokenizer is loaded on its own"),
    (r"^ema_", "running averages of mmcv's EMA hook"),
)
EXPECTED_UNUSED_2D = (
    *EXPECTED_UNUSED,
    (r"^(cls_head\.)?lm_head\.", "the joint stage starts a new classifier, as the original does"),
    (r"^head\.", "classifier of an image model"),
)
STEM = "encoder.patch_embed."  # of clips
STREAM_PARTS = {  # what only this stream trains: its stem and its decoder
    "video": (STEM, "video_decoder."),
    "image": ("image_embed.", "image_decoder."),
}
FRESH_AFTER_2D = (  # our prefixes that an image-stream checkpoint may lack
    "mask_token.",
    "video_decoder.",
    "image_decoder.",
    "lm_head.",
    "feature_head.",
)


@dataclass(frozen=True)
class Weights:
    """A checkpoint in our names, those of BEVT and VideoClassifier together, with what is known about it."""

    state: State
    arch: dict[str, Any]  # constructor arguments of our models that the checkpoint determines
    unused: dict[str, str] = field(default_factory=dict)  # its key, as the file has it -> why it is not loaded
    may_be_fresh: tuple[str, ...] = ()  # prefixes of parameters that it may lack
    notes: tuple[str, ...] = ()
    source: Path = Path()  # filled in by whoever read the file
    layout: str = "bevt_ds"  # whose names the file has
    original: State = field(default_factory=dict)  # the file's tensors in its own names, where it is of others
    still: bool = False  # whether images alone decide it: clips' stem and tables are their inflation


def from_state(state: State, spatial_window: tuple[int, int] | None = None) -> Weights:
    """A state dict of any layout that is read, its names without wrappers' prefixes, as `Weights`.

    A 2-D one, as of an image stream, is inflated to a window of 8 tokens of time, the joint stage's; its windows stay
    as wide as they are. `spatial_window` is stated where the file does not tell it. Raises UserError for another
    layout, naming it.
    """
    layout = identify(state)
    official = layout.read(state)
    if official["patch_embed.proj.weight"].ndim == 4:
        weights = _from_image_stream(official, spatial_window)
    else:
        weights = _from_clips(official, spatial_window)
    unused = {name if name in state else layout.named(name): why for name, why in weights.unused.items()}
    return replace(weights, unused=unused, layout=layout.name, original=state)


def _from_clips(state: State, spatial_window: tuple[int, int] | None) -> Weights:
    window = infer_window(state, spatial_window)
    state, unused = split_unused(state, EXPECTED_UNUSED)
    arch = infer_arch(state, window)
    if "patch_embed_2d.proj.weight" in state:
        arch["image_windows"] = "official"
    return Weights(rename(state), arch, unused)


def _from_image_stream(state: State, spatial_window: tuple[int, int] | None) -> Weights:
    state, unused = split_unused(state, EXPECTED_UNUSED_2D)
    rows = _rows(state)
    side = (isqrt(rows) + 1) // 2
    window = (INFLATED_TIME, *(spatial_window or (side, side)))
    if rows and rows != table_rows((1, *window[1:])):
        which = f"the window {window[1:]} has not" if spatial_window else "no square window has"
        raise UserError(f"has 2-D bias tables of {rows} rows, which {which}{STATE_IT}")
    inflated, replaced = inflate(state, window, 2, window[1:])
    return Weights(
        rename(inflated),
        infer_arch(inflated, window),
        unused | replaced,
        FRESH_AFTER_2D,
        (f"image-stream checkpoint inflated to 3-D, window {window}",),
        still=True,
    )


def _rows(state: State) -> int:
    """Of every bias table. Raises UserError where stages have windows of different sizes: no model here has."""
    tables = {name: len(value) for name, value in state.items() if name.endswith(TABLE)}
    rows = next(iter(tables.values()), 0)
    if other := [f"{name} of {number}" for name, number in tables.items() if number != rows]:
        raise UserError(f"has bias tables of {rows} rows, and others: {listed(other, 3)}: only one window is read")
    return rows


def split_unused(state: State, patterns: tuple[tuple[str, str], ...]) -> tuple[State, dict[str, str]]:
    """Separate keys that match a pattern: (the rest, {key: the pattern's reason})."""
    unused = {key: reason for key in state for pattern, reason in patterns if re.search(pattern, key)}
    return {key: value for key, value in state.items() if key not in unused}, unused


def our_name(key: str) -> str | None:
    """Our name of an official parameter, or None if no model of ours has such a parameter."""
    for theirs, ours in RENAMES:
        if key == theirs or (theirs.endswith(".") and key.startswith(theirs)):
            return ours + key[len(theirs) :]
    return None


def rename(state: State) -> State:
    """Official names and shapes to ours. Raises UserError for names that belong to neither."""
    unknown = sorted(key for key in state if our_name(key) is None)
    if unknown:
        raise UserError(f"has tensors that no BEVT model has: {listed(unknown)}")
    return {our_name(key): _reshape(key, value) for key, value in state.items()}


def listed(names: Sequence[str], most: int = 12) -> str:
    """Names in a message: all, or the first and how many more."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _reshape(key: str, value: Tensor) -> Tensor:
    if key in ("patch_embed.proj.weight", "patch_embed_2d.proj.weight"):
        return value.flatten(1)  # a convolution over patches, as a matrix
    if key == "fpn.0.weight":
        return value.unsqueeze(2)  # 2-D kernel: one frame
    return value.flatten() if key == "mask_token" else value


def infer_window(state: State, spatial: tuple[int, int] | None = None) -> Size3:
    """The 3-D window of bias tables: (time, *spatial) from their rows; unless `spatial` is given, a square one.

    The number of tokens of a window, where an index of the pairs is saved, decides between several that have as many
    rows; else the published 7x7 goes first. Raises UserError where none fits, or several do.
    """
    rows, index = _rows(state), next((v for name, v in state.items() if name.endswith(INDEX)), None)
    tokens = isqrt(index.numel()) if index is not None else None  # torchvision saves it flat
    fitting = []
    for height, width in [spatial] if spatial else [(side, side) for side in range(2, 65)]:
        offsets, rest = divmod(rows, table_rows((1, height, width)))
        window = ((offsets + 1) // 2, height, width)
        if not rest and offsets % 2 and (spatial or tokens in (None, prod(window))):
            fitting.append(window)
    published = [window for window in fitting if window[1:] == SPATIAL_WINDOW]
    if len(chosen := published or fitting) == 1:
        return chosen[0]
    raise UserError(
        f"has bias tables of {rows} rows, which {'several windows have' if fitting else 'no such window has'}{STATE_IT}"
    )


def infer_arch(state: State, window: Size3) -> dict[str, Any]:
    """Constructor arguments of BEVT from the shapes of official 3-D weights."""
    blocks = {tuple(map(int, m.groups())) for k in state if (m := re.match(r"layers\.(\d+)\.blocks\.(\d+)\.", k))}
    depths = tuple(sum(stage == i for stage, _ in blocks) for i in range(1 + max((s for s, _ in blocks), default=-1)))
    stem = state["patch_embed.proj.weight"]
    try:
        heads = tuple(state[f"layers.{i}.blocks.0.attn.{TABLE}"].shape[1] for i in range(len(depths)))
        mlp_ratio = state["layers.0.blocks.0.mlp.fc1.weight"].shape[0] / stem.shape[0]
    except KeyError as error:
        raise UserError(f"lacks {error.args[0]}, so that the model's size cannot be told") from error
    arch = {
        "embed_dim": stem.shape[0],
        "depths": depths,
        "num_heads": heads,
        "window": window,
        "patch": tuple(stem.shape[2:]),
        "mlp_ratio": mlp_ratio,
    }
    if "cls_head.lm_head.weight" in state:
        arch["vocab_size"] = state["cls_head.lm_head.weight"].shape[0]
    if "cls_head.fc_cls.weight" in state:
        arch["num_classes"] = state["cls_head.fc_cls.weight"].shape[0]
    return arch


def inflate(
    state: State, window: Size3, patch_time: int, source: tuple[int, int] | None = None
) -> tuple[State, dict[str, str]]:
    """2-D weights (stripped official names) as 3-D ones that give the same on a clip that stands still.

    The 2-D stem becomes the images' stem and, spread evenly over `patch_time` frames, the clips'; every bias table is
    resized to the spatial window (bicubic) and repeated for every offset in time. Returns the state and what it left
    out: {key: reason}.
    """
    out, replaced = {}, {}
    for key, value in state.items():
        if key.startswith("norm.") and f"fc_{key}" in state:
            replaced[key] = "fc_norm takes its place"
        elif key.startswith("fc_norm."):
            out[key.removeprefix("fc_")] = value
        elif key.endswith(TABLE):
            out[key] = inflate_table(value, window, source)
        else:
            out[key] = value
        if key.startswith("patch_embed."):
            out[key.replace("patch_embed.", "patch_embed_2d.")] = value
    stem = state["patch_embed.proj.weight"]
    out["patch_embed.proj.weight"] = repeat(stem, "o c h w -> o c t h w", t=patch_time) / patch_time
    return out, replaced


def inflate_table(table: Tensor, window: Size3, source: tuple[int, int] | None = None) -> Tensor:
    """A 2-D bias table for a 3-D window: bicubic in space where sizes differ, repeated in time.

    Its own window is `source`, by default a square one: ((2s-1)^2, N).
    """
    time, height, width = (2 * w - 1 for w in window)
    h, w = (2 * extent - 1 for extent in source) if source else (isqrt(len(table)),) * 2
    if h * w != len(table):
        raise UserError(f"has a 2-D bias table of {len(table)} rows, which no such window has")
    if (h, w) != (height, width):
        plane = rearrange(table, "(h w) n -> 1 n h w", h=h)
        plane = F.interpolate(plane, size=(height, width), mode="bicubic", align_corners=False)
        table = rearrange(plane, "1 n h w -> (h w) n")
    return table.repeat(time, 1)


def fit_table(table: Tensor, source: Size3, target: Size3, still: bool) -> Tensor:
    """A bias table of window `source` for window `target`: as an image's where it is `still`, see `inflate_table`."""
    if len(table) != table_rows(source):
        raise UserError(f"has a bias table of {len(table)} rows, which its window {source} has not")
    plane = table[: table_rows((1, *source[1:]))]
    return inflate_table(plane, target, source[1:]) if still else resize_table(table, source, target)


def resize_table(table: Tensor, source: Size3, target: Size3) -> Tensor:
    """A 3-D bias table of window `source` for window `target`, trilinear, as the original's fine-tuning loader."""
    (t, h, w), size = (tuple(2 * extent - 1 for extent in window) for window in (source, target))
    volume = rearrange(table, "(t h w) n -> 1 n t h w", t=t, h=h, w=w)
    volume = F.interpolate(volume, size=size, mode="trilinear", align_corners=False)
    return rearrange(volume, "1 n t h w -> (t h w) n")


def without_untrained(weights: Weights, streams: Sequence[str]) -> Weights:
    """A model of ours without the stem and the decoder of a stream that its run never trained: they start fresh.

    `streams` are those that were trained. The clips' stem of an image-only model is derived from the images' first.
    """
    if tuple(streams) == ("image",):
        weights = spread_image_stream(weights)
    untrained = {
        part: f"{part.removesuffix('.')}: its run trained no {stream} stream"
        for stream, parts in STREAM_PARTS.items()
        for part in parts
        if stream not in streams and part != STEM
    }
    unused = {name: why for part, why in untrained.items() for name in weights.state if name.startswith(part)}
    state = {name: value for name, value in weights.state.items() if name not in unused}
    fresh = tuple(part for part in untrained if any(name.startswith(part) for name in unused))
    return replace(weights, state=state, unused=weights.unused | unused, may_be_fresh=weights.may_be_fresh + fresh)


def spread_image_stream(weights: Weights) -> Weights:
    """A model of ours that saw images only, made ready for clips: `inflate`'s rules in our names.

    Images train the zero-time-offset plane of each bias table and their own stem; the other planes and the clips' stem
    are derived from those.
    """
    state = dict(weights.state)
    time = 2 * weights.arch["window"][0] - 1
    for key, table in state.items():
        if key.endswith(TABLE):
            state[key] = table.view(time, -1, table.shape[1])[time // 2].repeat(time, 1)
    patch_time, height, width = weights.arch["patch"]
    for name in ("proj.bias", "norm.weight", "norm.bias"):
        state[f"encoder.patch_embed.{name}"] = state[f"image_embed.{name}"]
    stem = rearrange(state["image_embed.proj.weight"], "o (c h w) -> o c h w", h=height, w=width)
    stem = repeat(stem, "o c h w -> o (c t h w)", t=patch_time) / patch_time
    state["encoder.patch_embed.proj.weight"] = stem
    return replace(weights, state=state, notes=("image-only model: tables and clip stem spread over time",), still=True)
