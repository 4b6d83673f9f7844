"""The parts of the original whose golden data travels with the code; see tests/data/golden/README.md."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from safetensors.torch import load_file

from bevt_ds import VideoSwin, load_tokenizer
from bevt_ds.model.containers import strip, unwrap
from bevt_ds.model.convert import inflate, rename, resize_table
from bevt_ds.model.layers import LMHead, MaskToken, PatchEmbed

FEATURES = 1e-5  # of the maximum
RTOL = 1e-4
MARGIN = 1e-3
CROP = 3  # tokens at the start of a crop whose displaced windows reach beyond it
BIG = 1 << 20


@pytest.fixture(scope="module")
def stage1(committed):
    return load_file(committed / "stage1.safetensors")


def part_of(module, state, prefix):
    """Load the entries under `prefix` into `module`."""
    module.load_state_dict({k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)})
    return module


def first_stage(stage1, window=(8, 7, 7)):
    """An encoder of one stage with the golden weights; its last norm stays as it is and is not used."""
    encoder = VideoSwin(embed_dim=32, depths=(2,), num_heads=(1,), window=window)
    weights = rename({strip(k): v for k, v in stage1.items() if k.startswith("backbone.")})
    state = {k.removeprefix("encoder."): v for k, v in weights.items() if k.startswith("encoder.")}
    for key in state:
        if key.endswith("bias_table"):
            state[key] = resize_table(state[key], (8, 7, 7), window)
    missing, unexpected = encoder.load_state_dict(state, strict=False)
    assert set(missing) == {"norm.weight", "norm.bias"} and not unexpected
    return encoder, weights


def check(x, stage1, name, part, relative_error):
    """Channel mean (and rms, where stored) of x (B,T,H,W,C) within the crop against the original's."""
    statistics = {f"{part}_mean": x.mean(-1), f"{part}_rms": x.square().mean(-1).sqrt()}
    found = {k: v for k, v in statistics.items() if f"out.{name}{k}" in stage1}
    assert found
    for key, value in found.items():
        reference = stage1[f"out.{name}{key}"]
        inner = value[..., CROP:, CROP:].reshape(reference.shape)
        assert relative_error(inner, reference) < FEATURES, key


@pytest.mark.parametrize("name", ["video", "image"])
def test_golden_stem_and_first_stage(name, stage1, normalised, relative_error):
    encoder, weights = first_stage(stage1)
    mask_token = part_of(MaskToken(32, "auto"), weights, "mask_token.")
    stem, policy = encoder.patch_embed, "swin"
    pixels = normalised(stage1[f"in.{name}_u8"], stage1["in.mean"], stage1["in.std"])
    mask = stage1[f"in.{name}_token_mask"].bool()
    if name == "image":
        stem, policy = part_of(PatchEmbed((1, 4, 4), 32), weights, "image_embed."), "official"
        pixels, mask = pixels.unsqueeze(2), mask.unsqueeze(1)
    with torch.no_grad():
        tokens = stem(pixels)
        check(tokens, stage1, f"{name}_", "stem", relative_error)
        (x,) = encoder.encode(mask_token(tokens, mask), policy)
    check(x, stage1, f"{name}_", "stage1", relative_error)


@pytest.mark.parametrize("name", ["t32", "t32_window16", "pad_b"])
def test_golden_first_stage_of_longer_and_padded_clips(name, stage1, normalised, relative_error):
    half = stage1["in.t32_half_u8"]
    pixels = stage1["in.pad_b_u8"] if name == "pad_b" else torch.cat([half, 255 - half.flip(2)], dim=2)
    encoder, _ = first_stage(stage1, (16, 7, 7) if name == "t32_window16" else (8, 7, 7))
    with torch.no_grad():
        (x,) = encoder.encode(encoder.patch_embed(normalised(pixels, stage1["in.mean"], stage1["in.std"])))
    check(x, stage1, f"{name}.", "stage1", relative_error)


def test_golden_head(committed):
    io = load_file(committed / "head.safetensors")
    head = part_of(LMHead(256, 512, "auto"), io, "cls_head.lm_head.")
    features, targets = io["in.features"], io["in.target_ids"].long()
    halves = (len(targets) // 2, len(targets) - len(targets) // 2)
    losses, hits = head(features, targets, halves)
    torch.testing.assert_close(losses.sum() / len(targets), io["out.loss_image"], rtol=RTOL, atol=0)
    torch.testing.assert_close(losses, torch.stack([x.sum() for x in io["out.image_ce_masked"].split(halves)]))
    torch.testing.assert_close(hits.sum() / len(targets), io["out.acc_image"])
    (losses.sum() / len(targets)).backward()
    for name, parameter in head.named_parameters():
        reference = io[f"grad_norm_image_only.cls_head.lm_head.{name}"]
        torch.testing.assert_close(parameter.grad.norm(), reference, rtol=RTOL, atol=0)


@pytest.mark.parametrize("variant", ["v1", "v2"])
def test_golden_inflation(variant, committed):
    stored = load_file(committed / "tables.safetensors")
    part = lambda side: {k.split("/", 1)[1]: v for k, v in stored.items() if k.startswith(f"{side}.{variant}/")}  # noqa: E731
    ours, _ = inflate(unwrap({"module": part("in")}), window=(8, 7, 7), patch_time=2)
    expected = part("out")
    assert ours.keys() == expected.keys() and len(expected) == 11
    for key, reference in expected.items():
        torch.testing.assert_close(ours[key], reference, rtol=0, atol=1e-6, msg=lambda m, k=key: f"{k}: {m}")


def test_golden_table_resizing(committed):
    stored = load_file(committed / "tables.safetensors")
    name = "8x7x7_to_16x7x7/heads2"
    ours = resize_table(stored[f"in.{name}"], (8, 7, 7), (16, 7, 7))
    torch.testing.assert_close(ours, stored[f"out.{name}"], rtol=0, atol=2e-6)  # torch 2.15 rounds its own way


def test_golden_tokenizer(committed):
    tokenizer = load_tokenizer("dalle", weights=committed / "encoder_small.pkl")
    io = load_file(committed / "dvae.safetensors")
    frames = io["in.image_u8"].float() / 255
    decided = io["out.margin"] > MARGIN
    assert decided.float().mean() > 0.95
    assert torch.equal(tokenizer.encode(frames)[decided], io["out.ids"].long()[decided])
    image, row, column = io["out.logits_pos"].long().unbind(1)
    logits = tokenizer.logits(frames)
    torch.testing.assert_close(logits[image, :, row, column], io["out.logits_at"], rtol=0, atol=2e-5)


def test_golden_files_are_small(committed):
    sizes = [path.stat().st_size for path in committed.iterdir()]
    assert max(sizes) < BIG and sum(sizes) < 2.6 * BIG


def test_committed_golden_subset_equals_the_full_set(committed, golden):
    spec = importlib.util.spec_from_file_location("cut", committed / "cut.py")
    cut = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(cut)
    for part in (cut.stage1, cut.head, cut.tables, cut.dvae):
        fresh, kept = part(golden), load_file(committed / f"{part.__name__}.safetensors")
        assert fresh.keys() == kept.keys()
        assert all(torch.equal(value, kept[key]) for key, value in fresh.items())
    assert (golden / "encoder_small.pkl").read_bytes() == (committed / "encoder_small.pkl").read_bytes()
