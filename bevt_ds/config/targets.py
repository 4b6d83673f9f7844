"""What pretraining predicts at masked positions. Fields are as in schema.py."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated as A
from typing import Literal

from bevt_ds.config.fields import Field as F


@dataclass(frozen=True)
class TokenizerConfig:
    """Where the discrete targets come from."""

    name: A[str, "dalle, vq, huggingface, torchscript, random_projection, or one that an installed package adds"] = (
        "dalle"
    )
    weights: A[
        str,
        "its file or folder (dalle: OpenAI's encoder.pkl, or safetensors; vq: a run of train_tokenizer.py; huggingface:"
        " a folder; torchscript: such as Cosmos' encoder.jit)",
    ] = ""
    decoder: A[
        str, F("dalle: OpenAI's decoder.pkl, for images of what is predicted; empty: without", resume="free")
    ] = ""
    vocab_size: A[int, F("random_projection and torchscript: how many ids there are", least=1)] = 8192
    seed: A[int, F("random_projection: seed of projection and codebook")] = 0
    side: A[int, F("huggingface and torchscript: frames are resized to this side first; 0: the view's own")] = 0


@dataclass(frozen=True)
class TeacherConfig:
    """target=features: the frozen network whose features are predicted. A name is of timm's, without one it is ours."""

    name: A[str, "a network in timm, such as vit_base_patch16_224; empty: weights are of a Video Swin"] = ""
    weights: A[
        str,
        "a file of its weights; empty: random ones. Without a name: a run, or any file of a Video Swin or Swin",
    ] = ""
    seed: A[int, F("of random weights")] = 0


@dataclass(frozen=True)
class TargetsConfig:
    """What pretraining predicts, and where it comes from."""

    target: A[
        Literal["ids", "features"], "of masked positions: a tokenizer's ids, or features of a frozen network (teacher)"
    ] = "ids"
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    tokens: A[
        str, F("folder of ids that `bevt tokens` has made of data.crops, in place of making them", resume="free")
    ] = ""
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
