"""The masked head as others compute it: linear layer and cross-entropy of the masked rows, one sum for each segment.

A library that is not installed, or lacks the function in its version, raises when its job is made: a row with the
reason.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .kernels_providers import Job

Loss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  # rows, weight, bias, target -> the sum of losses


def torch_linear() -> Loss:
    """PyTorch 2.13's own, in chunks."""
    options = torch.nn.LinearCrossEntropyOptions(allow_retain_graph=True)

    def loss(h: Tensor, weight: Tensor, bias: Tensor, target: Tensor) -> Tensor:
        return F.linear_cross_entropy(h, weight, target, linear_bias=bias, reduction="sum", options=options)

    return loss


def deepspeed_chunked() -> Loss:
    """DeepSpeed's loss on logits that are there in full."""
    from deepspeed.runtime.chunked_cross_entropy import chunked_cross_entropy

    return lambda h, weight, bias, target: chunked_cross_entropy(F.linear(h, weight, bias), target, reduction="sum")


def deepspeed_sequence() -> Loss:
    """DeepSpeed's linear layer and loss of sequence-parallel runs, on one rank."""
    from deepspeed.sequence.linear_cross_entropy import vocab_parallel_linear_cross_entropy

    return lambda h, weight, bias, target: vocab_parallel_linear_cross_entropy(h, weight, target, bias, reduction="sum")


def liger() -> Loss:
    """Liger's fused linear cross-entropy."""
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    fused = LigerFusedLinearCrossEntropyLoss(reduction="sum")
    return lambda h, weight, bias, target: fused(weight, h, target, bias)


def cut() -> Loss:
    """Apple's cut cross-entropy."""
    from cut_cross_entropy import linear_cross_entropy

    return lambda h, weight, bias, target: linear_cross_entropy(h, weight, target, bias=bias, reduction="sum")


LOSSES: dict[str, Callable[[], Loss]] = {
    "torch_linear": torch_linear,
    "deepspeed_chunked": deepspeed_chunked,
    "deepspeed_sequence": deepspeed_sequence,
    "liger": liger,
    "cut_cross_entropy": cut,
}


def head_job(name: str, leaves: tuple[Tensor, Tensor, Tensor], index: Tensor, target: Tensor, segments: tuple) -> Job:
    """Gather, then the loss of a library on the rows of each segment; leaves: features, weight, bias."""
    loss = LOSSES[name]()

    def run() -> tuple[Tensor]:
        features, weight, bias = leaves
        rows = zip(features[index].split(segments), target.split(segments), strict=True)
        return (torch.stack([loss(h, weight, bias, wanted) for h, wanted in rows]),)

    return Job(run, leaves)
