"""Model sizes by name. They are registered with timm as well: `timm.create_model("bevt_swin_b")`.

Sizes T to L are those of Swin and Video Swin (configs/_base_/models/swin/* of xyzforever/BEVT@8881b21, with the patch
and window of its experiments); `tiny` is ours, for 128 px and 8 frames on a CPU: its windows tile that exactly.
"""

from __future__ import annotations

from collections.abc import Callable
from difflib import get_close_matches
from typing import Any

from timm.models import register_model
from torch import nn

from bevt_ds.errors import UserError

from .arch import SwinArch
from .bevt import BEVT
from .classifier import VideoClassifier
from .video_swin import VideoSwin

SIZES = {
    "tiny": SwinArch(embed_dim=32, depths=(2, 2, 2, 2), num_heads=(1, 2, 4, 8), window=(4, 4, 4)),
    "swin_t": SwinArch(embed_dim=96, depths=(2, 2, 6, 2), num_heads=(3, 6, 12, 24)),
    "swin_s": SwinArch(embed_dim=96, depths=(2, 2, 18, 2), num_heads=(3, 6, 12, 24)),
    "swin_b": SwinArch(embed_dim=128, depths=(2, 2, 18, 2), num_heads=(4, 8, 16, 32)),
    "swin_l": SwinArch(embed_dim=192, depths=(2, 2, 18, 2), num_heads=(6, 12, 24, 48)),
}
ENCODERS = {f"video_{name}": name for name in SIZES}


def create_model(name: str, **overrides: Any) -> nn.Module:
    """A BEVT (`tiny`, `swin_t`, `swin_s`, `swin_b`, `swin_l`) or its bare encoder (`video_tiny`, `video_swin_b`, ...).

    `overrides` are arguments of the class's constructor and win over the preset. Raises UserError for an unknown name.
    """
    if name in SIZES:
        return BEVT(**(SIZES[name].arguments() | overrides))
    if name in ENCODERS:
        return VideoSwin(**(SIZES[ENCODERS[name]].arguments() | overrides))
    near = get_close_matches(name, [*SIZES, *ENCODERS], n=1)
    hint = f" (did you mean {near[0]}?)" if near else ""
    raise UserError(f"no model named {name!r}{hint}: choose one of {', '.join([*SIZES, *ENCODERS])}")


def create_classifier(name: str, num_classes: int, **overrides: Any) -> VideoClassifier:
    """A classifier of clips on a backbone of SIZES; `overrides` are VideoClassifier's arguments.

    Raises UserError for an unknown name.
    """
    if name not in SIZES:
        raise UserError(f"no backbone named {name!r}: choose one of {', '.join(SIZES)}")
    return VideoClassifier(num_classes, **(SIZES[name].arguments() | overrides))


def _timm_entry(timm_name: str, name: str) -> Callable[..., nn.Module]:
    """A function with the arguments that timm passes, which builds `name`."""

    def build(
        pretrained: bool = False,
        pretrained_cfg: Any = None,
        pretrained_cfg_overlay: Any = None,
        cache_dir: Any = None,
        **overrides: Any,
    ) -> nn.Module:
        if pretrained:
            raise UserError(f"{timm_name} has no weights to download: use from_pretrained with a file")
        return create_model(name, **overrides)

    build.__name__ = timm_name
    return build


TIMM_NAMES = {f"bevt_{name}": name for name in SIZES} | {name: name for name in ENCODERS}
for _timm_name, _name in TIMM_NAMES.items():
    register_model(_timm_entry(_timm_name, _name))
# register_model appends names that are no attributes
__all__ = ["ENCODERS", "SIZES", "TIMM_NAMES", "create_classifier", "create_model"]
