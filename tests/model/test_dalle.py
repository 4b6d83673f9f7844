"""DALL-E's encoder: exact ids, both pickle containers and safetensors, hostile pickles."""

from __future__ import annotations

import pickle
import struct
import zipfile
from collections import OrderedDict
from io import BytesIO
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from bevt_ds import BEVT, Batch, UserError, load_tokenizer
from bevt_ds.kernels import launch_counts, reset_launch_counts
from bevt_ds.model.tokenizers import tokenize
from bevt_ds.model.tokenizers.dalle import DalleTokenizer
from bevt_ds.model.tokenizers.dalle_pickle import LEGACY_MAGIC, LEGACY_PROTOCOL, _Unpickler
from tests.hostile import Canary

MARGIN = 1e-3  # of the top two logits: below it fp32 does not decide an id
LOGITS = 2e-5  # a float64 run of the original differs by up to 1.4e-5
FILES = ("encoder_small.pkl", "encoder_small_legacy.pkl", "dvae_encoder_small.safetensors")


@pytest.mark.parametrize("file", FILES)
def test_dalle_ids_and_logits_equal_golden(file, golden):
    tokenizer = load_tokenizer("dalle", weights=golden / file)
    io = load_file(golden / "dvae_encoder_small_io.safetensors")
    frames = io["in.image_u8"].float() / 255
    ids = tokenizer.encode(frames)
    assert ids.dtype == torch.int64 and tokenizer.vocab_size == 512
    decided = io["out.margin"] > MARGIN
    assert decided.float().mean() > 0.95
    assert torch.equal(ids[decided], io["out.ids"].long()[decided])
    logits = tokenizer.logits(frames)
    image, row, column = io["out.logits_pos"].long().unbind(1)
    torch.testing.assert_close(logits[image, :, row, column], io["out.logits_at"], rtol=0, atol=LOGITS)
    torch.testing.assert_close(logits.mean(1), io["out.logits_mean"], rtol=0, atol=LOGITS)
    torch.testing.assert_close(logits.std(1), io["out.logits_std"], rtol=1e-4, atol=0)


def test_dalle_and_model_training_step_equals_golden(golden, joint, normalised, make_stream):
    """Tokenizer and model together: ids, losses and accuracies of the original's training step."""
    tokenizer = load_tokenizer("dalle", weights=golden / "encoder_small.pkl")
    model = BEVT.from_pretrained(golden / "bevt_joint_small.safetensors")
    streams = []
    for name in ("video", "image"):
        pixels = normalised(joint[f"in.{name}_u8"], joint["in.mean"], joint["in.std"])
        view = joint[f"in.{name}_tok_u8"].float() / 255
        view = view[None] if name == "video" else view
        streams.append(make_stream(pixels, joint[f"in.{name}_mask"].bool(), view=view))
    batch = tokenize(tokenizer, Batch(*streams))
    for name, stream in (("video", batch.video), ("image", batch.image)):
        valid = stream.rows >= 0
        reference = joint[f"e2e.{name}_ids"].flatten()[stream.rows[valid]].long()
        decided = joint[f"e2e.{name}_ids_margin"].flatten()[stream.rows[valid]] > MARGIN
        assert torch.equal(stream.targets[valid][decided], reference[decided])
        assert (stream.targets[~valid] == -100).all()
    with torch.no_grad():
        out = model(batch)
    torch.testing.assert_close(out.loss, joint["e2e.loss_total"], rtol=1e-4, atol=0)
    for name in ("video", "image"):
        accuracy = out.metrics[f"hits_{name}"] / out.metrics[f"rows_{name}"]
        torch.testing.assert_close(accuracy, joint[f"e2e.acc_{name}"], rtol=0, atol=1.5 / 193)


def test_dalle_full_size():
    """OpenAI's published sizes: 74 tensors, 53,786,240 parameters, one id for 8x8 pixels."""
    with torch.device("meta"):
        tokenizer = DalleTokenizer()
        assert tokenizer.encode(torch.empty(2, 3, 112, 112)).shape == (2, 14, 14)
    shapes = [p.shape for p in tokenizer.parameters()]
    assert len(shapes) == 74 and sum(s.numel() for s in shapes) == 53_786_240


