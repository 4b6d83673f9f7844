"""`dry_run=true`: all that would stop a run, exit codes, memory estimate."""

from __future__ import annotations

import numpy as np
import pytest

import bevt_ds
from bevt_ds import finetune, pretrain
from bevt_ds.config.parse import apply_overrides
from bevt_ds.config.recipes import get_recipe
from bevt_ds.config.schema import Config
from bevt_ds.data.reading.index import load_shard
from bevt_ds.data.tokens import contract_of, place_of, shape_of, write_ids
from bevt_ds.runtime.lock import hold, owner_of


@pytest.fixture
def dry(capsys, small):
    """Run dry with the settings of a small run and others; returns the exit code, the lines, and what would stop it."""

    def run(program=pretrain, /, base=small, **settings):
        words = [f"{key}={value}" for key, value in {**base, **settings}.items()]
        code = program.main([*words, "dry_run=true"])
        lines = capsys.readouterr().out.splitlines()
        stops = [line.removeprefix("would stop").strip() for line in lines if line.startswith("would stop")]
        return code, lines, stops

    return run


def test_dry_run_of_a_valid_run(dry, shards, tmp_path):
    samples = len(load_shard(str(shards["data.videos"])).only("video"))
    code, lines, stops = dry(**{"output_dir": tmp_path / "run"})
    assert (code, stops) == (0, [])
    assert any(f"{samples:,} samples in 1 shards, {6 * 4 / samples:,.2f} epochs" in line for line in lines)
    assert any(line.startswith("steps          6, each of 4 clips + 8 images") for line in lines)
    assert not (tmp_path / "run").exists()


def test_dry_run_lists_all_that_would_stop_the_run(dry, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "log.jsonl").write_text("")
    (tmp_path / "bad.tar").write_bytes(b"no tar" * 200)
    bevt_ds.create_model("tiny", vocab_size=64, embed_dim=64).save_pretrained(tmp_path / "other")
    code, _, stops = dry(
        **{
            "train.micro_clips": 3,
            "data.videos": tmp_path / "bad.tar",
            "data.images": tmp_path / "none-*.tar",
            "train.precision": "fp16",
            "output_dir": tmp_path / "run",
            "init_from": tmp_path / "other",
        }
    )
    parts = ["micro_clips=3", "bad.tar is not a readable tar", "data.images: no file", "fp16 on a CPU"]
    assert code == 2
    for part in [*parts, "holds log.jsonl", "embed_dim=64"]:
        assert sum(part in stop for stop in stops) >= 1, (part, stops)
    assert len(stops) == 6


def test_dry_run_holds_kept_ids_against_the_settings(dry, small, shards, tmp_path):
    config = apply_overrides(
        get_recipe("demo", Config), {key: str(value) for key, value in {**small, "data.crops": 2}.items()}
    )
    for kind in ("video", "image"):
        shard, contract = load_shard(str(shards[f"data.{kind}s"])).only(kind), contract_of(config, kind)
        ids = np.zeros((len(shard), *shape_of(contract)), np.uint16)
        write_ids(place_of(tmp_path, shard.path, kind), shard, ids, {}, contract, {})
    given = {"output_dir": tmp_path / "run", "data.crops": 2, "tokens": tmp_path}
    assert dry(**given)[0] == 0
    code, _, stops = dry(**given, **{"data.flip": 0.25})
    assert code == 2 and len(stops) == 2 and all("data.flip=0.5, this run 0.25" in stop for stop in stops)
    (missing,) = dry(**{**given, "tokens": tmp_path / "none", "train.global_images": 0})[2]
    assert missing.endswith("is missing: run `bevt tokens` with the words of this run, which makes it.")


def test_dry_run_of_the_demo_asks_for_kept_ids_too(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)  # its shards are not drawn yet: no ids can be there
    assert pretrain.main(["recipe=demo", "data.crops=2", "tokens=ids", "dry_run=true"]) == 2
    assert capsys.readouterr().out.count("would stop") == 2


def test_dry_run_lists_all_fields_out_of_bounds(dry, tmp_path):
    code, lines, stops = dry(**{"optim.lr": 0, "data.size": 65, "data.images": tmp_path / "none.tar"})
    assert code == 2
    assert [
        part for part in ("optim.lr=0", "data.size=65", "none.tar") if not any(part in stop for stop in stops)
    ] == []
    assert not [line for line in lines if line.startswith("parameters")]


@pytest.mark.parametrize(
    ("resume", "part"), [("nowhere/step-00000001", "not a checkpoint"), ("auto", "nothing to continue")]
)
def test_dry_run_of_an_impossible_resume(dry, tmp_path, resume, part):
    code, _, stops = dry(**{"resume": resume, "output_dir": tmp_path / "run", "init_from": tmp_path / "gone"})
    assert code == 2 and any(part in stop for stop in stops), stops


def test_dry_run_of_finetuning(dry, tmp_path):
    base = {"recipe": "finetune_demo", "data.train": tmp_path / "none.tar", "data.classes": tmp_path / "classes.txt"}
    code, lines, stops = dry(finetune, base=base, **{"train.micro_clips": 3})
    assert code == 2
    for part in ("micro_clips=3", "none.tar", "classes.txt: no such file"):
        assert any(part in stop for stop in stops), (part, stops)
    assert "validation     none: data.val is empty" in lines


def test_run_owner_is_seen_without_taking_the_lock(tmp_path):
    assert owner_of(tmp_path) is None
    assert list(tmp_path.iterdir()) == []
    assert hold(tmp_path) is None
    assert owner_of(tmp_path) is None  # this process itself


def test_dry_run_by_epochs_shows_steps_and_trained_streams(dry, shards, tmp_path):
    samples = len(load_shard(str(shards["data.videos"])).only("video"))
    settings = {"train.steps": 0, "train.epochs": 3, "train.global_images": 0, "output_dir": tmp_path / "run"}
    code, lines, stops = dry(**settings)
    assert (code, stops) == (0, [])
    steps = -(-3 * samples // 4)
    assert any(line == f"steps          {steps}, each of 4 clips" for line in lines)
