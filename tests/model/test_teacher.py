"""Features of a frozen network as targets: which vector stands at which row, the loss, and its gradient."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

from bevt_ds import BEVT, Batch, UserError
from bevt_ds.batch import denormalised
from bevt_ds.eval.feature_targets import constant_loss, evaluate
from bevt_ds.eval.visualize import marked, nearer
from bevt_ds.model.frozen_swin import FrozenModel
from bevt_ds.model.teacher import ImageTeacher, SwinTeacher, load_teacher, with_features
from bevt_ds.model.tokenizers import RandomProjectionTokenizer, tokenize
from bevt_ds.model.weights import load_init, read_weights


@pytest.fixture
def batch(small_batch, make_stream) -> Batch:
    """`small_batch` without targets; one frame pair of the first clip has no masked cell, and so no view."""
    mask = small_batch.video.mask.clone()
    mask[0, 0] = False
    view = torch.zeros(2, 4, 3, 32, 32)
    video = make_stream(small_batch.video.pixels, mask, view=view)
    image = make_stream(small_batch.image.pixels, small_batch.image.mask, view=torch.zeros(3, 3, 32, 32))
    return Batch(video, image)


@pytest.fixture(scope="module")
def resnet() -> ImageTeacher:
    return ImageTeacher("resnet10t", size=64, seed=3)


def at_rows(stream, maps: torch.Tensor) -> torch.Tensor:
    """(R,D) from features (B,T,h,w,D) or (B,h,w,D); rows that pad are left out."""
    return maps.flatten(0, -2)[stream.rows[stream.rows >= 0]]


def normalised(features: torch.Tensor) -> torch.Tensor:
    """Mean 0 and variance 1 over the last axis, written out."""
    centred = features - features.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()


# Which vector stands where


def test_image_teacher_gives_each_row_the_features_of_its_frame_and_cell(batch, resnet):
    """Against timm's own network, frame by frame: its third map has a cell for 16x16 pixels."""
    filled = with_features(resnet, batch)
    weights = resnet.network.network.state_dict()
    network = timm.create_model("resnet10t", features_only=True, out_indices=[3]).eval()
    network.load_state_dict({name: weights[name] for name in network.state_dict()})
    mean, std = (torch.tensor(network.pretrained_cfg[key]).view(3, 1, 1) for key in ("mean", "std"))

    def of_frame(levels) -> torch.Tensor:
        with torch.no_grad():
            (found,) = network(((torch.from_numpy(levels).movedim(-1, 0) - mean) / std)[None])
        return found[0].movedim(0, -1)

    for stream in (filled.video, filled.image):
        maps = [torch.stack([of_frame(frame) for frame in denormalised(sample)]) for sample in stream.pixels]
        expected = normalised(at_rows(stream, torch.stack(maps)))
        assert stream.targets.shape == (len(stream.rows), resnet.dim) == (len(stream.rows), 256)
        torch.testing.assert_close(stream.targets[stream.rows >= 0], expected, rtol=1e-3, atol=1e-3)
        assert stream.targets.isfinite().all() and not stream.targets.requires_grad


def test_image_teacher_does_not_look_at_frames_without_a_masked_cell(batch, resnet, monkeypatch):
    seen = []
    monkeypatch.setattr(
        resnet.network, "forward", lambda x: seen.append(len(x)) or [x.new_zeros(len(x), 256, 4, 4)] * 4
    )
    with_features(resnet, batch)
    assert seen == [8 - 2, 3]
    nothing = replace(batch.image, mask=batch.image.mask & False, view=batch.image.view[:0])
    assert resnet.rows(nothing).shape == (len(nothing.rows), 256) and len(seen) == 2


def test_image_teacher_fits_other_grids(batch):
    """A network of one size has 14x14 cells, which are averaged to the mask's 4x4."""
    filled = with_features(ImageTeacher("vit_tiny_patch16_224", size=64), batch)
    assert filled.video.targets.shape == (len(batch.video.rows), 192)
    assert filled.video.targets.isfinite().all()