def in_zip(payload: bytes, path: Path, compression: int = zipfile.ZIP_STORED) -> None:
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("archive/data.pkl", payload)


def in_legacy(payload: bytes, path: Path) -> None:
    header = [LEGACY_MAGIC, LEGACY_PROTOCOL, {"little_endian": True}]
    path.write_bytes(b"".join(pickle.dumps(x, 2) for x in header) + payload + pickle.dumps([], 2))


@pytest.mark.parametrize("wrap", [in_zip, in_legacy, lambda payload, path: path.write_bytes(payload)])
@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_dalle_pickle_runs_no_code(wrap, protocol, tmp_path):
    canary = tmp_path / "canary"
    payload = pickle.dumps(Canary(canary), protocol)
    wrap(payload, tmp_path / "encoder.pkl")
    with pytest.raises(UserError, match="not DALL-E's pickled encoder"):
        load_tokenizer("dalle", weights=tmp_path / "encoder.pkl")
    assert not canary.exists()
    pickle.loads(payload)
    assert canary.exists(), "the canary itself must work, or this test shows nothing"


def op_global(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


HOSTILE = {
    "eval through builtins": op_global("builtins", "eval") + b"(X\x01\x00\x00\x001tR.",
    "getattr chain": op_global("builtins", "getattr") + op_global("dall_e.encoder", "Encoder") + b"\x8c\x04initR.",
    "dotted name": b"\x80\x04\x8c\x0bcollections\x8c\x14OrderedDict.__init__\x93.",
    "a permitted module's other name": op_global("torch", "load") + b".",
    "submodule of a permitted module": op_global("torch._utils", "_import_dotted_name") + b".",
    "a module of itself": op_global("dall_e.encoder", "Encoder")
    + b"(tR}(X\x0b\x00\x00\x00_parametersX\x08\x00\x00\x00_modules}X\x01\x00\x00\x00a0ub.",
    "extension registry": b"\x82\x01.",
    "nothing but a number": b"K\x01.",
    "truncated": op_global("dall_e.encoder", "Encoder") + b"(",
    "setting an attribute of a stand-in": op_global("dall_e.encoder", "Encoder") + b"(N}X\x01\x00\x00\x00aK\x01stb.",
}


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("wrap", [in_zip, in_legacy])
def test_unusual_pickles_are_refused(name, wrap, tmp_path):
    wrap(HOSTILE[name], tmp_path / "encoder.pkl")
    with pytest.raises(UserError, match="not DALL-E's pickled encoder"):
        load_tokenizer("dalle", weights=tmp_path / "encoder.pkl")


def test_pickled_modules_in_a_cycle_are_refused(tmp_path):
    """A module whose child is itself would be walked for ever."""
    name = lambda s: b"X" + struct.pack("<I", len(s)) + s  # noqa: E731
    payload = (
        b"\x80\x02" + op_global("dall_e.encoder", "Encoder") + b")\x81q\x00}("
        + name(b"_parameters") + b"}" + name(b"_modules") + b"}" + name(b"a") + b"h\x00s" + b"ub."
    )  # fmt: skip
    in_zip(payload, tmp_path / "encoder.pkl")
    with pytest.raises(UserError, match="too many modules"):
        load_tokenizer("dalle", weights=tmp_path / "encoder.pkl")


def test_pickled_storage_longer_than_the_file_is_refused(golden, tmp_path):
    """The length before a storage is a number like any other: it must not decide how much memory is asked for."""
    raw = bytearray((golden / "encoder_small_legacy.pkl").read_bytes())
    stream = BytesIO(raw)
    for _ in ("magic", "protocol", "system", "module", "keys"):
        _Unpickler(stream).load()
    struct.pack_into("<q", raw, stream.tell(), 1 << 40)
    (tmp_path / "encoder.pkl").write_bytes(raw)
    with pytest.raises(UserError, match="longer than the file"):
        load_tokenizer("dalle", weights=tmp_path / "encoder.pkl")


def test_compressed_zip_is_refused(tmp_path):
    in_zip(b"K\x01." + b"0" * 10_000, tmp_path / "encoder.pkl", zipfile.ZIP_DEFLATED)
    with pytest.raises(UserError, match="compressed"):
        load_tokenizer("dalle", weights=tmp_path / "encoder.pkl")


@pytest.mark.parametrize("content", [b"", b"not a pickle", b"\x80\x04N.", b"PK\x03\x04 broken"])
@pytest.mark.parametrize("name", ["encoder.pkl", "encoder.safetensors"])
def test_files_that_are_not_a_tokenizer_are_named(content, name, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=name):
        load_tokenizer("dalle", weights=tmp_path / name)


def test_tensors_of_another_model_are_refused(committed, tmp_path):
    state = dict(load_tokenizer("dalle", weights=committed / "encoder_small.pkl").state_dict())
    for name, broken in {
        "missing": {k: v for k, v in state.items() if "group_3.block_2" not in k},
        "empty": {"x": torch.zeros(1)},
        "shape": OrderedDict(state, **{"blocks.group_1.block_1.res_path.conv_1.w": torch.zeros(4, 16, 1, 1)}),
    }.items():
        save_file(broken, tmp_path / f"{name}.safetensors")
        with pytest.raises(UserError, match="not a DALL-E encoder"):
            load_tokenizer("dalle", weights=tmp_path / f"{name}.safetensors")


def test_missing_tokenizer_weights_name_the_remedy(tmp_path):
    with pytest.raises(UserError, match="tokenizer.weights=FILE"):
        load_tokenizer("dalle")
    with pytest.raises(UserError, match="does not exist"):
        load_tokenizer("dalle", weights=tmp_path / "encoder.pkl")


def test_tokenizer_weights_are_converted_once():
    """Channels last after the first call, values untouched; in half precision the last convolution keeps fp32."""
    torch.manual_seed(0)
    tokenizer = DalleTokenizer(n_hid=4, vocab_size=32)
    for parameter in tokenizer.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    before = {name: value.clone() for name, value in tokenizer.state_dict().items()}
    frames = torch.rand(2, 3, 32, 32)
    first = tokenizer.logits(frames)
    weights = {name: p for name, p in tokenizer.named_parameters() if p.ndim == 4}
    assert all(p.is_contiguous(memory_format=torch.channels_last) for p in weights.values())
    assert all(value.equal(before[name]) for name, value in tokenizer.state_dict().items())
    places = [p.data_ptr() for p in tokenizer.parameters()]
    assert tokenizer.logits(frames).equal(first)
    assert places == [p.data_ptr() for p in tokenizer.parameters()], "nothing is copied again"
    tokenizer.settle(torch.float16)
    wide = {name for name, p in tokenizer.named_parameters() if p.dtype == torch.float32}
    assert wide == {"blocks.output.conv.w", "blocks.output.conv.b"}


def test_dalle_kernels_give_the_golden_ids(golden):
    """Wherever fp32 decides them; in half precision the bits are those of PyTorch's operators, see tests/kernels."""
    tokenizer = load_tokenizer("dalle", weights=golden / "encoder_small.pkl")
    io = load_file(golden / "dvae_encoder_small_io.safetensors")
    frames = io["in.image_u8"][:1, :, :32, :32].float() / 255
    expected = tokenizer.logits(frames)
    tokenizer.kernels = "triton"
    reset_launch_counts()
    actual = tokenizer.logits(frames)
    assert launch_counts() == {"scale_pixels_kernel": 1, "bias_relu_kernel": 25, "residual_relu_kernel": 8}
    torch.testing.assert_close(actual, expected, rtol=0, atol=LOGITS)
    top = expected.topk(2, 1).values
    decided = top[:, 0] - top[:, 1] > MARGIN
    assert decided.float().mean() > 0.9
    assert torch.equal(actual.argmax(1)[decided], expected.argmax(1)[decided])
