"""The step benchmark: attribution of time to parts, levers that change only the time, rows and page."""

import time
import weakref
from collections import Counter
from dataclasses import fields, replace
from itertools import repeat

import pytest
import torch
import torch.nn.functional as F
from deepspeed.runtime.utils import clip_grad_norm_
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import pages, report, step
from benchmarks.common import append_row, read_rows
from benchmarks.eager_model import EagerBEVT, TorchvisionEncoder
from benchmarks.eager_tokenizer import every_id
from benchmarks.step_batch import all_frames, resident_batch
from benchmarks.step_finetune import finetuning_configuration
from benchmarks.step_levers import LADDER, Levers, every_position
from benchmarks.step_parts import PARTS, count_operators, marked, part, profile_step
from benchmarks.step_providers import CPU_PROVIDERS, WITH_GRAPHS, Ours, Setting, configuration
from bevt_ds import BEVT
from bevt_ds.model.arch import SwinArch
from bevt_ds.model.tokenizers import RandomProjectionTokenizer, tokenize
from bevt_ds.plan.graphs import Made
from bevt_ds.plan.planning import memory_of
from bevt_ds.runtime.engine_setup import start_ranks
from bevt_ds.train.loop import train_step

SIZES = {"embed_dim": 32, "depths": (1, 1, 1, 1), "num_heads": (1, 2, 4, 8), "window": (2, 2, 2), "vocab_size": 16}


class Slow(torch.autograd.Function):
    """The identity, 60 ms late forward and 120 ms late backward."""

    @staticmethod
    def forward(ctx, x):
        time.sleep(0.06)
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        time.sleep(0.12)
        return grad.clone()


@pytest.fixture(scope="module")
def small():
    """The tiny preset's configuration at 64 pixels, and a batch."""
    config = configuration("tiny", clips=1, images=2)
    data = replace(config.data, size=64, token_size=32, short_side=(64, 80), frames=4)
    config = replace(config, data=data, model=replace(config.model, window=(2, 2, 2)))
    return config, resident_batch(1, 2, 4, 64)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("encoder.layers.1.blocks.0.attn", "attention"),
        ("encoder.layers.1.blocks.0.mlp.fc1", "linears"),
        ("encoder.layers.1.downsample.norm", "norm, activation, residual"),
        ("image_embed", "stems"),
        ("video_decoder.reduce", "head and loss"),
    ],
)
def test_time_is_attributed_to_its_module(name, expected):
    """Both directions: 180 ms put into one module show there, and the parts add up to the step."""
    torch.manual_seed(0)
    model = BEVT(**SIZES)
    batch = tokenize(RandomProjectionTokenizer(16), resident_batch(1, 1, 2, 64))
    module = model.get_submodule(name)

    def run():
        model(batch).loss.backward()

    run()
    before = profile_step(run, model, "cpu", step_ms=1000.0)["parts"]
    assert sum(before.values()) == pytest.approx(1000.0)
    assert set(before) == set(PARTS)
    quick = module.forward
    module.forward = lambda *arguments: Slow.apply(quick(*arguments))
    calls = 1 if name in ("image_embed", "video_decoder.reduce") else 2  # of each stream
    for _ in range(5):  # other programs on the machine add to any part, so it need not be the largest
        began = time.perf_counter()
        run()
        step_ms = 1e3 * (time.perf_counter() - began)
        parts = profile_step(run, model, "cpu", step_ms)["parts"]
        if parts[expected] > 0.5 * calls * 180:
            return
    pytest.fail(f"{expected} is not where {name}'s {calls * 180} ms went: {parts}")


def test_ranges_wrapped_by_hand_are_measured():
    """What is wrapped by hand is found, and a compiled model is left alone."""

    def run():
        with part("optimizer"):
            torch.ones(10).add_(1)
            time.sleep(0.05)

    parts = profile_step(run, None, "cpu", step_ms=100.0)["parts"]
    assert parts["optimizer"] > 80


def test_operators_are_counted_where_they_run():
    """Forward and backward, a composite one by its parts; views and allocations are free."""
    x, y = torch.ones(2, 3), torch.ones(3, requires_grad=True)
    assert count_operators(lambda: x.view(3, 2).t().unsqueeze(0)) == 0
    assert count_operators(lambda: torch.empty_like(x).fill_(1.0)) == 1
    assert count_operators(lambda: F.linear(x, torch.ones(4, 3), torch.ones(4))) == 3, "two fills and one product"
    assert count_operators(lambda: (2 * y).sum().backward()) == 4, "a product and a sum; ones for the loss; a product"


def test_compiled_blocks_get_no_timing_hooks():
    """A hook would be compiled in, or compile again; their stage is the part, what is not compiled keeps its own."""
    model = BEVT(**SIZES, compile=True)
    with marked(model):
        hooked = {path for path, module in model.named_modules() if module._forward_pre_hooks}
    assert {"encoder.layers.0", "encoder.layers.0.downsample.norm", "lm_head"} <= hooked
    assert not [path for path in hooked if ".blocks." in path]
    assert not [path for path, module in model.named_modules() if module._forward_pre_hooks], "hooks are taken off"


