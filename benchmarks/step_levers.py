"""What makes our step faster, each taken back alone or put on in turn. The training program has no such switches."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from types import MethodType, SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F

from bevt_ds.batch import Batch, Stream
from bevt_ds.model.bevt import BEVT, BEVTOutput
from bevt_ds.model.tokenizers import DalleTokenizer, Tokenizer

from .eager_tokenizer import plain_logits
from .step_batch import all_frames
from .step_parts import part


@dataclass(frozen=True)
class Levers:
    """All on is the training program as it is."""

    kernels: bool = True  # off: PyTorch's operators, as on a GPU without Triton
    masked_rows: bool = True  # off: every position through decoders and head
    masked_frames: bool = True  # off: every frame tokenized
    tokenizer_layout: bool = True  # DALL-E's encoder; off: usual layout, weights cast at every call
    fused_optimizer: bool = True  # off: AdamW by torch's default

    def take_back(self, engine: Any) -> None:
        """What is off and lives in the model or the optimizer; before the first step."""
        if not self.masked_rows:
            engine.module.forward = MethodType(every_position, engine.module)
        if not self.fused_optimizer:
            engine.ds.optimizer.optimizer.__class__ = UnfusedAdamW
            for group in engine.ds.optimizer.optimizer.param_groups:
                group["fused"] = None  # torch then takes its multi-tensor loop on a GPU, one tensor at a time on a CPU

    def batches(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The batches as the step gets them."""
        return batches if self.masked_frames else map(all_frames, batches)

    def tokenizer(self, tokenizer: Tokenizer) -> Any:
        """The tokenizer as the step gets it, its work in the part of that name."""
        encode = tokenizer.encode
        if not self.tokenizer_layout and isinstance(tokenizer, DalleTokenizer):
            encode = lambda frames: plain_logits(tokenizer, frames).argmax(1)  # noqa: E731

        def ranged(frames: torch.Tensor) -> torch.Tensor:
            with part("tokenizer"):
                return encode(frames)

        return SimpleNamespace(vocab_size=tokenizer.vocab_size, encode=ranged)


class UnfusedAdamW(torch.optim.AdamW):
    """AdamW without the flag that leaves a step out, which its fused kernel alone takes."""

    found_inf = property(lambda self: None, lambda self, flag: None)


def every_position(model: BEVT, batch: Batch) -> BEVTOutput:
    """`BEVT.forward` with decoders and head over all positions, the masked ones chosen from the logits."""
    losses, metrics = [], {"unknown_targets": torch.zeros((), dtype=torch.int64)}  # cross_entropy refuses them
    for name, stream in (("video", batch.video), ("image", batch.image)):
        if stream is not None:
            encode = model.forward_video if name == "video" else model.forward_image
            loss, metrics[f"hits_{name}"] = _chosen(model, encode, stream)
            metrics |= {f"loss_{name}": loss.detach(), f"rows_{name}": (stream.rows >= 0).sum()}
            losses.append(loss / stream.count)
    return BEVTOutput(sum(losses), metrics)


def _chosen(model: BEVT, encode: Any, stream: Stream) -> tuple[torch.Tensor, torch.Tensor]:
    logits = model.lm_head(encode(stream.pixels, stream.mask, stream.sample_keys)).flatten(0, 1)
    chosen = logits.index_select(0, stream.rows.clamp_min(0)).float()
    return F.cross_entropy(chosen, stream.targets, reduction="sum"), (chosen.argmax(-1) == stream.targets).sum()


def ladder() -> dict[str, Levers]:
    """No lever, then one more at a time in the order of the fields; the last row is the training program."""
    names = [f.name for f in fields(Levers)]
    rows = {"ours, no lever": Levers(**dict.fromkeys(names, False))}
    for i, name in enumerate(names[:-1], 1):
        rows[f"+ {name}"] = replace(rows["ours, no lever"], **dict.fromkeys(names[:i], True))
    return rows | {"ours": Levers()}


LADDER = ladder()
