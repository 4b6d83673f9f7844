"""Whose checkpoint is it? Each layout that is read is a table of names; those that are not are named in the refusal.

A table has rules from a name of Microsoft's Swin (which Video Swin and BEVT share) to the layout's, applied in order.
Writing applies them; reading looks up what they make of every name that a Swin can have: one table serves both.

Facts about the names: torchvision 0.28 (models/swin_transformer.py, models/video/swin_transformer.py), timm 1.0
(models/swin_transformer.py, swin_transformer_v2.py, vision_transformer.py, resnet.py), transformers 5 (models/swin),
mmpretrain 1, mmdetection 3 (swin_transformer.py), mmaction2 1 (swin.py), microsoft/SimMIM, openai/DALL-E (encoder.py).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from itertools import product

import torch
from einops import rearrange
from torch import Tensor

from bevt_ds.errors import UserError

from .containers import State

Rule = tuple[str, str | Callable[[re.Match], str]]
MOST_STAGES, MOST_BLOCKS = 6, 64


def _stage(text: str, times: int = 1, plus: int = 0) -> Callable[[re.Match], str]:
    return lambda match: text.format(times * int(match[1]) + plus)


BLOCKS, MERGING = r"^layers\.(\d+)\.blocks\.", r"^layers\.(\d+)\.downsample\."
TORCHVISION: tuple[Rule, ...] = ((r"\.mlp\.fc1\.", ".mlp.0."), (r"\.mlp\.fc2\.", ".mlp.3."))


@dataclass(frozen=True)
class Layout:
    """One way to name the tensors of a Swin. `signs` are patterns that all must match a name without wrappers."""

    name: str
    signs: tuple[str, ...]
    rules: tuple[Rule, ...] = ()
    split_qkv: bool = False  # query, key and value are three matrices
    unfolded: bool = False  # merging reads its four neighbours channel by channel, as nn.Unfold does

    def named(self, official: str) -> str:
        """This layout's name of a Swin's tensor."""
        for pattern, replacement in self.rules:
            official = re.sub(pattern, replacement, official)
        return official

    def read(self, state: State) -> State:
        """A state dict of this layout in the names of Microsoft's Swin; unknown names stay as they are."""
        back = _back(self)
        state = {back.get(name, name): value for name, value in state.items()}
        if self.unfolded:
            state = {
                name: _neighbours_first(value) if ".downsample." in name else value for name, value in state.items()
            }
        return _with_last_norm(_without_layer_scale(_with_joint_qkv(state)))

    def write(self, state: State) -> State:
        """The reverse of `read`, for the layouts that are written."""
        return {self.named(name): value for name, value in (_split(state) if self.split_qkv else state).items()}


