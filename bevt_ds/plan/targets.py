"""What it costs to make the targets: arithmetic and memory of the tokenizer, or of the teacher, whichever a run has."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from bevt_ds.batch import DTYPES
from bevt_ds.config.schema import Config, TrainingConfig
from bevt_ds.config.targets import TeacherConfig, TokenizerConfig
from bevt_ds.folders import weights_of
from bevt_ds.model.arch import SwinArch
from bevt_ds.model.frozen_swin import FrozenModel
from bevt_ds.model.teacher import ImageTeacher, SwinTeacher
from bevt_ds.model.tokenizers.dalle import DalleTokenizer
from bevt_ds.model.weights import read_weights
from bevt_ds.runtime.flops import encoder_macs
from bevt_ds.runtime.tokenizer import open_tokenizer, vocabulary_of

from .activations import Alive

UNREAD = ("dalle",)  # tokenizers whose sizes are known without their file


@dataclass(frozen=True)
class Cost:
    """Multiply-accumulates for the targets of a clip and of an image.

    `head`: BEVT's argument for them. `weights`: bytes of the frozen network; `working`: those that it works on at once
    for a clip and for an image of a micro-batch.
    """

    head: tuple[str, int]
    clip: float
    image: float
    weights: float
    working: tuple[float, float]

    def memory(self, clips: int, images: int) -> tuple[float, float]:
        """Bytes of the network's weights, and the most that it works on at once, for a micro-batch of both streams."""
        return self.weights, clips * self.working[0] + images * self.working[1]


def maker(config: TrainingConfig) -> str:
    """What makes a run's targets: a tokenizer unless it is a teacher."""
    return "teacher" if getattr(config, "target", "") == "features" else "tokenizer"


def cost_of(config: Config) -> Cost:
    """Of a run's targets; frames of a clip without a masked cell cost nothing where each frame is looked at alone.

    Ids that are kept cost nothing; their tokenizer is there all the same, for held-out samples.

    Raises:
        UserError: a tokenizer or teacher that cannot be opened.
    """
    data = config.data
    looked_at = data.frames * sum(data.mask.tube) / 2
    if config.target == "ids":
        cost = _of_tokenizer(config.tokenizer, data.token_size, looked_at)
        return replace(cost, clip=0.0, image=0.0, working=(0.0, 0.0)) if config.tokens else cost
    if config.teacher.name:
        return _of_image_teacher(config.teacher, data.size, looked_at, config.train.precision)
    return _of_swin(config.teacher, (data.frames, data.size, data.size), config.train.precision)


@lru_cache(maxsize=16)
def _of_tokenizer(config: TokenizerConfig, side: int, frames: float) -> Cost:
    if config.name in UNREAD:
        with torch.device("meta"):
            tokenizer, view = DalleTokenizer(kernels="torch"), torch.empty(1, 3, side, side)
        macs = counted(lambda: tokenizer(view))
        tokenizer.settle(torch.float16)  # as on a GPU
        working = worked_on(tokenizer, lambda: tokenizer(view), view)
    else:
        tokenizer, view = open_tokenizer(config), torch.zeros(1, 3, side, side)
        macs = counted(lambda: tokenizer.encode(view))
        working = worked_on(tokenizer, lambda: tokenizer.encode(view), view)
    return _by_frame(("vocab_size", vocabulary_of(config)), tokenizer, macs, working, frames)


@lru_cache(maxsize=16)
def _of_image_teacher(config: TeacherConfig, side: int, frames: float, precision: str) -> Cost:
    with torch.device("meta"):
        teacher = ImageTeacher(config.name, size=side).to(DTYPES[precision])
        frame = torch.empty(1, 3, side, side, dtype=DTYPES[precision])
    macs = counted(lambda: teacher.network(frame))
    working = worked_on(teacher, lambda: teacher.network(frame), frame)
    return _by_frame(("target_dim", teacher.dim), teacher, macs, working, frames)


@lru_cache(maxsize=16)
def _of_swin(config: TeacherConfig, pixels: tuple[int, int, int], precision: str) -> Cost:
    weights = read_weights(weights_of(config.weights, "teacher.weights"))
    with torch.device("meta"):
        teacher = SwinTeacher(FrozenModel(weights), config.weights).to(DTYPES[precision])
        clip = torch.empty(1, 3, *pixels, dtype=DTYPES[precision])
    arch, own_stem = SwinArch.of(weights.arch), teacher.network.image_embed is not None
    arch = replace(arch, depths=arch.depths[:-1], num_heads=arch.num_heads[:-1])
    macs = encoder_macs(arch, pixels), encoder_macs(arch, (1 if own_stem else 2, *pixels[1:]), own_stem)
    inputs = clip, clip[:, :, 0].contiguous()
    working = tuple(worked_on(teacher, lambda x=x: teacher.network.stages(x), x) for x in inputs)
    return Cost(("target_dim", teacher.dim), macs[0].total(), macs[1].total(), size_of(teacher), working)


def _by_frame(head: tuple[str, int], network: Any, macs: float, working: float, frames: float) -> Cost:
    return Cost(head, frames * macs, macs, size_of(network), (frames * working, working))


def counted(run: Callable[[], Any]) -> float:
    """Multiply-accumulates of what `run` does, by torch's count."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        run()
    return counter.get_total_flops() / 2


def worked_on(network: Any, run: Callable[[], Any], given: Tensor) -> float:
    """The most bytes that are alive at once while `run` computes, what it is `given` included, weights not."""
    with Alive(tensors_in(network)) as alive, torch.no_grad():
        alive.add(given.untyped_storage())
        run()
    return float(alive.peak)


def tensors_in(network: Any) -> list[Tensor]:
    """Weights and buffers, of what is a module."""
    return [*network.parameters(), *network.buffers()] if isinstance(network, nn.Module) else []


def size_of(network: Any) -> float:
    """Bytes of its weights and buffers."""
    return float(sum(tensor.nbytes for tensor in tensors_in(network)))