@pytest.fixture
def ours(small_bevt, tmp_path) -> BEVT:
    torch.manual_seed(5)
    model = small_bevt(image_windows="official").eval()
    model.save_pretrained(tmp_path / "ours")
    return model


def test_our_weights_give_the_features_of_the_whole_clip(batch, ours, tmp_path):
    """Against the same encoder, cut nowhere: its third stage, without mask token; both frames of a cell share them."""
    teacher = load_teacher(weights=str(tmp_path / "ours"))
    filled = with_features(teacher, batch)
    encoder = ours.encoder
    with torch.no_grad():
        clips = encoder.encode(encoder.patch_embed(batch.video.pixels))[2].repeat_interleave(2, 1)
        images = encoder.encode(ours.image_embed(batch.image.pixels.unsqueeze(2)), "official")[2]
    for stream, maps in ((filled.video, clips), (filled.image, images)):
        expected = normalised(at_rows(stream, maps))
        torch.testing.assert_close(stream.targets[stream.rows >= 0], expected, rtol=1e-4, atol=1e-4)
    assert teacher.dim == 128 and "ours" in teacher.describe()
    teacher.train()
    assert not any(m.training for m in teacher.modules()) and not any(p.requires_grad for p in teacher.parameters())


def test_teachers_that_cannot_be_are_named(tmp_path, small_bevt):
    with pytest.raises(UserError, match="has a name, of a network of timm's, or weights"):
        load_teacher()
    with pytest.raises(UserError, match="no network 'resnet10x' in timm"):
        load_teacher("resnet10x")
    with pytest.raises(UserError, match="none: no such file or folder"):
        load_teacher(weights=str(tmp_path / "none"))
    small_bevt(depths=(1, 1), num_heads=(1, 2)).save_pretrained(tmp_path / "short")
    network = FrozenModel(read_weights(tmp_path / "short"))
    with pytest.raises(UserError, match=r"patches of \(2, 4, 4\) and 2 stages: a teacher needs"):
        SwinTeacher(network, "short")


# Loss


@pytest.fixture
def student(small_bevt) -> BEVT:
    torch.manual_seed(0)
    return small_bevt(target_dim=256)


def test_feature_loss_is_smooth_l1_at_masked_positions(batch, resnet, student):
    """By its definition, from the features of all positions: half the square below 1, the distance less half above."""
    filled = with_features(resnet, batch)
    nn.init.normal_(student.feature_head.weight, std=0.5, generator=torch.Generator().manual_seed(1))
    loss, metrics = student.eval()(filled)
    expected = 0.0
    for name, forward in (("video", student.forward_video), ("image", student.forward_image)):
        stream = getattr(filled, name)
        real = stream.rows >= 0
        predicted = student.feature_head(forward(stream.pixels, stream.mask)).flatten(0, 1)[stream.rows[real]]
        apart = (predicted - stream.targets[real]).abs()
        each = torch.where(apart < 1, apart.square() / 2, apart - 0.5).mean(1)
        assert (apart < 1).any() and (apart > 1).any()
        torch.testing.assert_close(metrics[f"loss_{name}"], each.sum(), rtol=1e-5, atol=0)
        assert metrics[f"rows_{name}"] == real.sum()
        expected = expected + each.sum() / stream.count
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)


def test_targets_of_padding_rows_count_nothing(batch, resnet, student):
    filled, results = with_features(resnet, batch), []
    for noise in (0.0, 7.0):
        pads = (filled.video.rows < 0)[:, None]
        video = replace(filled.video, targets=filled.video.targets + noise * pads)
        student.zero_grad()
        loss = student(Batch(video, None)).loss
        loss.backward()
        results.append((loss.detach(), student.feature_head.weight.grad.clone()))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    student.zero_grad()
    student(filled).loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in student.parameters())