VIDEO = "torchvision's swin3d"
IMAGES = "torchvision's Swin"
TIMM = "timm's Swin"
HUGGING_FACE = "Hugging Face's Swin"
OFFICIAL = "Microsoft's Swin, Video Swin or BEVT"
READ = (
    Layout(
        VIDEO,
        (r"^patch_embed\.proj\.", r"^features\.\d+\.\d+\.attn\.qkv\."),
        (
            *TORCHVISION,
            (BLOCKS, _stage("features.{}.", 2)),
            (MERGING, _stage("features.{}.", 2, 1)),
            (r"^cls_head\.fc_cls\.", "head."),
        ),
    ),
    Layout(
        IMAGES,
        (r"^features\.0\.0\.weight$", r"^features\.\d+\.\d+\.attn\.qkv\."),
        (
            *TORCHVISION,
            (BLOCKS, _stage("features.{}.", 2, 1)),
            (MERGING, _stage("features.{}.", 2, 2)),
            (r"^patch_embed\.proj\.", "features.0.0."),
            (r"^patch_embed\.norm\.", "features.0.2."),
        ),
    ),
    Layout(
        "timm's Swin with features_only",
        (r"^layers_\d+\.blocks\.",),
        ((BLOCKS, _stage("layers_{}.blocks.")), (MERGING, _stage("layers_{}.downsample.", 1, 1))),
    ),
    Layout(
        TIMM,
        (r"^layers\.\d+\.blocks\.", r"^head\.fc\.|^layers\.{last}\.downsample\."),
        ((MERGING, _stage("layers.{}.downsample.", 1, 1)), (r"^head\.", "head.fc.")),
    ),
    Layout(
        HUGGING_FACE,
        (r"patch_embeddings\.projection\.", r"layers\.\d+\.blocks\.\d+\.attention\.self\."),
        (
            (r"^patch_embed\.proj\.", "embeddings.patch_embeddings.projection."),
            (r"^patch_embed\.norm\.", "embeddings.norm."),
            (r"^mask_token$", "embeddings.mask_token"),
            (r"\.norm1\.", ".layernorm_before."),
            (r"\.norm2\.", ".layernorm_after."),
            (r"\.attn\.proj\.", ".attention.output.dense."),
            (r"\.attn\.(query|key|value|relative_position)", r".attention.self.\1"),
            (r"\.mlp\.fc1\.", ".intermediate.dense."),
            (r"\.mlp\.fc2\.", ".output.dense."),
            (r"^norm\.", "layernorm."),
            (r"^head\.", "classifier."),
        ),
        split_qkv=True,
    ),
    Layout(
        "OpenMMLab's Swin",
        (r"^stages\.\d+\.blocks\.\d+\.attn\.w_msa\.",),
        (
            (r"^patch_embed\.proj\.", "patch_embed.projection."),
            (r"\.attn\.", ".attn.w_msa."),
            (r"\.mlp\.fc1\.", ".ffn.layers.0.0."),
            (r"\.mlp\.fc2\.", ".ffn.layers.1."),
            (r"^layers\.", "stages."),
        ),
        unfolded=True,
    ),
    Layout(OFFICIAL, (r"^patch_embed\.proj\.weight$", r"^layers\.0\.blocks\.0\.")),
)
BY_NAME = {layout.name: layout for layout in READ}
REFUSED = (  # the same, of what is another network
    Layout("torchvision's Swin V2", (r"^features\.0\.0\.weight$", r"\.attn\.cpb_mlp\.")),
    Layout("Swin V2", (r"\.attn\.(logit_scale|cpb_mlp)|continuous_position_bias_mlp",)),
    Layout(
        "a plain vision transformer (timm, MAE, BEiT, VideoMAE)", (r"^patch_embed\.proj\.", r"^blocks\.\d+\.attn\.")
    ),
    Layout(
        "DALL-E's tokenizer, which goes into tokenizer.weights,", (r"^blocks\.input\.w$", r"^blocks\.output\.conv\.w$")
    ),
    Layout("a ResNet", (r"^(conv1|stem)\b", r"^layer1\.0\.")),
)
NOT_SWIN = Layout("Hugging Face's transformers", (r"patch_embeddings\.projection\.",))
TAKEN = (
    "taken are folders of this project (config.json with model.safetensors) and Swin's weights in the names of BEVT,"
    " Video Swin, Microsoft's Swin, torchvision, timm, Hugging Face and OpenMMLab; see docs/interop.md"
)


def identify(state: State) -> Layout:
    """The layout of a state dict whose names have no wrapper's prefix.

    Raises:
        UserError: names the layout that it has and that is not read, or its first names.
    """
    stem = state.get("patch_embed.proj.weight")
    if stem is not None and stem.ndim == 2:
        raise UserError(
            "holds this project's own weights without their config.json: give the folder that save_pretrained or a run"
            " wrote, or put that config.json next to the file and name it model.safetensors"
        )
    for layout in (*REFUSED, *READ, NOT_SWIN):
        if all(_any_matches(pattern.replace("{last}", str(_last_stage(state))), state) for pattern in layout.signs):
            if layout in READ:
                return layout
            raise UserError(f"has the layout of {layout.name}, which is not read: {TAKEN}")
    names = ", ".join(sorted(state)[:3])
    raise UserError(f"is not a Swin or BEVT checkpoint: its layout is unknown (it begins with {names}); {TAKEN}")


