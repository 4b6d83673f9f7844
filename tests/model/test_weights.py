"""Saving and loading weights, official checkpoints, and refusals of unsuitable files."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from bevt_ds import BEVT, UserError, VideoClassifier, VideoSwin
from bevt_ds.model.containers import strip
from bevt_ds.model.convert import RENAMES, our_name
from bevt_ds.model.weights import load_init
from tests.hostile import Canary


def to_official(model: BEVT) -> dict[str, torch.Tensor]:
    """The model's state under official names and shapes, as the original's training saves it."""
    back = {ours: theirs for theirs, ours in RENAMES}
    pt, ph, pw = model.arch["patch"]
    state = {}
    for name, value in model.state_dict().items():
        prefix = max((p for p in back if name.startswith(p)), key=len)
        key = back[prefix] + name[len(prefix) :]
        if key == "patch_embed.proj.weight":
            value = value.view(-1, 3, pt, ph, pw)
        elif key == "patch_embed_2d.proj.weight":
            value = value.view(-1, 3, ph, pw)
        elif key == "fpn.0.weight":
            value = value.squeeze(2)
        elif key == "mask_token":
            value = value.view(1, 1, -1)
        state[key if key.startswith("cls_head.") else f"backbone.{key}"] = value.clone()
    return state


@pytest.fixture
def official(small_bevt):
    """A model with the published spatial window, and its official state dict."""
    model = small_bevt(window=(4, 7, 7), depths=(1, 1, 1, 1))
    return model, to_official(model)


def equal(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    theirs = b.state_dict()
    return all(torch.equal(value, theirs[name]) for name, value in a.state_dict().items())


def test_save_and_load_round_trip(small_bevt, tmp_path, capsys):
    model = small_bevt(image_windows="swin", drop_path=0.2)
    model.save_pretrained(tmp_path / "out")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["config.json", "model.safetensors"]
    assert len({p.stat().st_mode for p in (tmp_path / "out").iterdir()}) == 1
    copy = BEVT.from_pretrained(tmp_path / "out", checkpointing=True)
    assert equal(model, copy) and copy.arch == model.arch and copy.encoder.checkpointing
    assert equal(model, BEVT.from_pretrained(tmp_path / "out" / "model.safetensors"))
    assert f"{len(model.state_dict())} tensors loaded" in capsys.readouterr().out


def test_save_overwrites_nothing(small_bevt, tmp_path):
    small_bevt().save_pretrained(tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()
    with pytest.raises(UserError, match="exists"):
        small_bevt().save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == before


def test_save_into_an_unwritable_folder_is_named(small_bevt, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write "):
        small_bevt().save_pretrained(tmp_path / "file" / "out")


def test_encoder_from_a_bevt_folder_and_back(small_bevt, tmp_path):
    model = small_bevt()
    model.save_pretrained(tmp_path / "bevt")
    encoder = VideoSwin.from_pretrained(tmp_path / "bevt")
    assert equal(encoder, model.encoder)
    encoder.save_pretrained(tmp_path / "encoder")
    assert equal(VideoSwin.from_pretrained(tmp_path / "encoder"), encoder)
    with pytest.raises(UserError, match=r"lacks image_embed|lacks mask_token"):
        BEVT.from_pretrained(tmp_path / "encoder")


@pytest.mark.parametrize("container", ["model", "module", "state_dict", None])
@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_official_checkpoint_loads_every_tensor(container, suffix, official, tmp_path):
    """Every tensor arrives, whatever the wrapping; what is of no use is listed with its reason."""
    model, state = official
    state = {f"module.{key}": value for key, value in state.items()} if container else state
    extra = {
        "backbone.layers.0.blocks.0.attn.relative_position_index": torch.zeros(196, 196, dtype=torch.int64),
        "cls_head.vae_encoder.blocks.input.w": torch.zeros(2),
        "ema_backbone_norm_weight": torch.zeros(2),
    }
    path = tmp_path / f"joint.{suffix}"
    if suffix == "safetensors":
        save_file(state | extra, path)
    else:
        meta = {"meta": {"epoch": 150}, "optimizer": {"state": {}}}
        torch.save({container: state | extra, **meta} if container else state | extra, path)
    copy = BEVT.from_pretrained(path)
    assert equal(model, copy)
    assert copy.arch == model.arch
    report = load_init(copy, path)
    assert report.unused.keys() == {strip(key) for key in extra} and not report.fresh and not report.resized
    for reason in report.unused.values():
        assert reason in str(report)


def test_encoder_from_an_official_checkpoint(official, tmp_path):
    model, state = official
    torch.save({"state_dict": state | {"cls_head.fc_cls.weight": torch.zeros(3, 256)}}, tmp_path / "finetuned.pth")
    assert equal(VideoSwin.from_pretrained(tmp_path / "finetuned.pth"), model.encoder)


def image_stream(official_state):
    """A 2-D checkpoint in the style of Swin's: what an image-only script would have saved of these weights."""
    state = {}
    for key, value in official_state.items():
        key = key.removeprefix("backbone.")
        if key.endswith("relative_position_bias_table"):
            value = value[:169].clone()
        elif key == "patch_embed.proj.weight":
            value = value[:, :, 0].clone()
        if not key.startswith(("patch_embed_2d", "fpn", "lm_down", "mask_token", "cls_head")):
            state[f"encoder.{key}"] = value
    return state | {"lm_head.weight": torch.zeros(16, 256), "lm_head.bias": torch.zeros(16)}


