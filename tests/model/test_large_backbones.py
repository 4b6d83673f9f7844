"""Swin-H and Swin-G: sizes, post-norm blocks, and steps at full depth and reduced width."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from benchmarks.step_batch import resident_batch
from bevt_ds.batch import Batch
from bevt_ds.errors import UserError
from bevt_ds.model.arch import SwinArch
from bevt_ds.model.bevt import BEVT
from bevt_ds.model.layers import Block
from bevt_ds.model.presets import SIZES, create_model
from bevt_ds.model.windows import block_windows

ENCODERS = {"swin_h": 657_324_646, "swin_g": 3_004_547_104}  # Swin V2 states 658 million and 3.0 billion
IDS = 16


def narrow(name: str) -> SwinArch:
    """The preset at full depth, with one channel a head instead of 32, for small maps."""
    return replace(SIZES[name], embed_dim=SIZES[name].num_heads[0], window=(2, 2, 2))


def small_step_batch() -> Batch:
    """One clip of 4 frames and two images, 64 x 64, with ids for targets."""
    batch = resident_batch(1, 2, frames=4, size=64)
    fill = lambda s: replace(s, targets=torch.arange(len(s.rows)) % IDS)  # noqa: E731
    return Batch(fill(batch.video), fill(batch.image))


@pytest.mark.parametrize("name", ENCODERS)
def test_large_swin_parameter_counts_and_sizes(name):
    with torch.device("meta"):
        encoder = create_model(f"video_{name}")
    assert sum(p.numel() for p in encoder.parameters()) == ENCODERS[name]
    assert encoder.arch["norm"] == "post"
    assert all(32 * heads == encoder.arch["embed_dim"] << i for i, heads in enumerate(encoder.arch["num_heads"]))


@pytest.mark.parametrize("name", ENCODERS)
def test_large_swin_two_steps_at_full_depth(name):
    """Every block's branches open from zero, and the loss falls."""
    torch.manual_seed(0)
    model = BEVT(**narrow(name).arguments(), vocab_size=IDS, checkpointing=True).train()
    optimizer, batch, losses = torch.optim.AdamW(model.parameters(), lr=1e-3), small_step_batch(), []
    for _ in range(2):
        loss = model(batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[1] < losses[0]
    assert all(b.norm1.weight.any() and b.norm2.weight.any() for b in model.modules() if isinstance(b, Block))


def test_new_post_norm_block_is_the_identity():
    model = create_model("video_tiny", norm="post")
    x = torch.randn(1, 4, 8, 8, 32)
    block = model.layers[0].blocks[0]
    out, pending = block(x, block_windows((4, 8, 8), (4, 4, 4), shifted=False))
    assert torch.equal(out, x) and pending is None


def test_post_norm_branch_is_normalised_before_the_addition():
    block = Block(32, 2, (2, 2, 2), 4.0, "torch", norm="post").double()
    x, windows = 100 * torch.randn(1, 2, 4, 4, 32).double(), block_windows((2, 4, 4), (2, 2, 2), shifted=True)
    with torch.no_grad():
        x1 = x + F.layer_norm(block.attn(x, windows), (32,))
        wanted = x1 + F.layer_norm(block.mlp(x1), (32,))
        out, _ = block(x, windows)
        assert torch.equal(out, wanted)
        assert (out - x).abs().max() < 2 * 32**0.5  # two branches, each with a norm of sqrt(channels)


def test_published_sizes_are_pre_norm_and_do_not_name_it():
    assert all("norm" not in SIZES[name].arguments() for name in SIZES if name not in ENCODERS)


@pytest.mark.parametrize(("saved", "loaded"), [("pre", "post"), ("post", "pre")])
def test_weights_of_another_norm_are_refused(tmp_path, saved, loaded):
    """Their parameters have the same names and shapes."""
    create_model("tiny", vocab_size=IDS, norm=saved).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=f"norm={saved}, this model norm={loaded}"):
        BEVT.from_pretrained(tmp_path, norm=loaded)
    assert "norm" not in create_model("tiny").arch


def test_unknown_norm_is_refused():
    with pytest.raises(UserError, match="norm='rms': choose one of pre, post"):
        create_model("tiny", norm="rms")
