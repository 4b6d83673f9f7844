"""DALL-E's encoder run plainly: usual layout, weights cast at every call, half precision on a GPU, as the original."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from bevt_ds.batch import Batch
from bevt_ds.model.tokenizers import Tokenizer
from bevt_ds.model.tokenizers.dalle import GAIN, GROUPS, OUTPUT, DalleTokenizer

from .step_batch import all_frames


def convolve(x: Tensor, state: dict[str, Tensor], name: str) -> Tensor:
    """A convolution that keeps the size, by its name in the encoder's state dict."""
    weight, bias = (state[f"{name}.{part}"].to(x.dtype) for part in "wb")
    return F.conv2d(x, weight, bias, padding=weight.shape[-1] // 2)


def residual_block(x: Tensor, state: dict[str, Tensor], name: str) -> Tensor:
    """Four convolutions, added to the identity, or to a 1x1 convolution where the width changes."""
    branch = x
    for i in range(1, 5):
        branch = convolve(branch.relu(), state, f"{name}.res_path.conv_{i}")
    path = f"{name}.id_path"
    return (convolve(x, state, path) if f"{path}.w" in state else x) + GAIN * branch


@torch.no_grad()
def plain_logits(tokenizer: DalleTokenizer, frames: Tensor) -> Tensor:
    """Images (N,3,v,v), float RGB in [0,1] -> logits (N,V,v/8,v/8), fp32."""
    state = tokenizer.state_dict()
    x = convolve((0.8 * frames + 0.1).to(torch.float16 if frames.is_cuda else torch.float32), state, "blocks.input")
    for group in range(1, GROUPS + 1):
        for block in (1, 2):
            x = residual_block(x, state, f"blocks.group_{group}.block_{block}")
        x = F.max_pool2d(x, 2) if group < GROUPS else x
    return convolve(x.relu().float(), state, OUTPUT)


def every_id(tokenizer: Tokenizer, batch: Batch) -> list[Tensor]:
    """Ids of every frame and image, (B,T,h,w) and (B,h,w), from one call over all of them."""
    encode = tokenizer.encode
    if isinstance(tokenizer, DalleTokenizer):
        encode = lambda frames: plain_logits(tokenizer, frames).argmax(1)  # noqa: E731
    full = all_frames(batch)
    streams = [stream for stream in (full.video, full.image) if stream is not None]
    parts = encode(torch.cat([s.view for s in streams])).split([len(s.view) for s in streams])
    shapes = [(len(s.pixels), *s.pixels[0, 0].shape[:-2]) for s in streams]
    return [ids.unflatten(0, shape) for shape, ids in zip(shapes, parts, strict=True)]
