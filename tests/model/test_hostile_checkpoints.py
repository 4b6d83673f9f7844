"""Every hostile file at every place that takes weights: one clear line, nothing run, no memory taken."""

from __future__ import annotations

import io
import os
import pickle
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import pytest
import torch

from bevt_ds import BEVT, cli, create_model
from bevt_ds.config.recipes import get_recipe
from bevt_ds.config.schema import EvaluateConfig
from bevt_ds.errors import UserError
from bevt_ds.eval.multi_view import load_classifier
from bevt_ds.folders import weights_of
from bevt_ds.interop.convert import main as convert
from bevt_ds.model.weights import load_init
from bevt_ds.runtime.checkpoint import Facts
from bevt_ds.runtime.commit import save
from bevt_ds.runtime.engine_shards import require_readable
from bevt_ds.runtime.pieces import SavedPieces, Snapshot
from tests.downstream.worlds import ALONE
from tests.hostile import hostile_pickles, hostile_safetensors, live_objects


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> tuple[dict[str, Path], Path]:
    """Hostile files by name, and the canary that the live ones would make."""
    folder = tmp_path_factory.mktemp("hostile")
    canary = folder / "canary"
    found = hostile_pickles(folder, canary) | hostile_safetensors(folder)
    assert len(found) > 30
    return found, canary


model = cache(partial(create_model, "tiny", vocab_size=8))


def init_from(path: Path, _: Path) -> None:
    load_init(model(), weights_of(path, "init_from"))


def from_pretrained(path: Path, _: Path) -> None:
    BEVT.from_pretrained(path)


def evaluate(path: Path, _: Path) -> None:
    load_classifier(EvaluateConfig(weights=str(path)), ALONE)


def resume(path: Path, place: Path) -> None:
    """As the state of a checkpoint: of DeepSpeed, which earlier versions wrote, or ours."""
    if path.suffix == ".pt":
        shutil.copy(path, place / "mp_rank_00_model_states.pt")
        require_readable(place, ALONE)
    else:
        shutil.copy(path, place / "rank-00000.safetensors")
        with SavedPieces(place) as saved:
            saved.weights()


def checkpoint_command(path: Path, place: Path) -> None:
    """In a checkpoint with a manifest that fits: whoever forges one can forge the other."""
    facts = Facts(step=1, world=1, stage=2, config=get_recipe("demo"), data="", skips={}, schema=2)

    def forge(folder: Path, forged: bool = True) -> None:
        Snapshot({"weights/a": torch.ones(1)}, {"a": 0}, {}, {"shapes": {"a": [1]}}).write(folder / "state", 0)
        (folder / "weights").mkdir()
        for target in (folder / "state" / "rank-00000.safetensors", folder / "weights" / "model.safetensors"):
            if forged:
                shutil.copy(path, target)

    good = save(place / "good", facts, [lambda folder: forge(folder, False)], ALONE, keep=1)
    bad = save(place / "bad", replace(facts, schema=1 + (path.suffix == ".pt")), [forge], ALONE, keep=1)
    if cli.main(["checkpoint", "diff", str(good), str(bad)]) == 2:
        raise UserError("diff")


def convert_command(path: Path, place: Path) -> None:
    convert([str(path), str(place / "out")])


ENTRIES: dict[str, Callable[[Path, Path], None]] = {
    "init_from": init_from,
    "from_pretrained": from_pretrained,
    "evaluate": evaluate,
    "resume": resume,
    "bevt checkpoint": checkpoint_command,
    "bevt convert": convert_command,
}


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.filterwarnings("ignore:Detected pickle protocol 4", "ignore:'torch.load' received a zip file")
def test_hostile_files_are_refused_in_one_line_and_run_nothing(files, tmp_path, monkeypatch, entry):
    paths, canary = files
    monkeypatch.setattr(os, "fsync", lambda handle: None)
    for name, path in paths.items():
        place = tmp_path / name
        place.mkdir()
        with pytest.raises(UserError) as caught:
            ENTRIES[entry](path, place)
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 1000, name
        assert not canary.exists(), name


def test_hostile_objects_are_live(tmp_path):
    """Each does what it is for where it is loaded carelessly, or the test above shows nothing."""
    canary = tmp_path / "canary"
    objects = live_objects(canary)
    assert len(objects) > 20
    for name, value in objects.items():
        data = pickle.dumps(value)
        assert not canary.exists(), name
        with suppress(Exception):  # some fail once they have done it
            pickle.load(io.BytesIO(data))
        assert canary.exists(), name
        canary.rmdir() if canary.is_dir() else canary.unlink()


@pytest.mark.parametrize(
    "text",
    ["", "[]", "1", "{}", '{"shapes": []}', '{"shapes": {"a": ["1"]}}', '{"shapes": {"a": 1}}', "[" * 100_000, "\0"],
)
def test_counters_that_are_not_of_a_checkpoint_are_named(tmp_path, text):
    Snapshot({"weights/a": torch.ones(1)}, {"a": 0}, {}, {"shapes": {"a": [1]}}).write(tmp_path, 0)
    (tmp_path / "counters.json").write_text(text)
    with SavedPieces(tmp_path) as saved, pytest.raises(UserError, match=r"counters.json is not of a checkpoint"):
        saved.weights()
