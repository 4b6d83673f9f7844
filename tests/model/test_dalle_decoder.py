"""DALL-E's decoder: against its definition written out, and its files."""

from __future__ import annotations

import pickle
import sys
from collections import OrderedDict
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from bevt_ds import UserError, load_tokenizer
from bevt_ds.model.tokenizers import DecodingTokenizer
from bevt_ds.model.tokenizers.dalle import DalleTokenizer
from bevt_ds.model.tokenizers.dalle_decoder import DalleAutoencoder, DalleDecoder

IDS = 24


def drawn(module: nn.Module, seed: int = 0) -> nn.Module:
    """The module with weights that keep the size of what passes."""
    draw = torch.Generator().manual_seed(seed)
    for p in module.parameters():
        p.data = torch.randn(p.shape, generator=draw) * (p[0].numel() ** -0.5 if p.ndim > 1 else 0.1)
    return module


@pytest.fixture(scope="module")
def decoder() -> DalleDecoder:
    return drawn(DalleDecoder(n_hid=8, n_init=6, vocab_size=IDS))


@pytest.fixture
def files(decoder, tmp_path):
    """encoder and decoder as .safetensors."""
    paths = tmp_path / "encoder.safetensors", tmp_path / "decoder.safetensors"
    for path, module in zip(paths, (drawn(DalleTokenizer(n_hid=8, vocab_size=IDS)), decoder), strict=True):
        save_file(module.state_dict(), path)
    return paths


