"""BEVT: masked token prediction on clips and images with one Video Swin encoder.

Letters: B samples, T frames, t = T/2 tokens of time, H W pixels, h = H/16 and w = W/16 the mask grid, C features,
R rows (masked output positions of a micro-batch, padded), V token ids. Masks: True = masked.
Source of the semantics: xyzforever/BEVT@8881b21, mmaction/models/backbones/swin_transformer_bevt.py and
mmaction/models/heads/bevt_multisource_head.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, get_args

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

import bevt_ds.kernels as ops
from bevt_ds.batch import IGNORE, Batch, Stream
from bevt_ds.errors import UserError

from .inputs import (
    CLIPS,
    IMAGES,
    look_at_values,
    require_batch,
    require_keys,
    require_mask,
    require_multiples,
    require_pixels,
)
from .layers import LMHead, MaskToken, PatchEmbed, Upsample
from .video_swin import VideoSwin
from .weights import PretrainedMixin
from .windows import WindowPolicy

POLICIES = get_args(WindowPolicy)


class BEVTOutput(NamedTuple):
    """What `BEVT.forward` returns.

    `metrics` are sums over the micro-batch's masked rows, as device scalars that add up over ranks and micro-steps:
    loss_STREAM (cross-entropy, or smooth L1 of features; fp32), hits_STREAM (right predictions of ids) and rows_STREAM
    (rows), for each STREAM of `video` and `image` that the batch holds; and of ids unknown_targets, the rows whose
    target is no id of the head's vocabulary, whose loss is NaN and whose gradient is none.
    """

    loss: Tensor
    metrics: dict[str, Tensor]


@dataclass(frozen=True)
class Rows:
    """Masked rows of one stream, ready for the shared norm and head."""

    features: Tensor  # (R,C)
    targets: Tensor  # int64 (R,), or float (R,D)
    real: Tensor  # bool (R,): False where a row pads
    count: int  # the loss's denominator, as in Stream


class Decoder(nn.Module):
    """From the last two stages to one feature per output position: h x w cells of `frames` output positions each.

    There is no activation and no norm in it; the encoder's norm follows.
    """

    def __init__(self, dim: int, frames: int, kernels: str):
        super().__init__()
        self.kernels = kernels
        self.upsample = Upsample(dim, (1, 2, 2))
        self.reduce = nn.Linear(dim // 2 + dim, dim)
        self.unfold = Upsample(dim, (frames, 1, 1)) if frames > 1 else nn.Identity()

    def forward(self, fine: Tensor, coarse: Tensor, cells: Tensor | None = None) -> Tensor:
        """fine (B,t,h,w,C/2), coarse (B,t,h/2,w/2,C) -> (K,frames,C), a cell's output positions side by side.

        K cells: all of (B,t,h,w) flattened, or those of the index `cells` int64 (K,), where -1 stands for a cell of
        zeros. After the upsampling each cell is on its own, so that choosing cells first changes nothing but the cost.
        """
        grids = [x.flatten(0, 3) for x in (fine, self.upsample(coarse))]
        if cells is not None:
            grids = [ops.gather_masked(x, cells, provider=self.kernels) for x in grids]
        x = self.reduce(torch.cat(grids, dim=-1))
        return self.unfold(x[:, None, None, None]).flatten(1, 3)


class BEVT(PretrainedMixin, nn.Module):
    """One encoder, a stem and a decoder for each stream, a mask token, norm and head that both share.

    `encoder.patch_embed` is the clips' stem and `encoder.norm` follows the decoders. Height and width of the images
    are multiples of 32, frames of 2. `image_windows="official"` masks images as the released weights expect it,
    "swin" as the Swin paper does. `target_dim` is the length of the vectors that it predicts in place of ids; 0: ids.
    `options` are VideoSwin's arguments, `kernels` too.
    """

    def __init__(
        self,
        *,
        vocab_size: int = 8192,
        target_dim: int = 0,
        image_windows: WindowPolicy = "official",
        kernels: str = "auto",
        **options: Any,
    ):
        super().__init__()
        if image_windows not in POLICIES:
            raise UserError(f"image_windows={image_windows!r}: choose one of {', '.join(POLICIES)}")
        self.image_windows: WindowPolicy = image_windows
        self.encoder = VideoSwin(kernels=kernels, **options)
        head = {"target_dim": target_dim} if target_dim else {"vocab_size": vocab_size}
        self.arch = self.encoder.arch | head | {"image_windows": image_windows}
        patch, embed_dim = self.arch["patch"], self.arch["embed_dim"]
        dim = self.encoder.norm.normalized_shape[0]
        self.image_embed = PatchEmbed((1, *patch[1:]), embed_dim, kernels=kernels)
        self.mask_token = MaskToken(embed_dim, kernels)
        self.video_decoder = Decoder(dim, frames=patch[0], kernels=kernels)
        self.image_decoder = Decoder(dim, frames=1, kernels=kernels)
        if target_dim:
            self.feature_head = nn.Linear(dim, target_dim)
        else:
            self.lm_head = LMHead(dim, vocab_size, kernels)
        self.init_weights()

    def forward_video(self, clip: Tensor, mask: Tensor, sample_keys: Tensor | None = None) -> Tensor:
        """Features of every output position of clips, after the shared norm.

        clip (B,3,T,H,W) float, normalised; mask (B,T/2,h,w) bool -> (B,T·h·w,C), frame by frame, row by row.

        Raises UserError for other shapes, types or ranges: see `inputs`.
        """
        require_pixels(clip, CLIPS)
        look_at_values(clip, CLIPS, self)
        self._require_fit(clip, mask, sample_keys)
        fine, coarse = self._encode_video(clip, mask, sample_keys)
        x = self.encoder.norm(self.video_decoder(fine, coarse))
        b, t, h, w, _ = fine.shape
        return rearrange(x, "(b t h w) f c -> b (t f h w) c", b=b, t=t, h=h, w=w)

    def forward_image(self, image: Tensor, mask: Tensor, sample_keys: Tensor | None = None) -> Tensor:
        """Features of every output position of images, after the shared norm.

        image (B,3,H,W) float, normalised; mask (B,h,w) bool -> (B,h*w,C), row by row.

        Raises UserError for other shapes, types or ranges: see `inputs`.
        """
        require_pixels(image, IMAGES)
        look_at_values(image, IMAGES, self)
        self._require_fit(image, mask, sample_keys)
        fine, coarse = self._encode_image(image, mask, sample_keys)
        x = self.encoder.norm(self.image_decoder(fine, coarse))
        return rearrange(x, "(b n) 1 c -> b n c", b=len(image))

    def forward(self, batch: Batch) -> BEVTOutput:
        """Loss and metrics of one micro-batch whose targets are filled in.

        The loss is the sum over streams of cross-entropy, or the smooth L1 distance of features, at masked positions,
        each divided by the stream's `count`: the masked positions of the global batch. Micro-batches of a step
        therefore add up to the step's loss. A stream without a masked position adds 0.

        Raises UserError for a batch without targets, and for streams of other shapes or types: see `inputs`.
        """
        require_batch(batch, self.arch.get("target_dim", 0))
        streams: dict[str, Rows] = {}
        if batch.video is not None:
            streams["video"] = self._video_rows(batch.video)
        if batch.image is not None:
            streams["image"] = self._image_rows(batch.image)
        features = self.encoder.norm(torch.cat([rows.features for rows in streams.values()]))
        targets = torch.cat([rows.targets for rows in streams.values()])
        segments = tuple(len(rows.targets) for rows in streams.values())
        metrics: dict[str, Tensor] = {}
        if "target_dim" in self.arch:
            real = torch.cat([rows.real for rows in streams.values()])
            losses = smooth_l1_sums(self.feature_head(features), targets, real, segments)
        else:
            losses, hits = self.lm_head(features, targets, segments)
            outside = (targets < 0) | (targets >= len(self.lm_head.weight))
            metrics["unknown_targets"] = (outside & (targets != IGNORE)).sum()
            metrics |= {f"hits_{name}": hits[i] for i, name in enumerate(streams)}
        for i, (name, rows) in enumerate(streams.items()):
            metrics[f"loss_{name}"] = losses[i].detach()
            metrics[f"rows_{name}"] = rows.real.sum()
        return BEVTOutput(sum(losses[i] / max(rows.count, 1) for i, rows in enumerate(streams.values())), metrics)

    def _require_fit(self, pixels: Tensor, mask: Tensor, keys: Tensor | None) -> None:
        """UserError unless the size suits the network, and mask and keys the pixels."""
        require_multiples(pixels, 2, 32, "BEVT")
        t, *patch = self.arch["patch"]
        cell = [side << len(self.arch["depths"]) - 2 for side in patch]
        grid = [extent // side for extent, side in zip(pixels.shape[-2:], cell, strict=True)]
        time = [pixels.shape[2] // t] if pixels.ndim == 5 else []
        require_mask(mask, [len(pixels), *time, *grid])
        require_keys(keys, len(pixels))

    def _encode_video(self, clip: Tensor, mask: Tensor, keys: Tensor | None) -> Sequence[Tensor]:
        tokens = self.mask_token(self.encoder.patch_embed(clip), mask)
        return self.encoder.last_stages(2, tokens, "swin", keys)

    def _encode_image(self, image: Tensor, mask: Tensor, keys: Tensor | None) -> Sequence[Tensor]:
        tokens = self.mask_token(self.image_embed(image.unsqueeze(2)), mask.unsqueeze(1))
        return self.encoder.last_stages(2, tokens, self.image_windows, keys)

    def _video_rows(self, stream: Stream) -> Rows:
        self._require_fit(stream.pixels, stream.mask, stream.sample_keys)
        fine, coarse = self._encode_video(stream.pixels, stream.mask, stream.sample_keys)
        return self._rows(stream, self.video_decoder(fine, coarse, stream.cells))

    def _image_rows(self, stream: Stream) -> Rows:
        self._require_fit(stream.pixels, stream.mask, stream.sample_keys)
        fine, coarse = self._encode_image(stream.pixels, stream.mask, stream.sample_keys)
        return self._rows(stream, self.image_decoder(fine, coarse, stream.cells))

    def _rows(self, stream: Stream, decoded: Tensor) -> Rows:
        real = stream.rows >= 0 if "target_dim" in self.arch else stream.targets != IGNORE
        return Rows(decoded.flatten(0, 1), stream.targets, real, stream.count)


def smooth_l1_sums(predicted: Tensor, targets: Tensor, real: Tensor, segments: tuple[int, ...]) -> Tensor:
    """The smooth L1 distance of vectors, summed over the rows of each segment: fp32 (S,).

    Of a row: the mean over its D numbers of d^2 / 2 where |d| < 1, else |d| - 1/2 (Girshick 2015, "Fast R-CNN").

    Args:
        predicted, targets: (R,D), float.
        real: bool (R,); other rows count nothing and have no gradient.
        segments: row counts that sum to R.
    """
    each = F.smooth_l1_loss(predicted.float(), targets.float(), reduction="none").mean(-1).masked_fill(~real, 0.0)
    return torch.stack([part.sum() for part in each.split(segments)])