def test_torchvision_encoder_gives_the_same_shapes():
    """Its encoder between our stems and decoders: shapes of both streams, and every weight gets a gradient."""
    arch = BEVT(**SIZES).arch | {"window": (2, 4, 4)}
    model = EagerBEVT(arch)
    model.encoder = TorchvisionEncoder(arch)
    tokenizer, batch = RandomProjectionTokenizer(16), resident_batch(1, 1, 2, 64)
    loss = model(batch, every_id(tokenizer, batch))
    loss.backward()
    assert 4 < loss.item() < 8, "two streams, 16 ids each: about 2 ln 16"
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


def test_loss_over_all_positions_is_the_same():
    """The lever of the masked rows: loss, metrics and every gradient."""
    torch.manual_seed(0)
    model = BEVT(**SIZES).double()
    batch = tokenize(RandomProjectionTokenizer(16), resident_batch(2, 2, 2, 64)).cast(torch.float64)
    results = []
    for forward in (model.forward, lambda batch: every_position(model, batch)):
        model.zero_grad()
        output = forward(batch)
        output.loss.backward()
        results.append((output, [p.grad.clone() for p in model.parameters()]))
    (ours, grads), (full, full_grads) = results
    torch.testing.assert_close(ours.loss, full.loss, rtol=1e-6, atol=0, check_dtype=False)
    assert ours.metrics.keys() == full.metrics.keys()
    assert all(int(ours.metrics[k]) == int(full.metrics[k]) for k in ours.metrics if not k.startswith("loss"))
    for ours_grad, full_grad in zip(grads, full_grads, strict=True):
        torch.testing.assert_close(ours_grad, full_grad, rtol=1e-5, atol=1e-8)


def test_tokenizing_masked_frames_only_changes_no_target():
    """The lever of the masked frames: fewer images, the same ids."""
    tokenizer, batch = RandomProjectionTokenizer(64), resident_batch(3, 2, 8, 64, seed=3)
    full = all_frames(batch)
    assert len(batch.video.view) < len(full.video.view) == 24
    some, every = tokenize(tokenizer, batch), tokenize(tokenizer, full)
    assert some.video.targets.equal(every.video.targets)
    assert some.image.targets.equal(every.image.targets)


def test_step_levers_change_nothing_but_time(small):
    """Two updates with all levers off and on: the second loss has been through backward pass and optimizer."""
    config, batch = small
    setting = Setting(config, "random_projection", start_ranks())
    losses = []
    for levers in (Levers(), LADDER["ours, no lever"]):
        ours = Ours(setting, levers)
        sums = [train_step(ours.task, levers.batches(repeat(batch)), i).sums for i in (0, 1)]
        losses.append([float(s[name]) for s in sums for name in ("loss_video", "loss_image", "hits_video")])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


class Named(TorchDispatchMode):
    """Counts operators by name inside the block; views and allocations are none."""

    def __init__(self):
        super().__init__()
        self.found = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        self.found[name] += not (function.is_view or "empty" in name)
        return function(*args, **(kwargs or {}))


UPDATES = {(0, "fp32"): 30, (1, "fp32"): 40, (2, "bf16"): 40}  # operators of an update, at most; of 136 parameters


@pytest.mark.parametrize(("stage", "precision"), UPDATES)
def test_an_update_is_one_fused_kernel_for_each_group_of_parameters(small, stage, precision):
    """Of both groups one AdamW each, and one copy to the network's type; norms and clipping are few operators too."""
    config, batch = small
    ours = Ours(Setting(config, "random_projection", start_ranks()), Levers(), stage=stage, precision=precision)
    engine, named = ours.task.engine, Named()
    update = engine.step

    def counted(number):
        with named:
            return update(number)

    ours(repeat(batch))  # makes the moments
    engine.step = counted
    ours(repeat(batch))
    assert named.found["_fused_adamw_"] == 2
    assert named.found.total() <= UPDATES[stage, precision], named.found


def test_clipping_without_zero_is_deepspeeds_bit_for_bit(small):
    """Its own takes the norm of each parameter again. After the step nothing holds the gradient."""
    config, batch = small
    ours = Ours(Setting(config, "random_projection", start_ranks()), Levers(), stage=0)
    ds, most = ours.task.engine.ds, config.optim.clip_grad
    clip, compared, made = ds.clip_fp32_gradients, [], []

    def both():
        graded = [p for p in ds.module.parameters() if p.grad is not None]
        before = [torch.nn.Parameter(p.detach()) for p in graded]
        for p, copy in zip(graded, before, strict=True):
            copy.grad = 100 * p.grad
            p.grad.mul_(100)
        ours.task.engine.guard.before_step()
        assert clip_grad_norm_(before, most).equal(ours.task.engine.guard.total) and before[0].grad.norm() < most
        clip()
        compared.extend(p.grad.equal(copy.grad) for p, copy in zip(graded, before, strict=True))
        made.extend(weakref.ref(p.grad) for p in graded)

    ds.clip_fp32_gradients = both
    ours(repeat(batch))
    assert len(compared) > 100 and all(compared)
    assert not any(gradient() is not None for gradient in made)


