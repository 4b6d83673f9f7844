"""Configuration: command line, validation, DeepSpeed JSON, help."""

import json
from pathlib import Path

import pytest

from bevt_ds import cli
from bevt_ds.config.command_line import parse_arguments
from bevt_ds.config.deepspeed import merge, read_json, resolve
from bevt_ds.config.help import page
from bevt_ds.config.parse import (
    apply_overrides,
    config_fields,
    from_dict,
    get_value,
    parse_overrides,
    to_dict,
)
from bevt_ds.config.recipes import PRETRAINING, get_recipe
from bevt_ds.config.validate import micro_steps, require_inputs, validate
from bevt_ds.errors import UserError
from bevt_ds.pretrain import USAGE

ROOT = Path(__file__).parents[2]
JSONS = sorted((ROOT / "ds_configs").glob("*.json"))


def configured(*words: str, recipe: str = "joint_swin_b"):
    return apply_overrides(get_recipe(recipe), parse_overrides(words))


@pytest.mark.parametrize("name", PRETRAINING)
def test_pretraining_recipes_are_valid_and_survive_json(name):
    config = get_recipe(name)
    assert config.recipe == name
    assert validate(config) is config
    assert from_dict(json.loads(json.dumps(to_dict(config)))) == config
    assert micro_steps(config, world=1) >= 1


def test_joint_recipe_has_the_original_numbers():
    c = get_recipe("joint_swin_b")
    assert (c.optim.lr, c.optim.weight_decay, c.optim.clip_grad) == (5e-4, 0.05, 3.0)
    assert (c.train.global_clips, c.train.global_images, c.model.drop_path) == (256, 2048, 0.3)
    assert (c.data.frames, c.data.stride, c.data.size, c.data.short_side) == (16, 8, 224, (256, 320))
    assert micro_steps(c, world=32) == 2  # the original's update_interval on 32 GPUs


def test_every_field_can_be_set_from_the_command_line():
    config = get_recipe("demo")
    for f in config_fields():
        value = get_value(config, f.key)
        text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
        assert get_value(apply_overrides(config, {f.key: text}), f.key) == value


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["train.stpes=3"], ["unknown key", "train.steps"]),
        (["steps=3"], ["unknown key", "train.steps"]),
        (["train.steps"], ["key=value"]),
        (["data.videos=a-000.tar", "data.videos=a-001.tar"], ["given twice", "quotes"]),
        (["train.steps=many"], ["expected int"]),
        (["train.steps=1.5"], ["expected int"]),
        (["train.steps=inf"], ["expected int"]),
        (["train.steps="], ["train.steps= has no value", "expected int"]),
        (["optim.lr="], ["optim.lr= has no value"]),
        (["train.batch_size=8"], ["train.global_clips"]),
        (["learning_rate=1"], ["optim.lr"]),
        (["model.window=8,7"], ["expected 3 values"]),
        (["train.precision=int8"], ["bf16, fp16, fp32"]),
        (["model.checkpointing=yes"], ["true or false"]),
    ],
)
def test_pretraining_command_line_mistakes_are_named(words, parts):
    with pytest.raises(UserError) as caught:
        configured(*words)
    for part in parts:
        assert part in str(caught.value)


def test_integers_may_be_written_as_floats():
    for text in ("100000", "1e5", "100000.0"):
        value = configured(f"train.steps={text}").train.steps
        assert (value, type(value)) == (100_000, int)
    assert configured("train.seed=9007199254740993.0").train.seed == 9007199254740993  # which no float is


@pytest.mark.parametrize(
    ("word", "part"),
    [
        ("data.size=200", "multiple of 32"),
        ("data.token_size=100", "half of data.size"),
        ("data.frames=7", "even"),
        ("data.short_side=320,256", "must not be larger"),
        ("data.short_side=100,256", "cannot hold the crop"),
        ("model.drop_path=1.5", "[0, 1)"),
        ("data.mask.ratio=0", "mask at least one"),
        ("data.mask.ratio=0.004", "mask at least one"),
        ("data.mask.tube=1.0,0.4", "smaller first"),
        ("train.global_clips=-2", "at least 0"),
        ("optim.weight_decay=nan", "finite"),
        ("train.min_gain=0.2", "held-out samples"),
        ("data.holdout=0.6", "in [0, 0.5]"),
        ("data.clips_per_video=3", "multiple of data.clips_per_video"),
        ("train.steps=0", "both 0"),
        ("train.log_every=0", "at least 1"),
    ],
)
def test_invalid_configuration_values_are_refused(word, part):
    with pytest.raises(UserError) as caught:
        validate(configured(word))
    assert part in str(caught.value)


def test_indivisible_batch_size_lists_divisible_ones():
    for micro in (0, 7):
        with pytest.raises(UserError, match=r"train.micro_clips can be 1, 2, 4, 8, 16, 32, 64, 128\.$"):
            micro_steps(configured(f"train.micro_clips={micro}"), world=2)
    with pytest.raises(UserError, match="multiple of the 3 ranks"):
        micro_steps(configured(), world=3)
    with pytest.raises(UserError, match="forward passes"):
        micro_steps(configured("train.micro_clips=8"), world=2)


