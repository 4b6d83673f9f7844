"""Tokenizers of Hugging Face and Cosmos' kind: ids found in what a network returns, on the mask's grid."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

from bevt_ds import UserError, load_tokenizer
from bevt_ds.model.tokenizers.foreign import GridTokenizer, as_grid, fitted, integers


class Levels(nn.Module):
    """A stand-in: an id for each patch, the level of its mean brightness, as Cosmos gives them: (ids, codes)."""

    def __init__(self, patch: int = 8):
        super().__init__()
        self.patch = patch

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        codes = F.avg_pool2d(images.mean(1), self.patch)
        return ((codes + 1) * 4.999).to(torch.int32), codes


def frames(side: int = 32) -> Tensor:
    """Two frames whose 8x8 patches have brightness 0.05, 0.15, ... row by row."""
    cells = (torch.arange(side * side // 64) % 10 / 10 + 0.05).view(1, 1, side // 8, side // 8)
    return cells.repeat_interleave(8, -1).repeat_interleave(8, -2).expand(2, 3, -1, -1).contiguous()


def test_ids_are_those_of_the_network_on_scaled_frames():
    ids = GridTokenizer(Levels(), 10, Levels()).encode(frames())
    assert ids.dtype == torch.int64 and ids.tolist() == [(torch.arange(16) % 10).view(4, 4).tolist()] * 2
    own = GridTokenizer(Levels(), 10, Levels(), mean=(0.0,) * 3, std=(1.0,) * 3).encode(frames())
    assert own.min() >= 5, "mean and std decide what the network sees"


def test_grid_is_fitted_where_one_divides_the_other():
    grid = torch.arange(16).view(1, 4, 4)
    assert fitted(grid, 4).equal(grid)
    assert fitted(grid, 2).tolist() == [[[5, 7], [13, 15]]]
    assert fitted(grid[:, :2, :2], 4).tolist() == [[[0, 0, 1, 1], [0, 0, 1, 1], [4, 4, 5, 5], [4, 4, 5, 5]]]
    with pytest.raises(UserError, match="4x4 and the mask's 3x3, and neither divides the other: set tokenizer.side"):
        fitted(grid, 3)
    coarse = GridTokenizer(Levels(16), 10, Levels(16))
    assert coarse.encode(frames()).shape == (2, 4, 4)
    resized = GridTokenizer(Levels(16), 10, Levels(16), side=64).encode(frames())
    assert (resized - GridTokenizer(Levels(), 10, Levels()).encode(frames())).abs().max() <= 1


def test_ids_are_found_in_what_a_network_returns():
    ids = torch.arange(8)
    nested = {"loss": torch.rand(()), "mask": torch.ones(2, dtype=torch.bool), "all": [torch.rand(3), (ids,)]}
    assert next(integers(nested)) is ids
    assert as_grid(ids, 2).tolist() == [[[0, 1], [2, 3]], [[4, 5], [6, 7]]]
    with pytest.raises(UserError, match="gives no integers"):
        as_grid(None, 2)
    with pytest.raises(UserError, match="no square grid"):
        as_grid(torch.arange(6), 2)


def test_torchscript_file_is_a_tokenizer_by_name(tmp_path):
    torch.jit.script(Levels()).save(tmp_path / "encoder.jit")
    tokenizer = load_tokenizer("torchscript", str(tmp_path / "encoder.jit"), vocab_size=10)
    assert tokenizer.vocab_size == 10
    assert tokenizer.encode(frames()).equal(GridTokenizer(Levels(), 10, Levels()).encode(frames()))
    (tmp_path / "none.jit").write_bytes(b"no")
    with pytest.raises(UserError, match="is no TorchScript file"):
        load_tokenizer("torchscript", str(tmp_path / "none.jit"), vocab_size=10)
    with pytest.raises(UserError, match="no TorchScript file, such as Cosmos"):
        load_tokenizer("torchscript", vocab_size=10)


@pytest.fixture(scope="module")
def janus(tmp_path_factory):
    """A tiny random image tokenizer of transformers, with an id for 16x16 pixels, as its folder."""
    config = transformers.JanusVQVAEConfig(
        embed_dim=4, num_embeddings=32, latent_channels=4, base_channels=32, channel_multiplier=[1, 1, 1, 1, 1],
        num_res_blocks=1, num_patches=4, projection_dim=4, num_hidden_layers=1, hidden_size=4,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("janus")
    torch.manual_seed(0)
    model = transformers.JanusVQVAE(config)
    model.save_pretrained(folder)
    return folder, model.eval()


def test_folder_of_hugging_face_is_a_tokenizer_by_name(janus):
    folder, model = janus
    tokenizer = load_tokenizer("huggingface", str(folder), side=64)
    views = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    ids = tokenizer.encode(views)
    assert tokenizer.vocab_size == 32 and ids.shape == (2, 4, 4) and ids.unique().numel() > 1
    larger = F.interpolate(views, (64, 64), mode="bicubic", antialias=True).clamp(0, 1)
    with torch.no_grad():
        expected = model.encode(2 * larger - 1).image_tokens
    assert ids.flatten().equal(expected.flatten())


def test_folders_that_hold_no_image_tokenizer_are_named(janus, tmp_path):
    with pytest.raises(UserError, match="no folder with a config.json"):
        load_tokenizer("huggingface", str(tmp_path))
    for architecture, message in (("BertModel", "no image tokenizer"), ("JanusVQVAE", "cannot be read as")):
        (tmp_path / "config.json").write_text(json.dumps({"architectures": [architecture], "vocab_size": 8}))
        with pytest.raises(UserError, match=message):
            load_tokenizer("huggingface", str(tmp_path))