def plain_decoder(state: dict[str, Tensor], ids: Tensor) -> Tensor:
    """The published network from its layers' names, in fp64, on a one-hot input: 4 groups of 2 blocks, 14 -> 112."""
    state = {name: value.double() for name, value in state.items()}

    def conv(x: Tensor, name: str) -> Tensor:
        w, b = state[f"blocks.{name}.w"], state[f"blocks.{name}.b"]
        x = F.unfold(F.pad(x, [w.shape[-1] // 2] * 4), w.shape[-1])
        return (w.flatten(1) @ x + b[:, None]).unflatten(-1, (side, side))

    side = ids.shape[-1]
    x = conv(F.one_hot(ids, IDS).movedim(-1, 1).double(), "input")
    for group in (1, 2, 3, 4):
        for block in (1, 2):
            name, y = f"group_{group}.block_{block}", x
            for i in (1, 2, 3, 4):
                y = conv(F.relu(y), f"{name}.res_path.conv_{i}")
            has_id_path = f"blocks.{name}.id_path.w" in state
            x = (conv(x, f"{name}.id_path") if has_id_path else x) + y / 64
        if group < 4:
            x, side = x.repeat_interleave(2, -1).repeat_interleave(2, -2), 2 * side
    x = torch.sigmoid(conv(F.relu(x), "output.conv"))[:, :3]
    return ((x - 0.1) / 0.8).clamp(0, 1)


def test_decoder_equals_its_definition(decoder):
    ids = torch.randint(IDS, (2, 3, 3), generator=torch.Generator().manual_seed(1))
    frames = decoder(ids)
    assert frames.shape == (2, 3, 24, 24) and frames.std() > 0.01
    torch.testing.assert_close(frames.double(), plain_decoder(decoder.state_dict(), ids), rtol=0, atol=1e-5)


def test_decoder_full_size():
    """OpenAI's published sizes: n_init 128, n_hid 256, 8192 ids on 14x14 to 112x112 pixels."""
    with torch.device("meta"):
        decoder = DalleDecoder()
        assert decoder(torch.zeros(2, 14, 14, dtype=torch.int64)).shape == (2, 3, 112, 112)
    shapes = {name: tuple(p.shape) for name, p in decoder.named_parameters()}
    assert shapes["blocks.input.w"] == (128, 8192, 1, 1)
    assert shapes["blocks.group_1.block_1.id_path.w"] == (2048, 128, 1, 1)
    assert shapes["blocks.group_1.block_1.res_path.conv_1.w"] == (512, 128, 1, 1)
    assert shapes["blocks.group_4.block_1.res_path.conv_4.w"] == (256, 64, 3, 3)
    assert shapes["blocks.output.conv.w"] == (6, 256, 1, 1)
    assert "blocks.group_4.block_2.id_path.w" not in shapes


def test_decoder_file_makes_a_tokenizer_that_decodes(files, decoder):
    encoder, path = files
    tokenizer, plain = load_tokenizer("dalle", weights=encoder, decoder=path), load_tokenizer("dalle", weights=encoder)
    frames = torch.rand(2, 3, 24, 24, generator=torch.Generator().manual_seed(2))
    ids = tokenizer.encode(frames)
    assert torch.equal(ids, plain.encode(frames)) and torch.equal(tokenizer.decode(ids), decoder(ids))
    assert isinstance(tokenizer, DecodingTokenizer) and not isinstance(plain, DecodingTokenizer)
    for wrong in (ids.float(), ids[0], ids + IDS, ids - IDS):
        with pytest.raises(UserError, match="ids"):
            tokenizer.decode(wrong)


@pytest.fixture
def dall_e(monkeypatch):
    """A stand-in for the package whose classes OpenAI's file names: put a tree of our modules into its classes."""
    modules = {name: ModuleType(name) for name in ("dall_e", "dall_e.decoder", "dall_e.utils")}
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)

    def of(home: str, name: str) -> nn.Module:
        kind = type(name, (nn.Module,), {"__module__": home})
        setattr(modules[home], name, kind)
        return kind

    kinds = [of("dall_e.decoder", "Decoder"), of("dall_e.decoder", "DecoderBlock"), of("dall_e.utils", "Conv2d")]

    def dressed(ours: nn.Module, names: list[str]) -> nn.Module:
        leaf, is_block = any(True for _ in ours.parameters(recurse=False)), hasattr(ours, "res_path")
        made = kinds[2]() if leaf else kinds[1]() if is_block else kinds[0]() if not names else nn.Sequential()
        for name, parameter in ours.named_parameters(recurse=False):
            setattr(made, name, parameter)
        for name, child in ours.named_children():
            identity = isinstance(child, nn.Identity)
            made.add_module(name, child if identity else dressed(child, [*names, name]))
        if names and names[-1] == "res_path":
            parts = [(f"{kind}_{i}", p) for i, conv in enumerate(made.children(), 1)
                     for kind, p in (("relu", nn.ReLU()), ("conv", conv))]  # fmt: skip
            made = nn.Sequential(OrderedDict(parts))
        if names and names[-1].startswith("group_"):
            made.add_module("upsample", nn.Upsample(scale_factor=2, mode="nearest"))
        return made

    return lambda module: dressed(module, [])


@pytest.mark.parametrize("legacy", [False, True])
def test_decoder_in_the_layout_of_openai_is_read(legacy, dall_e, decoder, files, tmp_path):
    """A pickled module of the package's classes, in either container, with its Upsample and ReLU."""
    torch.save(dall_e(decoder), tmp_path / "decoder.pkl", _use_new_zipfile_serialization=not legacy)
    ids = torch.arange(9).view(1, 3, 3)
    read = load_tokenizer("dalle", weights=files[0], decoder=tmp_path / "decoder.pkl")
    assert torch.equal(read.decode(ids), decoder(ids))


def test_files_that_do_not_belong_together_are_named(files, tmp_path):
    encoder, path = files
    with pytest.raises(UserError, match="is not a DALL-E decoder: .* tensors differ"):
        DalleAutoencoder.from_files(encoder, encoder)
    with pytest.raises(UserError, match="is not a DALL-E encoder: .* tensors differ"):
        DalleAutoencoder.from_files(path, path)
    save_file(drawn(DalleDecoder(n_hid=8, n_init=6, vocab_size=IDS + 1)).state_dict(), tmp_path / "more.safetensors")
    with pytest.raises(UserError, match="24 ids and .* 25: they are not of one dVAE"):
        DalleAutoencoder.from_files(encoder, tmp_path / "more.safetensors")
    with pytest.raises(UserError, match="set tokenizer.decoder to DALL-E's decoder.pkl"):
        DalleAutoencoder.from_files(encoder, tmp_path / "none.pkl")
    (tmp_path / "odd.pkl").write_bytes(pickle.dumps([1]))
    with pytest.raises(UserError, match="not DALL-E's pickled decoder"):
        DalleAutoencoder.from_files(encoder, tmp_path / "odd.pkl")
