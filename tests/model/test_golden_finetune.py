"""The bare encoder against the original fine-tuning backbone: temporal shift, a larger window, all kinds of padding."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from bevt_ds import VideoClassifier, VideoSwin
from bevt_ds.model.containers import strip, unwrap
from bevt_ds.model.convert import inflate, our_name, rename, resize_table
from bevt_ds.model.weights import read_weights

FEATURES = 1e-5  # of the maximum, as for the joint model
GRADIENTS = 1e-4
RTOL = 1e-4


@pytest.fixture(scope="module")
def encoder(golden):
    return VideoSwin.from_pretrained(golden / "bevt_joint_small.safetensors")


@pytest.fixture(scope="module")
def clips(finetune, normalised):
    half = finetune["in.t32_half_u8"]
    pixels = {
        "t32": torch.cat([half, 255 - half.flip(2)], dim=2),
        "pad_a": finetune["in.pad_a_u8"],
        "pad_b": finetune["in.pad_b_u8"],
    }
    return {name: normalised(x, finetune["in.mean"], finetune["in.std"]) for name, x in pixels.items()}


def classify(finetune, features):
    pooled = features.mean((2, 3, 4))
    return F.linear(pooled, finetune["cls_head.fc_cls.weight"], finetune["cls_head.fc_cls.bias"])


@pytest.mark.parametrize("name", ["t32", "pad_a", "pad_b"])
def test_golden_finetune_features(name, encoder, clips, finetune, relative_error):
    """Stage 4 of pad_a is left out: the original clips its bias index there, which is wrong where W is clipped."""
    with torch.no_grad():
        features, stages = encoder.forward_intermediates(clips[name])
    for i, x in enumerate(stages[:3] if name == "pad_a" else stages, 1):
        assert relative_error(x.mean(1), finetune[f"out.{name}.stage{i}_mean"]) < FEATURES, f"stage {i}"
    assert features.shape == finetune[f"out.{name}.features"].shape
    if name != "pad_a":
        assert relative_error(features, finetune[f"out.{name}.features"]) < FEATURES
        assert relative_error(classify(finetune, features), finetune[f"out.{name}.logits"]) < RTOL


def test_golden_finetune_clip_and_mirror(encoder, clips, finetune):
    with torch.no_grad():
        views = [encoder.forward_features(x) for x in (clips["t32"], clips["t32"].flip(-1))]
        average = torch.stack([classify(finetune, x).softmax(-1) for x in views]).mean(0)
    torch.testing.assert_close(average, finetune["out.t32.prob_avg_clip_and_hflip"], rtol=RTOL, atol=1e-6)


def test_golden_finetune_loss_and_gradients(encoder, clips, finetune, relative_error):
    encoder.zero_grad()
    logits = classify(finetune, encoder.forward_features(clips["t32"]))
    loss = F.cross_entropy(logits, finetune["in.t32_label"].long())
    loss.backward()
    torch.testing.assert_close(loss, finetune["out.t32.loss"], rtol=RTOL, atol=0)

    def stored(kind):
        prefix = f"out.t32.{kind}.backbone."
        return {strip(k.removeprefix(prefix)): v for k, v in finetune.items() if k.startswith(prefix)}

    gradients = {f"encoder.{name}": p.grad for name, p in encoder.named_parameters()}
    norms = {our_name(key): value for key, value in stored("grad_norm").items()}
    assert norms.keys() == gradients.keys()
    for name, reference in norms.items():
        torch.testing.assert_close(gradients[name].double().norm().float(), reference, rtol=RTOL, atol=1e-7)
    for name, reference in rename(stored("grad")).items():
        assert relative_error(gradients[name], reference) < GRADIENTS, name


def test_golden_finetune_larger_window(golden, clips, finetune, relative_error):
    """Window (16,7,7) from weights of (8,7,7): tables resized while loading."""
    encoder = VideoSwin.from_pretrained(golden / "bevt_joint_small.safetensors", window=(16, 7, 7))
    for block in ("layers.0.blocks.1", "layers.2.blocks.0"):
        table = encoder.get_submodule(block).attn.relative_position_bias_table
        reference = finetune[f"out.t32_window16.rpb_after_load.{block}"]
        torch.testing.assert_close(table.detach(), reference, rtol=0, atol=2e-6)  # torch 2.15 rounds its own way
    with torch.no_grad():
        features, stages = encoder.forward_intermediates(clips["t32"])
    for i, x in enumerate(stages, 1):
        assert relative_error(x.mean(1), finetune[f"out.t32_window16.stage{i}_mean"]) < FEATURES
    assert relative_error(classify(finetune, features), finetune["out.t32_window16.logits"]) < RTOL


@pytest.mark.parametrize("variant", ["v1", "v2", "v3"])
def test_golden_finetune_inflation(variant, golden):
    """Prefixes, containers, fc_norm, stems and tables: every tensor that the original loads, bit for bit or to 1e-6."""
    stored = load_file(golden / "inflate_small.safetensors")
    part = lambda side: {k.split("/", 1)[1]: v for k, v in stored.items() if k.startswith(f"{side}.{variant}/")}  # noqa: E731
    ours, _ = inflate(unwrap({"model": part("in")}), window=(8, 7, 7), patch_time=2)
    for key, reference in part("out").items():
        torch.testing.assert_close(ours[key], reference, rtol=0, atol=1e-6, msg=lambda m, k=key: f"{k}: {m}")


@pytest.mark.parametrize("heads", [2, 4])
def test_golden_finetune_table_resizing(heads, golden):
    stored = load_file(golden / "rpb_resize.safetensors")
    name = f"8x7x7_to_16x7x7/heads{heads}"
    ours = resize_table(stored[f"in.{name}"], (8, 7, 7), (16, 7, 7))
    torch.testing.assert_close(ours, stored[f"out.{name}"], rtol=0, atol=2e-6)  # torch 2.15 rounds its own way


@pytest.fixture(scope="module")
def classifier_file(golden, finetune, tmp_path_factory):
    """The original's classifier as one official file: its encoder and its head."""
    backbone = load_file(golden / "bevt_joint_small.safetensors")
    tensors = {k: v for k, v in backbone.items() if "lm_head" not in k}
    tensors |= {k: v for k, v in finetune.items() if k.startswith("cls_head.")}
    path = tmp_path_factory.mktemp("official") / "finetuned.safetensors"
    save_file(tensors, path)
    return path


def test_golden_finetune_classifier(classifier_file, clips, finetune, relative_error):
    """An official fine-tuned file, head included: logits, loss and the head's gradients."""
    assert read_weights(classifier_file).arch["num_classes"] == 10
    model = VideoClassifier.from_pretrained(classifier_file).eval()
    logits = model(clips["t32"])
    assert relative_error(logits, finetune["out.t32.logits"]) < RTOL
    loss = F.cross_entropy(logits, finetune["in.t32_label"].long())
    torch.testing.assert_close(loss, finetune["out.t32.loss"], rtol=RTOL, atol=0)
    loss.backward()
    for name in ("weight", "bias"):
        stored = finetune[f"out.t32.grad_norm.cls_head.fc_cls.{name}"]
        torch.testing.assert_close(getattr(model.head, name).grad.norm(), stored.float(), rtol=RTOL, atol=1e-7)
    assert relative_error(model.head.weight.grad, finetune["out.t32.grad.cls_head.fc_cls.weight"]) < GRADIENTS
