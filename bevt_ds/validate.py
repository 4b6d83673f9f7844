"""What must hold of a configuration before anything is started, and the split of a step over ranks."""

from __future__ import annotations

from pathlib import Path

from bevt_ds.config import Config
from bevt_ds.errors import UserError


def validate(config: Config) -> Config:
    """Check what can be known without shards, weights or ranks; returns the config itself.

    Raises:
        UserError: the first field that cannot work, with the reason.
    """
    data, train, model = config.data, config.train, config.model
    streams = train.global_clips + train.global_images
    _need(
        streams > 0,
        "train.global_clips and train.global_images are both 0: there is nothing to train on.",
    )
    _need(data.size > 0 and data.size % 32 == 0, f"data.size={data.size}: must be a multiple of 32.")
    _need(
        data.token_size * 2 == data.size,
        f"data.token_size={data.token_size}: must be half of data.size={data.size}.",
    )
    _need(
        data.short_side[0] <= data.short_side[1],
        f"data.short_side={data.short_side}: the first must not be larger.",
    )
    _need(
        data.short_side[0] >= data.size,
        f"data.short_side={data.short_side}: a side below data.size={data.size} cannot hold the crop.",
    )
    _need(
        data.frames > 0 and data.frames % 2 == 0,
        f"data.frames={data.frames}: must be even, a token spans 2 frames.",
    )
    _need(data.stride > 0, f"data.stride={data.stride}: must be at least 1.")
    for name in ("clips_per_video", "workers", "threads", "readers", "prefetch", "shuffle_window"):
        _need(getattr(data, name) > 0, f"data.{name}={getattr(data, name)}: must be at least 1.")
    _need(
        train.micro_clips % data.clips_per_video == 0,
        f"train.micro_clips={train.micro_clips}: must be a multiple of data.clips_per_video={data.clips_per_video},"
        " because one rank decodes a video once for all its clips.",
    )
    _need(0 <= model.drop_path < 1, f"model.drop_path={model.drop_path}: must be in [0, 1).")
    _need(min(model.window) > 0, f"model.window={model.window}: every side must be at least 1.")
    _need(0 < data.mask.ratio < 1, f"data.mask.ratio={data.mask.ratio}: must be between 0 and 1.")
    _need(train.steps > 0, f"train.steps={train.steps}: must be at least 1.")
    for name in ("log_every", "checkpoint_every", "keep_checkpoints", "eval_batches"):
        _need(getattr(train, name) > 0, f"train.{name}={getattr(train, name)}: must be at least 1.")
    for name in ("workers", "threads", "prefetch", "shuffle_window"):
        _need(getattr(data, name) > 0, f"data.{name}={getattr(data, name)}: must be at least 1.")
    _need(data.decode_seconds > 0, f"data.decode_seconds={data.decode_seconds}: must be positive.")
    _need(train.seed >= 0, f"train.seed={train.seed}: must not be negative.")
    _need(config.optim.lr > 0, f"optim.lr={config.optim.lr}: must be positive.")
    return config


def require_inputs(config: Config) -> None:
    """Check that the shards are named and that the files which the configuration names are there.

    Raises:
        UserError: what is missing, and where it goes.
    """
    data, train, tokenizer = config.data, config.train, config.tokenizer
    _need(
        bool(data.videos) or not train.global_clips,
        "data.videos is empty: name the shards, or train.global_clips=0.",
    )
    _need(
        bool(data.images) or not train.global_images,
        "data.images is empty: name the shards, or train.global_images=0.",
    )
    if tokenizer.name == "dalle":
        _need(
            bool(tokenizer.weights),
            "tokenizer.weights is empty: download encoder.pkl of the DALL-E dVAE (about 215 MB; openai/DALL-E names the"
            " address) and pass tokenizer.weights=PATH/encoder.pkl, or use tokenizer.name=random_projection.",
        )
        _need(
            Path(tokenizer.weights).is_file(),
            f"tokenizer.weights={tokenizer.weights}: no such file.",
        )
    _need(
        not config.init_from or Path(config.init_from).exists(),
        f"init_from={config.init_from}: no such file or folder.",
    )


def micro_steps(config: Config, world: int) -> int:
    """Forward passes a rank makes in one step; both streams take the same number.

    Raises:
        UserError: the global batch does not divide; the message lists micro-batches that do.
    """
    train = config.train
    counts = {
        name: _accumulation(name, total, micro, world)
        for name, total, micro in (
            ("clips", train.global_clips, train.micro_clips),
            ("images", train.global_images, train.micro_images),
        )
        if total > 0
    }
    if len(set(counts.values())) > 1:
        raise UserError(
            f"clips need {counts['clips']} forward passes a step and images {counts['images']}: they must need as"
            f" many. The number is train.global_* / (train.micro_* x {world} ranks)."
        )
    return next(iter(counts.values()))


def _accumulation(name: str, total: int, micro: int, world: int) -> int:
    if micro > 0 and total % (micro * world) == 0:
        return total // (micro * world)
    fits = [m for m in range(1, total // world + 1) if total % (m * world) == 0]
    hint = (
        f"with {world} ranks train.micro_{name} can be {', '.join(map(str, fits))}"
        if fits
        else f"train.global_{name} must be a multiple of the {world} ranks"
    )
    raise UserError(
        f"train.global_{name}={total} does not divide into micro-batches of train.micro_{name}={micro} on"
        f" {world} ranks: {hint}."
    )


def _need(holds: bool, message: str) -> None:
    if not holds:
        raise UserError(message)
