"""Fine-tuning recipes, command line, label smoothing, mixup and cutmix, moving average; no run."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from bevt_ds.config.command_line import DryRun, parse_arguments, resolve_config
from bevt_ds.config.deepspeed import resolve
from bevt_ds.config.help import page
from bevt_ds.config.parse import config_fields, from_dict, to_dict
from bevt_ds.config.recipes import (
    FINETUNING,
    SSV2_MICRO_STEPS,
    finetune_demo,
    finetune_k400,
    finetune_ssv2,
    get_recipe,
)
from bevt_ds.config.schema import FinetuneConfig
from bevt_ds.config.validate import micro_steps, require_inputs, validate
from bevt_ds.errors import UserError
from bevt_ds.finetune import USAGE
from bevt_ds.runtime.checkpoint import check_same
from bevt_ds.runtime.distributed import Ranks
from bevt_ds.runtime.ema import WeightAverage
from bevt_ds.runtime.run_dir import choose_folder, write_config
from bevt_ds.train.dry_run import report_finetuning
from bevt_ds.train.finetuning import classification_loss
from bevt_ds.train.mixup import Mixing
from tests.training.processes import ROOT


def resolved(*words: str, stage: int = 2, world: int = 1) -> FinetuneConfig:
    path = ROOT / "ds_configs" / f"zero{stage}.json"
    return resolve_config(parse_arguments(words, default_recipe="", default_json=str(path)), FinetuneConfig, world)[0]


@pytest.mark.parametrize("name", FINETUNING)
def test_finetuning_recipes_are_valid_and_survive_json(name):
    config = get_recipe(name, FinetuneConfig)
    assert config.recipe == name
    assert validate(config) is config
    assert from_dict(json.loads(json.dumps(to_dict(config))), FinetuneConfig) == config


def test_k400_has_the_original_numbers():
    c = finetune_k400()
    assert (c.optim.lr, c.optim.weight_decay, c.optim.layer_decay, c.optim.clip_grad) == (3e-4, 1e-3, 0.9, 40.0)
    assert (c.optim.warmup_epochs, c.optim.warmup_ratio, c.optim.ema) == (2.5, 0.1, 0.0)
    assert (c.model.window, c.model.drop_path, c.model.dropout) == ((8, 7, 7), 0.3, 0.5)
    assert (c.data.sampling, c.data.frames, c.data.stride, c.data.flip) == ("dense", 32, 2, 0.5)
    assert (c.data.short_side, c.data.size, c.data.crop_area) == (256, 224, (0.08, 1.0))
    assert (c.data.randaugment, c.data.erasing, c.train.label_smoothing) == ((0, 0), 0.0, 0.0)
    assert (c.train.mixup, c.train.cutmix, c.train.epochs, c.train.global_clips) == (0.0, 0.0, 60, 64)
    assert (c.views.clips, c.views.crops, c.views.short_side) == (4, 3, 224)
    assert micro_steps(c, world=8) == 4


def test_ssv2_has_the_original_numbers():
    c = finetune_ssv2()
    assert (c.optim.lr, c.optim.weight_decay, c.optim.backbone_scale, c.optim.clip_grad) == (5e-4, 0.05, 0.1, 0.0)
    assert c.optim.layer_decay == 1.0
    assert c.optim.ema == pytest.approx(0.0016, rel=1e-3)  # 0.9984 of the old average stays, each update
    assert (c.model.window, c.model.drop_path, c.model.dropout) == ((16, 7, 7), 0.4, 0.5)
    assert (c.data.sampling, c.data.frames, c.data.flip) == ("segments", 32, 0.0)
    assert (c.data.randaugment, c.data.erasing, c.train.label_smoothing) == ((4, 7), 0.25, 0.1)
    assert (c.train.epochs, c.train.global_clips, c.views.clips, c.views.crops) == (60, 64, 1, 3)
    assert micro_steps(c, world=8) == 8 == SSV2_MICRO_STEPS


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["train.epochs=3"], "recipe= is missing"),
        (
            ["recipe=joint_swin_b"],
            "recipe of bevt_ds/pretrain.py; bevt_ds/finetune.py has finetune_k400",
        ),
        (["recipe=finetune_k600"], "no recipe 'finetune_k600'"),
        (["recipe=finetune_k400", "train.epoch=3"], "Near: train.epochs"),
        (["recipe=finetune_k400", "data.train=a-0.tar", "data.train=a-1.tar"], "given twice"),
        (["recipe=finetune_k400", "data.sampling=sparse"], "dense, segments"),
        (["recipe=finetune_k400", "train.micro_clips=3"], "train.micro_clips can be"),
        (["recipe=finetune_k400", "train.micro_clips=1", "train.mixup=0.8"], "must be even"),
        (["recipe=finetune_k400", "train.epochs=0"], "nothing to do"),
        (["recipe=finetune_k400", "train.label_smoothing=1"], "[0, 1)"),
        (["recipe=finetune_k400", "optim.layer_decay=1.1"], "(0, 1]"),
        (["recipe=finetune_k400", "data.size=100"], "multiple of 32"),
        (["recipe=finetune_k400", "data.short_side=160"], "cannot hold"),
        (["recipe=finetune_k400", "views.crops=2"], "views.crops=2: expected one of 1, 3"),
        (["recipe=finetune_k400", "optim.lr=0"], "must be positive"),
        (["recipe=finetune_k400", "optim.betas=[0.9,1.5]"], "optim.betas=(0.9, 1.5): must be in [0, 1)"),
    ],
)
def test_finetuning_command_line_mistakes_are_named(words, part):
    with pytest.raises(UserError) as caught:
        resolved(*words)
    assert part in str(caught.value)


def test_recipe_of_the_other_program_is_refused():
    with pytest.raises(UserError, match="recipe of bevt_ds/finetune.py"):
        get_recipe("finetune_k400")


def test_run_of_the_other_program_is_not_continued(tmp_path):
    write_config(tmp_path, get_recipe("demo"))
    config = replace(finetune_demo(), output_dir=str(tmp_path), resume="auto")
    with pytest.raises(UserError, match="another program"):
        choose_folder(config, Ranks(0, 1, torch.device("cpu")))


def test_class_file_may_move_on_resume():
    """What is in it is held by the checkpoint's fingerprint of the data."""
    config = finetune_demo()
    check_same(config, replace(config, data=replace(config.data, classes="elsewhere.txt")), "run")
    with pytest.raises(UserError, match="data.flip: 0.0 -> 0.5"):
        check_same(config, replace(config, data=replace(config.data, flip=0.5)), "run")


