"""The encoder as timm's users expect a model: `timm.create_model("bevt_swin_base", checkpoint_path=...)`.

Clips are (B,3,T,H,W), images (B,3,H,W), normalised; an image is seen as a still clip of one token of time. A file of
any layout that is read (docs/interop.md) loads, through `load_state_dict`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from einops import repeat
from timm.models import FeatureInfo
from torch import Tensor, nn
from torch.nn.modules.module import _IncompatibleKeys

from bevt_ds.batch import MEAN, STD
from bevt_ds.errors import UserError

from .layers import draw_parameters
from .video_swin import VideoSwin
from .weights import load_tensors

FRAMES, SIDE = 16, 224  # of pretraining; any other size works


def default_cfg(arch: Mapping[str, Any], num_classes: int) -> dict[str, Any]:
    """What timm's `resolve_data_config` and checkpoints tools read of a model."""
    return {
        "architecture": "bevt",
        "url": "",
        "num_classes": num_classes,
        "input_size": (3, SIDE, SIDE),
        "num_frames": FRAMES,
        "pool_size": None,
        "crop_pct": 1.0,
        "crop_mode": "center",
        "interpolation": "bilinear",
        "fixed_input_size": False,
        "mean": tuple(mean / 255 for mean in MEAN),
        "std": tuple(std / 255 for std in STD),
        "first_conv": "encoder.patch_embed.proj",
        "classifier": "head",
    }


class LoadsAnyLayout(nn.Module):
    """A module whose `load_state_dict` also takes tensors in others' names. `arch` is as of our models."""

    arch: dict[str, Any]

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> _IncompatibleKeys:
        """As torch's, for names of this model; else reads the layout and prints what was loaded.

        Raises:
            UserError: the layout is not read, or a tensor is missing or unknown, by name.
        """
        if not state_dict.keys() - self.state_dict().keys():
            return super().load_state_dict(state_dict, strict, assign)
        print(load_tensors(self, dict(state_dict)))
        return _IncompatibleKeys([], [])


class TimmVideoSwin(LoadsAnyLayout):
    """`encoder` and `head`, with timm's methods. `options` are VideoSwin's arguments."""

    def __init__(
        self, num_classes: int = 0, in_chans: int = 3, drop_rate: float = 0.0, global_pool: str = "avg", **options: Any
    ):
        super().__init__()
        if in_chans != 3 or global_pool not in ("avg", ""):
            raise UserError(f"in_chans={in_chans}, global_pool={global_pool!r}: there are 3 channels and avg, or none.")
        options["drop_path"] = options.pop("drop_path_rate", options.get("drop_path", 0.0))
        self.encoder = VideoSwin(**options)
        self.num_features = self.head_hidden_size = self.encoder.norm.normalized_shape[0]
        self.head_drop, self.global_pool = nn.Dropout(drop_rate), global_pool
        self.feature_info = stage_info(self.encoder)
        self.reset_classifier(num_classes)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new head over `num_classes`; 0: none."""
        self.global_pool = self.global_pool if global_pool is None else global_pool
        self.num_classes = num_classes
        self.head = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()
        draw_parameters(self.head)
        self.arch = self.encoder.arch | ({"num_classes": num_classes} if num_classes else {})
        self.default_cfg = self.pretrained_cfg = default_cfg(self.arch, num_classes)

    def get_classifier(self) -> nn.Module:
        """The head, or an Identity."""
        return self.head

    def forward_features(self, x: Tensor) -> Tensor:
        """Clips -> (B,C,T',H',W'), images -> (B,C,H',W'), after the last norm."""
        features = self.encoder.features_of(x)
        return features if x.ndim == 5 else features.squeeze(2)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Features -> their mean (B,C) where they are pooled, and logits (B,K) unless `pre_logits`."""
        x = x.flatten(2).mean(2) if self.global_pool else x
        x = self.head_drop(x)
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B,K), or pooled features (B,C) of a model without classes."""
        return self.forward_head(self.forward_features(x))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Stages' outputs before merging, channels first: those of `indices`, or the last so many; all by default."""
        last, outputs = self.encoder.forward_intermediates(as_clip(x, self.encoder))
        outputs = [*outputs[:-1], last if norm else outputs[-1]]
        last, *outputs = [last, *outputs] if x.ndim == 5 else [value.squeeze(2) for value in (last, *outputs)]
        many = len(outputs) if indices is None else indices
        picked = outputs[-many:] if isinstance(many, int) else [outputs[i] for i in many]
        return picked if intermediates_only else (last, picked)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Whether blocks are computed again in the backward pass."""
        self.encoder.checkpointing = enable

    def no_weight_decay(self) -> set[str]:
        """The tables of relative positions."""
        return {name for name, _ in self.named_parameters() if name.endswith("relative_position_bias_table")}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """timm's groups of layers, for layer-wise learning rates."""
        blocks = r"^encoder\.layers\.(\d+)" if coarse else r"^encoder\.layers\.(\d+)\.blocks\.(\d+)"
        ends = [(r"^encoder\.layers\.(\d+)\.downsample", (0,)), (r"^encoder\.norm", (99999,))]
        return {"stem": r"^encoder\.patch_embed", "blocks": blocks if coarse else [(blocks, None), *ends]}


class StageFeatures(LoadsAnyLayout):
    """The outputs of an encoder's stages, with timm's `feature_info` of channels and spatial reduction.

    `out_indices` are the stages, in order; negative ones count from the end. Raises UserError for a stage that is not.
    """

    def __init__(self, encoder: VideoSwin, out_indices: Sequence[int] | None = None):
        super().__init__()
        stages = len(encoder.arch["depths"])
        chosen = range(stages) if out_indices is None else out_indices
        if wrong := [i for i in chosen if not -stages <= i < stages]:
            raise UserError(f"out_indices={list(chosen)}: there is no stage {wrong[0]}, the model has {stages}")
        self.encoder, self.indices, self.arch = encoder, [i % stages for i in chosen], encoder.arch
        self.feature_info = FeatureInfo(stage_info(encoder), self.indices)

    def forward(self, x: Tensor) -> list[Tensor]:
        """Clips -> (B,C_i,T',H'_i,W'_i), images -> (B,C_i,H'_i,W'_i), of each chosen stage before merging and norm."""
        _, outputs = self.encoder.forward_intermediates(as_clip(x, self.encoder))
        return [outputs[i] if x.ndim == 5 else outputs[i].squeeze(2) for i in self.indices]


def stage_info(encoder: VideoSwin) -> list[dict[str, Any]]:
    """timm's description of each stage."""
    width, patch = encoder.arch["embed_dim"], encoder.arch["patch"][-1]
    stages = range(len(encoder.arch["depths"]))
    return [{"num_chs": width << i, "reduction": patch << i, "module": f"layers.{i}"} for i in stages]


def as_clip(x: Tensor, encoder: VideoSwin) -> Tensor:
    """A still clip of one token of time of each image; clips as they are."""
    return x if x.ndim != 4 else repeat(x, "b c h w -> b c t h w", t=encoder.arch["patch"][0])
