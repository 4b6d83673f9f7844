"""The trained tokenizer: its grid, its folder, its name; frozen networks of timm, and the distance that they see."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from bevt_ds import BEVT, UserError, load_tokenizer
from bevt_ds.model.frozen import FrozenFeatures
from bevt_ds.model.tokenizers import DecodingTokenizer
from bevt_ds.model.tokenizers.perceptual import perceptual_distance
from bevt_ds.model.tokenizers.vq import VQTokenizer

SMALL = {"width": 8, "blocks": 1, "code_dim": 4, "codes": 32}


def frames(number: int = 2, side: int = 32, seed: int = 0) -> torch.Tensor:
    return torch.rand(number, 3, side, side, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("options", [{}, {"levels": (4, 3, 2)}], ids=["ema", "fsq"])
def test_trained_tokenizer_keeps_the_contract(options, tmp_path):
    """One id for 8x8 pixels, the same from its folder, and back to frames; found by name."""
    torch.manual_seed(0)
    model = VQTokenizer(**SMALL, **options).eval()
    ids = model.encode(frames())
    assert ids.shape == (2, 4, 4) and ids.dtype == torch.int64 and ids.min() >= 0 and ids.max() < model.vocab_size
    assert model.vocab_size == (24 if options else 32)
    assert torch.equal(model(frames()).ids, ids)
    model.save_pretrained(tmp_path / "weights")
    read = load_tokenizer("vq", weights=str(tmp_path))
    assert isinstance(read, DecodingTokenizer) and not any(p.requires_grad for p in read.parameters())
    assert torch.equal(read.encode(frames()), ids)
    shown = read.decode(ids)
    assert shown.shape == (2, 3, 32, 32) and shown.min() >= 0 and shown.max() <= 1
    torch.testing.assert_close(shown, model(frames()).frames.clamp(0, 1))
    with pytest.raises(UserError, match="ids reach"):
        read.decode(ids + 100)


def test_default_is_8192_ids_on_a_grid_of_14():
    with torch.device("meta"):
        model = VQTokenizer().eval()
        assert model.vocab_size == 8192
        assert model.encode(torch.empty(1, 3, 112, 112)).shape == (1, 14, 14)
        assert model.decode(torch.zeros(1, 14, 14, dtype=torch.int64)).shape == (1, 3, 112, 112)


def test_folders_that_hold_no_tokenizer_are_named(tmp_path, small_bevt):
    with pytest.raises(UserError, match="needs tokenizer.weights"):
        load_tokenizer("vq")
    with pytest.raises(UserError, match="no such file"):
        load_tokenizer("vq", weights=str(tmp_path / "none"))
    small_bevt().save_pretrained(tmp_path / "bevt")
    with pytest.raises(UserError, match="is no trained tokenizer: it holds a BEVT"):
        load_tokenizer("vq", weights=str(tmp_path / "bevt"))
    VQTokenizer(**SMALL).save_pretrained(tmp_path / "vq")
    with pytest.raises(UserError):
        BEVT.from_pretrained(tmp_path / "vq")
    config = json.loads((tmp_path / "vq" / "config.json").read_text())
    config["arch"]["codes"] = 33
    (tmp_path / "vq" / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="is a tokenizer of other sizes: 3 tensors differ, quantiser"):
        load_tokenizer("vq", weights=str(tmp_path / "vq"))


# What the loss sees with


def test_perceptual_distance_is_0_of_a_frame_to_itself_and_has_the_gradient_of_the_other():
    network = FrozenFeatures("resnet10t", levels=2)
    one, two = frames().requires_grad_(), frames(seed=1).requires_grad_()
    assert perceptual_distance(network, one, one).item() == pytest.approx(0, abs=1e-6)
    distance = perceptual_distance(network, one, two)
    assert 0 < distance.item() <= 4 * 2
    distance.backward()
    assert one.grad is None and two.grad.abs().sum() > 0
    parts = [perceptual_distance(network, one[i : i + 1], two[i : i + 1]) for i in range(2)]
    torch.testing.assert_close(distance, sum(parts), rtol=1e-4, atol=0)


def test_frozen_network_is_the_same_for_a_seed_and_stays_in_evaluation():
    state = torch.random.get_rng_state()
    one, two = (FrozenFeatures("resnet10t", levels=3, seed=4) for _ in range(2))
    assert torch.equal(state, torch.random.get_rng_state()), "random numbers of others are not touched"
    assert "random weights: none were named" in one.describe()
    one.train()
    assert not any(m.training for m in one.modules()) and not any(p.requires_grad for p in one.parameters())
    shapes = [tuple(f.shape[1:]) for f in one(frames())]
    assert len(shapes) == 3 and shapes[0][1:] == (16, 16)
    assert all(torch.equal(a, b) for a, b in zip(one(frames()), two(frames()), strict=True))


def test_frozen_network_takes_weights_of_its_own_without_the_classifier(tmp_path):
    source = FrozenFeatures("resnet10t", seed=7)
    state = {name: value for name, value in source.network.state_dict().items() if not name.startswith("fc.")}
    save_file(state, tmp_path / "ours.safetensors")
    torch.save({"state_dict": {f"module.{k}": v for k, v in state.items()}}, tmp_path / "wrapped.pth")
    for name in ("ours.safetensors", "wrapped.pth"):
        read = FrozenFeatures("resnet10t", str(tmp_path / name))
        assert all(torch.equal(a, b) for a, b in zip(read(frames()), source(frames()), strict=True))
        assert name in read.describe()
    save_file({k: v for k, v in state.items() if k != "conv1.0.weight"}, tmp_path / "less.safetensors")
    with pytest.raises(UserError, match="does not hold resnet10t of timm's: 1 tensors differ, conv1.0.weight"):
        FrozenFeatures("resnet10t", str(tmp_path / "less.safetensors"))
    with pytest.raises(UserError, match="no such file of weights"):
        FrozenFeatures("resnet10t", str(tmp_path / "none.pth"))
    with pytest.raises(UserError, match="no network 'resnet10x' in timm"):
        FrozenFeatures("resnet10x")


def test_frozen_network_of_one_size_gets_frames_of_that_size():
    network = FrozenFeatures("vit_tiny_patch16_224", levels=1)
    (maps,) = network(frames(1, 32))
    assert maps.shape[-2:] == (14, 14)
