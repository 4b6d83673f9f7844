"""Recipes of fine-tuning: each returns the whole configuration of a run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from bevt_ds.config.recipes import RECIPES as PRETRAINING
from bevt_ds.config.schema import LabelledDataConfig, ViewsConfig
from bevt_ds.config.schema_downstream import ClassifierConfig, FinetuneConfig, FinetuneOptimConfig, FinetuneTrainConfig
from bevt_ds.errors import UserError

DIVING48_CLIPS = 15_027  # training videos of V2
SSV2_MICRO_STEPS = 8
SSV2_MOMENTUM = 0.0002  # of mmcv's EMA hook, which the original leaves at its default


def finetune_k400() -> FinetuneConfig:
    """Kinetics-400 with Swin-B, 60 epochs, as the original: 32 frames of stride 2, layer decay 0.9, 4 x 3 views."""
    return FinetuneConfig(recipe="finetune_k400")


def finetune_ssv2() -> FinetuneConfig:
    """Something-Something V2 with Swin-B, 60 epochs, as the original: 32 segments, window 16, no flip, 1 x 3 views.

    The original averages the weights at every micro-iteration, eight to a step in which they do not change.
    """
    base = finetune_k400()
    return replace(
        base,
        recipe="finetune_ssv2",
        model=replace(base.model, window=(16, 7, 7), drop_path=0.4),
        data=replace(base.data, sampling="segments", flip=0.0, randaugment=(4, 7), erasing=0.25),
        optim=replace(
            base.optim,
            lr=5e-4,
            weight_decay=0.05,
            layer_decay=1.0,
            backbone_scale=0.1,
            clip_grad=0.0,
            ema=1 - (1 - SSV2_MOMENTUM) ** SSV2_MICRO_STEPS,
        ),
        train=replace(base.train, micro_clips=1, label_smoothing=0.1),
        views=replace(base.views, clips=1),
    )


def finetune_diving48() -> FinetuneConfig:
    """Diving48 V2 with Swin-B, 60 epochs. Ours: the original has results and no recipe; SSv2's with flips, 4 x 3 views.

    As in SSv2 the classes differ in the order of motions and share their scene, hence its segments, window and
    optimizer. Unlike there a mirror image keeps its class: a class is take-off, somersaults, twists and position, and
    neither the side of the pool nor the sense of a twist is part of it. An epoch has a tenth of SSv2's steps, so the
    weights are averaged over about one epoch instead of 625 steps.
    """
    base = finetune_ssv2()
    return replace(
        base,
        recipe="finetune_diving48",
        data=replace(base.data, flip=0.5),
        optim=replace(base.optim, ema=1 / (DIVING48_CLIPS // base.train.global_clips)),
        views=ViewsConfig(),
    )


def finetune_demo() -> FinetuneConfig:
    """The `tiny` backbone on small clips, in fp32: for tests and drawn shards, on a CPU."""
    return FinetuneConfig(
        recipe="finetune_demo",
        model=ClassifierConfig(name="tiny", window=(4, 4, 4), drop_path=0.0, dropout=0.0),
        data=LabelledDataConfig(
            frames=8, stride=1, size=64, short_side=64, crop_area=(0.6, 1.0), flip=0.0, workers=1, threads=1
        ),
        optim=FinetuneOptimConfig(lr=1e-3, weight_decay=0.05, layer_decay=0.8, warmup_epochs=1.0, clip_grad=5.0),
        train=FinetuneTrainConfig(
            epochs=10, global_clips=8, micro_clips=8, precision="fp32", log_every=5, val_every=2, checkpoint_every=100
        ),
        views=ViewsConfig(clips=1, crops=1, short_side=64, micro_videos=8),
    )


RECIPES: dict[str, Callable[[], FinetuneConfig]] = {
    f.__name__: f for f in (finetune_k400, finetune_ssv2, finetune_diving48, finetune_demo)
}


def get_recipe(name: str) -> FinetuneConfig:
    """The full configuration of a named recipe.

    Raises:
        UserError: none is named, there is no such recipe, or it is one of pretraining.
    """
    if name in RECIPES:
        return RECIPES[name]()
    if not name:
        raise UserError(f"recipe= is missing: write recipe=NAME with one of {', '.join(RECIPES)}.")
    if name in PRETRAINING:
        raise UserError(f"recipe={name} is a recipe of bevt_ds/pretrain.py; fine-tuning has {', '.join(RECIPES)}.")
    raise UserError(f"no recipe {name!r}. There are: {', '.join(RECIPES)}.")
