"""What must hold of a fine-tuning configuration before anything is started."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bevt_ds.config.schema_downstream import FinetuneConfig
from bevt_ds.config.validate import check_bounds, check_views, need

AT_LEAST_ONE = {  # of evaluate.py and probe.py too, which have some of the fields
    *(f"data.{name}" for name in ("size", "frames", "stride", "short_side", "workers", "threads", "readers")),
    *(f"data.{name}" for name in ("prefetch", "shuffle_window")),
    *(f"train.{name}" for name in ("global_clips", "micro_clips", "log_every", "val_every", "checkpoint_every")),
    *(f"views.{name}" for name in ("clips", "crops", "short_side", "micro_videos")),
    "train.keep_checkpoints",
    "model.window",
}
POSITIVE = {
    *(f"optim.{name}" for name in ("lr", "eps", "layer_decay", "backbone_scale")),
    "data.decode_seconds",
    "data.remote_seconds",
    "data.read_seconds",
}
SHARES = ("model.drop_path", "model.dropout", "train.label_smoothing", "optim.ema")


def validate(config: FinetuneConfig, values: dict[str, Any]) -> FinetuneConfig:
    """Check what can be known without shards, weights or ranks; returns the config itself.

    values: the DeepSpeed JSON.

    Raises:
        UserError: the first field that cannot work, with the reason.
    """
    train, optim, data = config.train, config.optim, config.data
    check_bounds(config, AT_LEAST_ONE, POSITIVE)
    for key in SHARES:
        section, _, name = key.partition(".")
        share = getattr(getattr(config, section), name)
        need(share < 1, f"{key}={share}: must be in [0, 1).")
    need(train.epochs + train.steps > 0, "train.epochs and train.steps are both 0: there is nothing to do.")
    need(data.size % 32 == 0, f"data.size={data.size}: must be a multiple of 32.")
    need(
        data.short_side >= data.size,
        f"data.short_side={data.short_side}: a side below data.size={data.size} cannot hold the validation's crop.",
    )
    check_views(data, config.views)
    need(
        not (train.mixup or train.cutmix) or train.micro_clips % 2 == 0,
        f"train.mixup and train.cutmix mix pairs of clips: train.micro_clips={train.micro_clips} must be even.",
    )
    need(max(optim.betas) < 1, f"optim.betas={optim.betas}: must be in [0, 1).")
    need(optim.layer_decay <= 1, f"optim.layer_decay={optim.layer_decay}: must be in (0, 1].")
    if optim.ema:
        _check_average(config, values)
    return config


def _check_average(config: FinetuneConfig, values: dict[str, Any]) -> None:
    """The moving average needs the fp32 master weights in one piece for each rank."""
    stage = (values.get("zero_optimization") or {}).get("stage", 0)
    need(
        stage != 3,
        f"optim.ema={config.optim.ema} works with ZeRO stages 0 to 2, and the DeepSpeed JSON has stage 3: use"
        " --deepspeed_config ds_configs/zero2.json, or optim.ema=0.",
    )
    need(
        stage != 0 or config.train.precision != "fp16",
        f"optim.ema={config.optim.ema}: DeepSpeed does not show the fp32 weights of fp16 without ZeRO: use"
        " --deepspeed_config ds_configs/zero1.json, or train.precision=bf16.",
    )


def require_inputs(config: FinetuneConfig) -> None:
    """Check that the training shards are named and that the weights to start from are there.

    Raises:
        UserError: what is missing, and where it goes.
    """
    need(bool(config.data.train), "data.train is empty: name the labelled training shards.")
    need(
        not config.init_from or Path(config.init_from).exists(),
        f"init_from={config.init_from}: no such file or folder.",
    )
