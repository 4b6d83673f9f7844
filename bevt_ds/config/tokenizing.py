"""The configuration of a tokenizer's training. Fields are as in schema.py, which has all that other trainings have too.

The numbers are ours: PeCo, whose idea this is, published neither code nor settings.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated as A
from typing import ClassVar, Literal

from bevt_ds.config.fields import Field as F
from bevt_ds.config.schema import NetworkConfig, OptimConfig, StreamsTrainConfig, UnlabelledConfig

IMAGENET_EPOCHS = 50


@dataclass(frozen=True)
class VQConfig(NetworkConfig):
    """The tokenizer: convolutions to one code for 8x8 pixels of its view, a quantiser, and convolutions back."""

    width: A[int, F("channels at half the side; doubled at each of two more halvings", least=8, multiple=8)] = 128
    blocks: A[int, F("residual blocks after each halving, and as many on the way back", least=1)] = 2
    quantiser: A[
        Literal["ema", "fsq"],
        "ema: a codebook that follows the data, dead codes revived; fsq: numbers rounded to levels, no codebook",
    ] = "ema"
    codes: A[int, F("ema: ids there are", least=2)] = 8192
    code_dim: A[int, F("ema: numbers of a code", least=1)] = 32
    decay: A[float, F("ema: weight of what has been, each step, in a code's average", below=1)] = 0.99
    patience: A[int, F("ema: steps that a code may go unused before it is put where the data is", least=1)] = 100
    commitment: A[float, F("ema: weight of the distance from a vector to its code")] = 0.25
    levels: A[str, "fsq: levels of each dimension, with commas; their product is the number of ids"] = "8,8,8,4,4"


@dataclass(frozen=True)
class PerceptualConfig:
    """The loss next to the pixels': the distance of a frame and its reconstruction for a frozen network of timm's."""

    network: A[str, "its name in timm"] = "vgg16"
    weights: A[
        str, "a file of its weights; empty: random ones, which still see edges and textures, and are no PeCo"
    ] = ""
    levels: A[int, F("its first so many feature maps are compared; 0: all")] = 5
    weight: A[float, F("of this loss; 0: pixels alone")] = 1.0


@dataclass(frozen=True)
class TokenizerTrainingConfig(UnlabelledConfig):
    """A training of a tokenizer, on the views that pretraining would show it. Masks only choose frames of clips."""

    program: ClassVar[str] = "bevt_ds/train_tokenizer.py"

    model: VQConfig = field(default_factory=VQConfig)
    perceptual: PerceptualConfig = field(default_factory=PerceptualConfig)
    optim: OptimConfig = field(
        default_factory=lambda: OptimConfig(
            lr=4e-4, betas=(0.9, 0.99), weight_decay=1e-4, warmup_steps=5000, clip_grad=1.0
        )
    )
    train: StreamsTrainConfig = field(
        default_factory=lambda: StreamsTrainConfig(
            epochs=IMAGENET_EPOCHS, steps=0, global_clips=0, micro_clips=0, global_images=256, micro_images=32
        )
    )


def levels_of(text: str) -> tuple[int, ...]:
    """The levels that `model.levels` names. ValueError: they are no numbers."""
    return tuple(int(part) for part in text.split(","))


def levels_problems(text: str) -> Iterator[str]:
    """What is wrong with `model.levels`, if something is."""
    try:
        levels = levels_of(text)
    except ValueError:
        levels = ()
    if not levels or min(levels) < 2:
        yield f"model.levels={text}: must be whole numbers of at least 2, with commas, as 8,8,8,4,4."
