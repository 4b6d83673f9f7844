"""What a plan counts for the targets: any tokenizer's and any teacher's arithmetic and memory, not the dVAE's alone."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from bevt_ds.config.recipes import demo
from bevt_ds.config.targets import TeacherConfig, TokenizerConfig
from bevt_ds.model.presets import create_model
from bevt_ds.model.teacher import load_teacher
from bevt_ds.model.tokenizers.vq import VQTokenizer
from bevt_ds.plan.compute import flops
from bevt_ds.plan.planning import memory_of, meta_model
from bevt_ds.plan.targets import cost_of

FRAMES = 8 * 0.75  # of a clip of the demo, that hold a masked cell


def with_tokenizer(**values):
    return replace(demo(), tokenizer=TokenizerConfig(**values))


def with_teacher(**values):
    return replace(demo(), target="features", teacher=TeacherConfig(**values))


def bytes_of(network: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in (*network.parameters(), *network.buffers()))


def test_trained_tokenizer_costs_what_torch_counts(tmp_path):
    model = VQTokenizer(width=8, blocks=1, code_dim=4, codes=32).eval()
    model.save_pretrained(tmp_path / "weights")
    config = with_tokenizer(name="vq", weights=str(tmp_path))
    with FlopCounterMode(display=False) as counter:
        model.encode(torch.zeros(1, 3, 64, 64))
    cost = cost_of(config)
    assert 2 * cost.image == counter.get_total_flops() > 0 and cost.clip == pytest.approx(FRAMES * cost.image)
    assert cost.head == ("vocab_size", 32) and cost.weights == bytes_of(model)
    assert cost.working[1] >= 8 * 32 * 32 * 4, "the first map, of 8 channels at half the side"
    assert flops(config, 2, 3)["tokenizer"] == pytest.approx((2 * FRAMES + 3) * counter.get_total_flops())


def test_kept_ids_cost_the_weights_of_their_tokenizer_alone():
    config, kept = demo(), replace(demo(), tokens="ids", data=replace(demo().data, crops=2))
    made, cost = cost_of(config), cost_of(kept)
    assert (cost.clip, cost.image, cost.working) == (0, 0, (0, 0)) and made.clip > 0
    assert (cost.weights, cost.head) == (made.weights, made.head)
    assert flops(kept, 2, 3)["tokenizer"] == 0


def test_torchscript_tokenizer_has_a_cost(tmp_path):
    class Ids(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 8, 8)

        def forward(self, frames: torch.Tensor) -> torch.Tensor:
            return self.conv(frames).argmax(1)

    torch.jit.script(Ids()).save(tmp_path / "ids.jit")
    cost = cost_of(with_tokenizer(name="torchscript", weights=str(tmp_path / "ids.jit"), vocab_size=4))
    assert cost.image == 64 * 4 * 3 * 8 * 8, "8x8 cells, 4 channels, patches of 8x8 pixels in 3 colours"
    assert cost.weights >= 4 * (3 * 64 + 1) * 4


def test_teacher_of_timm_costs_what_torch_counts():
    config = with_teacher(name="resnet10t")
    teacher = load_teacher("resnet10t", size=128)
    with FlopCounterMode(display=False) as counter:
        teacher.network(torch.zeros(1, 3, 128, 128))
    cost = cost_of(config)
    assert 2 * cost.image == counter.get_total_flops() and cost.clip == pytest.approx(FRAMES * cost.image)
    assert cost.head == ("target_dim", 256) and cost.weights == bytes_of(teacher)
    assert flops(config, 1, 1)["teacher"] == pytest.approx((FRAMES + 1) * counter.get_total_flops())
    model = meta_model(config)
    assert model.feature_head.out_features == 256
    memory = memory_of(config, {}, 1, 1)
    assert memory.parts["teacher"] == cost.weights and memory.activations["logits"] > 0


def test_own_weights_as_teacher_cost_their_encoder_but_the_last_stage(tmp_path):
    create_model("tiny", vocab_size=8, window=(4, 4, 4)).save_pretrained(tmp_path / "ours")
    config = with_teacher(weights=str(tmp_path / "ours"))
    cost = cost_of(config)
    teacher = load_teacher(weights=str(tmp_path / "ours"))
    assert cost.head == ("target_dim", 128) and cost.weights == bytes_of(teacher)
    assert len(teacher.network.encoder.layers) == 3
    assert cost.clip > cost.image > 0 and cost.working[0] > cost.working[1] > 3 * 128 * 128 * 4
