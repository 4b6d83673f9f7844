"""Decoded frames to RGB on any device, bit for bit as FFmpeg's swscale converts them in decode workers.

A worker converts with the flags of video.py. Of H.264 and HEVC chroma lies at every second pixel of a line and halfway
between two lines, and is interpolated; sums are of integers. The same integers in torch give the same pixels, so that
it does not matter who has decoded a frame. A test holds it.

Shape letters: F frames, H W pixels, both even.
"""

from __future__ import annotations

import torch
from torch import Tensor

_PIXELS = 1 << 21  # converted at a time: about ten integers of 4 bytes for each
_BT601 = (104597, 132201, -25675, -53279)  # in 1/65536: red of V, blue of U, green of U and of V (swscale's table)
_LUMA_OFFSET, _LUMA_LEVELS, _CHROMA_LEVELS = 16, 219, 224  # of limited range
_BITS = 22  # below a level in the sums
_MOST = (1 << 30) - 1  # 255 and a fraction


def rgb_of_nv12(frames: Tensor, full_range: bool) -> Tensor:
    """uint8 (F,H+H/2,W): luma, then lines in which U and V take turns -> uint8 (F,H,W,3).

    full_range: levels go from 0 to 255; else those of luma from 16 to 235, of chroma from 16 to 240.
    """
    count, rows, width = frames.shape
    height = rows * 2 // 3
    rgb = torch.empty((count, height, width, 3), dtype=torch.uint8, device=frames.device)
    at_a_time = max(_PIXELS // (height * width), 1)
    for part, out in zip(frames.split(at_a_time), rgb.split(at_a_time), strict=True):
        _convert(part, out, full_range)
    return rgb


def _convert(frames: Tensor, rgb: Tensor, full_range: bool) -> None:
    height, width = rgb.shape[1:3]
    luma = _luma(frames[:, :height].int(), full_range)
    chroma = frames[:, height:].unflatten(2, (width // 2, 2)).permute(3, 0, 1, 2).int()
    u, v = ((_upsampled(chroma) << 15) + ((1 << 9) - (128 << 19)) >> 10).unbind()
    red, blue, green_u, green_v = _of_chroma(full_range)
    for channel, parts in enumerate(((v * red,), (u * green_u, v * green_v), (u * blue,))):
        # What lies far outside RGB passes 2**31 and becomes 0, here as there.
        rgb[..., channel] = sum(parts, luma).clamp_(0, _MOST) >> _BITS


def _luma(levels: Tensor, full_range: bool) -> Tensor:
    """Its part of every sum, and a half to round by."""
    offset = 0 if full_range else _LUMA_OFFSET
    scale = 1 << 13 if full_range else _rounded((1 << 16) * 255 // _LUMA_LEVELS)
    return ((levels - offset) << 9) * scale + (1 << (_BITS - 1))


def _of_chroma(full_range: bool) -> list[int]:
    """The four coefficients in 1/8192."""
    signs = (1 if value > 0 else -1 for value in _BT601)
    sizes = (abs(value) * _CHROMA_LEVELS // 255 if full_range else abs(value) for value in _BT601)
    return [_rounded(sign * size) for sign, size in zip(signs, sizes, strict=True)]


def _rounded(value: int) -> int:
    """From 1/65536 to 1/8192."""
    return ((value << 13) + (1 << 15)) >> 16


def _upsampled(chroma: Tensor) -> Tensor:
    """int (...,h,w) -> (...,2h,2w), 16 times as large. What is beyond an edge is the edge."""
    above = torch.cat([chroma[..., :1, :], chroma[..., :-1, :]], -2)
    below = torch.cat([chroma[..., 1:, :], chroma[..., -1:, :]], -2)
    lines = torch.stack([3 * chroma + above, 3 * chroma + below], -2).flatten(-3, -2)
    right = torch.cat([lines[..., 1:], lines[..., -1:]], -1)
    return torch.stack([4 * lines, 2 * (lines + right)], -1).flatten(-2, -1)
