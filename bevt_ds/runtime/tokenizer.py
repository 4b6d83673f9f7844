"""The tokenizer that a configuration names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from bevt_ds.config.schema import TokenizerConfig
from bevt_ds.model.tokenizers import Tokenizer, load_tokenizer

DALLE_VOCABULARY = 8192


def open_tokenizer(config: TokenizerConfig, device: torch.device | str = "cpu") -> Tokenizer:
    """Read or make it, on `device` where it has weights to move. UserError: see load_tokenizer."""
    options: dict[str, Any] = {}
    if config.name == "random_projection":
        options = {"vocab_size": config.vocab_size, "seed": config.seed}
    elif config.name == "dalle" and config.decoder:
        options = {"decoder": config.decoder}
    tokenizer = load_tokenizer(config.name, config.weights or None, **options)
    return tokenizer.to(device) if hasattr(tokenizer, "to") else tokenizer


def tokenizer_file(config: TokenizerConfig) -> str:
    """The file of its weights, if it has one."""
    return config.weights if config.weights and Path(config.weights).is_file() else ""


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
