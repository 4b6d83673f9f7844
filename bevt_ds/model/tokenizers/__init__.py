"""Frozen tokenizers: images to grids of discrete ids, which are what the model predicts. Start with dalle.py."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from bevt_ds.batch import IGNORE, Batch, Stream
from bevt_ds.errors import UserError
from bevt_ds.tokenizer_names import added, builder, unknown_name

from . import foreign, vq
from .dalle import DalleTokenizer
from .dalle_decoder import DalleAutoencoder
from .random_projection import RandomProjectionTokenizer


class Tokenizer(Protocol):
    """Anything that turns images into ids; how it scales its pixels is its own business.

    One that has `decode` too, see DecodingTokenizer, lets images of predictions show what was predicted.
    """

    vocab_size: int

    def encode(self, frames: Tensor) -> Tensor:
        """Images (N,3,v,v), float RGB in [0,1] -> ids (N,h,w), int64 in [0, vocab_size)."""
        ...


@runtime_checkable
class DecodingTokenizer(Tokenizer, Protocol):
    """A tokenizer that also turns ids back into frames."""

    def decode(self, ids: Tensor) -> Tensor:
        """Ids (N,h,w), int64 in [0, vocab_size) -> frames (N,3,v,v), float RGB in [0,1]."""
        ...


def _random_projection(weights: str | None, **options: Any) -> Tokenizer:
    if weights:
        raise UserError("the random_projection tokenizer has no weights: leave tokenizer.weights empty")
    return RandomProjectionTokenizer(**options)


def _dalle(weights: str | None, decoder: str | None = None) -> Tokenizer:
    if not weights:
        raise UserError(
            "the dalle tokenizer needs OpenAI's encoder.pkl (https://cdn.openai.com/dall-e/encoder.pkl): "
            "download it and set tokenizer.weights=FILE"
        )
    return DalleAutoencoder.from_files(weights, decoder) if decoder else DalleTokenizer.from_file(weights)


TOKENIZERS: dict[str, Callable[..., Tokenizer]] = {
    "dalle": _dalle,
    "vq": vq.build,
    "huggingface": foreign.from_hugging_face,
    "torchscript": foreign.from_torchscript,
    "random_projection": _random_projection,
}


def load_tokenizer(name: str, weights: str | None = None, **options: Any) -> Tokenizer:
    """A tokenizer by name.

    Args:
        name: one of TOKENIZERS, or the name of an entry point in the group `bevt_ds.tokenizers`, whose object is called
            with `weights`, if there are any, and `options`.
        weights: its file or folder.
        options: `decoder` of dalle, a file, for a tokenizer with `decode`; `vocab_size` and `seed` of
            random_projection; `side` of huggingface and torchscript, and of the latter `vocab_size` too.

    Raises:
        UserError: an unknown name, missing or superfluous weights, a file that is not a tokenizer, or another
            package's object that is none.
    """
    if name in added():
        return _require_tokenizer(name, builder(name)(*([weights] if weights else []), **options))
    for problem in unknown_name(name):
        raise UserError(problem)
    return TOKENIZERS[name](weights, **options)


def _require_tokenizer(name: str, found: Any) -> Tokenizer:
    size = getattr(found, "vocab_size", None)
    if not callable(getattr(found, "encode", None)) or not isinstance(size, int) or size < 1:
        raise UserError(
            f"tokenizer.name={name}: {type(found).__name__} is no tokenizer, which has encode(frames) and vocab_size,"
            " a positive int"
        )
    return found


def require_vocabulary(tokenizer: Tokenizer, head: int) -> None:
    """Hold a tokenizer's vocabulary against that of a head of so many ids.

    Raises:
        UserError: the tokenizer gives ids that the head does not have.
    """
    if tokenizer.vocab_size > head:
        raise UserError(
            f"the tokenizer has {tokenizer.vocab_size:,} ids, the model's head {head:,}: make the model with"
            f" vocab_size={tokenizer.vocab_size}"
        )


@torch.no_grad()
def tokenize(tokenizer: Tokenizer, batch: Batch) -> Batch:
    """The batch with `targets` filled in where it has none; both streams are encoded in one call."""
    streams = [s for s in (batch.video, batch.image) if s is not None and s.targets is None]
    if not streams:
        return batch
    views = [stream.view for stream in streams]
    frames = torch.cat(views)
    # Where nothing is masked there are none, and not every tokenizer takes an empty batch.
    ids = tokenizer.encode(frames) if len(frames) else streams[0].rows.new_empty((0, *streams[0].mask.shape[-2:]))
    ids = ids.split([len(v) for v in views])
    filled = iter([_with_targets(stream, part) for stream, part in zip(streams, ids, strict=True)])
    return Batch(*(s if s is None or s.targets is not None else next(filled) for s in (batch.video, batch.image)))


def _with_targets(stream: Stream, ids: Tensor) -> Stream:
    grid = tuple(stream.mask.shape[-2:])
    if tuple(ids.shape[1:]) != grid:
        raise UserError(
            f"the tokenizer gives {ids.shape[1]}x{ids.shape[2]} ids an image, the mask has {grid[0]}x{grid[1]} cells: "
            "data.token_size must be half of data.size"
        )
    targets = ids.flatten().index_select(0, stream.token_rows)
    return replace(stream, targets=targets.masked_fill(stream.rows < 0, IGNORE))
