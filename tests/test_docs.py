"""Commands and code in the documents run, as far as they can without data."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import bevt_ds
from bevt_ds.model.presets import create_classifier
from bevt_ds.shards.synthetic.draw_worker import encode_mp4

ROOT = Path(__file__).parents[1]
API = (ROOT / "docs" / "api.md").read_text()
PAGES = {page: page.read_text() for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md"))}
TEXTS = {page.name: re.findall(r"```python\n(.*?)```", text, re.DOTALL) for page, text in PAGES.items()}
TEXTS = {name: blocks for name, blocks in TEXTS.items() if blocks}
ELSEWHERE = {"own-videos.md", "quickstart.md"}  # on what the tutorial leaves: test_own_videos.py


def run(page: str, **names: object) -> dict[str, object]:
    """What the names of a page's Python stand for after all of it has run."""
    exec("\n".join(TEXTS[page]), names)
    return names


def test_python_of_every_page_is_run_by_a_test():
    here = Path(__file__).read_text()
    assert {name for name in TEXTS if f'run("{name}"' not in here} == ELSEWHERE


def test_readme_code_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    bevt_ds.create_model("tiny", vocab_size=32).save_pretrained("runs/joint/weights")
    create_classifier("tiny", 2, classes=("left", "right")).save_pretrained("runs/ssv2/weights")
    frames = np.random.default_rng(0).integers(0, 256, (20, 64, 64, 3), np.uint8)
    Path("clip.mp4").write_bytes(encode_mp4(frames))
    names = run("README.md", mask=torch.ones(1, 8, 14, 14, dtype=torch.bool))
    assert names["vector"].shape == (256,) and names["tokens"].ndim == 4
    assert names["shares"].keys() == {"left", "right"}
    assert names["features"].shape == (1, 16 * 14 * 14, 256)
    assert names["maps"].shape == (1, 256, 8, 7, 7)
    assert names["pooled"].shape == (256,)
    assert {name for name, _ in names["best"]} == {"left", "right"}


def test_finetuning_code_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    create_classifier("tiny", 2, classes=("left", "right")).save_pretrained("runs/ssv2/best")
    names = run("finetuning.md", clip=torch.randn(1, 3, 4, 64, 64))
    assert names["logits"].shape == (1, 2)
    assert names["names"] == ("left", "right")


def test_pipeline_code_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    bevt_ds.create_model("tiny", vocab_size=32).save_pretrained("runs/joint/weights")
    create_classifier("tiny", 2, classes=("left", "right")).save_pretrained("runs/ssv2/weights")
    frames = np.random.default_rng(0).integers(0, 256, (70, 64, 64, 3), np.uint8)
    Path("clip.mp4").write_bytes(encode_mp4(frames))
    Image.fromarray(frames[0]).save("image.jpg")
    names = run("interop.md", frames=frames)
    assert names["pooled"].shape == (256,) and names["tokens"].shape == (7, 7, 256)
    assert names["shares"].keys() == names["same"].keys() == {"left", "right"}


def test_weights_code_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    bevt_ds.create_model("tiny", vocab_size=32).save_pretrained("runs/joint/weights")
    names = run("weights.md")
    assert names["encoder"].arch["embed_dim"] == names["classifier"].arch["embed_dim"] == 32
    assert names["classifier"].head.out_features == 174


def test_tokenizer_that_the_page_declares_is_one():
    names = run("tokenizers.md")
    assert names["__annotations__"].keys() == {"vocab_size"}
    tokenizer = bevt_ds.load_tokenizer("random_projection", vocab_size=32)
    assert callable(names["encode"]) and tokenizer.vocab_size == 32
    assert tokenizer.encode(torch.rand(2, 3, 32, 32)).shape == (2, 4, 4)  # as the page's comment says


def test_kernels_code_runs(capsys):
    names = run("kernels.md")
    assert names["out"].shape == (2, 8, 14, 14, 128)
    assert all(names[name].grad.isfinite().all() for name in ("qkv", "table", "hidden", "weight", "bias"))
    assert names["losses"].shape == names["hits"].shape == (2,)
    assert "12 replaced, 0 left" in capsys.readouterr().out


@pytest.fixture(scope="module")
def after_api(tmp_path_factory):
    """What the names of api.md's code stand for after all of it has run."""
    frames = np.random.default_rng(0).integers(0, 256, (20, 64, 64, 3), np.uint8)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("api"))
        Path("clip.mp4").write_bytes(encode_mp4(frames))
        Image.fromarray(frames[0]).save("image.jpg")
        return run("api.md")


@pytest.mark.parametrize("name", bevt_ds.__all__)
def test_public_name_is_documented(name):
    """A docstring, a section of api.md with the signature as it is, and code that uses the name."""
    value = getattr(bevt_ds, name)
    section = re.search(rf"^## `{name}`\n(.*?)(?=^## |\Z)", API, re.MULTILINE | re.DOTALL)
    assert section and f"bevt_ds.{name}" in API
    if callable(value):
        assert inspect.getdoc(value)
    if callable(value) and value is not bevt_ds.UserError:
        signature = inspect.signature(value)
        plain = [parameter.replace(annotation=inspect.Parameter.empty) for parameter in signature.parameters.values()]
        wanted = str(signature.replace(parameters=plain, return_annotation=inspect.Signature.empty))
        assert f"`{name}{wanted}`" in " ".join(section[1].split())


def test_api_code_gives_what_it_says(after_api):
    shapes = {"clip": (1, 3, 16, 224, 224), "image": (1, 3, 224, 224), "features": (1, 16 * 14 * 14, 256)}
    shapes |= {"tokens": (1, 256, 8, 7, 7), "logits": (1, 2), "pooled": (256,), "view": (1, 3, 112, 112)}
    shapes |= {"ids": (1, 14, 14), "again": (256,)}
    assert {name: tuple(after_api[name].shape) for name in shapes} == shapes
    assert [tuple(x.shape) for x in after_api["maps"]] == [(1, 128, 8, 14, 14), (1, 256, 8, 7, 7)]
    assert after_api["channels"] == [128, 256] and isinstance(after_api["same"], bevt_ds.VideoClassifier)
    assert {name for name, _ in after_api["best"]} == {"left", "right"}
    assert after_api["loss"].isfinite() and "clip[None] makes a batch of one" in after_api["message"]