def test_missing_pretraining_inputs_are_named(tmp_path):
    with pytest.raises(UserError, match="data.videos is empty"):
        require_inputs(configured())
    shards = ("data.videos=v.tar", "data.images=i.tar")
    with pytest.raises(UserError, match="encoder.pkl"):
        require_inputs(configured(*shards))
    with pytest.raises(UserError, match="no such file"):
        require_inputs(configured(*shards, f"tokenizer.weights={tmp_path / 'none.pkl'}"))
    gone = (*shards, "tokenizer.name=random_projection", f"init_from={tmp_path / 'gone'}")
    with pytest.raises(UserError, match="init_from=.*no such file"):
        require_inputs(configured(*gone))
    require_inputs(configured(*gone, "resume=auto"))  # a run that continues does not read it


# The DeepSpeed JSON


def test_ds_config_is_found_by_name_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for path in JSONS:
        assert read_json(path.stem) == json.loads(path.read_text())
    with pytest.raises(UserError, match="go by name: .*zero2, zero3"):
        read_json("ds_configs/zero2.json")


def test_bevt_command_starts_the_programs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["pretrain", "--deepspeed_config", "zero3", "dry_run=true"]) == 0
    assert "parameters" in capsys.readouterr().out
    assert cli.main(["finetune", "recipe=none"]) == 2
    assert capsys.readouterr().err.startswith("error: no recipe 'none'")
    for program in ("evaluate", "probe"):
        assert cli.main([program, "--help"]) == 0
        assert f"bevt_ds/{program}.py" in capsys.readouterr().out


def test_ctrl_c_of_bevt_is_one_line(monkeypatch, capsys):
    def interrupt(argv):
        raise KeyboardInterrupt

    monkeypatch.setattr("bevt_ds.pretrain.main", interrupt)
    assert cli.main(["pretrain"]) == 130
    assert capsys.readouterr().err == "interrupted\n"


@pytest.mark.parametrize("path", JSONS, ids=lambda p: p.stem)
def test_shipped_deepspeed_json_leaves_numbers_to_the_recipe(path):
    config, values = get_recipe("joint_swin_b"), read_json(str(path))
    merged, notes = merge(config, set(), values, world=2)
    assert (merged, notes) == (config, [])
    result = resolve(values, config, world=2, largest=10, total=1000, width=64)
    assert '"auto"' not in json.dumps(result)
    assert "optimizer" not in result
    assert result["train_batch_size"] == 256 + 2048
    assert result["gradient_accumulation_steps"] == 32
    assert result["gradient_clipping"] == 3.0
    assert result["bf16"]["enabled"] is True
    assert result["data_types"]["grad_accum_dtype"] == "fp32"


def test_deepspeed_json_number_replaces_a_default_and_is_reported():
    values = {"gradient_clipping": 1.0, "optimizer": {"type": "AdamW", "params": {"lr": 1e-4, "betas": [0.9, 0.95]}}}
    config, notes = merge(get_recipe("joint_swin_b"), set(), values, world=1)
    assert (config.optim.clip_grad, config.optim.lr, config.optim.betas) == (1.0, 1e-4, (0.9, 0.95))
    assert len(notes) == 3
    assert "optim.lr: 0.0005 -> 0.0001" in "\n".join(notes)


def test_deepspeed_json_that_contradicts_the_command_line_is_an_error():
    config = configured("optim.lr=0.001")
    with pytest.raises(UserError, match=r"optim.lr=0.001.*optimizer.params.lr.*0.0001"):
        merge(config, {"optim.lr"}, {"optimizer": {"params": {"lr": 1e-4}}}, world=1)
    merge(config, {"optim.lr"}, {"optimizer": {"params": {"lr": 1e-3}}}, world=1)  # agreeing is fine


@pytest.mark.parametrize(
    ("sections", "precision"),
    [
        ({"bf16": {"enabled": True}}, "bf16"),
        ({"fp16": {"enabled": True}}, "fp16"),
        ({"bf16": {"enabled": False}, "fp16": {"enabled": False}}, "fp32"),
        ({"bf16": {"enabled": "auto"}}, "bf16"),
        ({"bf16": {"enabled": False}}, "fp32"),
        ({"fp16": {"enabled": False}}, "bf16"),
        ({}, "bf16"),
    ],
)
def test_deepspeed_json_precision(sections, precision):
    config, _ = merge(get_recipe("joint_swin_b"), set(), sections, world=1)
    assert config.train.precision == precision
    settings = resolve(sections, config, 1, 1, 1, 1)
    assert {name: settings[name]["enabled"] for name in ("bf16", "fp16")} == {
        "bf16": precision == "bf16",
        "fp16": precision == "fp16",
    }


