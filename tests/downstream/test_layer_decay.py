"""Layer-wise decay: parameter groups equal the original optimizer's; mmcv's schedule by epoch."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bevt_ds.config.recipes import get_recipe
from bevt_ds.config.schema import FinetuneConfig, FinetuneOptimConfig
from bevt_ds.model.presets import create_classifier
from bevt_ds.runtime.optim import layer_decay_groups, learning_rate

GOLDEN = json.loads((Path(__file__).parents[1] / "data" / "golden" / "layer_decay.json").read_text())
RECIPES = {"k400": ("finetune_k400", 400), "ssv2": ("finetune_ssv2", 174)}


def our_name(name: str) -> str:
    return name.replace("backbone.", "encoder.").replace("cls_head.fc_cls.", "head.")


@pytest.mark.parametrize("kind", ["official", "intended"])
@pytest.mark.parametrize("data", RECIPES)
def test_layer_decay_groups_equal_the_original(data, kind):
    name, classes = RECIPES[data]
    optim = replace(get_recipe(name, FinetuneConfig).optim, groups=kind)
    with torch.device("meta"):
        model = create_classifier("swin_b", classes)
    names = {id(p): n for n, p in model.named_parameters()}
    groups = layer_decay_groups(model, model.arch["depths"], optim)
    ours = {names[id(p)]: (g["lr_scale"] * optim.lr, g["weight_decay"]) for g in groups for p in g["params"]}
    golden = {
        our_name(n): row["effective" if kind == "official" else "intended"]
        for row in GOLDEN[data]
        for n in row["names"]
    }
    assert sum(len(g["params"]) for g in groups) == len(ours) == len(golden) == 329
    for n, (rate, decay) in golden.items():
        assert ours[n] == (pytest.approx(rate, rel=1e-12), decay), n


def test_layer_decay_groups_are_few_and_never_empty():
    """A rate for the head, the 24 blocks, the 3 mergings and the stem: 29, each decayed or not."""
    with torch.device("meta"):
        model = create_classifier("swin_b", 400)
    groups = layer_decay_groups(model, model.arch["depths"], get_recipe("finetune_k400", FinetuneConfig).optim)
    assert all(g["params"] for g in groups)
    assert len(groups) == len({(g["lr_scale"], g["weight_decay"]) for g in groups}) <= 2 * 29
    assert len({g["lr_scale"] for g in groups}) == 29


def test_without_layer_decay_only_norms_and_tables_differ():
    """No layer has a key of its own then, so that both readings of the configuration agree."""
    model = create_classifier("tiny", 3)
    for kind in ("official", "intended"):
        optim = FinetuneOptimConfig(layer_decay=1.0, groups=kind, weight_decay=0.1)
        groups = layer_decay_groups(model, model.arch["depths"], optim)
        assert {(g["lr_scale"], g["weight_decay"]) for g in groups} == {(1.0, 0.1), (1.0, 0.0)}


def test_schedule_is_mmcv_cosine_by_epoch_times_linear_warmup():
    optim = FinetuneOptimConfig(lr=1.0, warmup_epochs=2.5, warmup_ratio=0.1)
    rate = lambda step: learning_rate(step, optim, 100, optim.warmup_epochs * 10, 10)  # noqa: E731
    cosine = lambda epoch: 0.5 * (1 + math.cos(math.pi * epoch / 10))  # noqa: E731
    assert rate(0) == pytest.approx(0.1)
    assert rate(12) == pytest.approx(cosine(1) * (1 - (1 - 12 / 25) * 0.9))
    assert rate(25) == rate(29) == pytest.approx(cosine(2))
    assert rate(99) == rate(90) == pytest.approx(cosine(9))
    no_warmup = replace(optim, warmup_epochs=0.0)
    assert learning_rate(0, no_warmup, 100, 0.0, 10) == 1.0
