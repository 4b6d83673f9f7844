"""A recipe is a function that returns the whole configuration of a run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from bevt_ds.config.schema import (
    Config,
    DataConfig,
    MaskConfig,
    ModelConfig,
    OptimConfig,
    TokenizerConfig,
    TrainConfig,
)
from bevt_ds.errors import UserError

IMAGENET_STEPS_AN_EPOCH = 625  # 1,281,167 images / 2048


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
            steps=280,
            global_clips=4,
            global_images=16,
            micro_clips=4,
            micro_images=16,
            precision="fp32",
            log_every=10,
            checkpoint_every=100,
            eval_batches=6,
            min_gain=0.2,
        ),
    )


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


def _joint(name: str, drop_path: float) -> Config:
    base = joint_swin_b()
    return replace(base, recipe=f"joint_{name}", model=replace(base.model, name=name, drop_path=drop_path))


RECIPES: dict[str, Callable[[], Config]] = {
    f.__name__: f for f in (demo, image_swin_b, joint_swin_b, joint_swin_t, joint_swin_s, joint_swin_l)
}


def get_recipe(name: str) -> Config:
    """The full configuration of a named recipe.

    Raises:
        UserError: no such recipe.
    """
    if name.startswith("finetune_"):
        raise UserError(f"recipe={name} is a recipe of bevt_ds/finetune.py; pretraining has {', '.join(RECIPES)}.")
    if name not in RECIPES:
        raise UserError(f"no recipe {name!r}. There are: {', '.join(RECIPES)}.")
    return RECIPES[name]()
