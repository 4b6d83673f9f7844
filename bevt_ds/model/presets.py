"""Model sizes by name. They are registered with timm as well: `timm.create_model("bevt_swin_base")`.

Sizes T to L are those of Swin and Video Swin (configs/_base_/models/swin/* of xyzforever/BEVT@8881b21, with the patch
and window of its experiments); H and G have the widths and depths of Swin V2 (Liu et al. 2022, section 3.5) and its
residual post-norm, with Video Swin's attention and bias tables: there are no weights of them. `tiny` is ours, for
128 px and 8 frames on a CPU: its windows tile that exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from difflib import get_close_matches
from typing import Any

from timm.models import register_model
from torch import nn

from bevt_ds.errors import UserError
from bevt_ds.folders import weights_of

from .arch import SwinArch
from .bevt import BEVT
from .classifier import VideoClassifier
from .timm_model import StageFeatures, TimmVideoSwin
from .video_swin import VideoSwin
from .weights import read_weights

SIZES = {
    "tiny": SwinArch(embed_dim=32, depths=(2, 2, 2, 2), num_heads=(1, 2, 4, 8), window=(4, 4, 4)),
    "swin_t": SwinArch(embed_dim=96, depths=(2, 2, 6, 2), num_heads=(3, 6, 12, 24)),
    "swin_s": SwinArch(embed_dim=96, depths=(2, 2, 18, 2), num_heads=(3, 6, 12, 24)),
    "swin_b": SwinArch(embed_dim=128, depths=(2, 2, 18, 2), num_heads=(4, 8, 16, 32)),
    "swin_l": SwinArch(embed_dim=192, depths=(2, 2, 18, 2), num_heads=(6, 12, 24, 48)),
    "swin_h": SwinArch(embed_dim=352, depths=(2, 2, 18, 2), num_heads=(11, 22, 44, 88), norm="post"),
    "swin_g": SwinArch(embed_dim=512, depths=(2, 2, 42, 4), num_heads=(16, 32, 64, 128), norm="post"),
}
TIMM_SWINS = {"swin_t": "swin_tiny", "swin_s": "swin_small", "swin_b": "swin_base", "swin_l": "swin_large"}  # timm's
ENCODERS = {f"video_{name}": name for name in SIZES}


def create_model(
    name: str,
    num_classes: int | None = None,
    features_only: bool = False,
    out_indices: Sequence[int] | None = None,
    **overrides: Any,
) -> nn.Module:
    """A model by name: `tiny`, `swin_t`, `_s`, `_b`, `_l`, `_h`, `_g`, or an encoder: `video_tiny`, `video_swin_b`, ...

    Args:
        num_classes: none: a BEVT, or the bare VideoSwin of a `video_` name; 0: a bare VideoSwin; more: a
            VideoClassifier of so many classes.
        features_only: a StageFeatures instead, of the stages `out_indices` (default: all).
        overrides: arguments of the class's constructor, which win over the preset.

    Raises:
        UserError: an unknown name or argument.
    """
    arguments = _sizes(name).arguments() | overrides
    if features_only:
        return StageFeatures(VideoSwin(**arguments), out_indices)
    if out_indices is not None:
        raise UserError("out_indices needs features_only=True")
    if num_classes:
        return VideoClassifier(num_classes, **arguments)
    return VideoSwin(**arguments) if num_classes == 0 or name in ENCODERS else BEVT(**arguments)


def _sizes(name: str) -> SwinArch:
    if name in SIZES or name in ENCODERS:
        return SIZES[ENCODERS.get(name, name)]
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


def require_same_sizes(name: str, path: str) -> None:
    """Hold the weights that `init_from=path` names against the preset `name`, before anything else is made.

    Raises:
        UserError: they are of another width, depth or number of heads, and of which preset.
    """
    theirs, ours = read_weights(weights_of(path, "init_from")).arch, SIZES[name].arguments()
    differing = [key for key in ("embed_dim", "depths", "num_heads") if not _same(theirs, ours, key)]
    if not differing:
        return
    fitting = [other for other, arch in SIZES.items() if all(_same(theirs, arch.arguments(), key) for key in differing)]
    advice = f"say model.name={fitting[0]}" if fitting else "no preset of model.name has these sizes"
    values = ", ".join(f"{key}={theirs[key]} (model.name={name} has {ours[key]})" for key in differing)
    raise UserError(f"init_from={path} has {values}: {advice}.")


def _same(theirs: dict[str, Any], ours: dict[str, Any], key: str) -> bool:
    """Whether two architectures agree in a size, as far as the first says it."""
    plain = lambda value: list(value) if isinstance(value, tuple) else value  # noqa: E731
    return key not in theirs or plain(theirs[key]) == plain(ours[key])


def create_timm_model(
    name: str,
    features_only: bool = False,
    out_indices: Sequence[int] | None = None,
    img_size: Any = None,
    **options: Any,
) -> nn.Module:
    """A TimmVideoSwin of a preset, or its StageFeatures. Any `img_size` works, so that it is not looked at.

    Raises:
        UserError: an unknown argument.
    """
    model = TimmVideoSwin(**(SIZES[name].arguments() | options))
    return StageFeatures(model.encoder, out_indices) if features_only else model


def _register(timm_name: str, name: str, create: Callable[..., nn.Module]) -> None:
    """Register a function with the arguments that timm passes, which builds `name`."""

    def build(
        pretrained: bool = False,
        pretrained_cfg: Any = None,
        pretrained_cfg_overlay: Any = None,
        cache_dir: Any = None,
        **overrides: Any,
    ) -> nn.Module:
        if pretrained:
            raise UserError(f"{timm_name} has no weights to download: use checkpoint_path with a file")
        return create(name, **overrides)

    build.__name__ = timm_name
    register_model(build)


TIMM_NAMES = {f"bevt_{name}": name for name in SIZES} | {name: name for name in ENCODERS}
for _timm_name, _name in TIMM_NAMES.items():
    _register(_timm_name, _name, create_model)
for _name, _timm_name in TIMM_SWINS.items():
    _register(f"bevt_{_timm_name}", _name, create_timm_model)
# register_model appends names that are no attributes
__all__ = ["ENCODERS", "SIZES", "TIMM_NAMES", "StageFeatures", "create_classifier", "create_model"]
