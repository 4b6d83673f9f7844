"""A recipe is a function that returns the whole configuration of a run: of pretraining first, then of fine-tuning."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TypeVar

from bevt_ds.config.files import saved_config, start_from
from bevt_ds.config.samples import DataConfig, LabelledDataConfig, MaskConfig, ViewsConfig
from bevt_ds.config.schema import (
    ClassifierConfig,
    Config,
    FinetuneConfig,
    FinetuneOptimConfig,
    FinetuneTrainConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    RunT,
    StreamsTrainConfig,
    TrainConfig,
    UnlabelledConfig,
)
from bevt_ds.config.targets import TokenizerConfig
from bevt_ds.config.tokenizing import PerceptualConfig, TokenizerTrainingConfig, VQConfig
from bevt_ds.errors import UserError

IMAGENET_STEPS_AN_EPOCH = 625  # 1,281,167 images / 2048
DIVING48_CLIPS = 15_027  # training videos of V2
FOR_OWN_DATA = ("demo", "small", "small_images", "vq_demo")  # recipes that train on whatever shards are given
STREAM_SIZES = {"videos": "global_clips", "images": "global_images"}  # shards, and how many a step takes of them
SSV2_MICRO_STEPS = 8
UnlabelledT = TypeVar("UnlabelledT", bound=UnlabelledConfig)
SSV2_MOMENTUM = 0.0002  # of mmcv's EMA hook, which the original leaves at its default


def demo() -> Config:
    """Learns from drawn clips and images on 2 CPU cores in under 3 minutes; draws its shards if they are absent."""
    folder = "demo-data"
    return Config(
        recipe="demo",
        model=ModelConfig(name="tiny", window=(4, 4, 4), drop_path=0.0, image_windows="swin"),
        tokenizer=TokenizerConfig(name="random_projection", vocab_size=64),
        data=DataConfig(
            videos=f"{folder}/train-video-*.tar",
            images=f"{folder}/train-image-*.tar",
            eval_videos=f"{folder}/eval-video-*.tar",
            eval_images=f"{folder}/eval-image-*.tar",
            frames=8,
            stride=1,
            size=128,
            token_size=64,
            short_side=(128, 160),
            image_jitter=(0.0, 0.0, 0.0),
            mask=MaskConfig(ratio=0.35, min_block=6),
            workers=1,
            threads=1,
        ),
        optim=OptimConfig(lr=1.2e-3, warmup_steps=20),
        train=TrainConfig(
            steps=220,
            global_clips=4,
            global_images=12,
            micro_clips=4,
            micro_images=12,
            precision="fp32",
            log_every=10,
            checkpoint_every=100,
            eval_batches=6,
            min_gain=0.2,
        ),
    )


def small() -> Config:
    """One's own clips, images or both on one GPU or a CPU: `tiny`, 128 px, no download; 2 % of the data is held out."""
    return Config(
        recipe="small",
        model=demo().model,
        tokenizer=TokenizerConfig(name="random_projection", vocab_size=512),
        data=DataConfig(holdout=0.02, frames=8, stride=4, size=128, token_size=64, short_side=(128, 160)),
        optim=OptimConfig(lr=1e-3, warmup_steps=50),
        train=TrainConfig(
            epochs=20,
            steps=0,
            global_clips=8,
            global_images=32,
            micro_clips=8,
            micro_images=32,
            precision="fp32",
            checkpoint_every=500,
        ),
    )


def small_images() -> Config:
    """One's own images alone on one GPU or a CPU: as `small`, for 50 epochs."""
    base = small()
    return replace(base, recipe="small_images", train=replace(base.train, epochs=50, global_clips=0, micro_clips=0))


def image_swin_b() -> Config:
    """Stage 1: masked image modelling on ImageNet-1K, 800 epochs. The original never published it: this one is ours."""
    joint = joint_swin_b()
    return replace(
        joint,
        recipe="image_swin_b",
        model=replace(joint.model, drop_path=0.1),
        optim=replace(joint.optim, warmup_steps=10 * IMAGENET_STEPS_AN_EPOCH),
        train=replace(
            joint.train,
            steps=800 * IMAGENET_STEPS_AN_EPOCH,
            global_clips=0,
            micro_clips=0,
            micro_images=64,
        ),
    )


def joint_swin_b() -> Config:
    """Stage 2: joint image and video modelling, ImageNet-1K and Kinetics-400, 150 epochs, as the original."""
    return Config(recipe="joint_swin_b")


def joint_swin_t() -> Config:
    """Stage 2 with Video Swin-T; the original has no such recipe: joint_swin_b's numbers with less drop-path."""
    return _joint("swin_t", drop_path=0.1)


def joint_swin_s() -> Config:
    """Stage 2 with Video Swin-S; the original has no such recipe: joint_swin_b's numbers with less drop-path."""
    return _joint("swin_s", drop_path=0.2)


def joint_swin_l() -> Config:
    """Stage 2 with Video Swin-L, for ZeRO-3 (ds_configs/zero3.json); recomputes activations. Not in the original."""
    config = _joint("swin_l", drop_path=0.3)
    return replace(config, model=replace(config.model, checkpointing=True))


def joint_swin_h() -> Config:
    """Stage 2 with Video Swin-H (encoder: 657 million), for ZeRO-3; recomputes activations. Ours: docs/scaling.md."""
    return _large("swin_h")


def joint_swin_g() -> Config:
    """Stage 2 with Video Swin-G (encoder: 3.0 billion), for ZeRO-3; recomputes activations. Ours: docs/scaling.md."""
    return _large("swin_g")


