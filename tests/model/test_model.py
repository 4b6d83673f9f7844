"""The networks: shapes, parameter counts, gradients, drop-path, masked loss, initialisation."""

from __future__ import annotations

from dataclasses import replace

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

from bevt_ds import BEVT, Batch, UserError, VideoSwin, create_model
from bevt_ds.model.bevt import Decoder
from bevt_ds.model.drop_path import residual_scales, splitmix64, uniform
from bevt_ds.model.layers import PatchEmbed, PatchMerging, Upsample, draw_parameters
from bevt_ds.model.windows import Windows, block_windows, table_rows

SIZES = {  # name: (encoder, encoder with both decoders, images' stem and mask token), measured on the original classes
    "swin_t": (27_850_470, 35_527_014),
    "swin_s": (49_509_078, 57_185_622),
    "swin_b": (87_638_984, 101_282_248),
    "swin_l": (196_339_116, 227_027_628),
}

TABLE = (8, 7, 7)


def parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize("name", SIZES)
def test_swin_parameter_counts(name):
    with torch.device("meta"):
        model, encoder = create_model(name), create_model(f"video_{name}")
    assert (parameters(encoder), parameters(model) - parameters(model.lm_head)) == SIZES[name]


def test_parameter_counts_of_swin_b_by_part():
    with torch.device("meta"):
        model, larger = create_model("swin_b"), create_model("video_swin_b", window=(16, 7, 7))
    assert parameters(larger) == 88_655_688
    assert parameters(model) == 109_679_048
    assert parameters(model.lm_head) == 8_396_800
    assert parameters(model.image_embed) == 6_528
    assert parameters(model.image_decoder) == 1_573_888 + 4_195_328
    assert parameters(model.video_decoder) == 1_573_888 + 4_195_328 + 2_098_176
    assert len(list(model.parameters())) == 342 + 2


def test_create_model_by_name():
    assert isinstance(create_model("tiny"), BEVT)
    assert create_model("tiny", drop_path=0.5, kernels="torch").encoder.drop_path == 0.5
    assert isinstance(timm.create_model("video_tiny"), VideoSwin)
    assert isinstance(timm.create_model("bevt_tiny", vocab_size=8), BEVT)
    with pytest.raises(UserError, match="did you mean swin_b"):
        create_model("swinb")
    with pytest.raises(UserError, match="checkpoint_path"):
        timm.create_model("bevt_tiny", pretrained=True)
    with pytest.raises(UserError, match="official, swin"):
        create_model("tiny", image_windows="swim")


@pytest.mark.parametrize(
    ("grid", "shifted", "policy", "expected"),
    [
        ((8, 56, 56), False, "swin", Windows((8, 56, 56), (8, 7, 7), TABLE, (0, 0, 0), (0, 0, 0))),
        ((8, 56, 56), True, "swin", Windows((8, 56, 56), (8, 7, 7), TABLE, (0, 3, 3), (0, 3, 3))),
        ((16, 7, 7), True, "swin", Windows((16, 7, 7), (8, 7, 7), TABLE, (4, 0, 0), (4, 0, 0))),
        ((10, 59, 55), True, "swin", Windows((16, 63, 56), (8, 7, 7), TABLE, (4, 3, 3), (4, 3, 3))),
        ((8, 7, 6), True, "swin", Windows((8, 7, 6), (8, 7, 6), TABLE, (0, 0, 0), (0, 0, 0))),
        ((1, 56, 56), True, "swin", Windows((1, 56, 56), (1, 7, 7), TABLE, (0, 3, 3), (0, 3, 3))),
        ((1, 56, 56), False, "official", Windows((1, 56, 56), (1, 7, 7), TABLE, (0, 0, 0), (0, 3, 3))),
        ((1, 7, 7), True, "official", Windows((1, 7, 7), (1, 7, 7), TABLE, (0, 3, 3), (0, 3, 3))),
        ((1, 4, 4), True, "official", Windows((1, 4, 4), (1, 4, 4), TABLE, (0, 0, 0), (0, 0, 0))),
    ],
)
def test_window_geometry(grid, shifted, policy, expected):
    assert block_windows(grid, TABLE, shifted=shifted, policy=policy) == expected


@pytest.mark.parametrize(
    ("grid", "by_number"), [((8, 7, 7), False), ((4, 7, 7), False), ((8, 6, 7), True), ((8, 14, 4), True)]
)
def test_small_windows_matter_where_height_or_width_is_clipped(grid, by_number):
    """A window clipped in time alone numbers its tokens as the whole one does."""
    assert block_windows(grid, TABLE, shifted=False, small="official").bias_by_number == by_number
    assert not block_windows(grid, TABLE, shifted=False).bias_by_number


