"""Schedule and parameter groups."""

import math

import pytest
import torch

from bevt_ds.config.schema import OptimConfig
from bevt_ds.model.presets import create_model
from bevt_ds.runtime.optim import learning_rate, parameter_groups


def test_schedule_is_mmcv_cosine_times_linear_warmup():
    optim, steps = OptimConfig(lr=1.0, warmup_steps=10, warmup_ratio=0.1), 100
    assert learning_rate(0, optim, steps) == pytest.approx(0.1)
    middle = 0.5 * (1 + math.cos(math.pi * 0.05))
    assert learning_rate(5, optim, steps) == pytest.approx(middle * 0.55)
    assert learning_rate(10, optim, steps) == pytest.approx(0.5 * (1 + math.cos(math.pi * 0.1)))
    assert learning_rate(50, optim, steps) == pytest.approx(0.5)
    assert learning_rate(100, optim, steps) == pytest.approx(0.0)
    rates = [learning_rate(s, optim, steps) for s in range(10, 101)]
    assert rates == sorted(rates, reverse=True)


def test_only_norms_and_bias_tables_are_not_decayed():
    with torch.device("meta"):
        model = create_model("tiny", vocab_size=64)
    names = {id(p): n for n, p in model.named_parameters()}
    decayed, plain = parameter_groups(model, 0.05)
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.05, 0.0)
    assert len(decayed["params"]) + len(plain["params"]) == len(names)
    for p in plain["params"]:
        assert "norm" in names[id(p)] or "relative_position_bias_table" in names[id(p)]
    kept = {names[id(p)] for p in decayed["params"]}
    for word in ("mask_token", "proj.bias", "qkv.bias", "lm_head", "patch_embed"):
        assert any(word in name for name in kept), word
