"""A classifier of clips: Video Swin, mean over all tokens, dropout, linear head.

Letters: B clips, K classes, C features. Source of the semantics: xyzforever/BEVT@8881b21,
mmaction/models/heads/i3d_head.py with configs/recognition/swin/swin_base_patch244_window877_bevt_finetune_k400.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .drop_path import uniform
from .inputs import CLIPS, require_pixels
from .layers import draw_parameters
from .video_swin import VideoSwin
from .weights import PretrainedMixin

HEAD_STD = 0.01
DROPOUT_COUNTER = 1 << 20  # drop-path counts its decisions from 0; the two must not share random numbers


class VideoClassifier(PretrainedMixin, nn.Module):
    """`encoder` and `head`: clips in, logits out.

    `options` are VideoSwin's arguments. `classes` are the names of the labels, or none. Dropout, like drop-path, is a
    function of each sample's key: ranks and batch sizes do not change it.
    """

    def __init__(
        self,
        num_classes: int,
        classes: Sequence[str] = (),
        dropout: float = 0.0,
        **options: Any,
    ):
        super().__init__()
        if classes and len(classes) != num_classes:
            raise ValueError(f"{len(classes)} names of {num_classes} classes")
        self.encoder = VideoSwin(**options)
        own = {"num_classes": num_classes, "classes": tuple(classes), "dropout": dropout}
        self.arch = own | self.encoder.arch
        self.dropout = dropout
        self.head = nn.Linear(self.encoder.norm.normalized_shape[0], num_classes)
        self.init_weights()

    @torch.no_grad()
    def draw(self, module: nn.Module, generator: torch.Generator | None = None) -> None:
        """The encoder's as in pretraining, the head's normal of std 0.01 with bias 0."""
        draw_parameters(module, generator)
        if module is self.head:
            nn.init.normal_(self.head.weight, std=HEAD_STD, generator=generator)

    def forward(self, clip: Tensor, sample_keys: Tensor | None = None) -> Tensor:
        """Logits of clips: (B,3,T,H,W) float -> (B,K).

        `sample_keys` int64 (B,) decide what training drops; without them torch's own generator draws keys.

        Raises UserError for other shapes, types or ranges: see `inputs`.
        """
        require_pixels(clip, CLIPS)
        if self.training and sample_keys is None:
            sample_keys = torch.randint(2**63 - 1, (len(clip),), device=clip.device)
        pooled = self.encoder.forward_features(clip, sample_keys).mean((2, 3, 4))
        return self.head(self._drop(pooled, sample_keys))

    def _drop(self, x: Tensor, keys: Tensor | None) -> Tensor:
        """Dropout of x (B,C) in training mode, decided by keys (B,)."""
        if not self.training or keys is None or self.dropout == 0:
            return x
        counters = DROPOUT_COUNTER + torch.arange(x.shape[1], device=x.device)
        kept = uniform(keys[:, None], counters) >= self.dropout
        return x * kept / (1 - self.dropout)