def test_relative_position_table_rows():
    assert (table_rows((8, 7, 7)), table_rows((16, 7, 7)), table_rows((1, 7, 7))) == (2535, 5239, 169)


@pytest.mark.parametrize("patch", [(2, 4, 4), (1, 4, 4)])
def test_patch_embedding_equals_conv3d(patch):
    embed = PatchEmbed(patch, 8)
    conv = nn.Conv3d(3, 8, patch, patch)
    with torch.no_grad():
        conv.weight.copy_(embed.proj.weight.view_as(conv.weight))
        conv.bias.copy_(embed.proj.bias)
        clip = torch.randn(2, 3, 3, 9, 10)
        padded = F.pad(clip, (0, 2, 0, 3, 0, -3 % patch[0]))
        expected = embed.norm(conv(padded).movedim(1, -1))
        torch.testing.assert_close(embed(clip), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("scale", [(1, 2, 2), (2, 1, 1)])
def test_upsampling_equals_a_transposed_convolution(scale):
    up, conv = Upsample(6, scale), nn.ConvTranspose3d(6, 6, scale, scale)
    up.load_state_dict(conv.state_dict())
    x = torch.randn(2, 3, 4, 5, 6)
    torch.testing.assert_close(up(x), conv(x.movedim(-1, 1)).movedim(1, -1), rtol=0, atol=1e-6)


def test_patch_merging_order():
    merge = PatchMerging(4)
    x = torch.randn(1, 2, 5, 6, 4)
    padded = F.pad(x, (0, 0, 0, 0, 0, 1))
    corners = [padded[:, :, i::2, j::2] for i, j in ((0, 0), (1, 0), (0, 1), (1, 1))]  # (row, column)
    torch.testing.assert_close(merge(x), merge.reduction(merge.norm(torch.cat(corners, -1))))


@pytest.mark.parametrize("frames", [1, 2])
def test_decoder_equals_its_definition(frames):
    """Transposed convolution, [fine, coarse] to one Linear, then the taps of time: BEVT's decoders, spelled out."""
    decoder = Decoder(8, frames, "torch")
    for module in decoder.modules():
        draw_parameters(module)
    fine, coarse = torch.randn(2, 3, 4, 4, 4), torch.randn(2, 3, 2, 2, 8)
    up, unfold = decoder.upsample, decoder.unfold
    x = F.conv_transpose3d(coarse.movedim(-1, 1), up.weight, up.bias, stride=(1, 2, 2)).movedim(1, -1)
    x = decoder.reduce(torch.cat([fine, x], -1))
    if frames > 1:
        x = F.conv_transpose3d(x.movedim(-1, 1), unfold.weight, unfold.bias, stride=(frames, 1, 1)).movedim(1, -1)
    cells = decoder(fine, coarse).view(2, 3, 4, 4, frames, 8)
    torch.testing.assert_close(cells.permute(0, 1, 4, 2, 3, 5).flatten(1, 2), x, rtol=0, atol=1e-6)


def test_shapes_of_the_public_surface(small_bevt):
    model = small_bevt()
    with torch.no_grad():
        video = model.forward_video(torch.randn(2, 3, 4, 64, 96), torch.zeros(2, 2, 4, 6, dtype=torch.bool))
        image = model.forward_image(torch.randn(3, 3, 64, 96), torch.ones(3, 4, 6, dtype=torch.bool))
        features, stages = model.encoder.forward_intermediates(torch.randn(1, 3, 5, 50, 70))
    assert video.shape == (2, 4 * 4 * 6, 256) and image.shape == (3, 4 * 6, 256)
    assert model.lm_head(video).shape == (2, 96, 16)
    assert features.shape == (1, 256, 3, 2, 3)
    assert [tuple(x.shape[1:]) for x in stages] == [(32, 3, 13, 18), (64, 3, 7, 9), (128, 3, 4, 5), (256, 3, 2, 3)]
    with pytest.raises(UserError, match="multiples of 32"):
        model.forward_image(torch.randn(1, 3, 64, 80), torch.zeros(1, 4, 5, dtype=torch.bool))
    with pytest.raises(UserError, match="multiple of 2"):
        model.forward_video(torch.randn(1, 3, 3, 64, 64), torch.zeros(1, 1, 4, 4, dtype=torch.bool))


@pytest.mark.parametrize("policy", ["official", "swin"])
def test_sizes_not_divisible_by_the_window(policy, small_bevt):
    """96 pixels: 24, 12, 6 and 3 tokens against windows of 7, that is padding, then clipping, in both streams."""
    model = small_bevt(window=(8, 7, 7), image_windows=policy)
    with torch.no_grad():
        video = model.forward_video(torch.randn(1, 3, 4, 96, 96), torch.zeros(1, 2, 6, 6, dtype=torch.bool))
        image = model.forward_image(torch.randn(1, 3, 96, 96), torch.zeros(1, 6, 6, dtype=torch.bool))
    assert video.shape == (1, 144, 256) and image.shape == (1, 36, 256)
    assert video.isfinite().all() and image.isfinite().all()


def test_bfloat16_model(small_bevt, small_batch):
    """bf16 weights take fp32 pixels; the loss stays fp32 and close to the fp32 model's."""
    model = small_bevt(drop_path=0.2).train()
    expected = model(small_batch).loss
    out = model.bfloat16()(small_batch)
    out.loss.backward()
    assert out.loss.dtype == torch.float32 and all(p.grad.dtype == torch.bfloat16 for p in model.parameters())
    torch.testing.assert_close(out.loss, expected, rtol=2**-7, atol=0)  # bf16 has 8 bits of precision


def test_masked_pixels_do_not_leak_into_features(small_bevt):
    """With every cell masked the image has no influence; with none it has."""
    model = small_bevt().eval()
    a, b = torch.randn(2, 1, 3, 64, 64)
    for mask, same in ((torch.ones(1, 4, 4, dtype=torch.bool), True), (torch.zeros(1, 4, 4, dtype=torch.bool), False)):
        with torch.no_grad():
            assert torch.equal(model.forward_image(a, mask), model.forward_image(b, mask)) == same


def test_every_parameter_gets_a_gradient(small_bevt, small_batch):
    model = small_bevt(drop_path=0.0)
    out = model(small_batch)
    out.loss.backward()
    dead = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not dead


def test_gathered_loss_equals_loss_of_all_positions(small_bevt, small_batch):
    """Gathering before the decoder's last layers and the head is exact: the same loss as from every position."""
    model = small_bevt().eval()
    with torch.no_grad():
        out = model(small_batch)
        expected = 0
        for name, stream in (("video", small_batch.video), ("image", small_batch.image)):
            forward = model.forward_video if name == "video" else model.forward_image
            logits = model.lm_head(forward(stream.pixels, stream.mask)).flatten(0, 1)
            valid = stream.rows >= 0
            logits, targets = logits[stream.rows[valid]], stream.targets[valid]
            total = F.cross_entropy(logits, targets, reduction="sum")
            torch.testing.assert_close(out.metrics[f"loss_{name}"], total)
            assert out.metrics[f"hits_{name}"] == (logits.argmax(-1) == targets).sum()
            expected += total / stream.count
    torch.testing.assert_close(out.loss, expected)


def test_order_of_masked_cells_does_not_matter(small_bevt, small_batch):
    model, stream = small_bevt().eval(), small_batch.video
    shuffle = torch.randperm(len(stream.cells))
    rows, targets = (x.view(-1, 2)[shuffle].flatten() for x in (stream.rows, stream.targets))
    video = replace(stream, cells=stream.cells[shuffle], rows=rows, targets=targets)
    with torch.no_grad():
        torch.testing.assert_close(model(replace(small_batch, video=video)).loss, model(small_batch).loss)


@pytest.mark.parametrize(
    "rows",
    [
        [1, 9, 5, 13, -1, -1],  # frame by frame
        [1, 5, 9, 12, -1, -1],  # another cell's frame
        [1, 5, 9, 13, -1],  # one frame of the padding
        [1, 5, 9, -1, -1, -1],  # one frame of a masked cell
    ],
)
def test_rows_must_match_the_masked_cells(make_stream, rows):
    """The model takes a cell's features for the rows at its place, and would learn from the wrong targets."""
    mask = torch.zeros(1, 2, 2, 2, dtype=torch.bool)
    mask[0, 0, 0, 1] = mask[0, 1, 0, 1] = True
    stream = make_stream(torch.zeros(1), mask, pad=1)
    assert stream.cells.tolist() == [1, 5, -1]
    assert stream.rows.tolist() == [1, 5, 9, 13, -1, -1]
    with pytest.raises(UserError, match="all frames of a masked cell"):
        replace(stream, rows=torch.tensor(rows))


def test_splitmix64_equals_python_integers():
    """The published finaliser in Python's integers; torch has only signed 64-bit numbers that wrap."""

    def reference(x: int) -> int:
        bits = (1 << 64) - 1
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & bits
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & bits
        return x ^ (x >> 31)

    values = [0, 1, 2**40 + 17, 2**63 - 1]
    ours = splitmix64(torch.tensor(values)).tolist()
    assert [x % (1 << 64) for x in ours] == [reference(x) for x in values]


def test_drop_path_rates():
    """6 sigma of a binomial around each block's linear rate, and independence of the two branches."""
    keys = torch.arange(20_000)
    scales = residual_scales(keys, 0.3, 4)
    dropped = scales == 0
    for block, rate in enumerate((0.0, 0.1, 0.2, 0.3)):
        sigma = (rate * (1 - rate) / len(keys)) ** 0.5
        for branch in range(2):
            assert abs(dropped[block, branch].float().mean() - rate) <= 6 * sigma
        kept = scales[block][~dropped[block]]
        torch.testing.assert_close(kept, torch.full_like(kept, 1 / (1 - rate)))
    both = dropped[3].all(0).float().mean()
    assert abs(both - 0.09) < 6 * (0.09 * 0.91 / len(keys)) ** 0.5
    draws = uniform(keys, torch.tensor(0))
    assert draws.min() >= 0 and draws.max() < 1


def test_drop_path_depends_on_the_sample_only(small_bevt, small_batch):
    """Splitting a batch changes no sample's output by a bit, and another key changes it."""
    model = small_bevt(drop_path=0.5).train()
    stream = small_batch.video
    with torch.no_grad():
        whole = model.forward_video(stream.pixels, stream.mask, stream.sample_keys)
        for i in range(2):
            part = model.forward_video(*(x[i : i + 1] for x in (stream.pixels, stream.mask, stream.sample_keys)))
            torch.testing.assert_close(part, whole[i : i + 1], rtol=0, atol=1e-5)
        other = model.forward_video(stream.pixels, stream.mask, stream.sample_keys + 1)
    assert not torch.allclose(other, whole, atol=1e-3)
    assert torch.equal(
        residual_scales(stream.sample_keys, 0.5, 6)[..., 1:], residual_scales(stream.sample_keys[1:], 0.5, 6)
    )


def test_drop_path_without_sample_keys(small_bevt):
    """In training torch's own generator decides; in evaluation nothing is dropped."""
    encoder = small_bevt(drop_path=0.5).encoder
    clip = torch.randn(1, 3, 4, 32, 32).expand(8, -1, -1, -1, -1)
    with torch.no_grad():
        torch.manual_seed(1)
        first = encoder.train()(clip)
        torch.manual_seed(1)
        assert torch.equal(first, encoder(clip))
        assert not torch.equal(first, encoder(clip))
        assert torch.equal(encoder.eval()(clip), encoder(clip))


def test_activation_checkpointing_changes_nothing(small_bevt, small_batch):
    model = small_bevt(drop_path=0.5).train()
    gradients = []
    encoder = model.encoder
    for encoder.checkpointing, encoder.recompute, encoder.recompute_every in (
        (False, "block", 1),
        (True, "block", 1),
        (True, "block", 2),
        (True, "attention", 1),
    ):
        model.zero_grad()
        model(small_batch).loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for other in gradients[1:] for a, b in zip(gradients[0], other, strict=True))


