"""Learning rate schedule and parameter groups of pretraining."""

import math

import pytest
import torch
from torch import nn

from bevt_ds.config.schema import OptimConfig
from bevt_ds.model.layers import BranchNorm, SumNorm
from bevt_ds.model.presets import create_model
from bevt_ds.runtime.optim import freeze_unused, learning_rate, parameter_groups

NORMS = (nn.LayerNorm, SumNorm, BranchNorm)


def test_schedule_is_mmcv_cosine_times_linear_warmup():
    optim, steps = OptimConfig(lr=1.0, warmup_steps=10, warmup_ratio=0.1), 100
    assert learning_rate(0, optim, steps, optim.warmup_steps) == pytest.approx(0.1)
    middle = 0.5 * (1 + math.cos(math.pi * 0.05))
    assert learning_rate(5, optim, steps, optim.warmup_steps) == pytest.approx(middle * 0.55)
    assert learning_rate(10, optim, steps, optim.warmup_steps) == pytest.approx(0.5 * (1 + math.cos(math.pi * 0.1)))
    assert learning_rate(50, optim, steps, optim.warmup_steps) == pytest.approx(0.5)
    assert learning_rate(100, optim, steps, optim.warmup_steps) == pytest.approx(0.0)
    rates = [learning_rate(s, optim, steps, optim.warmup_steps) for s in range(10, 101)]
    assert rates == sorted(rates, reverse=True)


def test_weight_decay_skips_norms_and_bias_tables_only():
    """Right value: every parameter of a LayerNorm, and every table; nothing else."""
    with torch.device("meta"):
        model = create_model("tiny", vocab_size=64)
    norms = [p for module in model.modules() if isinstance(module, NORMS) for p in module.parameters()]
    tables = [p for name, p in model.named_parameters() if name.endswith("relative_position_bias_table")]
    assert len(norms) > 20 and len(tables) > 4
    decayed, plain = parameter_groups(model, 0.05)
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.05, 0.0)
    assert set(plain["params"]) == {*norms, *tables}
    assert set(decayed["params"]) == set(model.parameters()) - {*norms, *tables}


@pytest.mark.parametrize("stream", ["video", "image"])
def test_untrained_parameters_are_in_no_optimizer_group(stream):
    """Right value: the parameters that get no gradient from that stream."""
    model = create_model("tiny", vocab_size=64, window=(2, 2, 2))
    if stream == "video":
        features = model.forward_video(torch.randn(1, 3, 4, 64, 64), torch.ones(1, 2, 4, 4, dtype=torch.bool))
    else:
        features = model.forward_image(torch.randn(1, 3, 64, 64), torch.ones(1, 4, 4, dtype=torch.bool))
    rows = features.flatten(0, 1)
    losses, _ = model.lm_head(rows, torch.zeros(len(rows), dtype=torch.int64), (len(rows),))
    losses.sum().backward()
    untrained = {name for name, p in model.named_parameters() if p.grad is None}
    freeze_unused(model, [stream])
    names = {id(p): name for name, p in model.named_parameters()}
    grouped = [names[id(p)] for group in parameter_groups(model, 0.05) for p in group["params"]]
    assert len(untrained) > 4 and len(grouped) == len(set(grouped))
    assert set(grouped) == set(names.values()) - untrained