def test_micro_batches_of_features_add_up_to_the_step(batch, resnet, student):
    """Samples of their own, as `bevt replay` cuts them, give the loss of all."""
    filled = with_features(resnet, batch)
    whole = student.eval()(filled).loss
    parts = [Batch(filled.video.only([i]), None) for i in range(2)] + [Batch(None, filled.image.only([0, 1, 2]))]
    torch.testing.assert_close(sum(student(part).loss for part in parts), whole, rtol=1e-5, atol=0)


def test_targets_of_the_other_kind_are_refused(batch, resnet, student, small_bevt):
    with pytest.raises(UserError, match=r"targets are int64 \(.*this BEVT predicts features"):
        student(tokenize(RandomProjectionTokenizer(16), batch))
    with pytest.raises(UserError, match=r"targets are float32 \(.*this BEVT predicts ids"):
        small_bevt()(with_features(resnet, batch))


# Weights


def test_head_of_features_is_saved_and_starts_fresh_from_one_of_ids(student, ours, small_bevt, tmp_path):
    student.save_pretrained(tmp_path / "student")
    again = BEVT.from_pretrained(tmp_path / "student")
    assert again.arch == student.arch and again.arch["target_dim"] == 256 and "vocab_size" not in again.arch
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), student.parameters(), strict=True))
    for model, path, kinds in ((small_bevt(), "student", "features, .*ids"), (student, "ours", "ids, .*features")):
        with pytest.raises(UserError, match=f"was trained to predict .*{kinds}.*init_head=false"):
            load_init(model, tmp_path / path)
        report = load_init(model, tmp_path / path, head=False)
        assert {name.split(".")[0] for name in report.fresh} == {"lm_head" if path == "student" else "feature_head"}
    with pytest.raises(UserError, match=r"target_dim=256.*init_head=false"):
        load_init(small_bevt(target_dim=128), tmp_path / "student")


# What is measured


class StillEngine:
    """An engine as far as an evaluation sees it."""

    def __init__(self, model: BEVT):
        self.module, self.forward = model, model
        self.ranks, self.evaluating = SimpleNamespace(device=torch.device("cpu")), nullcontext


def test_held_out_loss_stands_next_to_that_of_the_mean_feature(batch, resnet, student):
    """Two micro-batches: one mean over both. A head that says that mean gains nothing."""
    whole = with_features(resnet, batch)
    filled = [whole, Batch(whole.video.only([0]), whole.image.only([1, 2]))]
    found = evaluate(StillEngine(student.eval()), lambda part: part, filled)
    for name in ("video", "image"):
        targets = torch.cat([getattr(part, name).targets[getattr(part, name).rows >= 0] for part in filled])
        guess = F.smooth_l1_loss(targets.mean(0).expand_as(targets), targets)
        assert found[name].mean_loss == pytest.approx(guess.item(), rel=1e-5)
        assert found[name].cells == len(targets)
        assert found[name].gain == pytest.approx(1 - found[name].loss / found[name].mean_loss)
        mean = targets.mean(0)
    with torch.no_grad():
        student.feature_head.weight.zero_()
        student.feature_head.bias.copy_(mean)
    again = evaluate(StillEngine(student), lambda part: part, filled)
    assert again["image"].gain == pytest.approx(0, abs=1e-5)
    assert constant_loss(mean, filled[0].image) + constant_loss(mean, filled[1].image) == pytest.approx(
        again["image"].mean_loss * again["image"].cells, rel=1e-5
    )


def test_rows_nearer_than_the_mean_are_right(batch, resnet):
    stream = with_features(resnet, batch).image
    mean = stream.targets[stream.rows >= 0].mean(0)
    half = torch.arange(len(stream.rows)) % 2 == 0
    predicted = torch.where(half[:, None], stream.targets, 2 * mean - stream.targets + 5)
    right = nearer(stream, predicted)
    assert torch.equal(right[stream.rows >= 0], half[stream.rows >= 0])
    marks = torch.from_numpy(marked(stream, right)).flatten()
    assert (marks >= 0).sum() == (stream.rows >= 0).sum() and (marks == 1).sum() == right[stream.rows >= 0].sum()