def test_model_with_one_stream_only(small_bevt, small_batch):
    model = small_bevt().eval()
    with torch.no_grad():
        both = model(small_batch)
        image = model(Batch(None, small_batch.image))
        video = model(Batch(small_batch.video, None))
    assert set(image.metrics) == {"loss_image", "hits_image", "rows_image", "unknown_targets"}
    torch.testing.assert_close(video.loss + image.loss, both.loss)


def test_initialisation_spreads_and_seed(small_bevt):
    """Seedable, leaves nothing unset, and has the stated spreads."""
    model = small_bevt()
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(float("nan"))
    model.init_weights(torch.Generator().manual_seed(3))
    first = {n: p.clone() for n, p in model.named_parameters()}
    assert all(p.isfinite().all() for p in first.values())
    model.init_weights(torch.Generator().manual_seed(3))
    assert all(torch.equal(p, first[n]) for n, p in model.named_parameters())

    block = model.encoder.layers[3].blocks[0]
    for weight in (block.mlp.fc1.weight, block.attn.qkv.weight, model.lm_head.weight):
        assert abs(weight.std() - 0.02) < 0.02 * 6 / (2 * weight.numel()) ** 0.5
    stem, upsample = model.encoder.patch_embed.proj, model.video_decoder.upsample
    for layer, fan_in in ((stem, 3 * 2 * 4 * 4), (upsample, 256 * 4)):
        bound = fan_in**-0.5
        assert 0.99 * bound < layer.weight.abs().max() <= bound and layer.bias.abs().max() <= bound
    assert not block.mlp.fc1.bias.any() and not model.lm_head.bias.any()


def test_loss_at_initialisation():
    """Close to ln V: the original's measures 9.24 at V = 8192."""
    torch.manual_seed(0)
    model = create_model("tiny").eval()
    with torch.no_grad():
        logits = model.lm_head(model.forward_image(torch.randn(2, 3, 128, 128), torch.rand(2, 8, 8) < 0.5))
    loss = F.cross_entropy(logits.flatten(0, 1), torch.randint(8192, (128,)))
    assert 8.9 < loss < 9.5
