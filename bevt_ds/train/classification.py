"""The loss of fine-tuning."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def classification_loss(logits: Tensor, targets: Tensor, smoothing: float) -> tuple[Tensor, dict[str, Tensor]]:
    """Cross-entropy summed over clips, and the sums that a log line needs.

    logits (B,K); targets: classes int64 (B,), or shares of classes float (B,K). With `smoothing` e a target's class
    counts 1 - e + e/K and every other e/K, as in the original (label_smooth_eps of mmaction2's base head). A clip is
    right where the best class is the target's, or that with the largest share.
    """
    logits = logits.float()
    loss = F.cross_entropy(logits, targets, label_smoothing=smoothing, reduction="sum")
    wanted = targets if targets.ndim == 1 else targets.argmax(-1)
    hits = (logits.argmax(-1) == wanted).sum()
    return loss, {"loss": loss.detach(), "hits": hits, "clips": torch.full_like(hits, len(logits))}