def test_missing_finetuning_inputs_are_named(tmp_path):
    config = finetune_k400()
    with pytest.raises(UserError, match="data.train is empty"):
        require_inputs(config)
    named = replace(config, data=replace(config.data, train="a.tar"), init_from=str(tmp_path / "none"))
    with pytest.raises(UserError, match="no such file"):
        require_inputs(named)


def test_deepspeed_json_batch_size_counts_clips(tmp_path):
    """A number in the JSON replaces the recipe's, and DeepSpeed accepts any number of parameters."""
    path = tmp_path / "own.json"
    zero = {"zero_optimization": {"stage": 1}}
    path.write_text(json.dumps(zero | {"train_micro_batch_size_per_gpu": 4, "gradient_clipping": 1.0}))
    words = parse_arguments(["recipe=finetune_k400", f"--deepspeed_config={path}"], "", "")
    config, values, notes = resolve_config(words, FinetuneConfig, world=2)
    assert (config.train.micro_clips, config.optim.clip_grad, len(notes)) == (4, 1.0, 2)
    values = {"zero_optimization": {"stage": 2, "allgather_bucket_size": "auto"}}
    settings = resolve(values, config, world=2, largest=3, total=101, width=8)
    assert (settings["train_batch_size"], settings["gradient_accumulation_steps"]) == (64, 8)
    assert settings["zero_optimization"]["allgather_bucket_size"] % 2 == 0


