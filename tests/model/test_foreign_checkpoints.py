"""Checkpoints of other projects: each layout is named in the refusal; Microsoft's Swin is loaded."""

from __future__ import annotations

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models.swin_transformer import SwinTransformer
from timm.models.swin_transformer_v2 import SwinTransformerV2
from torch import nn
from torchvision.models import resnet18
from torchvision.models import swin_transformer as vision
from torchvision.models.video.swin_transformer import SwinTransformer3d

from bevt_ds import BEVT, UserError, VideoClassifier, VideoSwin
from bevt_ds.folders import weights_of
from bevt_ds.model.tokenizers import DalleTokenizer
from bevt_ds.model.weights import load_init

SIZES = ([1, 1], [1, 2])  # depths, heads
V2 = {"block": vision.SwinTransformerBlockV2, "downsample_layer": vision.PatchMergingV2}
OTHERS = {  # what the refusal names: a small model with the names of that layout
    "torchvision's swin3d": lambda: SwinTransformer3d([2, 4, 4], 8, *SIZES, [8, 7, 7]),
    "torchvision's Swin,": lambda: vision.SwinTransformer([4, 4], 8, *SIZES, [7, 7]),
    "torchvision's Swin V2": lambda: vision.SwinTransformer([4, 4], 8, *SIZES, [8, 8], **V2),
    "timm's Swin,": lambda: SwinTransformer(embed_dim=8, depths=SIZES[0], num_heads=SIZES[1]),
    "Swin V2,": lambda: SwinTransformerV2(window_size=8, embed_dim=8, depths=SIZES[0], num_heads=SIZES[1]),
    "timm's Swin with features_only": lambda: timm.create_model(
        "swin_tiny_patch4_window7_224", features_only=True, embed_dim=8, num_heads=(1, 2, 4, 8)
    ),
    "plain vision transformer": lambda: timm.create_model("vit_tiny_patch16_224", depth=1),
    "a ResNet": resnet18,
    "DALL-E's tokenizer, which goes into tokenizer.weights": lambda: DalleTokenizer(8, 16),
}
NAMES = {  # the same for packages that are no dependency
    "Hugging Face's Swin": (
        "swin.embeddings.patch_embeddings.projection.weight",
        "swin.encoder.layers.0.blocks.0.attention.self.query.weight",
    ),
    "Hugging Face's transformers": ("videomae.embeddings.patch_embeddings.projection.weight",),
    "OpenMMLab's Swin": (
        "backbone.patch_embed.projection.weight",
        "backbone.stages.0.blocks.0.attn.w_msa.qkv.weight",
    ),
    "layout is unknown (it begins with a.b)": ("a.b",),
}


def refusal(state, folder) -> str:
    torch.save({"state_dict": state}, folder / "other.pth")
    with pytest.raises(UserError) as error:
        VideoSwin.from_pretrained(folder / "other.pth")
    return str(error.value)


@pytest.mark.parametrize("layout", OTHERS)
def test_foreign_checkpoint_layout_is_named(layout, tmp_path):
    message = refusal(OTHERS[layout]().state_dict(), tmp_path)
    assert layout in message and "other.pth" in message
    for taken in ("config.json", "BEVT", "Video Swin", "Microsoft's Swin", "docs/weights.md"):
        assert taken in message


@pytest.mark.parametrize("layout", NAMES)
def test_checkpoint_layout_is_told_by_tensor_names(layout, tmp_path):
    assert layout in refusal({name: torch.zeros(4, 3, 4, 4) for name in NAMES[layout]}, tmp_path)


def test_own_weights_without_config_are_named(small_bevt, tmp_path):
    save_file(small_bevt().state_dict(), tmp_path / "mine.safetensors")
    with pytest.raises(UserError, match=r"mine\.safetensors holds this project's own .* without their config\.json"):
        BEVT.from_pretrained(tmp_path / "mine.safetensors")


def microsoft(model: nn.Module) -> dict[str, torch.Tensor]:
    """timm's Swin in Microsoft's names: the merging ends a stage instead of beginning the next."""
    state = {}
    for name, value in model.state_dict().items():
        parts = name.replace("head.fc.", "head.").split(".")
        if "downsample" in parts:
            parts[1] = str(int(parts[1]) - 1)
        state[".".join(parts)] = value
    return state


def test_microsoft_swin_checkpoint_starts_the_encoder(tmp_path):
    """An image classifier starts the encoder: every block, the tables repeated over time; its head is left out."""
    torch.manual_seed(0)
    swin = SwinTransformer(56, embed_dim=32, depths=SIZES[0], num_heads=SIZES[1], num_classes=3)
    state = microsoft(swin)
    torch.save({"model": state}, tmp_path / "swin.pth")
    encoder = VideoSwin.from_pretrained(tmp_path / "swin.pth")
    assert encoder.arch["window"] == (8, 7, 7) and encoder.arch["num_heads"] == (1, 2)
    assert encoder.layers[1].blocks[0].attn.qkv.weight.equal(state["layers.1.blocks.0.attn.qkv.weight"])
    assert encoder.layers[0].downsample.reduction.weight.equal(state["layers.0.downsample.reduction.weight"])
    assert load_init(encoder, tmp_path / "swin.pth").unused["head.weight"] == "classifier of an image model"
    image = torch.randn(1, 3, 56, 56)
    with torch.no_grad():
        still = encoder.eval()(image[:, :, None].expand(-1, -1, 16, -1, -1))
        once = swin.eval().forward_features(image)
    torch.testing.assert_close(still.mean(2), once.movedim(-1, 1), rtol=0, atol=1e-4)


@pytest.mark.parametrize("place", ["run", "newest checkpoint", "checkpoint", "weights", "file"])
def test_from_pretrained_accepts_what_init_from_accepts(place, small_bevt, tmp_path):
    run, model = tmp_path / "runs" / "demo", small_bevt()
    commit = run / "checkpoints" / "step-00000007"
    inside = {"newest checkpoint": commit, "checkpoint": commit}.get(place, run)
    older = commit.with_name("step-00000003")
    for folder in (older, inside):
        model.init_weights()
        model.save_pretrained(folder / "weights")
        (folder / "manifest.json").write_text("{}")
    (run / "log.jsonl").touch()
    given = {"checkpoint": commit, "weights": run / "weights", "file": run / "weights" / "model.safetensors"}
    path = given.get(place, run)
    assert weights_of(str(path)) in (inside / "weights", inside / "weights" / "model.safetensors")
    for kind, options in ((BEVT, {}), (VideoSwin, {}), (VideoClassifier, {"num_classes": 2})):
        loaded = kind.from_pretrained(str(path), **options)
        encoder = loaded if kind is VideoSwin else loaded.encoder
        assert all(value.equal(model.encoder.state_dict()[name]) for name, value in encoder.state_dict().items())


def test_run_without_a_checkpoint_is_named(tmp_path):
    (tmp_path / "log.jsonl").touch()
    with pytest.raises(UserError, match="has not written a checkpoint yet"):
        BEVT.from_pretrained(tmp_path)