def test_a_plan_has_room_for_what_a_step_makes(small):
    """ZeRO-2 in bf16: activations, buckets and what reducing them takes, and the fp32 gradient next to them."""
    config, batch = small
    config = replace(
        config, model=replace(config.model, kernels="torch"), train=replace(config.train, precision="bf16")
    )
    ours = Ours(Setting(config, "none", start_ranks()), Levers(kernels=False), precision="bf16")
    ours(repeat(batch))
    with Made([]) as made:
        ours(repeat(batch))
    zero = {"stage": 2, "reduce_bucket_size": ours.task.engine.ds.optimizer.reduce_bucket_size}
    memory = memory_of(config, {"zero_optimization": zero}, world=1, passes=1)
    there = sum(memory.parts[name] for name in ("optimizer", "weights", "tokenizer", "input"))
    gradient = memory.parts["gradients"]
    assert made.peak > gradient > 0.2 * made.peak, "it is a good part of all"
    assert made.peak <= memory.peak - there <= made.peak + gradient


def test_ladder_adds_one_lever_at_a_time():
    """From none to all; the last row is what the training program does."""
    rows = [{f.name for f in fields(Levers) if getattr(levers, f.name)} for levers in LADDER.values()]
    assert [len(row) for row in rows] == list(range(len(fields(Levers)) + 1))
    assert all(a < b for a, b in zip(rows, rows[1:], strict=False))
    assert LADDER["ours"] == Levers()


def test_step_benchmark_rows_page_and_plot(small, tmp_path):
    """A whole case: every number that the page names, and a competitor that fails."""
    benchmark = step.Benchmark(tmp_path / "step-cpu.jsonl", small[0], seconds=0.0)
    benchmark.run("no tokenizer", CPU_PROVIDERS, "random_projection")
    rows = list(read_rows(benchmark.path))
    assert [row["provider"] for row in rows] == list(CPU_PROVIDERS)
    for row in rows:
        assert row["steps"] >= 3
        assert sum(row["parts"].values()) == pytest.approx(row["p50_ms"], abs=0.02)
        assert row["clips_per_s"] == pytest.approx(1e3 / row["p50_ms"], rel=1e-3, abs=1e-3)
        assert {"commit", "device", "torch"} <= set(row["provenance"])
        assert row["launches"] is None and row["operators"] > 500
    assert rows[1]["operators"] <= 1725, "500 more where DeepSpeed copies and adds up each gradient alone"
    failed = {k: v for k, v in rows[0].items() if k in (*pages.SETTING, "provenance", "ceilings")}
    append_row(benchmark.path, failed | {"provider": "torchvision", "error": "RuntimeError: no"})
    page = report.write(benchmark.path)
    assert "not measured: RuntimeError: no" in page
    assert "These are CPU numbers" in page
    assert benchmark.path.with_suffix(".png").stat().st_size > 5000


def test_fine_tuning_rows(tmp_path):
    """The original's step and ours, and graphs, which a CPU has not: a row with the reason."""
    config = finetuning_configuration("tiny", clips=1)
    data = replace(config.data, size=64, short_side=(64, 80), frames=4)
    config = replace(config, data=data, model=replace(config.model, window=(2, 2, 2)))
    benchmark = step.Benchmark(tmp_path / "step-cpu.jsonl", configuration("tiny", 1, 2), seconds=0.0, finetune=config)
    benchmark.run("fine-tuning", ["eager", "ours", WITH_GRAPHS], "none")
    failed, *rows = read_rows(benchmark.path)
    assert (failed["provider"], "a cpu has none" in failed["error"]) == (WITH_GRAPHS, True)
    assert [row["provider"] for row in rows] == ["eager", "ours"]
    for row in rows:
        assert (row["case"], row["batch"], row["images_per_s"]) == ("fine-tuning", "1 clips", 0)
        assert row["operators"] > 300 and row["mfu"] > 0 and row["parts"]["optimizer"] > 0
    assert "fine-tuning, tiny" in report.write(benchmark.path)


def test_step_flops_count_the_masked_head_only(small):
    """Doubling the vocabulary adds the head's products on masked positions only."""
    config, batch = small
    setting = Setting(config, "none", start_ranks())
    double = replace(config, tokenizer=replace(config.tokenizer, vocab_size=2 * config.tokenizer.vocab_size))
    extra = step.step_flops(replace(setting, config=double), batch) - step.step_flops(setting, batch)
    assert (
        extra
        == 6 * (batch.video.count + batch.image.count) * SwinArch.of(setting.arch()).width * config.tokenizer.vocab_size
    )