def _large(name: str) -> Config:
    """A lower rate than joint_swin_b's; its batch, 256 clips and 2,048 images, in micro-batches of 4 and 32."""
    config = _joint(name, drop_path=0.3)
    model, optim = replace(config.model, checkpointing=True), replace(config.optim, lr=2e-4)
    return replace(config, model=model, optim=optim)


def _joint(name: str, drop_path: float) -> Config:
    base = joint_swin_b()
    return replace(base, recipe=f"joint_{name}", model=replace(base.model, name=name, drop_path=drop_path))


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


def vq_in1k() -> TokenizerTrainingConfig:
    """A tokenizer of 8192 ids on a 14x14 grid, ImageNet-1K, 50 epochs. Ours: PeCo's idea, whose settings are not known.

    It sees what pretraining will show it: the 112-pixel view of the same crops, colour jitter included.
    """
    return TokenizerTrainingConfig(recipe="vq_in1k")


def vq_demo() -> TokenizerTrainingConfig:
    """A tokenizer of 64 ids from the demo's drawn images, on 2 CPU cores in under 3 minutes."""
    data = demo().data
    return TokenizerTrainingConfig(
        recipe="vq_demo",
        model=VQConfig(width=16, blocks=1, code_dim=8, codes=64, decay=0.9, patience=10, levels="4,4,4"),
        perceptual=PerceptualConfig(network="resnet10t", levels=3, weight=0.5),
        data=replace(data, videos="", eval_videos=""),
        optim=OptimConfig(lr=2e-3, weight_decay=0.0, warmup_steps=20, clip_grad=1.0, betas=(0.9, 0.99)),
        train=StreamsTrainConfig(
            steps=400,
            global_clips=0,
            micro_clips=0,
            global_images=16,
            micro_images=16,
            precision="fp32",
            log_every=10,
            checkpoint_every=200,
            eval_batches=6,
        ),
    )


def _named(*recipes: Callable[[], RunT]) -> dict[str, Callable[[], RunT]]:
    return {recipe.__name__: recipe for recipe in recipes}


JOINT = (joint_swin_b, joint_swin_t, joint_swin_s, joint_swin_l, joint_swin_h, joint_swin_g)
PRETRAINING = _named(demo, small, small_images, image_swin_b, *JOINT)
FINETUNING = _named(finetune_k400, finetune_ssv2, finetune_diving48, finetune_demo)
TOKENIZING = _named(vq_in1k, vq_demo)
RECIPES: dict[type[RunConfig], Mapping[str, Callable[[], RunConfig]]] = {
    Config: PRETRAINING,
    TokenizerTrainingConfig: TOKENIZING,
    FinetuneConfig: FINETUNING,
}


def get_recipe(name: str, kind: type[RunT] = Config) -> RunT:
    """The full configuration of a recipe, of the `kind` of run that it must be for.

    `name`: one of RECIPES, or a run's folder or its config.json, whose settings a new run then starts from.

    Raises:
        UserError: none is named, there is none of this name, or it is for another program.
    """
    own = ", ".join(RECIPES[kind])
    if not name:
        raise UserError(f"recipe= is missing: write recipe=NAME with one of {own}.")
    every = {key: make for recipes in RECIPES.values() for key, make in recipes.items()}
    if name not in every:
        if file := saved_config(name):
            return start_from(file, kind)
        raise UserError(f"no recipe {name!r}. There are: {own}; or the folder of a run, to start from its settings.")
    config = every[name]()
    if not isinstance(config, kind):
        raise UserError(f"recipe={name} is a recipe of {config.program}; {kind.program} has {own}.")
    return config


def recipe_for(name: str, kind: type[RunT], given: Mapping[str, str]) -> RunT:
    """`get_recipe`, less what no longer holds where `given` overrides it: its number of steps, and its shards.

    Raises:
        UserError: as `get_recipe`.
    """
    config = get_recipe(name, kind)
    if isinstance(config, FinetuneConfig | UnlabelledConfig) and "train.epochs" in given and "train.steps" not in given:
        config = replace(config, train=replace(config.train, steps=0))
    is_new = name in PRETRAINING or name in TOKENIZING
    return _on_own_data(config, given, is_new) if isinstance(config, UnlabelledConfig) else config


def is_drawn(config: UnlabelledConfig) -> bool:
    """Whether a run reads the demo's shards alone, which it draws itself where they are absent."""
    drawn, keys = demo().data, ("videos", "images", "eval_videos", "eval_images")
    used = {key: shards for key in keys if (shards := getattr(config.data, key))}
    return bool(used) and all(shards == getattr(drawn, key) for key, shards in used.items())


def _on_own_data(config: UnlabelledT, given: Mapping[str, str], is_new: bool) -> UnlabelledT:
    """A recipe for other shards than its own: the demo's held-out shards and its check of the result leave.

    So does a stream of which no shards are given, except from the settings of a run, which has chosen its streams.
    """
    drawn, data, train = demo().data, config.data, config.train
    own = {key for key in STREAM_SIZES if given.get(f"data.{key}", "") not in ("", getattr(drawn, key))}
    if not own:
        return config
    shown = [key for key in ("eval_videos", "eval_images") if getattr(data, key) == getattr(drawn, key)]
    if shown:
        data = replace(data, **dict.fromkeys(shown, ""))
        train = replace(train, min_gain=0.0) if isinstance(train, TrainConfig) else train
    if is_new and config.recipe in FOR_OWN_DATA:
        missing = STREAM_SIZES.keys() - own
        data = replace(data, **dict.fromkeys(missing, ""))
        train = replace(train, **{STREAM_SIZES[key]: 0 for key in missing})
    return replace(config, data=data, train=train)
