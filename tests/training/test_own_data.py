"""Training on own shards: recipes, epochs, the held-out share, messages."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest

from bevt_ds.config.parse import apply_overrides
from bevt_ds.config.recipes import demo, is_drawn, recipe_for, vq_demo
from bevt_ds.config.samples import DataConfig
from bevt_ds.config.schema import Config, FinetuneConfig
from bevt_ds.config.validate import validate
from bevt_ds.data.holdout import split
from bevt_ds.data.loader import Source, _samples
from bevt_ds.data.plan import StreamId
from bevt_ds.data.reading.members import COLUMNS, Shard
from bevt_ds.data.reading.storage import Storage
from bevt_ds.errors import UserError
from bevt_ds.eval.held_out import StreamSummary, shortfall
from bevt_ds.model.presets import create_model, require_same_sizes
from tests.training.processes import run_ranks


def configured(recipe: str, **given: str) -> Config:
    overrides = {key.replace("__", "."): text for key, text in given.items()}
    return apply_overrides(recipe_for(recipe, Config, overrides), overrides)


def shard_of(path: str, keys: list[str]) -> Shard:
    rows = {name: tuple(range(len(keys))) for name in COLUMNS}
    return Shard(path, **{**rows, "keys": tuple(keys), "extensions": ("mp4",) * len(keys)}, ignored=0)


def keys_of(shards: list[Shard]) -> list[str]:
    return [key for shard in shards for key in shard.keys]


# Samples held out


def test_held_out_share_does_not_depend_on_sharding():
    keys = [f"folder/clip-{i:05}" for i in range(10_000)]
    rest, held = split([shard_of("a", keys)], 0.02, "video")
    assert 150 < len(keys_of(held)) < 250  # 200 wanted, standard deviation 14
    assert sorted(keys_of(rest) + keys_of(held)) == keys
    parts = [shard_of(str(i), keys[i::7][::-1]) for i in range(7)]
    assert set(keys_of(split(parts, 0.02, "video")[1])) == set(keys_of(held))
    assert set(keys_of(held)) < set(keys_of(split(parts, 0.04, "video")[1]))
    assert split(parts, 0.0, "video") == (parts, [])


def test_held_out_split_keeps_samples_of_one_key_together():
    shards = [shard_of("a", ["x", "y"]), shard_of("b", ["x"]), shard_of("c", ["y", "z"])]
    rest, held = split(shards, 1e-9, "video")
    assert len(set(keys_of(held))) == 1 and not set(keys_of(rest)) & set(keys_of(held))
    assert all(len(shard) for shard in rest + held)
    with pytest.raises(UserError, match="no video to train on.*data.holdout=0"):
        split([shard_of("a", ["x"]), shard_of("b", ["x"])], 0.1, "video")


def test_training_never_sees_held_out_samples(shards):
    storage = Storage(DataConfig())
    for train, judge, path in (
        (StreamId.VIDEO, StreamId.EVAL_VIDEO, shards["data.videos"]),
        (StreamId.IMAGE, StreamId.EVAL_IMAGE, shards["data.images"]),
    ):
        own, held = Source(train, str(path), 8, 4), Source(judge, str(path), 8, 4, held_out=True)
        every = keys_of(_samples(own, storage, 0.0))
        trained, judged = keys_of(_samples(own, storage, 0.3)), keys_of(_samples(held, storage, 0.3))
        assert judged and sorted(trained + judged) == sorted(every)
        assert keys_of(_samples(replace(held, held_out=False), storage, 0.3)) == every  # eval shards are used whole
    storage.close()


def test_run_by_epochs_with_held_out_share_resumes_exactly(tmp_path, small, shards):
    """Two ranks. Right values: 2 epochs of the clips that are left, rounded up; the same losses after a resume."""
    settings = {**small, "data.holdout": 0.2, "train.epochs": 2, "train.checkpoint_every": 1, "model.drop_path": 0.3}
    del settings["train.steps"]
    whole = run_ranks(tmp_path / "run", settings, world=2)
    assert whole.code == 0, whole.output
    storage = Storage(DataConfig())
    clips = keys_of(_samples(Source(StreamId.VIDEO, str(shards["data.videos"]), 4, 2), storage, 0.2))
    storage.close()
    losses, steps = whole.losses(), -(-2 * len(clips) // 4)
    assert len(losses) == steps and f"{len(clips)} videos" in whole.output
    assert {"video", "image"} == set(json.loads((whole.folder / "summary.json").read_text()))
    assert f"video figures are of 20.0% of data.videos={shards['data.videos']}" in whole.output
    assert (whole.folder / "samples.png").is_file()
    shutil.rmtree(whole.folder / "checkpoints" / f"step-{steps:08}")
    again = run_ranks(whole.folder, {**settings, "resume": "auto"}, world=2)
    assert again.code == 0 and f"continuing from step {steps - 1}" in again.output, again.output
    assert again.losses() == losses
    other = run_ranks(whole.folder, {**settings, "resume": "auto", "data.holdout": 0.4})
    assert other.code == 2 and "data" in other.output.splitlines()[-1]


# Recipes


def test_demo_settings_do_not_apply_to_own_shards():
    own = configured("demo", data__videos="mine-*.tar")
    assert (own.data.eval_videos, own.data.eval_images, own.data.images, own.train.min_gain) == ("", "", "", 0)
    assert (own.train.global_clips, own.train.global_images) == (4, 0)
    both = configured(
        "demo", data__videos="v.tar", data__images="i.tar", data__eval_videos="e.tar", train__min_gain="0.1"
    )
    assert (both.data.eval_videos, both.data.eval_images, both.train.min_gain) == ("e.tar", "", 0.1)
    assert both.train.global_images == demo().train.global_images
    assert configured("demo", data__videos=demo().data.videos, train__log_every="10") == demo()


def test_shards_are_drawn_only_for_runs_that_read_the_demo_s_alone():
    assert is_drawn(demo()) and is_drawn(vq_demo()) and is_drawn(configured("demo", data__eval_images=""))
    assert not is_drawn(configured("demo", data__videos="mine.tar"))
    assert not is_drawn(configured("demo", data__eval_videos="mine.tar"))
    assert not is_drawn(configured("small"))  # which names none


def test_small_recipe_trains_on_given_streams():
    clips, images = configured("small", data__videos="v.tar"), configured("small", data__images="i.tar")
    assert (clips.train.global_images, images.train.global_clips) == (0, 0)
    assert clips.train.global_clips and images.train.global_images
    both = configured("small", data__videos="v.tar", data__images="i.tar")
    assert both.train.global_clips and both.train.global_images
    for config in (clips, images, both, configured("small_images", data__images="i.tar")):
        assert validate(config).data.holdout and config.tokenizer.name == "random_projection"


def test_epochs_replace_the_steps_of_a_recipe():
    assert (configured("demo", train__epochs="3").train.steps, configured("demo").train.steps) == (0, 220)
    assert configured("demo", train__epochs="3", train__steps="5").train.steps == 5
    assert recipe_for("finetune_demo", FinetuneConfig, {"train.epochs": "3"}).train.steps == 0


# Words


def test_not_learned_names_the_data_and_the_remedy():
    summaries = {"video": StreamSummary(2.302, 0.1, 2.0, 0.2, 100), "image": StreamSummary(1.0, 0.1, 2.0, 0.2, 100)}
    message = shortfall(summaries, 0.2, {"video": "data.eval_videos=mine.tar", "image": "x"})
    assert "video loss on data.eval_videos=mine.tar ended 0.302 nats above" in message
    assert "train.steps" in message and "image loss" not in message


def test_init_from_another_preset_is_refused_by_name(tmp_path):
    create_model("tiny", vocab_size=8).save_pretrained(tmp_path / "weights")
    require_same_sizes("tiny", str(tmp_path / "weights"))
    with pytest.raises(UserError, match=r"embed_dim=32 \(model.name=swin_b has 128\).*say model.name=tiny"):
        require_same_sizes("swin_b", str(tmp_path / "weights"))