def _any_matches(pattern: str, names: Iterable[str]) -> bool:
    return any(re.search(pattern, name) for name in names)


def _last_stage(state: State) -> int:
    return max((int(match[1]) for name in state if (match := re.match(BLOCKS, name))), default=0)


@cache
def _back(layout: Layout) -> dict[str, str]:
    """Names of a layout -> official ones, of every Swin up to MOST_STAGES and MOST_BLOCKS."""
    affine = ("weight", "bias")
    parts = [f"{part}.{kind}" for part, kind in product(("norm1", "norm2", "mlp.fc1", "mlp.fc2", "attn.proj"), affine)]
    parts += [f"attn.{part}.{kind}" for part, kind in product(("qkv", "query", "key", "value"), affine)]
    parts += [f"attn.relative_position_{part}" for part in ("bias_table", "index")]
    names = [f"layers.{s}.blocks.{b}.{part}" for s, b, part in product(range(MOST_STAGES), range(MOST_BLOCKS), parts)]
    names += [
        f"layers.{s}.downsample.{part}.{kind}"
        for s, part, kind in product(range(MOST_STAGES), ("norm", "reduction"), affine)
    ]
    names += [
        f"{part}.{kind}" for part, kind in product(("patch_embed.proj", "patch_embed.norm", "norm", "head"), affine)
    ]
    names += ["mask_token", "cls_head.fc_cls.weight", "cls_head.fc_cls.bias"] if layout.name != IMAGES else []
    # where two names would become one (head and cls_head.fc_cls of swin3d), the later wins
    return {layout.named(name): name for name in names}


def _with_joint_qkv(state: State) -> State:
    """Query, key and value as one matrix; BEiT has biases of queries and values only, that of keys is zero."""
    out = dict(state)
    for name in state:
        if name.endswith(".attn.query.weight") or name.endswith(".attn.query.bias"):
            thirds = [name.replace(".query.", f".{part}.") for part in ("query", "key", "value")]
            if all(third in state for third in thirds):
                out[name.replace(".query.", ".qkv.")] = torch.cat([out.pop(third) for third in thirds])
        elif name.endswith(".attn.q_bias") and name.replace(".q_bias", ".v_bias") in state:
            query, value = out.pop(name), out.pop(name.replace(".q_bias", ".v_bias"))
            out[name.replace(".q_bias", ".qkv.bias")] = torch.cat([query, torch.zeros_like(query), value])
    return out


def _split(state: State) -> State:
    out = {}
    for name, value in state.items():
        if ".attn.qkv." in name:
            for part, third in zip(("query", "key", "value"), value.chunk(3), strict=True):
                out[name.replace(".qkv.", f".{part}.")] = third
        else:
            out[name] = value
    return out


def _without_layer_scale(state: State) -> State:
    """BEiT scales each residual branch by a learned vector; here it scales the branch's last matrix instead."""
    out = dict(state)
    for name, scale in state.items():
        match = re.match(r"(.*\.)gamma_([12])$", name)
        last = match and match[1] + {"1": "attn.proj", "2": "mlp.fc2"}[match[2]]
        if last and f"{last}.weight" in state:
            out[f"{last}.weight"] = state[f"{last}.weight"] * scale[:, None]
            out[f"{last}.bias"] = state[f"{last}.bias"] * scale
            del out[name]
    return out


def _with_last_norm(state: State) -> State:
    """Backbones of detectors, and mmaction2's, have a norm for each stage that is used: norm0, ..., norm3."""
    last = f"norm{_last_stage(state)}"
    if "norm.weight" in state:
        return state
    return {re.sub(rf"^{last}\.", "norm.", name): value for name, value in state.items()}


def _neighbours_first(value: Tensor) -> Tensor:
    """Columns in nn.Unfold's order (channel, row, column) -> (column, row, channel)."""
    return rearrange(value, "... (c h w) -> ... (w h c)", h=2, w=2)
