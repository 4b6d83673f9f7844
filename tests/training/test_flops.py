"""FLOP counts against published figures and torch's counter; MFU."""

import time

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from bevt_ds.config.recipes import demo
from bevt_ds.config.schema import LoopConfig
from bevt_ds.model.arch import SwinArch
from bevt_ds.runtime.flops import clip_parts, encoder_macs, image_parts, peak_flops, training_flops
from bevt_ds.runtime.logging import SpeedMeter, expected_step_flops

PUBLISHED = {  # 32x224x224, window (8,7,7): GMACs
    "T": ((96, (2, 2, 6, 2)), 87.9),
    "S": ((96, (2, 2, 18, 2)), 165.9),
    "B": ((128, (2, 2, 18, 2)), 281.6),
    "L": ((192, (2, 2, 18, 2)), 604.0),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_backbone_flops_match_published_counts(name):
    (width, depths), gmacs = PUBLISHED[name]
    count = encoder_macs(SwinArch(width, depths), (32, 224, 224)).total()
    assert count / 1e9 == pytest.approx(gmacs, rel=3e-3)


def test_head_flops_count_masked_cells_only():
    arch = SwinArch()
    masked, none = (clip_parts(arch, 8192, 16, 224, rows) for rows in (100, 0))
    assert masked["head"] - none["head"] == 100 * 1024 * 8192
    assert masked["decoder"] - none["decoder"] == 50 * (1536 * 1024 + 2 * 1024 * 1024)  # a cell is two positions


def test_peak_flops_of_devices():
    assert peak_flops("NVIDIA H200") == 989e12
    assert peak_flops("an unknown device") is None


def test_training_flops_equal_torch_counts():
    """Forward, gradients of inputs and of weights: two FLOPs a multiply-accumulate each."""
    rows, widths = 5, (8, 16, 4)
    network = nn.Sequential(nn.Linear(widths[0], widths[1]), nn.ReLU(), nn.Linear(widths[1], widths[2]))
    with FlopCounterMode(display=False) as counter:
        network(torch.randn(rows, widths[0], requires_grad=True)).sum().backward()
    assert training_flops(rows * (8 * 16 + 16 * 4)) == counter.get_total_flops()


def test_step_flops_count_clips_and_images_of_all_ranks():
    config, arch = demo(), SwinArch(64, (1, 1, 1, 1), window=(4, 4, 4))
    cells = 64 * config.data.mask.ratio
    clip = clip_parts(arch, 0, config.data.frames, config.data.size, cells * config.data.frames * 0.75).total()
    images = image_parts(arch, 0, config.data.size, cells).total()
    assert expected_step_flops(config, arch.arguments() | {"vocab_size": 0}) == 6 * (4 * clip + 12 * images)


@pytest.mark.parametrize("world", [1, 4])
def test_mfu_is_the_share_of_the_peak_of_all_ranks(monkeypatch, world):
    """Two steps in four seconds, each of what one H200 can do in a second."""
    clock = iter((10.0, 14.0))
    monkeypatch.setattr(time, "perf_counter", clock.__next__)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    speed = SpeedMeter(LoopConfig(precision="bf16"), 989e12, world, torch.device("cuda", 0))
    speed.steps = 2
    assert speed.read(0.0)["mfu"] == pytest.approx(0.5 / world)


def test_mfu_is_unknown_on_an_unknown_device_and_in_fp32(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    fp32 = SpeedMeter(LoopConfig(precision="fp32"), 1.0, 1, torch.device("cuda", 0))
    on_cpu = SpeedMeter(LoopConfig(precision="bf16"), 1.0, 1, torch.device("cpu"))
    assert fp32.read(0.0)["mfu"] is None and on_cpu.read(0.0)["mfu"] is None
