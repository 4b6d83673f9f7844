"""What must hold of a configuration before anything is started, and the split of a step over ranks."""

from __future__ import annotations

import math
from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any

from bevt_ds.config.parse import config_fields, get_value
from bevt_ds.config.schema import Config, LabelledDataConfig, ViewsConfig
from bevt_ds.errors import UserError

AT_LEAST_ONE = {
    *(f"data.{name}" for name in ("size", "frames", "stride", "clips_per_video", "workers", "threads", "readers")),
    *(f"data.{name}" for name in ("prefetch", "shuffle_window", "short_side", "token_size", "mask.min_block")),
    *(f"train.{name}" for name in ("steps", "log_every", "checkpoint_every", "keep_checkpoints", "eval_batches")),
    "model.window",
    "tokenizer.vocab_size",
}
POSITIVE = {"optim.lr", "optim.eps", "data.decode_seconds", "data.remote_seconds", "data.read_seconds"}


def validate(config: Config) -> Config:
    """Check what can be known without shards, weights or ranks; returns the config itself.

    Raises:
        UserError: the first field that cannot work, with the reason.
    """
    data, train, model, mask = config.data, config.train, config.model, config.data.mask
    check_bounds(config, AT_LEAST_ONE, POSITIVE)
    need(
        train.global_clips + train.global_images > 0,
        "train.global_clips and train.global_images are both 0: there is nothing to train on.",
    )
    need(data.size % 32 == 0, f"data.size={data.size}: must be a multiple of 32.")
    need(
        data.token_size * 2 == data.size,
        f"data.token_size={data.token_size}: must be half of data.size={data.size}.",
    )
    need(
        data.short_side[0] <= data.short_side[1],
        f"data.short_side={data.short_side}: the first must not be larger.",
    )
    need(
        data.short_side[0] >= data.size,
        f"data.short_side={data.short_side}: a side below data.size={data.size} cannot hold the crop.",
    )
    need(data.frames % 2 == 0, f"data.frames={data.frames}: must be even, a token spans 2 frames.")
    need(
        train.micro_clips % data.clips_per_video == 0,
        f"train.micro_clips={train.micro_clips}: must be a multiple of data.clips_per_video={data.clips_per_video},"
        " because one rank decodes a video once for all its clips.",
    )
    need(max(config.optim.betas) < 1, f"optim.betas={config.optim.betas}: must be in [0, 1).")
    need(0 <= model.drop_path < 1, f"model.drop_path={model.drop_path}: must be in [0, 1).")
    need(0 <= data.flip <= 1, f"data.flip={data.flip}: must be in [0, 1].")
    need(
        mask.ratio < 1 and int(mask.ratio * (data.size // 16) ** 2) >= 1,
        f"data.mask.ratio={mask.ratio}: must be below 1 and mask at least one of {(data.size // 16) ** 2} cells.",
    )
    need(0 < mask.min_aspect <= 1, f"data.mask.min_aspect={mask.min_aspect}: must be in (0, 1].")
    need(
        0 < mask.tube[0] <= mask.tube[1] <= 1,
        f"data.mask.tube={mask.tube}: must be two shares of the clip, the smaller first.",
    )
    need(
        train.min_gain <= 0 or bool(data.eval_videos or data.eval_images),
        f"train.min_gain={train.min_gain} needs held-out shards: data.eval_videos, data.eval_images.",
    )
    need(
        not config.probe.every or bool(config.probe.train and config.probe.val and train.global_clips),
        f"probe.every={config.probe.every} needs labelled shards, probe.train and probe.val, and clips to train on.",
    )
    return config


def require_inputs(config: Config) -> None:
    """Check that the shards are named and that the files which the configuration names are there.

    Raises:
        UserError: what is missing, and where it goes.
    """
    data, train, tokenizer = config.data, config.train, config.tokenizer
    need(
        bool(data.videos) or not train.global_clips,
        "data.videos is empty: name the shards, or train.global_clips=0.",
    )
    need(
        bool(data.images) or not train.global_images,
        "data.images is empty: name the shards, or train.global_images=0.",
    )
    if tokenizer.name == "dalle":
        need(
            bool(tokenizer.weights),
            "tokenizer.weights is empty: download encoder.pkl of the DALL-E dVAE (about 215 MB; openai/DALL-E names the"
            " address) and pass tokenizer.weights=PATH/encoder.pkl, or use tokenizer.name=random_projection.",
        )
        need(
            Path(tokenizer.weights).is_file(),
            f"tokenizer.weights={tokenizer.weights}: no such file.",
        )
    need(
        not config.init_from or Path(config.init_from).exists(),
        f"init_from={config.init_from}: no such file or folder.",
    )


def micro_steps(config: Any, world: int) -> int:
    """Forward passes a rank makes in one step of a run of any kind; all its streams take the same number.

    Raises:
        UserError: the global batch does not divide; the message lists micro-batches that do.
    """
    return micro_steps_of(config.train.streams, world)


def micro_steps_of(streams: Mapping[str, tuple[int, int]], world: int) -> int:
    """`micro_steps` from what a run's streams take: samples a step, and samples of a rank's forward pass."""
    counts = {name: _accumulation(name, total, micro, world) for name, (total, micro) in streams.items() if total > 0}
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


def check_bounds(config: Any, at_least_one: Container[str], positive: Container[str]) -> None:
    """Every number is finite, none is negative, and counts and rates that cannot be 0 are not."""
    for field in config_fields(type(config)):
        value = get_value(config, field.key)
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, (int, float)) and not isinstance(number, bool):
                least = 1 if field.key in at_least_one else 0
                need(math.isfinite(number), f"{field.key}={number}: must be a finite number.")
                need(number >= least, f"{field.key}={number}: must be at least {least}.")
                need(number > 0 or field.key not in positive, f"{field.key}={number}: must be positive.")


def need(holds: bool, message: str) -> None:
    """Raise `message` as a UserError unless something holds."""
    if not holds:
        raise UserError(message)


def check_views(data: LabelledDataConfig, views: ViewsConfig) -> None:
    """Check the views of a test against the crop. UserError: the first field that cannot work, with the reason."""
    need(views.clips > 0, f"views.clips={views.clips}: must be at least 1.")
    need(views.micro_videos > 0, f"views.micro_videos={views.micro_videos}: must be at least 1.")
    need(views.crops in (1, 3), f"views.crops={views.crops}: must be 1 or 3.")
    need(
        views.short_side >= data.size,
        f"views.short_side={views.short_side}: a side below data.size={data.size} cannot hold the crop.",
    )
