"""Maps smaller than the window: `small_windows="official"` against torchvision's Video Swin, and the default."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor
from torchvision.models.video.swin_transformer import SwinTransformer3d

from bevt_ds import BEVT, UserError, VideoClassifier, VideoSwin

SIZES = {"embed_dim": 32, "depths": (2, 2, 2, 2), "num_heads": (1, 2, 4, 8), "window": (8, 7, 7)}


def our_name(name: str) -> str:
    """Our name of torchvision's parameter; its features alternate between stages and mergings."""
    name = re.sub(r"mlp\.0\.", "mlp.fc1.", re.sub(r"mlp\.3\.", "mlp.fc2.", name))
    if merging := re.fullmatch(r"features\.(\d)\.(reduction|norm)\.(.*)", name):
        return f"layers.{int(merging[1]) // 2}.downsample.{merging[2]}.{merging[3]}"
    return re.sub(r"features\.(\d)\.", lambda match: f"layers.{int(match[1]) // 2}.blocks.", name)


@pytest.fixture(scope="module")
def theirs() -> SwinTransformer3d:
    """torchvision's model with tables that are no longer near zero."""
    torch.manual_seed(0)
    model = SwinTransformer3d([2, 4, 4], 32, list(SIZES["depths"]), list(SIZES["num_heads"]), [8, 7, 7], num_classes=2)
    for name, parameter in model.named_parameters():
        if name.endswith("relative_position_bias_table"):
            torch.nn.init.normal_(parameter)
    return model.eval()


@pytest.fixture(scope="module")
def expected(theirs: SwinTransformer3d) -> dict[int, tuple[Tensor, Tensor]]:
    """A clip of each size, and torchvision's features of it, (B,T',H',W',C)."""
    clips = {side: torch.randn(1, 3, 8, side, side) for side in (112, 128, 192, 224)}
    with torch.no_grad():
        return {side: (clip, theirs.norm(theirs.features(theirs.patch_embed(clip)))) for side, clip in clips.items()}


def loaded(theirs: SwinTransformer3d, **options) -> VideoSwin:
    """Our encoder with torchvision's weights."""
    state = {our_name(n): p for n, p in theirs.named_parameters() if not n.startswith("head.")}
    state["patch_embed.proj.weight"] = state["patch_embed.proj.weight"].flatten(1)
    model = VideoSwin(**SIZES, **options)
    model.load_state_dict(state)
    return model.eval()


def difference(model: VideoSwin, clip: Tensor, features: Tensor) -> float:
    """The largest difference, as a share of the largest feature."""
    with torch.no_grad():
        ours = model(clip).movedim(1, -1)
    return ((ours - features).abs().max() / features.abs().max()).item()


@pytest.mark.parametrize("side", [112, 128, 192])
def test_official_small_windows_equal_torchvision(side, theirs, expected):
    """At the fourth stage the map has 4, 4 and 6 tokens a side, the window 7; the default differs there."""
    assert difference(loaded(theirs, small_windows="official"), *expected[side]) < 1e-5
    assert difference(loaded(theirs), *expected[side]) > 1e-2


def test_whole_windows_equal_torchvision_with_either_option(theirs, expected):
    for option in ("exact", "official"):
        assert difference(loaded(theirs, small_windows=option), *expected[224]) < 1e-5


def test_every_model_saves_the_small_windows_option(tmp_path):
    small = SIZES | {"depths": (1, 1, 1, 1), "small_windows": "official"}
    models = {"bevt": BEVT(vocab_size=16, **small), "swin": VideoSwin(**small), "class": VideoClassifier(3, **small)}
    for name, model in models.items():
        model.save_pretrained(tmp_path / name)
        assert type(model).from_pretrained(tmp_path / name).arch["small_windows"] == "official"
    with pytest.raises(UserError, match="small_windows=official, this model small_windows=exact"):
        VideoSwin.from_pretrained(tmp_path / "swin", small_windows="exact")
    with pytest.raises(UserError, match="choose one of exact, official"):
        VideoSwin(small_windows="offical")
