"""Fields of the configuration: bounds, what may change on resume, configurations of earlier runs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import pytest

from bevt_ds.config.fields import Field
from bevt_ds.config.parse import Leaf, Section, config_fields, from_dict, get_value, set_value, to_dict
from bevt_ds.config.recipes import finetune_k400, joint_swin_b, vq_in1k
from bevt_ds.config.schema import Config, EvaluateConfig, FinetuneConfig, ProbeRunConfig, TrainingConfig
from bevt_ds.config.tokenizing import TokenizerTrainingConfig
from bevt_ds.config.validate import check_fields, validate
from bevt_ds.errors import UserError
from bevt_ds.rng import Use, generator
from bevt_ds.runtime.checkpoint import check_same

MAY_CHANGE = {  # the right answers
    # nothing of these changes what a run computes, but its rounding
    "free": """
        output_dir init_from init_head resume dry_run model.checkpointing model.recompute model.recompute_every
        model.compile model.kernels
        data.decoder data.loader_process data.workers data.threads data.readers data.prefetch
        data.decode_seconds data.read_seconds
        data.verify data.max_bad_fraction data.cache_dir data.cache_bytes data.remote_seconds data.allow_pipe
        data.videos data.images data.eval_videos data.eval_images data.train data.val data.classes data.expected_val
        train.log_every train.checkpoint_every train.keep_checkpoints train.max_skipped train.grace_seconds
        train.rank_deadline train.offload_dir train.graphs
        train.eval_batches train.min_gain train.val_every train.micro_clips train.micro_images
        tokenizer.decoder tokens probe.every probe.train probe.val log.to
        views.clips views.crops views.short_side views.micro_videos
    """,
    # these a user may want to change after a failure
    "override": """
        optim.lr optim.warmup_steps optim.warmup_epochs optim.warmup_ratio optim.clip_grad
        train.precision train.seed train.steps train.epochs train.skip_steps train.max_spike
    """,
    # these decide what is computed
    "never": """
        recipe model.name model.window model.small_windows model.drop_path model.dropout model.image_windows
        target teacher.name teacher.weights teacher.seed
        tokenizer.name tokenizer.weights tokenizer.vocab_size tokenizer.seed tokenizer.side
        data.shuffle_window data.max_pixels data.max_frames data.max_file_bytes data.max_clip_bytes
        data.frames data.stride data.clips_per_video data.crops data.size data.short_side data.flip data.image_jitter
        data.token_size data.holdout data.mask.ratio data.mask.min_block data.mask.min_aspect data.mask.tube
        data.sampling data.crop_area data.crop_aspect data.randaugment data.erasing
        optim.betas optim.eps optim.weight_decay optim.layer_decay optim.backbone_scale optim.groups optim.ema
        train.global_clips train.global_images
        train.label_smoothing train.mixup train.cutmix
        model.width model.blocks model.quantiser model.codes model.code_dim model.decay model.patience
        model.commitment model.levels perceptual.network perceptual.weights perceptual.levels perceptual.weight
    """,
}
EXPECTED = {key: resume for resume, keys in MAY_CHANGE.items() for key in keys.split()}
TRAININGS = {Config: joint_swin_b(), FinetuneConfig: finetune_k400(), TokenizerTrainingConfig: vq_in1k()}
LEAVES = [(kind, leaf) for kind in TRAININGS for leaf in config_fields(kind)]


def another(leaf: Leaf, value: Any) -> Any:
    """A value of the field other than `value`."""
    if get_origin(leaf.type) is Literal:
        return next(other for other in get_args(leaf.type) if other != value)
    if isinstance(value, tuple):
        return tuple(number + 1 for number in value)
    if isinstance(value, bool):
        return not value
    return f"{value}x" if isinstance(value, str) else value + 1


@pytest.mark.parametrize(("kind", "leaf"), LEAVES, ids=[f"{kind.__name__}-{leaf.key}" for kind, leaf in LEAVES])
def test_fields_that_may_change_on_resume(kind: type[TrainingConfig], leaf: Leaf) -> None:
    """A new field is added to one of the lists above, by what it does to a run that is continued."""
    assert leaf.field.resume == EXPECTED[leaf.key]
    saved = TRAININGS[kind]
    changed = set_value(saved, leaf.key, another(leaf, get_value(saved, leaf.key)))
    if EXPECTED[leaf.key] != "never":
        check_same(saved, changed, Path("run"))
    else:
        with pytest.raises(UserError, match=f"another configuration.*{leaf.key}: "):
            check_same(saved, changed, Path("run"))


def test_micro_batch_of_a_run_with_mixup_may_not_change() -> None:
    """Mixup pairs the clips of a forward pass, so another size would compute something else."""
    saved = set_value(TRAININGS[FinetuneConfig], "train.mixup", 0.8)
    with pytest.raises(UserError, match=r"train.micro_clips: 2 -> 4"):
        check_same(saved, set_value(saved, "train.micro_clips", 4), Path("run"))


def test_listed_fields_exist() -> None:
    assert {leaf.key for _, leaf in LEAVES} == set(EXPECTED)


# Bounds


@dataclass(frozen=True)
class Bounded(Section):
    plain: Annotated[float, "a number"] = 0.0
    count: Annotated[int, Field("count", least=1)] = 1
    rate: Annotated[float, Field("rate", above=0)] = 1.0
    offset: Annotated[float, Field("offset", above=-2)] = 0.0
    share: Annotated[float, Field("share", most=1)] = 0.5
    smaller: Annotated[tuple[float, float], Field("smaller", below=1)] = (0.1, 0.2)
    part: Annotated[float, Field("part", above=0, most=1)] = 1.0
    sides: Annotated[int, Field("sides", least=1, multiple=32)] = 32
    pairs: Annotated[int, Field("pairs", multiple=2)] = 0
    choice: Annotated[Literal[1, 3], "choice"] = 1


@pytest.mark.parametrize(
    ("key", "values", "rule"),
    [
        ("plain", (-0.1,), "at least 0"),
        ("plain", (float("nan"), float("inf")), "a finite number"),
        ("count", (0, -3), "at least 1"),
        ("count", (1 << 63,), "below 2**63"),
        ("rate", (0.0, -1.0), "positive"),
        ("offset", (-2.0,), "above -2"),
        ("share", (-0.1, 1.1), "in [0, 1]"),
        ("smaller", ((0.5, 1.0), (-0.1, 0.5)), "in [0, 1)"),
        ("part", (0.0, 1.5), "in (0, 1]"),
        ("sides", (33, 50), "a multiple of 32"),
        ("sides", (0,), "at least 1"),
        ("pairs", (3,), "even"),
        ("choice", (2,), "1 or 3"),
    ],
)
def test_field_values_out_of_bounds_are_named(key: str, values: tuple, rule: str) -> None:
    for value in values:
        with pytest.raises(UserError) as caught:
            check_fields(set_value(Bounded(), key, value), "data.")
        assert str(caught.value) == f"data.{key}={value}: must be {rule}."


def test_field_values_at_the_bounds_are_accepted() -> None:
    check_fields(Bounded())
    check_fields(
        Bounded(count=(1 << 63) - 1, rate=1e-300, share=1.0, smaller=(0.0, 0.999), part=1e-9, sides=64, pairs=4)
    )


@pytest.mark.parametrize("kind", [Config, FinetuneConfig, EvaluateConfig, ProbeRunConfig])
def test_field_defaults_are_within_their_bounds(kind: type) -> None:
    check_fields(kind())


@pytest.mark.parametrize("key", ["train.seed", "tokenizer.seed"])
def test_seed_beyond_64_bits_is_an_error(key: str) -> None:
    with pytest.raises(UserError, match=rf"{key}=\d+: must be below 2\*\*63"):
        validate(set_value(joint_swin_b(), key, 1 << 64))


@pytest.mark.parametrize("seed", [-1, 1 << 64, 1 << 100])
def test_seed_of_the_python_interface_beyond_64_bits_is_an_error(seed: int) -> None:
    with pytest.raises(UserError, match=f"seed={seed}: must be at least 0"):
        generator(seed, Use.TOKENIZER)
    assert generator((1 << 64) - 1, Use.TOKENIZER).random() != generator(0, Use.TOKENIZER).random()


# Saved configurations

READING = """
    decoder workers threads readers prefetch shuffle_window decode_seconds max_pixels max_frames max_file_bytes
    max_clip_bytes verify read_seconds max_bad_fraction cache_dir cache_bytes remote_seconds allow_pipe
