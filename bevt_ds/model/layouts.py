"""Whose checkpoint is it? Names the layout of a state dict that cannot be read, by the names that only that layout has.

Facts about the names: torchvision 0.28 (models/swin_transformer.py, models/video/swin_transformer.py), timm 1.0
(models/swin_transformer.py, swin_transformer_v2.py, vision_transformer.py, resnet.py), transformers 4 (models/swin),
mmpretrain 1 (models/backbones/swin_transformer.py), openai/DALL-E (encoder.py).
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from torch import Tensor

from bevt_ds.errors import UserError

TAKEN = (
    "taken are folders of this project (config.json with model.safetensors), and files with the names of BEVT,"
    " Video Swin or Microsoft's Swin (patch_embed.proj.weight, layers.0.blocks.0.attn.qkv.weight,"
    " layers.0.downsample.reduction.weight); see docs/weights.md"
)
FOREIGN = (  # layout, patterns that all must match a name without its wrapper's prefix
    ("torchvision's swin3d", (r"^patch_embed\.proj\.", r"^features\.\d+\.\d+\.attn\.qkv\.")),
    ("torchvision's Swin V2", (r"^features\.0\.0\.weight$", r"\.attn\.cpb_mlp\.")),
    ("torchvision's Swin", (r"^features\.0\.0\.weight$", r"^features\.\d+\.\d+\.attn\.qkv\.")),
    ("Swin V2", (r"\.attn\.(logit_scale|cpb_mlp)",)),
    ("timm's Swin", (r"^layers\.\d+\.blocks\.", r"^head\.fc\.|^layers\.3\.downsample\.")),
    ("timm's Swin with features_only", (r"^layers_\d+\.blocks\.",)),
    ("Hugging Face's Swin", (r"patch_embeddings\.projection\.", r"layers\.\d+\.blocks\.\d+\.attention\.self\.")),
    ("Hugging Face's transformers", (r"patch_embeddings\.projection\.",)),
    ("OpenMMLab's Swin", (r"^stages\.\d+\.blocks\.\d+\.attn\.w_msa\.",)),
    ("a plain vision transformer (timm, MAE, BEiT, VideoMAE)", (r"^patch_embed\.proj\.", r"^blocks\.\d+\.attn\.")),
    ("DALL-E's tokenizer, which goes into tokenizer.weights,", (r"^blocks\.input\.w$", r"^blocks\.output\.conv\.w$")),
    ("a ResNet", (r"^(conv1|stem)\b", r"^layer1\.0\.")),
)


def require_known(state: dict[str, Tensor]) -> None:
    """Refuse a state dict, its names without wrappers' prefixes, that is not in one of the layouts that can be read.

    Raises:
        UserError: names the layout that it has, or its first names, and the layouts that are read.
    """
    stem = state.get("patch_embed.proj.weight")
    if stem is not None and stem.ndim == 2:
        raise UserError(
            "holds this project's own weights without their config.json: give the folder that save_pretrained or a run"
            " wrote, or put that config.json next to the file and name it model.safetensors"
        )
    for layout, patterns in FOREIGN:
        if all(_any_matches(pattern, state) for pattern in patterns):
            raise UserError(f"has the layout of {layout}, which is not read: {TAKEN}")
    if stem is None or stem.ndim not in (4, 5) or not _any_matches(r"^layers\.0\.blocks\.0\.", state):
        names = ", ".join(sorted(state)[:3])
        raise UserError(f"is not a Swin or BEVT checkpoint: its layout is unknown (it begins with {names}); {TAKEN}")


def _any_matches(pattern: str, names: Iterable[str]) -> bool:
    return any(re.search(pattern, name) for name in names)