@pytest.mark.parametrize("values", [{}, {"zero_optimization": {"stage": 0}}, {"zero_optimization": {}}])
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_without_zero_is_refused(values, precision):
    config = configured(f"train.precision={precision}")
    with pytest.raises(UserError, match=r"stage 0.*zero1.*train.precision=fp32"):
        validate(config, values)
    validate(configured("train.precision=fp32"), values)
    validate(config, {"zero_optimization": {"stage": 1}})


def test_deepspeed_json_batch_size_keeps_the_clip_to_image_ratio():
    config, _ = merge(get_recipe("joint_swin_b"), set(), {"train_batch_size": 1152}, world=1)
    assert (config.train.global_clips, config.train.global_images) == (128, 1024)
    config, _ = merge(get_recipe("joint_swin_b"), set(), {"train_micro_batch_size_per_gpu": 18}, world=1)
    assert (config.train.micro_clips, config.train.micro_images) == (2, 16)
    config, _ = merge(get_recipe("joint_swin_b"), set(), {"gradient_accumulation_steps": 4}, world=8)
    assert (config.train.micro_clips, config.train.micro_images) == (8, 64)
    with pytest.raises(UserError, match="does not split"):
        merge(get_recipe("joint_swin_b"), set(), {"train_batch_size": 100}, world=1)
    with pytest.raises(UserError, match="do not fit"):
        both = {"train_micro_batch_size_per_gpu": 18, "gradient_accumulation_steps": 4}
        merge(get_recipe("joint_swin_b"), set(), both, world=8)


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("{", "not JSON"),
        ("[]", "JSON object"),
        ('{"scheduler": {}}', "scheduler"),
        ('{"optimizer": {"type": "Lamb"}}', "Lamb"),
        ('{"optimizer": "AdamW"}', "optimizer must be an object"),
        ('{"optimizer": {"params": {"lr": "1e-3"}}}', "optimizer.params.lr must be a number"),
        ('{"optimizer": {"params": {"amsgrad": true}}}', "amsgrad"),
        ('{"train_batch_size": "20"}', "train_batch_size must be a number"),
        ('{"gradient_accumulation_steps": 0}', "at least 1"),
        ('{"checkpoint": "zip"}', "checkpoint must be an object"),
        ('{"checkpoint": {"tag_validation": "loud"}}', "one of ignore, warn, fail"),
        ('{"checkpoint": {"checkpoint_serialization": "zip"}}', "must be true"),
        ('{"checkpoint": {"writer": {"type": "fast"}}}', "remove checkpoint.writer"),
        ('{"checkpoint": {"load_universal": true}}', "remove checkpoint.load_universal"),
        ('{"checkpoint": {"use_node_local_storage": true}}', "remove checkpoint.use_node_local_storage"),
    ],
)
def test_unusable_deepspeed_json_is_named(tmp_path, text, part):
    path = tmp_path / "ds.json"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        read_json(str(path))
    assert part in str(caught.value)


def test_unknown_deepspeed_auto_is_refused():
    values = {"zero_optimization": {"stage": 2, "sub_group_size": "auto"}}
    with pytest.raises(UserError, match="zero_optimization.sub_group_size"):
        resolve(values, get_recipe("demo"), 1, 1, 1, 1)


# Arguments and help


def test_pretraining_arguments():
    a = parse_arguments(
        ["--local_rank=0", "--deepspeed_config", "x.json", "recipe=demo", "a=1", "--deepspeed"], "r", "j"
    )
    assert (a.deepspeed_config, a.recipe, a.overrides) == ("x.json", "demo", ["a=1"])
    assert parse_arguments([], "r", "j").recipe == "r"
    with pytest.raises(UserError, match="given twice"):
        parse_arguments(["recipe=a", "recipe=b"], "r", "j")
    with pytest.raises(UserError, match="needs a file"):
        parse_arguments(["--deepspeed_config"], "r", "j")
    with pytest.raises(UserError, match="recipe= is missing"):
        get_recipe(parse_arguments(["recipe="], "r", "j").recipe)
    with pytest.raises(UserError, match="--steps"):
        parse_arguments(["--steps=3"], "r", "j")


def test_help_names_every_recipe_and_field():
    text = page(USAGE, PRETRAINING, get_recipe("demo"))
    for name in PRETRAINING:
        assert name in text
    for f in config_fields():
        assert f.key == "recipe" or f"\n  {f.key}=" in text
        assert f.field.help


def test_help_shows_bounds_and_what_may_change_on_resume():
    text = page(USAGE, PRETRAINING, get_recipe("demo"))
    assert "\n  data.size=128  <int, at least 1, a multiple of 32>\n" in text
    assert "\n  data.workers=1  <int, at least 1> [free on resume]\n" in text
    assert "\n  data.frames=8  <int, at least 1, even>\n" in text
    assert "\n  data.mask.tube=0.5,1.0  <(float, float), in (0, 1]>\n" in text
    assert "\n  tokenizer.seed=0  <int>\n" in text
