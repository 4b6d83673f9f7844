"""The masked ops as others do them, and as we do: mask tokens, row gather, the masked head."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from bevt_ds import kernels
from bevt_ds.kernels import reference

from . import kernels_heads
from .kernels_providers import Job, leaf


@dataclass(frozen=True)
class MaskedCase:
    """Sizes of the masked ops in one step of a model, and the least work that they are."""

    name: str
    clips: int
    images: int
    width: int  # of stage 1
    vocabulary: int
    side: int  # of the feature grid: 14 at 224 pixels

    @property
    def positions(self) -> tuple[int, int]:
        """Output positions of clips (16 frames) and images."""
        return self.clips * 16 * self.side**2, self.images * self.side**2

    @property
    def segments(self) -> tuple[int, int]:
        """Masked positions, on average: 3/8 of the clips', half of the images'."""
        video, image = self.positions
        return video * 3 // 8, image // 2


BASE_STEP = MaskedCase("b 8 clips 64 images", 8, 64, 128, 8192, 14)
SMALL_STEP = MaskedCase("small", 1, 2, 32, 512, 8)


def head_inputs(case: MaskedCase, device: str, dtype: torch.dtype) -> tuple[tuple[Tensor, ...], Tensor, Tensor]:
    """(features, weight, bias), masked row numbers, targets."""
    channels = 8 * case.width
    features = leaf(sum(case.positions), channels, device=device, dtype=dtype)
    weight = leaf(case.vocabulary, channels, device=device, dtype=dtype, scale=0.02)
    bias = leaf(case.vocabulary, device=device, dtype=dtype)
    video, image = case.positions
    rows = [torch.randperm(n, device=device)[:k].sort()[0] for n, k in zip((video, image), case.segments, strict=True)]
    index = torch.cat([rows[0], rows[1] + video])
    return (features, weight, bias), index, torch.randint(case.vocabulary, (len(index),), device=device)


def eager_head(case: MaskedCase, device: str, dtype: torch.dtype, gather_first: bool = False) -> Job:
    """The original: logits of every position, then the masked ones, float32, loss and accuracy of each stream."""
    leaves, index, target = head_inputs(case, device, dtype)

    def run() -> tuple[Tensor]:
        features, weight, bias = leaves
        inputs, rows = (features[index], slice(None)) if gather_first else (features, index)
        logits = F.linear(inputs, weight, bias)[rows]
        logits.argmax(-1).eq(target).sum()
        parts = zip(logits.float().split(case.segments), target.split(case.segments), strict=True)
        return (torch.stack([F.cross_entropy(a, b, reduction="sum") for a, b in parts]),)

    return Job(run, leaves)


def rival_head(case: MaskedCase, device: str, dtype: torch.dtype, name: str) -> Job:
    """The head of a library."""
    leaves, index, target = head_inputs(case, device, dtype)
    return kernels_heads.head_job(name, leaves, index, target, case.segments)


def our_head(case: MaskedCase, device: str, dtype: torch.dtype, provider: str) -> Job:
    """gather_masked, then masked_cross_entropy."""
    (features, weight, bias), index, target = head_inputs(case, device, dtype)

    def run() -> tuple[Tensor]:
        h = kernels.gather_masked(features, index, provider)
        return (kernels.masked_cross_entropy(h, weight, bias, target, case.segments, provider)[0],)

    return Job(run, (features, weight, bias))


def insert_job(case: MaskedCase, device: str, dtype: torch.dtype, insert: Callable) -> Job:
    """Mask tokens put into the stem's output of the clips."""
    grid = (case.clips, 8, 4 * case.side, 4 * case.side, case.width)
    x, token = leaf(*grid, device=device, dtype=dtype), leaf(case.width, device=device, dtype=dtype)
    mask = torch.rand(case.clips, 8, case.side, case.side, device=device) < 0.375
    return Job(lambda: (insert(x, token, mask),), (x, token))


def eager_insert(x: Tensor, token: Tensor, mask: Tensor) -> Tensor:
    """The original's x (1 - w) + token w."""
    w = reference.cell_mask(mask, tuple(x.shape[1:4]))[..., None].to(x.dtype)
    return x * (1 - w) + token * w


def masked_jobs(device: str) -> Iterator[tuple[str, MaskedCase, str, Callable[..., Job]]]:
    """(op, case, provider's name, maker of the job)."""
    case, provider = (BASE_STEP, "triton") if device == "cuda" else (SMALL_STEP, "torch")
    yield "masked_head", case, "eager", eager_head
    yield "masked_head", case, "eager_gather_first", partial(eager_head, gather_first=True)
    for name in kernels_heads.LOSSES:
        yield "masked_head", case, name, partial(rival_head, name=name)
    yield "masked_head", case, "bevt_ds", partial(our_head, provider=provider)
    yield "insert_mask_tokens", case, "eager", partial(insert_job, insert=eager_insert)
    ours = partial(kernels.insert_mask_tokens, provider=provider)
    yield "insert_mask_tokens", case, "bevt_ds", partial(insert_job, insert=ours)


def check_masked(case: MaskedCase, device: str, dtype: torch.dtype, provider: str) -> None:
    """Raises unless our masked ops agree with the reference, to the rounding of the logits."""
    (features, weight, bias), index, target = head_inputs(case, device, dtype)
    h = kernels.gather_masked(features, index, provider)
    if not torch.equal(h, features[index]):
        raise AssertionError("gather_masked does not copy")
    arguments = (weight, bias, target, case.segments)
    losses, _ = kernels.masked_cross_entropy(h, *arguments, provider)
    expected, _ = reference.masked_cross_entropy(h, *arguments)
    torch.testing.assert_close(losses, expected, rtol=1e-4, atol=0)