"""
SAVED: dict[type[TrainingConfig], dict[str, str]] = {  # what config.json had when 0.1.0 wrote it
    Config: {
        "model": "name window drop_path image_windows checkpointing compile kernels",
        "tokenizer": "name weights vocab_size seed",
        "data": f"{READING} videos images eval_videos eval_images frames stride clips_per_video size short_side flip"
        " image_jitter token_size mask",
        "optim": "lr betas eps weight_decay warmup_steps warmup_ratio clip_grad",
        "train": "steps global_clips global_images micro_clips micro_images precision seed log_every checkpoint_every"
        " keep_checkpoints eval_batches min_gain",
        "probe": "every train val",
    },
    FinetuneConfig: {
        "model": "name window drop_path dropout checkpointing compile kernels",
        "data": f"{READING} train val classes expected_val frames stride sampling size short_side crop_area crop_aspect"
        " flip randaugment erasing",
        "optim": "lr betas eps weight_decay layer_decay backbone_scale groups warmup_epochs warmup_ratio clip_grad ema",
        "train": "epochs steps global_clips micro_clips precision label_smoothing mixup cutmix seed log_every val_every"
        " checkpoint_every keep_checkpoints",
        "views": "clips crops short_side micro_videos",
    },
}


@pytest.mark.parametrize("kind", SAVED)
def test_configuration_of_an_earlier_run_loads(kind: type[TrainingConfig]) -> None:
    now = to_dict(TRAININGS[kind])
    saved = {name: now[name] for name in ("recipe", "output_dir", "init_from", "resume", "dry_run")}
    for section, names in SAVED[kind].items():
        saved[section] = {name: now[section][name] for name in names.split()}
    assert from_dict(saved, kind) == TRAININGS[kind]
