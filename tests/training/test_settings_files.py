"""Settings from files: a run as a recipe, resume with a run's settings, `config=FILE`."""

from __future__ import annotations

import json

import pytest

from bevt_ds.config.command_line import given_keys, parse_arguments, resolve_config
from bevt_ds.config.parse import set_value, to_dict
from bevt_ds.config.recipes import get_recipe
from bevt_ds.config.schema import Config, FinetuneConfig
from bevt_ds.errors import UserError


@pytest.fixture
def run(tmp_path):
    """The folder of a run of the demo with another rate, of ZeRO stage 3."""
    folder = tmp_path / "run"
    folder.mkdir()
    config = set_value(set_value(get_recipe("demo"), "optim.lr", 0.25), "output_dir", str(folder))
    (folder / "config.json").write_text(json.dumps(to_dict(config)))
    (folder / "deepspeed.json").write_text(json.dumps({"zero_optimization": {"stage": 3}}))
    return folder


def resolved(*words, kind=Config):
    arguments = parse_arguments(words, default_recipe="joint_swin_b", default_json="zero2")
    config, values, _ = resolve_config(arguments, kind, world=1)
    return config, values["zero_optimization"]["stage"], given_keys(arguments, config)


def test_settings_of_a_run_serve_as_a_recipe(run):
    for name in (run, run / "config.json"):
        config, stage, given = resolved(f"recipe={name}", "train.seed=3")
        assert (config.recipe, config.optim.lr, config.train.seed, stage) == ("demo", 0.25, 3, 3)
        assert (config.output_dir, config.resume, given) == ("", "never", {"train.seed"})
    assert resolved(f"recipe={run}", "--deepspeed_config", "zero1")[1] == 1


def test_resume_takes_the_settings_of_the_run(run):
    config, stage, given = resolved("resume=auto", f"output_dir={run}", "train.log_every=7")
    assert (config.optim.lr, config.train.log_every, stage) == (0.25, 7, 3)
    assert (config.output_dir, config.resume) == (str(run), "auto")
    assert given == {"resume", "output_dir", "train.log_every"}
    assert resolved("resume=auto", f"output_dir={run}", "recipe=demo")[0].optim.lr == get_recipe("demo").optim.lr
    assert resolved("resume=auto", f"output_dir={run}-2")[0].recipe == "joint_swin_b"


def test_settings_of_another_kind_or_damaged_run_are_named(run):
    with pytest.raises(UserError, match=f"{run}.*does not know: "):
        resolved(f"recipe={run}", kind=FinetuneConfig)
    (run / "config.json").write_text('{"train": ')
    with pytest.raises(UserError, match="config.json is not the config.json of a run"):
        resolved(f"recipe={run}")
    with pytest.raises(UserError, match="no recipe 'nowhere'.*or the folder of a run"):
        resolved("recipe=nowhere")


SETTINGS = {
    "a.yaml": "recipe: demo\ntrain: {steps: 9, precision: fp32}\noptim.lr: 1e-3\ndata:\n  short_side: [160, 192]\n",
    "a.json": json.dumps(
        {"recipe": "demo", "train": {"steps": 9}, "optim": {"lr": 0.001}, "data.short_side": [160, 192]}
    ),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_config_file_sets_fields(tmp_path, name):
    (tmp_path / name).write_text(SETTINGS[name])
    config, _, given = resolved(f"config={tmp_path / name}", "train.steps=11")
    assert (config.recipe, config.train.steps, config.optim.lr) == ("demo", 11, 1e-3)  # the command line wins
    assert config.data.short_side == (160, 192)
    assert {"train.steps", "optim.lr", "data.short_side"} <= given
    (tmp_path / "b.yaml").write_text("dry_run: true")
    assert resolved(f"config={tmp_path / 'b.yaml'}")[0].dry_run is True


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train: [1", "neither JSON nor YAML"),
        ("- 1", "expected keys and values"),
        ("train:", "train has no value"),
        ("train: {steps: 1}\ntrain.steps: 2", "train.steps is given twice"),
        ("train: {stepz: 1}", "unknown key 'train.stepz'"),
        ("train: {steps: many}", "train.steps=many"),
    ],
)
def test_mistake_in_a_config_file_is_named(tmp_path, text, message):
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(UserError, match=message):
        resolved(f"config={tmp_path / 'a.yaml'}")
    with pytest.raises(UserError, match="cannot be read"):
        resolved(f"config={tmp_path / 'none.yaml'}")
