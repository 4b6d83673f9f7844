"""A step that is not finite: its bundle, and what `bevt replay` finds in it."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from benchmarks.step_batch import resident_batch
from bevt_ds import cli, exit_codes
from bevt_ds.batch import Batch, LabelledBatch
from bevt_ds.config.recipes import get_recipe
from bevt_ds.config.schema import Config, FinetuneConfig
from bevt_ds.model.bevt import BEVT
from bevt_ds.model.classifier import VideoClassifier
from bevt_ds.model.tokenizers import RandomProjectionTokenizer, tokenize
from bevt_ds.runtime import bundle
from bevt_ds.runtime.bundle import Held
from bevt_ds.runtime.distributed import Ranks
from bevt_ds.runtime.guard import Verdict
from bevt_ds.runtime.logging import StepSums
from bevt_ds.train.narrowing import BACKWARD, FORWARD, culprits, run
from bevt_ds.train.nonfinite import Watch
from tests.downstream.worlds import ALONE, on_ranks

SIZES = {"embed_dim": 8, "depths": (1, 1, 1, 1), "num_heads": (1, 1, 2, 2), "window": (2, 2, 2), "kernels": "torch"}
IDS, STEP = 16, 7


def pretraining() -> tuple[nn.Module, Batch]:
    """A small network, and three clips and two images with their ids."""
    torch.manual_seed(0)
    batch = tokenize(RandomProjectionTokenizer(IDS), resident_batch(3, 2, 4, 64))
    streams = {"v": batch.video, "i": batch.image}
    named = [replace(s, keys=tuple(f"{n}/{i}" for i in range(len(s.pixels)))) for n, s in streams.items()]
    return BEVT(vocab_size=IDS, **SIZES), Batch(*named)


def finetuning() -> tuple[nn.Module, LabelledBatch]:
    """A small classifier, and four clips with shares of classes."""
    torch.manual_seed(0)
    keys = tuple(f"v/{i}" for i in range(4))
    pixels, shares = torch.randn(4, 3, 4, 32, 32), torch.full((4, 3), 1 / 3)
    return VideoClassifier(3, dropout=0.5, **SIZES), LabelledBatch(pixels, shares, torch.arange(4), keys, 4)


def loss_of(model: nn.Module, batch: Batch | LabelledBatch) -> Tensor:
    if isinstance(batch, Batch):
        return model(batch).loss
    return nn.functional.cross_entropy(model(batch.pixels, batch.sample_keys), batch.labels, reduction="sum") / 4


@dataclass
class FakeTask:
    """What Watch asks of a task whose engine has skipped a step."""

    folder: Path
    model: nn.Module
    ranks: Ranks = ALONE
    precision: str = "fp32"
    fingerprint: str = "data"
    trained_streams: tuple[str, ...] = ("video", "image")
    loss_scale: float = 1.0
    skipped: int = 0

    def __post_init__(self) -> None:
        kind = Config if isinstance(self.model, BEVT) else FinetuneConfig
        base = get_recipe("demo" if kind is Config else "finetune_demo", kind)
        train = replace(base.train, precision=self.precision, max_skipped=(99, 99))
        self.config = replace(base, train=train, model=replace(base.model, kernels="torch"))
        self.setup = SimpleNamespace(folder=self.folder, first_step=0, config=self.config, changes=())
        self.engine, self.stage, self.module = self, 2, self.model
        self.guard = SimpleNamespace(norms=lambda: {"w": math.inf}, loss_scale=self.loss_scale)
        self.folder.mkdir(exist_ok=True)
        self.watch = Watch(self)

    def count_skipped(self) -> None:
        self.skipped += 1

    def shown_weights(self) -> dict[str, Tensor]:
        return dict(self.model.state_dict()) if self.ranks.is_main else {}

    def metrics(self, totals: dict, step: int) -> dict:
        return {}


def skip(task: FakeTask, batches: list, step: int = STEP) -> Path:
    """Tell a watch that a step with these micro-batches was skipped; the bundle."""
    held, sums = Held(step), StepSums()
    for batch in batches:
        held.add(batch, loss_of(task.model, batch))
    sums.add({"loss": torch.zeros(())})
    task.watch.note(held, Verdict(True), sums)
    return task.folder / "nonfinite" / f"step-{step:08d}"


def replayed(folder: Path, capsys, *options: str) -> tuple[int, dict]:
    """Exit code and finding of `bevt replay --json`."""
    capsys.readouterr()
    code = cli.main(["replay", str(folder), "--device", "cpu", "--json", *options])
    return code, json.loads(capsys.readouterr().out, parse_constant=pytest.fail)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("make", [pretraining, finetuning])
def test_replay_finds_the_sample_with_a_nan_among_its_pixels(tmp_path, capsys, make, precision):
    """The second micro-batch of two; the bundle is moved to another place first."""
    model, good = make()
    _, bad = make()
    (bad.video if make is pretraining else bad).pixels[2, 1] = math.nan
    folder = skip(FakeTask(tmp_path / "run", model, precision=precision), [good, bad])
    capsys.readouterr()
    moved = shutil.move(folder, tmp_path / "elsewhere")
    code, found = replayed(moved, capsys)
    assert code == exit_codes.FINISHED and found["reproduced"] and found["way"] == FORWARD
    assert (found["groups"], found["pixels"], found["place"]) == ([["v/2"]], ["v/2"], [0, 1])
    assert found["layer"]["name"].startswith("encoder.patch_embed") and found["loss"] == "nan"
    assert (found["step"], found["precision"], found["device"]) == (STEP, precision, "cpu")
    assert "sample: v/2, alone, of" in found["answer"] and "its pixels are not finite" in found["answer"]


def test_replay_finds_the_sample_whose_nan_is_masked(tmp_path, capsys):
    """The mask hides it from the loss, not from the gradient."""
    model, batch = pretraining()
    masked = batch.video.mask[1].nonzero()[0] * torch.tensor([2, 16, 16])
    batch.video.pixels[1, 0, masked[0], masked[1], masked[2]] = math.nan
    code, found = replayed(skip(FakeTask(tmp_path, model), [batch]), capsys)
    assert code == exit_codes.FINISHED and found["way"] == BACKWARD and found["loss"] > 0
    assert found["groups"] == [["v/1"]] and found["pixels"] == ["v/1"]
    assert found["layer"]["name"].startswith("encoder.patch_embed")


@pytest.mark.parametrize("make", [pretraining, finetuning])
def test_replay_blames_a_weight_that_is_not_finite(tmp_path, capsys, make):
    model, batch = make()
    name = "encoder.layers.1.blocks.0.mlp.fc1.weight"
    name = next(n for n, _ in model.named_parameters() if "layers.1" in n and n.endswith("fc1.weight"))
    dict(model.named_parameters())[name].data[3, 4] = math.nan
    code, found = replayed(skip(FakeTask(tmp_path, model), [batch]), capsys)
    assert code == exit_codes.FINISHED and found["weights"] == {name: 1} and found["groups"] == []
    assert found["layer"]["name"] == name.removesuffix(".weight")
    assert f"weights: not finite are {name} (1 of its numbers); no sample is to blame" in found["answer"]


def test_replay_finds_a_gradient_that_overflows_and_its_layer(tmp_path, capsys):
    """A head so large, behind a norm so small, that the loss is finite and the gradient of the norm is not."""
    model, batch = narrow_network()
    folder = skip(FakeTask(tmp_path, model, loss_scale=2.0**16), [batch])
    code, found = replayed(folder, capsys)
    assert code == exit_codes.FINISHED and found["way"] == BACKWARD
    assert found["loss"] == pytest.approx(float(loss_of(model, batch)))
    assert "encoder.norm.weight" in found["parameters"] and found["layer"]["name"] == "lm_head"
    assert "the loss is finite" in found["answer"] and "whose gradient is not finite" in found["answer"]


def test_replay_says_where_the_norm_of_the_gradient_alone_overflows(tmp_path, capsys):
    model, batch = narrow_network()
    code, found = replayed(skip(FakeTask(tmp_path, model), [batch]), capsys)
    assert code == exit_codes.FINISHED and found["way"] == BACKWARD and found["layer"] is None
    assert found["parameters"] == ["encoder.norm.bias"]
    assert "the norm of its gradient overflows, most of it in encoder.norm.bias" in found["answer"]


def narrow_network() -> tuple[nn.Module, Batch]:
    model, batch = pretraining()
    with torch.no_grad():
        model.encoder.norm.weight.mul_(1e-37)
        model.lm_head.weight.mul_(1e37 / model.lm_head.weight.abs().max())
    assert loss_of(model, batch).isfinite()
    return model, batch


def test_replay_says_where_nothing_is_wrong(tmp_path, capsys):
    """As after a fault of the machine: exit code 1."""
    model, batch = pretraining()
    code, found = replayed(skip(FakeTask(tmp_path, model), [batch]), capsys)
    assert code == exit_codes.FOUND_FAULTS and not found["reproduced"] and found["way"] is None
    assert "not reproduced on cpu in fp32" in found["answer"] and "look at the machine" in found["answer"]
    assert found["loss"] == pytest.approx(float(loss_of(model, batch)), rel=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("make", [pretraining, finetuning])
def test_samples_of_a_batch_add_up_to_it(make):
    model, batch = make()
    if isinstance(batch, Batch):
        clips, images = batch.video.only, batch.image.only
        parts = [Batch(clips([2, 0]), images([1])), Batch(None, images([0])), Batch(clips([1]), None)]
    else:
        parts = [batch.only(chosen) for chosen in ([2], [3, 0], [1])]
    total = sum(loss_of(model, part) for part in parts)
    torch.testing.assert_close(total, loss_of(model, batch), rtol=1e-5, atol=0)


def test_bundle_returns_the_batch_that_the_network_was_given(tmp_path):
    for make in (pretraining, finetuning):
        _, batch = make()
        bundle.write_batch(tmp_path / "batch" / make.__name__, batch)
        got, given = (dict(bundle.leaves(b)) for b in (bundle.read_batch(tmp_path / "batch" / make.__name__), batch))
        assert got.keys() == given.keys()
        for name, value in given.items():
            same = torch.equal(got[name], value) if isinstance(value, Tensor) else got[name] == value
            assert same, name


def test_bundles_are_bounded_in_number_and_size(tmp_path, capsys):
    """The first four of a run hold batch and weights, of micro-batches whose loss is not finite; others the report."""
    model, good = finetuning()
    _, bad = finetuning()
    bad.pixels[0] = math.nan
    task = FakeTask(tmp_path, model)
    for step in range(bundle.WHOLE + 1):
        folder = skip(task, [good, bad], step)
    whole = sorted(path.parent.name for path in tmp_path.glob("nonfinite/*/model"))
    assert whole == [f"step-{step:08d}" for step in range(bundle.WHOLE)]
    first = tmp_path / "nonfinite" / whole[0]
    assert [path.name for path in (first / "batch").iterdir()] == ["rank-0-micro-1.safetensors"]
    assert sorted(path.name for path in folder.iterdir()) == ["manifest.json", "report.json"]
    capsys.readouterr()
    assert cli.main(["replay", str(folder)]) == exit_codes.USER_ERROR
    assert "is the report alone, without weights and batch: the run has 4 bundles" in capsys.readouterr().err


def test_choice_of_micro_batches_fits_its_limit():
    half = bundle.BATCH_BYTES // 2
    finite, spoilt = [[1.0, 2.0], [3.0, 4.0]], [[1.0, math.nan], [3.0, math.inf]]
    assert bundle.choose(finite, [[1, 1], [1, 1]]) == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert bundle.choose(finite, [[half, half], [1, 0]]) == [(0, 0), (0, 1)]
    assert bundle.choose(spoilt, [[1, 1], [1, 1]]) == [(0, 1), (1, 1)]
    assert bundle.choose(spoilt, [[1, 0], [1, bundle.BATCH_BYTES + 1]]) == []


def test_held_micro_batches_are_bounded(monkeypatch):
    _, batch = finetuning()
    monkeypatch.setattr(bundle, "HELD_BYTES", 2 * bundle.size_of(batch))
    held = Held(0)
    for _ in range(3):
        held.add(batch, torch.zeros(()))
    assert [size > 0 for size in held.sizes()] == [True, True, False] and len(held.keys) == 3


def test_ranks_write_one_bundle(tmp_path, capsys):
    """Each its own micro-batches; a bundle that a disk refuses is one line, and the run goes on."""
    bad = replace(finetuning()[1], pixels=torch.full((4, 3, 4, 32, 32), math.nan))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "nonfinite").write_text("in the way")

    def work(ranks: Ranks) -> Path:
        skip(FakeTask(tmp_path / "full", finetuning()[0], ranks), [bad])
        return skip(FakeTask(tmp_path / "run", finetuning()[0], ranks), [bad])

    folder, _ = on_ranks(2, work)
    assert sorted(p.name for p in (folder / "batch").iterdir()) == [f"rank-{r}-micro-0.safetensors" for r in (0, 1)]
    said = [line for line in capsys.readouterr().out.splitlines() if "Its bundle" in line]
    assert len(said) == 1 and f"cannot write {tmp_path}/full/nonfinite/step-0000000{STEP}" in said[0]
    assert said[0].endswith("The run goes on without it.")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "model" / "model.safetensors").unlink(), "model/model.safetensors is missing"),
        (lambda f: (f / "report.json").write_text("{}"), "report.json has 2 bytes"),
        (lambda f: (f / "report.json").unlink(), "is no bundle: it has no report.json"),
        (lambda f: (f / "manifest.json").unlink(), "it has no manifest.json"),
    ],
)
def test_damaged_bundle_is_refused(tmp_path, capsys, damage, message):
    model, batch = finetuning()
    folder = skip(FakeTask(tmp_path, model), [batch])
    damage(folder)
    capsys.readouterr()
    assert cli.main(["replay", str(folder)]) == exit_codes.USER_ERROR
    assert message in capsys.readouterr().err


def test_run_in_place_of_a_bundle_names_its_bundles(tmp_path, capsys):
    model, batch = finetuning()
    folder = skip(FakeTask(tmp_path, model), [batch])
    for given in (tmp_path, folder.parent):
        capsys.readouterr()
        assert cli.main(["replay", str(given)]) == exit_codes.USER_ERROR
        assert f"name one of its bundles: {folder}" in capsys.readouterr().err


class Overflow(torch.autograd.Function):
    """Nothing forward; backward a gradient that overflows where the input is large."""

    @staticmethod
    def forward(context, x: Tensor) -> Tensor:
        context.save_for_backward(x)
        return x.clone()

    @staticmethod
    def backward(context, gradient: Tensor) -> Tensor:
        (x,) = context.saved_tensors
        return torch.where(x.abs() > 100, gradient * math.inf, gradient)


class Block(nn.Module):
    """A layer and a function of none: `kind` says what the function does."""

    def __init__(self, kind: str = "") -> None:
        super().__init__()
        self.kind, self.linear, self.last = kind, nn.Linear(2, 2), nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.linear(x)
        x = Overflow.apply(x) if self.kind == "backward" else x / 0 if self.kind == "forward" else x
        return self.last(x)


def toy(kind: str) -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(Block(), Block(kind), Block())


@pytest.mark.parametrize(
    ("kind", "way", "layer", "between"),
    [("", None, None, None), ("forward", FORWARD, "1.last", True), ("backward", BACKWARD, "1.linear", True)],
)
def test_first_layer_that_is_not_finite_is_found(kind, way, layer, between):
    """What a block does itself, and not by one of its layers, is told by the layer next to it."""
    model, x = toy(kind), torch.full((3, 2), 1e4)
    outcome = run(model, lambda: model(x).mean())
    assert outcome.way == way
    assert (outcome.layer and (outcome.layer.name, outcome.layer.between)) == (layer and (layer, between))
    assert all(not module._forward_hooks and not module._backward_hooks for module in model.modules())


class Scaled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return Overflow.apply(x)


def test_module_whose_backward_overflows_is_found():
    model = nn.Sequential(nn.Linear(2, 2), Scaled(), nn.Linear(2, 2))
    outcome = run(model, lambda: model(torch.full((3, 2), 1e4)).mean())
    assert (outcome.layer.name, outcome.layer.kind, outcome.layer.between) == ("1", "Scaled", False)
    assert outcome.parameters == ("0.weight", "0.bias")


def test_bisection_finds_the_samples_of_an_overflowing_gradient():
    model, x = toy("backward"), torch.zeros(7, 2)
    x[2], x[5] = 1e4, -1e4
    is_bad = lambda chosen: run(model, lambda: model(x[list(chosen)]).mean()).way is not None  # noqa: E731
    assert culprits(range(7), is_bad) == [[2], [5]]


@pytest.mark.parametrize("bad", [set(), {0}, {6}, {1, 4}, set(range(7))])
def test_bisection_finds_every_culprit(bad):
    calls = []

    def is_bad(chosen) -> bool:
        calls.append(chosen)
        return bool(bad & set(chosen))

    assert culprits(range(7), is_bad) == [[i] for i in sorted(bad)]
    assert len(calls) <= 1 + 6 * max(len(bad), 0)


def test_samples_that_are_bad_together_alone_stay_a_group():
    assert culprits(range(8), lambda chosen: {2, 3} <= set(chosen)) == [[2, 3]]
    assert culprits(range(8), lambda chosen: len(chosen) > 5) == [list(range(8))]


def test_gradient_whose_norm_alone_overflows_names_the_largest():
    model = nn.Linear(2, 1, bias=False)
    outcome = run(model, lambda: (model(torch.ones(1, 2)) * 2e38).sum() * 0 + model.weight.sum() * 3e38)
    assert (outcome.way, outcome.parameters) == (BACKWARD, ("weight",))
