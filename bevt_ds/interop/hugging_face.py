"""Our encoder and classifier as transformers' AutoModel finds them: `import bevt_ds` registers them, see there.

Clips come as transformers' video processors give them, `pixel_values` (B,T,3,H,W); images as (B,3,H,W).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling, ImageClassifierOutput
from transformers.models.auto.configuration_auto import AutoConfig
from transformers.models.auto.modeling_auto import AutoModel, AutoModelForVideoClassification

from bevt_ds.errors import UserError
from bevt_ds.model.arch import SwinArch
from bevt_ds.model.layers import PatchEmbed
from bevt_ds.model.video_swin import VideoSwin


class BevtConfig(PretrainedConfig):
    """`arch` are the constructor's arguments of our models; `model`, `streams`, `format` those of a folder of ours."""

    model_type = "bevt"

    def __init__(self, arch: dict[str, Any] | None = None, model: str = "VideoSwin", **options: Any):
        self.arch, self.model = dict(arch or SwinArch().arguments()), model
        super().__init__(**options)


class BevtPreTrained(PreTrainedModel):
    """What both classes share: an encoder, and the images' stem where the weights have one."""

    config_class = BevtConfig
    base_model_prefix = ""
    main_input_name = "pixel_values"

    def __init__(self, config: BevtConfig):
        super().__init__(config)
        arch = SwinArch.of(config.arch)
        self.encoder = VideoSwin(**arch.arguments())
        has_stem = config.model == "BEVT"
        self.image_embed = PatchEmbed((1, *arch.patch[1:]), arch.embed_dim) if has_stem else None

    def _init_weights(self, module: nn.Module) -> None:
        """Every parameter is in the file; what the constructor drew stays otherwise."""

    def features(self, pixel_values: Tensor) -> Tensor:
        """Clips (B,T,3,H,W) -> (B,C,T',H',W'), images (B,3,H,W) -> (B,C,1,H',W')."""
        if pixel_values.ndim not in (4, 5):
            raise UserError(f"pixel_values has the shape {tuple(pixel_values.shape)}: (B,T,3,H,W) or (B,3,H,W).")
        pixels = pixel_values.transpose(1, 2) if pixel_values.ndim == 5 else pixel_values
        policy = self.config.arch.get("image_windows", "swin")
        return self.encoder.features_of(pixels, self.image_embed, policy)


class BevtModel(BevtPreTrained):
    """The encoder: tokens after the last norm, and their mean."""

    def __init__(self, config: BevtConfig):
        super().__init__(config)
        self.post_init()

    def forward(self, pixel_values: Tensor, **_: Any) -> BaseModelOutputWithPooling:
        """last_hidden_state (B,T'H'W',C), pooler_output (B,C)."""
        tokens = self.features(pixel_values).flatten(2).transpose(1, 2)
        return BaseModelOutputWithPooling(last_hidden_state=tokens, pooler_output=tokens.mean(1))


class BevtForVideoClassification(BevtPreTrained):
    """Mean over tokens, linear head."""

    def __init__(self, config: BevtConfig):
        super().__init__(config)
        self.head = nn.Linear(SwinArch.of(config.arch).width, config.arch["num_classes"])
        self.post_init()

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None, **_: Any) -> ImageClassifierOutput:
        """logits (B,K), and the cross-entropy where labels int64 (B,) are given."""
        logits = self.head(self.features(pixel_values).mean((2, 3, 4)))
        return ImageClassifierOutput(loss=None if labels is None else F.cross_entropy(logits, labels), logits=logits)


def load_folder(path: Path) -> BevtPreTrained:
    """A model of a folder, in float32. Raises UserError where a tensor is missing or left over, by name."""
    kind = BevtForVideoClassification if BevtConfig.from_pretrained(path).arch.get("num_classes") else BevtModel
    model, report = kind.from_pretrained(path, output_loading_info=True, dtype=torch.float32)
    if missing := sorted({*report["missing_keys"], *report["unexpected_keys"]}):
        raise UserError(
            f"{path}: transformers did not load {', '.join(missing)}: write the folder again with `bevt convert`."
        )
    return model


AutoConfig.register("bevt", BevtConfig, exist_ok=True)
AutoModel.register(BevtConfig, BevtModel, exist_ok=True)
AutoModelForVideoClassification.register(BevtConfig, BevtForVideoClassification, exist_ok=True)