def test_official_image_stream_checkpoint_is_inflated(official, tmp_path):
    """A still clip looks to the inflated stem as its image looks to the images' stem."""
    _, state = official
    torch.save({"model": image_stream(state)}, tmp_path / "image.pth")
    model = BEVT.from_pretrained(tmp_path / "image.pth")
    image = torch.randn(1, 3, 64, 64)
    clip = image.unsqueeze(2).expand(-1, -1, 4, -1, -1)
    with torch.no_grad():
        still, once = model.encoder.patch_embed(clip), model.image_embed(image.unsqueeze(2))
    torch.testing.assert_close(still, once.expand(-1, 2, -1, -1, -1), rtol=0, atol=1e-5)
    report = load_init(model, tmp_path / "image.pth")
    groups = {name.split(".")[0] for name in report.fresh}
    assert groups == {"mask_token", "video_decoder", "image_decoder", "lm_head"}
    assert "lm_head.weight" in report.unused and "inflated" in str(report)


@pytest.mark.parametrize("kind", ["joint", "image stream"])
def test_classifier_from_an_official_checkpoint(kind, official, tmp_path):
    """Fine-tuning's start: the encoder is taken and its tables are fitted to a longer window; the head is new."""
    model, state = official
    save_file(state if kind == "joint" else image_stream(state), tmp_path / "model.safetensors")
    options = {key: model.arch[key] for key in ("embed_dim", "depths", "num_heads")}
    classifier = VideoClassifier(5, window=(16, 7, 7), **options)
    report = load_init(classifier, tmp_path / "model.safetensors")
    assert set(report.fresh) == {"head.weight", "head.bias"}
    assert len(report.resized) == sum(options["depths"])
    block, source = (m.encoder.layers[0].blocks[0] for m in (classifier, model))
    assert block.attn.qkv.weight.equal(source.attn.qkv.weight)
    planes = block.attn.relative_position_bias_table.view(31, 169, -1)
    assert planes.std(0).max() < 1e-6 or kind == "joint", "an image says nothing about time"