def test_finetuning_help_and_dry_run():
    text = page(USAGE, FINETUNING, finetune_ssv2())
    assert all(name in text for name in FINETUNING)
    assert all(f"  {f.key}=" in text for f in config_fields(FinetuneConfig) if f.key != "recipe")
    summary, stops = report_finetuning(
        DryRun(resolved("recipe=finetune_ssv2"), {"zero_optimization": {"stage": 2}}, [], 1)
    )
    assert "88,655,688 + 1,025 for each class" in summary
    assert stops == ["data.train is empty: name the labelled shards."]


# Loss, mixing, moving average


def test_label_smoothing_equals_the_original():
    """The target's class counts 1 - e + e/K, every other e/K."""
    logits, labels, e = torch.randn(6, 5, generator=torch.Generator().manual_seed(0)), torch.arange(6) % 5, 0.1
    shares = torch.full((6, 5), e / 5)
    shares[torch.arange(6), labels] += 1 - e
    loss, metrics = classification_loss(logits, labels, e)
    torch.testing.assert_close(loss, -(shares * logits.log_softmax(-1)).sum())
    assert (metrics["clips"], metrics["hits"]) == (6, (logits.argmax(-1) == labels).sum())
    mixed, _ = classification_loss(logits, F.one_hot(labels, 5).float(), e)
    torch.testing.assert_close(mixed, loss)


def clips() -> torch.Tensor:
    return torch.rand(4, 3, 2, 16, 16, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("alphas", [(0.8, 0.0), (0.0, 1.0), (0.8, 1.0)])
def test_mixup_is_a_function_of_step_and_part(alphas):
    labels, before = torch.tensor([0, 1, 2, 2]), np.random.get_state()[1].copy()
    draw = lambda step, part: Mixing(*alphas, classes=3, seed=5)(clips(), labels, step, part)  # noqa: E731
    (pixels, targets), (again, _), (other, _) = draw(3, 1), draw(3, 1), draw(3, 2)
    assert pixels.equal(again) and not pixels.equal(other)
    assert (np.random.get_state()[1] == before).all()
    torch.testing.assert_close(targets.sum(-1), torch.ones(4))


def test_mixed_pixels_match_mixed_targets():
    labels = torch.tensor([0, 1, 0, 1])
    mixed, targets = Mixing(0.8, 0.0, classes=2, seed=0)(clips(), labels, step=1, part=0)
    own = targets[0, 0]
    torch.testing.assert_close(mixed, own * clips() + (1 - own) * clips().flip(0))


def test_cutmix_box_is_the_same_in_all_frames():
    labels = torch.tensor([0, 1, 0, 1])
    mixed, targets = Mixing(0.0, 1.0, classes=2, seed=0)(clips(), labels, step=0, part=0)
    foreign = (mixed != clips())[0]  # (3,T,S,S)
    assert foreign.any()
    assert foreign.eq(foreign[:1, :1]).all()
    assert mixed[0][foreign].equal(clips().flip(0)[0][foreign])
    assert targets[0, 1].item() == pytest.approx(foreign[0, 0].float().mean().item(), abs=1e-6)


class FakeEngine:
    """Two parts of master weights."""

    ranks = SimpleNamespace(rank=0)

    def __init__(self) -> None:
        self.parts = [torch.zeros(3), torch.ones(2)]
        self.guard = SimpleNamespace(skipped=0)

    def masters(self) -> list[torch.Tensor]:
        return self.parts


def test_moving_average_follows_its_formula():
    engine = FakeEngine()
    average = WeightAverage(engine, 0.25)
    for part in engine.parts:
        part += 4
    average.update()
    engine.guard.skipped = 1  # a step that is not finite leaves the average as it was
    average.update()
    engine.guard.skipped = 0
    average.update()
    for start, a in zip((0.0, 1.0), average.parts, strict=True):
        torch.testing.assert_close(a, torch.full_like(a, start + 4 * (1 - 0.75**2)))
