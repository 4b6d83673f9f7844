"""From decoded frames to the pixels of a training clip or of a test's views: resize, crop, flip, normalise, erase.

What the original does with OpenCV, by torch's kernels for 8-bit images: at most one level of 255 apart, 0.25 in the
mean (0.4 at 2:1), because torch rounds down; a test holds the bounds.

Shape letters: T frames, H W pixels, S crop side. Frames are uint8 (T,3,H,W) in channels-last memory, as decoded.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from bevt_ds.batch import MEAN, STD
from bevt_ds.data.decoding.geometry import Box

ATTEMPTS = 10  # at a random box, before the fallback
ERASED_AREA = (0.02, 1 / 3)  # RandomErasing of the original, which is timm's
ERASED_ASPECT = (0.3, 1 / 0.3)  # height / width


def as_frames(decoded: np.ndarray) -> Tensor:
    """Decoded frames uint8 (T,H,W,3) as (T,3,H,W), without a copy."""
    return torch.from_numpy(decoded).permute(0, 3, 1, 2)


def resized(frames: Tensor, height: int, width: int) -> Tensor:
    """Bilinear, without antialiasing: uint8 (T,3,H,W) -> (T,3,height,width)."""
    if frames.shape[-2:] == (height, width):
        return frames
    return F.interpolate(frames, (height, width), mode="bilinear", align_corners=False)


def with_short_side(frames: Tensor, short_side: int) -> Tensor:
    """Resized in proportion; the long side is rounded to the nearest pixel, halves up."""
    height, width = frames.shape[-2:]
    scale = short_side / min(height, width)
    return resized(frames, int(height * scale + 0.5), int(width * scale + 0.5))


def random_box(
    rng: np.random.Generator, height: int, width: int, area: tuple[float, float], aspect: tuple[float, float]
) -> Box:
    """The box of a random resized crop: its share of the image in `area`, its width / height in `aspect`.

    Area uniform, aspect log-uniform, as in the original (Szegedy et al. 2015, section 6); where ten draws do not fit
    into the image, the largest centred square.
    """
    areas = rng.uniform(*area, ATTEMPTS) * height * width
    aspects = np.exp(rng.uniform(*np.log(aspect), ATTEMPTS))
    heights, widths = (np.maximum(np.rint(np.sqrt(a)), 1).astype(int) for a in (areas / aspects, areas * aspects))
    y, x = rng.random(2)
    for h, w in zip(heights.tolist(), widths.tolist(), strict=True):
        if h <= height and w <= width:
            return Box(int(y * (height - h + 1)), int(x * (width - w + 1)), h, w)
    side = min(height, width)
    return Box((height - side) // 2, (width - side) // 2, side, side)


def view_boxes(height: int, width: int, size: int, crops: int) -> list[Box]:
    """The crops of a test: the centre, or along the long side its first end, last end and middle, in that order.

    The last end is twice the middle's offset, so it may miss one pixel, as in the original's ThreeCrop.
    """
    top, left = (height - size) // 2, (width - size) // 2
    if crops == 1:
        return [Box(top, left, size, size)]
    shares = (0, 2, 1)
    if width >= height:
        return [Box(top, left * share, size, size) for share in shares]
    return [Box(top * share, left, size, size) for share in shares]


def normalised(clips: Tensor, device: torch.device | str) -> Tensor:
    """uint8 (...,T,3,S,S) -> float (...,3,T,S,S) on `device`, zero mean and unit variance of the training set."""
    pixels = clips.to(device).movedim(-4, -3).to(torch.float32, memory_format=torch.contiguous_format)
    mean, std = (torch.tensor(values, device=pixels.device).view(3, 1, 1, 1) for values in (MEAN, STD))
    return pixels.sub_(mean).div_(std)


def erased_box(rng: np.random.Generator, size: int) -> Box | None:
    """The box of random erasing (Zhong et al. 2017) in a square image; None: none of ten draws fits."""
    areas = rng.uniform(*ERASED_AREA, ATTEMPTS) * size**2
    aspects = np.exp(rng.uniform(*np.log(ERASED_ASPECT), ATTEMPTS))
    heights, widths = (np.rint(np.sqrt(a)).astype(int) for a in (areas * aspects, areas / aspects))
    y, x = rng.random(2)
    for h, w in zip(heights.tolist(), widths.tolist(), strict=True):
        if h < size and w < size:
            return Box(int(y * (size - h + 1)), int(x * (size - w + 1)), h, w)
    return None


def stacked_views(frames: Tensor, boxes: Sequence[Box], clips: int) -> Tensor:
    """Frames of all clips, clip by clip, uint8 (clips*T,3,H,W) -> (clips*crops,T,3,S,S), the crop changing fastest."""
    crops = torch.stack([box.of(frames) for box in boxes], dim=1)  # (clips*T, crops, 3, S, S)
    return crops.unflatten(0, (clips, -1)).transpose(1, 2).flatten(0, 1)
