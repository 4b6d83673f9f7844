"""The classifier: structure, initial weights, loading from pretraining, dropout by sample."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F

from bevt_ds import BEVT, UserError, VideoClassifier, VideoSwin
from bevt_ds.model.weights import load_init

SIZES = {"embed_dim": 32, "depths": (1, 2, 2, 1), "num_heads": (1, 2, 4, 8), "window": (2, 2, 2)}
CLIP = torch.randn(2, 3, 4, 64, 64, generator=torch.Generator().manual_seed(0))


def classifier(num_classes: int = 5, **options) -> VideoClassifier:
    return VideoClassifier(num_classes, **{**SIZES, **options})


def test_classifier_is_encoder_mean_head():
    model = classifier(drop_path=0.5, dropout=0.5).eval()
    pooled = model.encoder(CLIP).mean((2, 3, 4))
    torch.testing.assert_close(model(CLIP), F.linear(pooled, model.head.weight, model.head.bias))


def test_classifier_head_starts_small():
    model = VideoClassifier(400, **SIZES)
    assert model.head.weight.std().item() == pytest.approx(0.01, rel=0.02)  # 102,400 numbers: 0.2 % standard error
    assert not model.head.bias.any()


def test_dropout_depends_on_the_sample_only():
    """The same samples in another order, or one by one, drop the same features; rates are as asked."""
    model = classifier(num_classes=3, drop_path=0.3, dropout=0.5)
    keys = torch.tensor([3, 1 << 40])
    both = model(CLIP, keys)
    torch.testing.assert_close(model(CLIP.flip(0), keys.flip(0)), both.flip(0))
    torch.testing.assert_close(model(CLIP[1:], keys[1:]), both[1:])
    assert not torch.allclose(model(CLIP, keys + 1), both)
    kept = model._drop(torch.ones(64, 1000), torch.arange(64))
    assert set(kept.unique().tolist()) == {0.0, 2.0}
    assert (kept > 0).float().mean().item() == pytest.approx(0.5, abs=6 * 0.5 / 64000**0.5)


def test_saved_classifier_loads_again(tmp_path):
    model = classifier(3, classes=("a", "b", "c"), dropout=0.5).eval()
    model.save_pretrained(tmp_path / "weights", streams=("video",))
    again = VideoClassifier.from_pretrained(tmp_path / "weights").eval()
    assert again.arch == json.loads(json.dumps(model.arch), object_hook=_tuples)
    torch.testing.assert_close(again(CLIP), model(CLIP), rtol=0, atol=0)
    encoder = VideoSwin.from_pretrained(tmp_path / "weights").eval()
    torch.testing.assert_close(encoder(CLIP), model.encoder(CLIP), rtol=0, atol=0)


def _tuples(values):
    return {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}


@pytest.mark.parametrize(
    ("saved", "model", "kept"),
    [
        ({}, {}, True),
        ({}, {"classes": ("a", "b", "c", "d", "e")}, True),
        ({"classes": ("a", "b", "c", "d", "e")}, {"classes": ("a", "b", "c", "d", "e")}, True),
        ({"classes": ("a", "b", "c", "d", "e")}, {"classes": ("e", "d", "c", "b", "a")}, False),
        ({"num_classes": 4}, {}, False),
    ],
)
def test_classifier_head_is_kept_for_the_same_classes_only(tmp_path, saved, model, kept):
    old = classifier(**saved)
    old.save_pretrained(tmp_path)
    new = classifier(**model)
    report = load_init(new, tmp_path)
    assert new.encoder.norm.weight.equal(old.encoder.norm.weight)
    assert (report.fresh == ()) is kept
    assert ("classifier of" in str(report)) is not kept
    assert kept is (new.head.weight.shape == old.head.weight.shape and new.head.weight.equal(old.head.weight))


def test_classifier_from_joint_pretraining(tmp_path):
    """Only the encoder is taken; tables are fitted to another window."""
    source = BEVT(**SIZES, vocab_size=16)
    source.save_pretrained(tmp_path / "joint")
    model = classifier(window=(4, 2, 2))
    report = load_init(model, tmp_path / "joint")
    assert set(report.fresh) == {"head.weight", "head.bias"}
    assert len(report.resized) == sum(SIZES["depths"])
    assert model.encoder.layers[0].blocks[0].mlp.fc1.weight.equal(source.encoder.layers[0].blocks[0].mlp.fc1.weight)
    assert "decoder" in str(report)


def test_classifier_from_image_pretraining(tmp_path):
    """The clips' stem and the tables come from what the images trained: a still clip gives what the image gave."""
    source = BEVT(**SIZES, vocab_size=16, image_windows="swin")
    source.save_pretrained(tmp_path / "stage1", streams=("image",))
    model = classifier().eval()
    load_init(model, tmp_path / "stage1")
    image = CLIP[:1, :, :1]
    tokens = model.encoder.patch_embed(image.expand(-1, -1, 2, -1, -1))
    torch.testing.assert_close(tokens, source.image_embed(image), rtol=1e-5, atol=1e-5)


def test_pretraining_weights_are_not_a_classifier(tmp_path):
    BEVT(**SIZES, vocab_size=16).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="pass num_classes"):
        VideoClassifier.from_pretrained(tmp_path)
    assert VideoClassifier.from_pretrained(tmp_path, num_classes=7).head.out_features == 7


def test_weights_of_another_architecture_are_refused(tmp_path):
    classifier(embed_dim=64).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"embed_dim=64, this model embed_dim=32"):
        load_init(classifier(), tmp_path)
