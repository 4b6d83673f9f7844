"""The tokenizer, or the teacher, that a configuration names."""

from __future__ import annotations

from pathlib import Path

import torch

from bevt_ds.config.schema import Config
from bevt_ds.config.targets import TeacherConfig, TokenizerConfig
from bevt_ds.folders import weights_of
from bevt_ds.model.teacher import ImageTeacher, SwinTeacher, load_teacher
from bevt_ds.model.tokenizers import Tokenizer, load_tokenizer
from bevt_ds.model.weights import TENSORS

DALLE_VOCABULARY = 8192
OPTIONS = {  # fields of the configuration that a tokenizer takes next to its weights
    "dalle": ("decoder",),
    "huggingface": ("side",),
    "torchscript": ("vocab_size", "side"),
    "random_projection": ("vocab_size", "seed"),
}


def open_tokenizer(config: TokenizerConfig, device: torch.device | str = "cpu") -> Tokenizer:
    """Read or make it, on `device` where it has weights to move. UserError: see load_tokenizer."""
    options = {name: getattr(config, name) for name in OPTIONS.get(config.name, ())}
    options = {name: value for name, value in options.items() if value != ""}
    tokenizer = load_tokenizer(config.name, config.weights or None, **options)
    return tokenizer.to(device) if hasattr(tokenizer, "to") else tokenizer


def open_teacher(config: Config) -> ImageTeacher | SwinTeacher:
    """Read or make the teacher of a run. UserError: see load_teacher."""
    of = config.teacher
    return load_teacher(of.name, of.weights, config.data.size, of.seed, config.model.kernels)


def file_of(config: TokenizerConfig | TeacherConfig) -> str:
    """The file of a tokenizer's or a teacher's weights, if it has one."""
    if not config.weights or not Path(config.weights).exists():
        return ""
    path = weights_of(config.weights)
    file = path / TENSORS if path.is_dir() else path
    return str(file) if file.is_file() else ""


def vocabulary_of(config: TokenizerConfig) -> int:
    """How many ids there are: OpenAI's number for dalle where its file is not there to be asked.

    Raises:
        UserError: see load_tokenizer.
    """
    if config.name == "random_projection":
        return config.vocab_size
    if config.name == "dalle" and not Path(config.weights).is_file():
        return DALLE_VOCABULARY
    return open_tokenizer(config).vocab_size
