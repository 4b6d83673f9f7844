"""Tokenizers by name: those of other packages come in through an entry point, and a wrong name is one line."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bevt_ds import UserError, load_tokenizer
from bevt_ds.config.recipes import get_recipe
from bevt_ds.config.schema import Config
from bevt_ds.config.targets import TokenizerConfig
from bevt_ds.config.validate import validate
from bevt_ds.runtime.tokenizer import file_of, open_tokenizer, vocabulary_of

TOY = """
import torch

class Brightness:
    def __init__(self, weights="none"):
        self.vocab_size, self.weights = 4, weights

    def encode(self, frames):
        return (torch.nn.functional.avg_pool2d(frames.mean(1), 8) * 3.99).long()

class Nothing:
    vocab_size = 0

"""


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Make a package, installed as far as Python can tell, that adds tokenizers: name -> object."""

    def make(points: dict[str, str], name: str = "toy_tokenizers") -> Path:
        root = tmp_path / name
        folder = root / f"{name}-1.0.dist-info"
        folder.mkdir(parents=True)
        (root / f"{name}.py").write_text(TOY)
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        lines = [f"{key} = {name}:{value}" for key, value in points.items()]
        (folder / "entry_points.txt").write_text("\n".join(["[bevt_ds.tokenizers]", *lines]))
        monkeypatch.syspath_prepend(root)
        return root

    return make


def with_tokenizer(**values: str) -> Config:
    recipe = get_recipe("demo", Config)
    return Config(**(vars(recipe) | {"tokenizer": TokenizerConfig(**values)}))


def test_package_adds_a_tokenizer_without_touching_ours(package, tmp_path):
    """Found by name, valid in a configuration, given its weights, and used as it is: no module, no `to`."""
    package({"brightness": "Brightness"})
    weights = tmp_path / "weights.bin"
    weights.write_bytes(b"")
    frames = torch.tensor([0.1, 0.9]).view(2, 1, 1, 1).expand(2, 3, 16, 16)
    config = validate(with_tokenizer(name="brightness", weights=str(weights))).tokenizer
    tokenizer = open_tokenizer(config)
    assert tokenizer.encode(frames).tolist() == [[[0, 0], [0, 0]], [[3, 3], [3, 3]]]
    assert tokenizer.weights == str(weights) == file_of(config)
    assert vocabulary_of(config) == 4
    assert load_tokenizer("brightness").weights == "none"


def test_unknown_name_lists_the_names_there_are(package):
    package({"brightness": "Brightness"})
    message = "no tokenizer named 'peco': choose one of dalle, .*brightness$"
    with pytest.raises(UserError, match=message):
        load_tokenizer("peco")
    with pytest.raises(UserError, match=message):
        validate(with_tokenizer(name="peco"))


def test_package_whose_tokenizer_is_none_or_cannot_be_imported_is_named(package):
    package({"nothing": "Nothing", "gone": "Gone"})
    with pytest.raises(UserError, match=r"tokenizer.name=nothing: Nothing is no tokenizer, which has encode"):
        load_tokenizer("nothing")
    with pytest.raises(UserError, match=r"tokenizer.name=gone: its package names toy_tokenizers:Gone, and"):
        load_tokenizer("gone")


def test_name_that_two_packages_use_is_refused(package):
    package({"twice": "Brightness", "dalle": "Brightness"}, "one")
    package({"twice": "Brightness"}, "two")
    with pytest.raises(UserError, match=r"tokenizer.name=twice: (one|two):Brightness of \1 and .* use this name"):
        load_tokenizer("twice")
    with pytest.raises(UserError, match=r"tokenizer.name=dalle: one:Brightness of one and bevt_ds itself use"):
        load_tokenizer("dalle")