def test_image_only_model_is_inflated_for_joint_training(small_bevt, tmp_path):
    """Joint training starts from an image-only run of ours: no untrained tables, no untrained stem for the clips."""
    model = small_bevt()
    model.save_pretrained(tmp_path / "stage1", streams=["image"])
    joint = small_bevt()
    report = load_init(joint, tmp_path / "stage1")
    assert "image-only" in str(report)
    table = joint.encoder.layers[1].blocks[0].attn.relative_position_bias_table.unflatten(0, (3, 3, 3))
    trained = model.encoder.layers[1].blocks[0].attn.relative_position_bias_table.unflatten(0, (3, 3, 3))[1]
    assert all(torch.equal(plane, trained) for plane in table)
    image = torch.randn(2, 3, 1, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(
            joint.encoder.patch_embed(image.expand(-1, -1, 2, -1, -1)), model.image_embed(image), rtol=0, atol=1e-5
        )
    untouched = ("image_embed", "image_decoder", "lm_head", "mask_token")
    theirs = joint.state_dict()
    assert all(torch.equal(v, theirs[n]) for n, v in model.state_dict().items() if n.startswith(untouched))


@pytest.mark.parametrize(
    ("stream", "untrained"), [("image", ("video_decoder.",)), ("video", ("image_decoder.", "image_embed."))]
)
def test_untrained_decoder_of_a_checkpoint_starts_fresh(stream, untrained, small_bevt, tmp_path):
    """Older runs of one stream left the other's decoder decayed to nearly nothing in their weights."""
    model = small_bevt()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith(untrained):
                parameter.mul_(0.00207)
    model.save_pretrained(tmp_path / "one", streams=[stream])
    joint = small_bevt()
    before = {name: value.clone() for name, value in joint.state_dict().items()}
    report = load_init(joint, tmp_path / "one")
    assert set(report.fresh) == {name for name in before if name.startswith(untrained)}
    assert all(torch.equal(before[name], value) for name, value in joint.state_dict().items() if name in report.fresh)
    for part in untrained:
        assert f"{part[:-1]}: its run trained no {'video' if stream == 'image' else 'image'} stream" in str(report)
    whole = small_bevt()
    model.save_pretrained(tmp_path / "both")
    assert not load_init(whole, tmp_path / "both").fresh


def test_bias_tables_are_resized_to_another_window(small_bevt, tmp_path):
    model = small_bevt()
    with torch.no_grad():
        for stage in model.encoder.layers:
            for block in stage.blocks:
                block.attn.relative_position_bias_table.fill_(3.0)
    model.save_pretrained(tmp_path)
    larger = small_bevt(window=(2, 4, 4))
    report = load_init(larger, tmp_path)
    assert len(report.resized) == 6 and "6 bias tables resized" in str(report)
    table = larger.encoder.layers[0].blocks[0].attn.relative_position_bias_table
    assert table.shape == (3 * 7 * 7, 1)
    torch.testing.assert_close(table.detach(), torch.full_like(table, 3.0))


def test_config_next_to_an_official_checkpoint_states_the_window(small_bevt, tmp_path):
    model = small_bevt(depths=(1, 1, 1, 1), window=(5, 2, 2))
    save_file(to_official(model), tmp_path / "joint.safetensors")
    with pytest.raises(UserError, match="81 rows, which several windows have: .*config.json"):
        BEVT.from_pretrained(tmp_path / "joint.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"format": "bevt_ds", "arch": {"window": [5, 2, 2]}}))
    assert equal(model, BEVT.from_pretrained(tmp_path / "joint.safetensors"))
    (tmp_path / "config.json").write_text(json.dumps({"format": "somebody else's"}))
    with pytest.raises(UserError, match="config.json"):
        BEVT.from_pretrained(tmp_path / "joint.safetensors")


@pytest.mark.parametrize("kind", ["folder", "official"])
def test_checkpoints_with_another_image_window_are_refused(kind, official, tmp_path):
    model, state = official
    path = tmp_path / "joint.safetensors"
    if kind == "folder":
        path = tmp_path / "folder"
        model.save_pretrained(path)
    else:
        save_file(state, path)
    other = BEVT(**{**model.arch, "image_windows": "swin"})
    before = other.lm_head.weight.clone()
    with pytest.raises(UserError, match="image_windows=official, this model image_windows=swin"):
        load_init(other, path)
    assert torch.equal(before, other.lm_head.weight)


@pytest.mark.parametrize("change", [{"embed_dim": 64}, {"vocab_size": 32}, {"depths": (1, 1, 2, 1)}])
def test_checkpoints_of_another_architecture_are_refused(change, small_bevt, tmp_path):
    small_bevt().save_pretrained(tmp_path)
    with pytest.raises(UserError, match=f"{next(iter(change))}=.*, this model .*: (make them agree|use the same)"):
        load_init(small_bevt(**change), tmp_path)


def test_head_of_another_vocabulary_starts_fresh_on_request(small_bevt, tmp_path):
    """Stage 1 to stage 2 with another tokenizer: everything but the head is loaded, and the report says so."""
    first, second = small_bevt(vocab_size=16), small_bevt(vocab_size=24)
    first.save_pretrained(tmp_path / "stage1")
    before = second.lm_head.weight.clone()
    with pytest.raises(UserError, match=r"vocab_size=16, this model vocab_size=24: .*init_head=false"):
        load_init(second, tmp_path / "stage1")
    report = load_init(second, tmp_path / "stage1", head=False)
    assert report.fresh == ("lm_head.weight", "lm_head.bias")
    assert "2 not loaded: init_head=false: the head starts fresh" in str(report)
    assert torch.equal(second.lm_head.weight, before)
    rest = {name for name in second.state_dict() if not name.startswith("lm_head.")}
    assert set(report.loaded) == rest
    assert all(torch.equal(second.state_dict()[name], first.state_dict()[name]) for name in rest)


def test_unknown_and_missing_tensors_are_refused(official, tmp_path):
    model, state = official
    for name, broken, message in (
        ("unknown", state | {"backbone.surprise": torch.zeros(1)}, "no BEVT model has: surprise"),
        ("missing", {k: v for k, v in state.items() if "norm2" not in k}, "lacks encoder.layers.0.blocks.0.norm2"),
        ("shape", state | {"backbone.norm.weight": torch.zeros(3)}, "other shapes for encoder.norm.weight"),
        ("rows", {k: v[:7] if k.endswith("table") else v for k, v in state.items()}, "bias tables of 7 rows"),
        ("foreign", {"conv1.weight": torch.zeros(1)}, "not a Swin or BEVT checkpoint"),
    ):
        save_file({k: v.contiguous() for k, v in broken.items()}, tmp_path / f"{name}.safetensors")
        with pytest.raises(UserError, match=message):
            BEVT.from_pretrained(tmp_path / f"{name}.safetensors")


def test_damaged_config_is_named(small_bevt, tmp_path):
    small_bevt().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for broken, message in (
        ({k: v for k, v in config.items() if k != "arch"}, "without arch"),
        ({**config, "arch": {**config["arch"], "later": 1}}, "another version: its config.json has later"),
        ({**config, "format": "other"}, "not a model folder"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(broken))
        with pytest.raises(UserError, match=message):
            BEVT.from_pretrained(tmp_path)
    config["arch"]["window"] = [4, 2, 2]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="bias table of 27 rows, which its window"):
        load_init(small_bevt(), tmp_path)


def test_paths_without_a_model_are_named(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "text.pth").write_text("not a checkpoint")
    (tmp_path / "text.safetensors").write_text("not a checkpoint")
    torch.save([1, 2], tmp_path / "list.pth")
    for name, message in (
        ("absent", "no such file or folder"),
        ("folder", "not a model folder"),
        ("text.pth", "not a checkpoint that torch.save"),
        ("text.safetensors", "not a safetensors file"),
        ("list.pth", "holds no state dict"),
    ):
        with pytest.raises(UserError, match=message) as error:
            BEVT.from_pretrained(tmp_path / name)
        assert name in str(error.value)


@pytest.mark.parametrize("zipped", [True, False])
def test_checkpoint_pickle_runs_no_code(zipped, tmp_path):
    canary = tmp_path / "canary"
    torch.save({"state_dict": Canary(canary)}, tmp_path / "evil.pth", _use_new_zipfile_serialization=zipped)
    with pytest.raises(UserError, match="holds no state dict"):
        BEVT.from_pretrained(tmp_path / "evil.pth")
    assert not canary.exists()


def test_every_official_tensor_name_is_mapped(golden):
    names = load_file(golden / "bevt_joint_small.safetensors").keys()
    ours = [our_name(name.removeprefix("backbone.")) for name in names]
    assert None not in ours and len(set(ours)) == len(ours)
