"""The configuration of `bevt features`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated as A
from typing import ClassVar, Literal

from bevt_ds.config.fields import Field as F
from bevt_ds.config.schema import InferenceConfig


@dataclass(frozen=True)
class FeaturesConfig:
    """What is kept of each sample, and in which files."""

    kind: A[Literal["video", "image"], "which samples of the shards: clips of videos, or images"] = "video"
    dense: A[bool, F("keep every token of the last stage; false: their mean, one vector a view")] = False
    format: A[
        Literal["safetensors", "parquet"], "of the files; safetensors has a row a sample, parquet a row a view"
    ] = "safetensors"
    dtype: A[Literal["float32", "float16"], "of the features in the files"] = "float32"
    chunk: A[int, F("samples a file; a run that is stopped loses less than one file of each rank", least=1)] = 256


@dataclass(frozen=True)
class FeaturesRunConfig(InferenceConfig):
    """An extraction of features. How clips are sampled is the choice of the weights' run, unless given."""

    program: ClassVar[str] = "bevt features"

    features: FeaturesConfig = field(default_factory=FeaturesConfig)
    output_dir: A[str, "OUT: the folder that is written, or continued"] = ""
