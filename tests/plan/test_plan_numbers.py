"""FLOPs and parameters against torch's counters, traffic against counted collectives, memory by stage, time."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from bevt_ds.config.deepspeed import read_json
from bevt_ds.config.recipes import PRETRAINING, finetune_k400, joint_swin_b
from bevt_ds.errors import UserError
from bevt_ds.kernels import torch_ops
from bevt_ds.model.presets import SIZES, create_model
from bevt_ds.plan import planning
from bevt_ds.plan.activations import micro_batch
from bevt_ds.plan.compute import MFU, Rates, flops, rates
from bevt_ds.plan.memory import bucket_bytes, checkpoint_bytes, state_bytes, surface_bytes
from bevt_ds.plan.planning import (
    STAGES,
    make_plan,
    meta_model,
    on,
    parameter_counts,
    require_fit,
    with_micro,
)
from bevt_ds.plan.supply import Machines, supply
from bevt_ds.plan.targets import cost_of
from bevt_ds.plan.traffic import sent
from bevt_ds.runtime.flops import encoder_macs
from bevt_ds.runtime.gpus import GPUS, gpu_named

ROOT = Path(__file__).parents[2]
H200 = gpu_named("h200")
ZERO = {stage: read_json(f"zero{stage}") for stage in STAGES}


def of(name: str, **model):
    """The joint recipe with another backbone, in fp32, whose model has the CPU's operators."""
    base = joint_swin_b()
    sizes = {"name": name, "kernels": "torch", **model}
    return replace(base, model=replace(base.model, **sizes), train=replace(base.train, precision="fp32"))


@pytest.mark.parametrize("name", SIZES)
def test_parameters_are_the_models(name):
    with torch.device("meta"):
        model = create_model(name, vocab_size=8192, window=(8, 7, 7))
    assert parameter_counts(planning.network(of(name)))[0] == sum(p.numel() for p in model.parameters())


FLOPS = [(name, 224, {}) for name in SIZES] + [
    ("tiny", 192, {"checkpointing": True}),
    ("tiny", 192, {"checkpointing": True, "drop_path": 0.0}),
    ("tiny", 192, {"checkpointing": True, "recompute": "attention", "recompute_every": 2}),
]


@pytest.mark.parametrize(("name", "size", "how"), FLOPS, ids=str)
def test_flops_are_those_that_torch_counts(name, size, how, monkeypatch):
    """Forward and backward, to the last one; at 192 px windows pad. Masked rows of so many samples are not padded."""
    monkeypatch.setattr(torch_ops, "_attend", torch_ops._BiasedAttention.apply)
    config = of(name, **how)
    config = replace(config, data=replace(config.data, size=size, token_size=size // 2))
    model = meta_model(config).train()
    (batch,) = micro_batch(config, 64, 256)
    with FlopCounterMode(display=False) as counter:
        model(batch).loss.backward()
    counted = flops(config, 64, 256)
    assert sum(counted.values()) - counted["tokenizer"] == counter.get_total_flops()


def test_known_figures():
    arch = SIZES["swin_b"]
    assert encoder_macs(arch, (16, 224, 224)).total() / 1e9 == pytest.approx(140.7, abs=0.1)
    assert cost_of(joint_swin_b()).image / 1e9 == pytest.approx(26.06, abs=0.01)


def test_parts_of_a_step():
    """Twice the samples are twice the work; the tokenizer sees three quarters of a clip's frames."""
    one, two = flops(joint_swin_b(), 1, 0), flops(joint_swin_b(), 2, 0)
    assert all(two[part] == pytest.approx(2 * one[part]) for part in one)
    assert one["tokenizer"] == 2 * cost_of(joint_swin_b()).image * 12
    assert one["recomputed"] == 0 < flops(of("swin_b", checkpointing=True), 1)["recomputed"]


def test_traffic_is_what_the_scaling_benchmark_counted():
    path = ROOT / "benchmarks" / "results" / "scaling-cpu-x86-64.jsonl"
    rows = [row for row in map(json.loads, path.read_text().splitlines()) if row["ranks"] == 2]
    assert {row["zero"] for row in rows} == set(STAGES)
    for row in rows:
        planned = sent(row["parameters"], 2, row["micro_steps"], 4, {"stage": row["zero"]})
        counted = {kind: mb for kind, mb in row["sent_by_kind"].items() if mb > 0.01}
        assert {kind: size / 1e6 for kind, size in planned.items()} == pytest.approx(counted, rel=1e-3)


def test_traffic_of_large_models_and_of_one_rank():
    assert sent(100, 1, 1, 2, {"stage": 2}) == {}
    once = sent(100, 4, 2, 2, {"stage": 3})
    twice = sent(100, 4, 2, 2, {"stage": 3, "stage3_max_reuse_distance": 10})
    assert once == {"all_gather": 300, "reduce_scatter": 300} and twice["all_gather"] == 600
    quantised = sent(100, 4, 2, 2, {"stage": 3, "zero_quantized_weights": True, "zero_quantized_gradients": True})
    assert quantised == {"all_gather": 150, "all_to_all": 150}


def test_state_of_a_rank():
    """4 ranks; offloaded parts leave the GPU, hpZ keeps a second copy over the node."""
    parts = state_bytes(1000, "bf16", {"stage": 3}, 4)
    assert parts == {"optimizer": 3000, "gradients": 1000, "weights": 500, "offloaded": 0, "gathered weights": 2000}
    away = {"stage": 3, "offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "nvme"}}
    parts = state_bytes(1000, "bf16", away | {"zero_hpz_partition_size": 2}, 4)
    assert parts["offloaded"] == 3500 and "optimizer" not in parts and parts["weights of the node"] == 1000


def test_state_by_precision_and_stage():
    """Bytes a parameter on 4 ranks: weights, gradients, and 12 of the optimizer (8 in fp32 without ZeRO)."""
    expected = {
        ("bf16", 1): 2 + 4 + 12 / 4,
        ("bf16", 2): 2 + (4 + 12) / 4,
        ("bf16", 3): (2 + 4 + 12) / 4,
        ("fp16", 2): 2 + (2 + 12) / 4,
        ("fp32", 0): 4 + 4 + 8,
    }
    for (precision, stage), size in expected.items():
        parts = state_bytes(1000, precision, {"stage": stage}, world=4)
        assert sum(parts.values()) - parts.get("gathered weights", 0) == 1000 * size


def test_checkpoint_is_of_the_parts_that_are_written():
    assert checkpoint_bytes(1000, "bf16", 2) == 2000 + 12_000 + 4000
    assert checkpoint_bytes(1000, "fp32", 0) == 4000 + 8000 + 4000


def test_rates_reproduce_their_rows():
    """What the plan says of the measured batches, next to what was measured: 520 ms, and 251 and 330 ms."""
    speed = rates(H200, "swin_b")
    assert "swin_b on one NVIDIA H200 at 781b91b" in speed.source and speed.source.startswith("measured")
    base = joint_swin_b()
    for batch, low, high in (((8, 64), 0.25, 0.33), ((32, 256), 0.51, 0.53)):
        config = with_micro(base, *batch)
        config = replace(config, train=replace(config.train, global_clips=batch[0], global_images=batch[1]))
        result = make_plan(config, ZERO[2], H200, Machines(1, storage=1e12, cores=1000), speed)
        assert low < result.step < high
    assert result.bound == "compute"


def test_rates_of_what_was_not_measured(tmp_path):
    speed = rates(gpu_named("a100-80"), "swin_b")
    assert (
        speed.source.startswith("assumed: 17% of the peak, as h200/step-nvidia-h200.jsonl, swin_b on one")
        and speed.flops < 312e12 / 5
    )
    assert rates(H200, "swin_b", folder=tmp_path) == Rates(
        MFU * H200.flops, 0.0, rates(H200, "tiny", None, tmp_path).source
    )
    assert rates(H200, "swin_b", mfu=0.5).flops == 0.5 * H200.flops


@pytest.mark.parametrize(("change", "bound"), [
    ({}, "launch"),
    ({"cores": 1}, "decode"),
    ({"storage": 1e8}, "storage"),
])  # fmt: skip
def test_bounds(change, bound):
    result = make_plan(joint_swin_b(), ZERO[2], H200, Machines(64, **change), rates(H200, "swin_b"))
    assert result.bound == bound and result.step >= result.seconds[bound]


def test_a_slow_link_bounds():
    slow = replace(H200, network=1e8)
    result = make_plan(joint_swin_b(), ZERO[2], slow, Machines(64), rates(H200, "swin_b"))
    assert result.bound == "link" and result.step > result.seconds["link"] / 2


def test_supply_of_a_step():
    """256 clips of 16 frames, 8 apart, and 2,048 images in one second."""
    needs = supply(joint_swin_b(), H200, Machines(64), 1.0)
    assert needs.per(64) == {"clips": 4, "images": 32, "frames": 512, "read": (256 * 0.6e6 + 2048 * 0.11e6) / 64}
    gpu = replace(joint_swin_b(), data=replace(joint_swin_b().data, decoder="gpu"))
    assert supply(gpu, H200, Machines(64), 1.0).decode_seconds == pytest.approx(256 / (8.6 * 64))


def test_length_of_a_run():
    speed = rates(H200, "swin_b")
    result = make_plan(joint_swin_b(), ZERO[1], H200, Machines(8), speed)
    assert result.gpu_hours == pytest.approx(140_550 * result.step * 8 / 3600)
    tuned = make_plan(finetune_k400(), ZERO[1], H200, Machines(8), speed, samples=6400)
    assert tuned.steps == 60 * 100
    assert make_plan(finetune_k400(), ZERO[1], H200, Machines(8), speed).steps is None


def test_micro_batches_of_other_numbers_of_gpus():
    sizes = {n: planning.micro_of(on(joint_swin_b(), n)) for n in (8, 64, 128, 256)}
    assert sizes == {8: (4, 32), 64: (4, 32), 128: (2, 16), 256: (1, 8)}
    with pytest.raises(UserError, match="24 GPUs do not divide a step of 256 \\+ 2,048 samples; 1, 2, 4, 8, .* 256 do"):
        on(joint_swin_b(), 24)


def test_a_recommendation_is_the_lowest_stage_that_is_fast():
    """ZeRO-1 fits Swin-B; of Swin-G on small GPUs only some do."""
    speed = rates(H200, "swin_b")
    plans = planning.alternatives(make_plan(joint_swin_b(), ZERO[2], H200, Machines(8), speed), ZERO[2], H200, speed)
    best = planning.recommended(plans, H200)
    assert (best.stage, best.config.model.checkpointing) == (1, False)
    small, large = gpu_named("a100-40"), PRETRAINING["joint_swin_g"]()
    plans = planning.alternatives(make_plan(large, ZERO[3], small, Machines(64), speed), ZERO[3], small, speed)
    best = planning.recommended(plans, small)
    assert best.stage > 1 and best.config.model.checkpointing
    assert [p.stage for p in plans if p.memory.peak <= planning.usable(small)] != []


def test_what_does_not_fit_names_what_does():
    speed, small = rates(H200, "swin_b"), gpu_named("l40s")
    config = with_micro(joint_swin_b(), 32, 256)
    plan = make_plan(config, ZERO[2], small, Machines(8), speed)
    with pytest.raises(
        UserError, match=r"needs 5\d\.\d GiB, .* train\.micro_clips=\d+ train\.micro_images=\d+ or .*zero1"
    ):
        require_fit(plan, planning.alternatives(plan, ZERO[2], small, speed), small)
    clips, images = planning.largest_micro(plan, small)
    assert images == 8 * clips and 16 < clips < 32
    fitting = make_plan(with_micro(config, 16, 128), ZERO[2], small, Machines(8), speed)
    require_fit(fitting, [], small)


def test_a_run_that_cannot_fit_is_refused_before_it_begins():
    """A plan that may be a little too high refuses nothing."""
    config = with_micro(joint_swin_b(), 4, 32)
    peak = make_plan(config, ZERO[2], H200, Machines(8), rates(H200, "swin_b")).memory.peak
    planning.require_room(config, ZERO[2], 8, "NVIDIA H200", int(0.95 * peak))
    with pytest.raises(
        UserError, match="it does not fit: a rank needs .* of a NVIDIA L40S's memory .*train.micro_clips="
    ):
        planning.require_room(config, ZERO[2], 8, "NVIDIA L40S", int(0.8 * peak))


def test_gpus_are_told_apart():
    assert len({gpu.name for gpu in GPUS}) == len(GPUS)
    assert gpu_named("H200") is H200
    with pytest.raises(UserError, match="--gpu h20: not known; there are a100-40, a100-80, .* l40s"):
        gpu_named("h20")
    assert Counter(gpu.decoders > 0 and gpu.memory > gpu.decoders for gpu in GPUS) == {True: len(GPUS)}


def test_what_decodes_is_what_is_given():
    """Decoders for clips, cores for both; a GPU that decodes holds their surfaces."""
    config = joint_swin_b()
    on_gpu = replace(config, data=replace(config.data, decoder="gpu"))
    few = replace(H200, decoders=1)
    assert supply(on_gpu, few, Machines(8), 1.0).decode_seconds == pytest.approx(
        7 * supply(on_gpu, H200, Machines(8), 1.0).decode_seconds
    )
    assert supply(config, few, Machines(8), 1.0).decoder == "16 cores a GPU"
    assert supply(config, few, Machines(8, cores=8), 1.0).decode_seconds == pytest.approx(
        2 * supply(config, few, Machines(8), 1.0).decode_seconds
    )
    held = surface_bytes(on_gpu)
    assert held == on_gpu.data.threads * 20 * 1.5 * 340 * 256 and surface_bytes(config) == 0


def test_one_stream_launches_half():
    """The encoder runs over clips and over images; a run of images alone launches the second only."""
    both, images = (PRETRAINING[name]() for name in ("joint_swin_b", "image_swin_b"))
    speed, machines = rates(H200, "swin_b"), Machines(8)
    plans = [make_plan(with_micro(c, 4 * (c is both), 32), ZERO[2], H200, machines, speed) for c in (both, images)]
    assert plans[0].seconds["launch"] == pytest.approx(2 * plans[1].seconds["launch"])


@pytest.mark.parametrize(
    ("stage", "precision", "overlap", "bytes_an_element"),
    [
        (0, "fp32", False, 0),
        (1, "fp32", False, 4 + 4),
        (1, "bf16", False, 2),
        (2, "bf16", False, 2 + 2 + 4),
        (2, "bf16", True, 2 * 2 + 2 + 4),
        (3, "bf16", True, 2 * 2),
    ],
)
def test_buckets_and_what_reducing_one_takes(stage, precision, overlap, bytes_an_element):
    """The buffer, two where they take turns; its flat copy; that copy in fp32."""
    zero = {"stage": stage, "overlap_comm": overlap, "reduce_bucket_size": 100}
    assert bucket_bytes({"zero_optimization": zero}, precision) == 100 * bytes_an_element
