"""`bevt convert`: what every target's library makes of what was written, and when nothing is written."""

from __future__ import annotations

import json
import re
import shutil
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
import torchvision
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from timm.models.swin_transformer import SwinTransformer
from torch import nn
from torchvision.models.video.swin_transformer import SwinTransformer3d

import bevt_ds
from bevt_ds import BEVT, UserError, VideoClassifier, VideoSwin, cli
from bevt_ds.config.parse import to_dict
from bevt_ds.config.recipes import get_recipe
from bevt_ds.config.schema import FinetuneConfig
from bevt_ds.errors import NonFiniteError
from bevt_ds.interop import references
from bevt_ds.interop.convert import convert, hints
from bevt_ds.model.arch import SwinArch
from bevt_ds.model.convert import Weights
from bevt_ds.model.presets import SIZES as SIZES_BY_NAME
from bevt_ds.model.weights import read_weights
from tests.model.test_foreign_checkpoints import OF_TIMM, keys_without_bias, timm_swin

SIZES = {"embed_dim": 16, "depths": (2, 2), "num_heads": (1, 2), "window": (4, 3, 3)}
CLIP = torch.randn(2, 3, 8, 24, 24, generator=torch.Generator().manual_seed(1))
LAST_TABLE = "layers.1.blocks.1.attn.relative_position_bias_table"
ENDINGS = {"bevt": "", "torchvision": ".pth", "timm": ".safetensors", "hf": "", "official": ".pth"}


def images_swin(classes: int) -> SwinTransformer:
    return SwinTransformer(24, window_size=3, num_classes=classes, embed_dim=16, depths=(2, 2), num_heads=(1, 2))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A classifier of ours, a joint model of ours, and a timm Swin of images, each where it lies."""
    folder = tmp_path_factory.mktemp("made")
    torch.manual_seed(0)
    models = {
        "classifier": VideoClassifier(5, classes=tuple("abcde"), **SIZES),
        "joint": BEVT(vocab_size=16, **SIZES),
        "images": images_swin(2),
    }
    for name, model in models.items():
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn(parameter.shape) / 9)
        model.eval()
        if name == "images":
            torch.save({"state_dict": model.state_dict()}, folder / name)
        else:
            model.save_pretrained(folder / name)
    return folder, models


def converted(made, name: str, to: str, tmp_path: Path, **options) -> tuple[Path, str]:
    target = tmp_path / f"{name}{ENDINGS[to]}"
    return target, "\n".join(convert(made[0] / name, target, to, **options))


def same(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)


@torch.no_grad()
def test_torchvision_target_gives_the_same_logits(made, tmp_path):
    path, report = converted(made, "classifier", "torchvision", tmp_path)
    swin = SwinTransformer3d([2, 4, 4], 16, [2, 2], [1, 2], [4, 3, 3], num_classes=5).eval()
    swin.load_state_dict(torch.load(path))
    same(swin(CLIP), made[1]["classifier"](CLIP))
    assert "torchvision's swin3d, the target's" in report


@torch.no_grad()
def test_timm_target_holds_clips_and_images(made, tmp_path):
    path, _ = converted(made, "classifier", "timm", tmp_path)
    make = {**SIZES, "checkpoint_path": str(path)}
    model = timm.create_model("bevt_swin_base", pretrained=False, num_classes=5, **make).eval()
    same(model(CLIP), made[1]["classifier"](CLIP))
    stages = timm.create_model("bevt_swin_base", pretrained=False, features_only=True, **make).eval()
    _, expected = made[1]["classifier"].encoder.forward_intermediates(CLIP)
    assert all(torch.equal(a, b) for a, b in zip(stages(CLIP), expected, strict=True))
    still = CLIP[:, :, :1].expand(-1, -1, 2, -1, -1)
    same(model.forward_features(CLIP[:, :, 0]), model.forward_features(still).squeeze(2))


@torch.no_grad()
@pytest.mark.parametrize("name", ["classifier", "joint"])
def test_hugging_face_target_loads_by_auto_model(name, made, tmp_path):
    path, report = converted(made, name, "hf", tmp_path)
    names = {"config.json", "model.safetensors", "preprocessor_config.json", "README.md"}
    assert {file.name for file in path.iterdir()} == names
    model = made[1][name]
    by_time = CLIP.transpose(1, 2)  # as transformers' processors have it
    if name == "classifier":
        auto = transformers.AutoModelForVideoClassification.from_pretrained(path).eval()
        same(auto(pixel_values=by_time).logits, model(CLIP))
        assert auto.config.id2label == dict(enumerate("abcde"))
    else:
        auto = transformers.AutoModel.from_pretrained(path).eval()
        same(auto(by_time).pooler_output, model.encoder(CLIP).mean((2, 3, 4)))
        image = model.encoder.features_of(CLIP[:, :, 0], model.image_embed, model.image_windows)
        same(auto(CLIP[:, :, 0]).last_hidden_state.mean(1), image.mean((2, 3, 4)))
        assert "not written, the class has no such part: " in report and "video_decoder.unfold.weight" in report
    same(VideoSwin.from_pretrained(path).eval()(CLIP), model.encoder(CLIP))  # it is a folder of ours too
    processor = transformers.AutoImageProcessor.from_pretrained(path)
    frames = [torch.randint(0, 256, (3, 250, 300), dtype=torch.uint8) for _ in range(4)]
    assert processor(frames, return_tensors="pt").pixel_values.shape == (1, 4, 3, 224, 224)


@torch.no_grad()
def test_images_go_to_stock_classes(made, tmp_path):
    """A Swin of images needs no class of ours in timm or transformers."""
    image, swin = CLIP[:, :, 0], made[1]["images"]
    features = swin.forward_features(image)
    path, report = converted(made, "images", "hf", tmp_path)
    stock = transformers.AutoModel.from_pretrained(path).eval()
    assert type(stock) is transformers.SwinModel
    same(stock(image, interpolate_pos_encoding=False).last_hidden_state, features.flatten(1, 2))
    assert "not read, classifier of an image model: head.fc.weight, head.fc.bias" in report
    path, _ = converted(made, "images", "timm", tmp_path)
    again = images_swin(0).eval()
    timm.models.load_checkpoint(again, str(path))
    same(again.forward_features(image), features)


@pytest.mark.parametrize("name", ["classifier", "joint", "images"])
@pytest.mark.parametrize("to", ["official", "bevt", "torchvision"])
def test_targets_read_back_as_what_they_are_from(to, name, made, tmp_path):
    path, _ = converted(made, name, to, tmp_path)
    source, read = read_weights(made[0] / name), read_weights(path)
    wanted = source.state if to != "torchvision" else {
        key: value for key, value in source.state.items() if key.startswith(("encoder.", "head."))
    }  # fmt: skip
    assert read.state.keys() == wanted.keys()
    assert all(read.state[key].equal(value) for key, value in wanted.items())
    assert SwinArch.of(read.arch) == SwinArch.of(source.arch)


def test_converted_image_weights_start_a_joint_model(made, tmp_path):
    """What the file lacks may still be lacking in the folder that it became."""
    path, _ = converted(made, "images", "bevt", tmp_path)
    model = BEVT.from_pretrained(path, vocab_size=16)
    assert model.image_embed.proj.weight.view(16, 3, 4, 4).equal(made[1]["images"].patch_embed.proj.weight)


def test_models_that_differ_are_not_written(made, tmp_path, monkeypatch):
    def wrong(layout, state, arch, pixels):
        outputs = found(layout, state, arch, pixels)
        return outputs._replace(features=outputs.features + 1e-3)

    found = references.outputs_of
    monkeypatch.setattr("bevt_ds.interop.convert.outputs_of", wrong)
    with pytest.raises(UserError, match=r"torchvision's swin3d, the target's model differ by .*nothing was written"):
        converted(made, "classifier", "torchvision", tmp_path)
    assert list(tmp_path.iterdir()) == []
    path, report = converted(made, "classifier", "torchvision", tmp_path, check=False)
    assert path.is_file() and "difference" not in report


@pytest.mark.parametrize("to", ENDINGS)
def test_no_check_is_said_in_the_file(to, made, tmp_path):
    path, _ = converted(made, "joint", to, tmp_path, check=False)
    if to in ("bevt", "hf"):
        facts = json.loads((path / "config.json").read_text())["converted"]
        assert to == "bevt" or "checked: `no: --no-check`" in (path / "README.md").read_text()
    elif to == "timm":
        with safe_open(path, "pt") as file:
            facts = json.loads(file.metadata()["converted"])
    else:
        checkpoint = torch.load(path)  # weights_only
        facts = checkpoint["meta"]["converted"] if to == "official" else checkpoint._metadata["converted"]
    assert facts["checked"] == "no: --no-check"


@pytest.mark.parametrize("check", [True, False])
@pytest.mark.parametrize(
    ("name", "cut"),
    [
        ("images", "norm.bias"),
        ("classifier", "encoder.layers.1.blocks.0.mlp.fc2.bias"),
        ("classifier", "head.bias"),
        ("joint", "video_decoder.upsample.bias"),
    ],
)
def test_missing_tensor_is_named_and_nothing_written(name, cut, check, made, tmp_path):
    folder = tmp_path / "part"
    if name == "images":
        state = made[1][name].state_dict()
        del state[cut]
        torch.save(state, folder)
    else:
        shutil.copytree(made[0] / name, folder)
        state = load_file(folder / "model.safetensors")
        del state[cut]
        save_file(state, folder / "model.safetensors")
    with pytest.raises(UserError, match=rf"lacks \S*{re.escape(cut)}: nothing was written"):
        convert(folder, tmp_path / "out", "bevt", check=check)
    assert [path.name for path in tmp_path.iterdir()] == ["part"]


@pytest.mark.parametrize("check", [True, False])
@pytest.mark.parametrize(
    ("name", "changed", "words"),
    [
        ("images", {"layers.1.blocks.0.attn.more": (2,)}, "has tensors that no BEVT model has: {}: nothing"),
        (
            "images",
            {"patch_embed.proj.weight": (16, 1, 4, 4)},
            "it has the shapes (16, 32) of {}, not (16, 96)",
        ),
        (
            "images",
            {LAST_TABLE: (49, 2)},
            f"tables of 25 rows, and others: {LAST_TABLE} of 49: only one window is read",
        ),
        ("classifier", {"encoder.layers.0.more": (2,)}, "has tensors that no BEVT model has: {}: nothing"),
        ("classifier", {"head.bias": (6,)}, "it has the shapes (6,) of {}, not (5,): nothing"),
        ("joint", {"lm_head.bias": (15,)}, "it has the shapes (15,) of {}, not (16,): nothing"),
    ],
)
def test_tensor_of_no_model_or_of_another_shape_is_named(name, changed, words, check, made, tmp_path):
    """An unknown block's, one colour, another window in one stage, a head of another size."""
    ((tensor, shape),), state = changed.items(), dict(made[1][name].state_dict())
    state[tensor] = torch.zeros(shape)
    if name == "images":
        torch.save(state, tmp_path / "part")
        tensor = f"encoder.{tensor}"
    else:
        shutil.copytree(made[0] / name, tmp_path / "part")
        save_file(state, tmp_path / "part" / "model.safetensors")
    with pytest.raises(UserError, match=re.escape(words.format(tensor))):
        convert(tmp_path / "part", tmp_path / "out", "bevt", check=check)
    assert [path.name for path in tmp_path.iterdir()] == ["part"]


@pytest.mark.parametrize("check", [True, False])
def test_weights_that_are_not_finite_are_not_converted(check, made, tmp_path):
    shutil.copytree(made[0] / "classifier", tmp_path / "part")
    state = load_file(tmp_path / "part" / "model.safetensors")
    state["head.bias"][1] = float("nan")
    save_file(state, tmp_path / "part" / "model.safetensors")
    with pytest.raises(NonFiniteError, match="part: head.bias of the weights are not finite: nothing is written"):
        convert(tmp_path / "part", tmp_path / "out", "bevt", check=check)
    assert [path.name for path in tmp_path.iterdir()] == ["part"]


def test_model_card_has_recipe_data_and_results(made, tmp_path):
    run = tmp_path / "run"
    model = made[1]["classifier"]
    model.save_pretrained(run / "weights")
    config = get_recipe("finetune_k400", FinetuneConfig)
    config = replace(config, data=replace(config.data, train="k400-train.tar"))
    (run / "config.json").write_text(json.dumps(to_dict(config)))
    (run / "log.jsonl").touch()
    (run / "eval-1").mkdir()
    (run / "eval-1" / "scores.json").write_text(json.dumps({"top1": 0.75, "classes": []}))
    convert(run, tmp_path / "hub", "hf", check=False)
    card = (tmp_path / "hub" / "README.md").read_text()
    assert "- recipe: `finetune_k400`" in card and "- train: `k400-train.tar`" in card
    assert 'eval-1/scores.json: `{"top1": 0.75}`' in card and card.startswith("---\nlibrary_name: transformers\n")


def test_command_prints_the_difference_and_names_mistakes(made, tmp_path, capsys):
    assert cli.main(["convert", str(made[0] / "joint"), str(tmp_path / "a.pth"), "--to", "official"]) == 0
    assert "largest difference of features: " in capsys.readouterr().out
    assert cli.main(["convert", str(made[0] / "joint"), str(tmp_path / "a.pth"), "--to", "official"]) == 2
    assert "a.pth exists" in capsys.readouterr().err


def test_post_norm_blocks_go_to_no_other_library(tmp_path):
    VideoSwin(norm="post", **SIZES).save_pretrained(tmp_path / "post")
    with pytest.raises(UserError, match=r"norm=post, which torchvision's swin3d has not"):
        convert(tmp_path / "post", tmp_path / "a.pth", "torchvision")
    convert(tmp_path / "post", tmp_path / "hub", "hf")


def test_timm_methods(made):
    model = timm.create_model("bevt_swin_tiny", num_classes=3, drop_path_rate=0.1, **SIZES).eval()
    assert model.default_cfg["num_classes"] == 3 and model.num_features == 32
    config = timm.data.resolve_data_config(model=model)
    assert config["input_size"] == (3, 224, 224) and config["mean"] == pytest.approx((0.485, 0.456, 0.406), abs=1e-3)
    features = model.forward_features(CLIP)
    assert features.shape == (2, 32, 4, 3, 3) and model.forward_head(features, pre_logits=True).shape == (2, 32)
    assert model(CLIP).shape == (2, 3) and model(CLIP[:, :, 0]).shape == (2, 3)
    assert isinstance(model.get_classifier(), nn.Linear)
    model.reset_classifier(0)
    assert model(CLIP).equal(model.forward_features(CLIP).mean((2, 3, 4))) and model.default_cfg["num_classes"] == 0
    last, stages = model.forward_intermediates(CLIP[:, :, 0], norm=True)
    assert [s.shape for s in stages] == [(2, 16, 6, 6), (2, 32, 3, 3)] and last.equal(stages[-1])
    assert model.forward_intermediates(CLIP, indices=1, intermediates_only=True)[0].shape == (2, 32, 4, 3, 3)
    assert len(model.no_weight_decay()) == 4
    groups = timm.models.group_parameters(model, model.group_matcher())
    assert sum(map(len, groups.values())) == len(list(model.parameters()))
    model.set_grad_checkpointing()
    model.train()(CLIP).sum().backward()


@pytest.mark.parametrize("names", OF_TIMM)
def test_every_layout_of_image_swins_is_compared_and_written(names, tmp_path):
    """The source's tensors run in a model of a library that is installed, whatever the layout."""
    swin = keys_without_bias(timm_swin(window=3)) if names == "beit" else timm_swin(window=3)
    torch.save({"model": OF_TIMM[names](swin.state_dict()), "args": Namespace(lr=1)}, tmp_path / "swin.pth")
    report = "\n".join(convert(tmp_path / "swin.pth", tmp_path / "timm.pth", "timm"))
    assert re.search(r"largest difference of features: \S+ \(float64\), of this project's and .*timm", report)
    again = timm_swin(window=3)
    again.reset_classifier(0)
    again.load_state_dict(torch.load(tmp_path / "timm.pth"))
    image = torch.randn(2, 3, 24, 24)
    with torch.no_grad():
        same(again.eval().forward_features(image), swin.forward_features(image))


@torch.no_grad()
def test_fine_tuned_mmaction_checkpoint_goes_to_torchvision(made, tmp_path):
    """What `official` writes is what Video Swin's users have."""
    path, _ = converted(made, "classifier", "official", tmp_path)
    report = "\n".join(convert(path, tmp_path / "swin3d.pth", "torchvision"))
    assert "largest difference of features" in report and "torchvision's swin3d, the target's" in report
    swin = SwinTransformer3d([2, 4, 4], 16, [2, 2], [1, 2], [4, 3, 3], num_classes=5).eval()
    swin.load_state_dict(torch.load(tmp_path / "swin3d.pth"))
    same(swin(CLIP), made[1]["classifier"](CLIP))


@torch.no_grad()
def test_deepspeed_folder_is_gathered_and_converted(tmp_path):
    """ZeRO-1 on two ranks, of a torchvision model in somebody's training."""
    swin = SwinTransformer3d([2, 4, 4], 16, [2, 2], [1, 2], [4, 3, 3], num_classes=5).eval()
    folder, parameters = tmp_path / "global_step7", dict(swin.named_parameters())
    folder.mkdir()
    half = {f"module.{name}": value.half() for name, value in swin.state_dict().items()}
    shapes, buffers = (
        [{f"module.{name}": value.shape for name, value in parameters.items()}],
        dict(swin.named_buffers()),
    )
    states = {"module": half, "param_shapes": shapes, "buffer_names": [f"module.{name}" for name in buffers]}
    torch.save(states, folder / "mp_rank_00_model_states.pt")
    flat = torch.cat([value.flatten() for value in parameters.values()])
    for rank, part in enumerate(nn.functional.pad(flat, (0, len(flat) % 2)).chunk(2)):
        optimizer = {"single_partition_of_fp32_groups": [part], "zero_stage": 1, "partition_count": 2}
        torch.save({"optimizer_state_dict": optimizer}, folder / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
    assert "torchvision's swin3d, the source's" in "\n".join(convert(folder, tmp_path / "out", "bevt"))
    same(VideoClassifier.from_pretrained(tmp_path / "out").eval()(CLIP), swin(CLIP))


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "to"), [(n, t) for n in ("classifier", "joint", "images") for t in ENDINGS if t != "official"]
)
def test_call_that_the_report_names_loads_the_result(name, to, made, tmp_path):
    path, report = converted(made, name, to, tmp_path)
    call = report.rpartition("load it: ")[2].removesuffix(", after import bevt_ds")
    libraries = {"bevt_ds": bevt_ds, "timm": timm, "torch": torch, "torchvision": torchvision}
    loaded = eval(call, libraries | {"transformers": transformers})
    if to != "torchvision":
        assert isinstance(loaded, nn.Module)
        return
    assert set(loaded.missing_keys) <= {"head.weight", "head.bias"} and not loaded.unexpected_keys


@pytest.mark.parametrize(
    ("size", "classes", "to", "call"),
    [
        ("swin_t", 400, "torchvision", "torchvision.models.video.swin3d_t(num_classes=400).load_state_dict("),
        (
            "swin_l",
            0,
            "torchvision",
            "SwinTransformer3d([2, 4, 4], 192, [2, 2, 18, 2], [6, 12, 24, 48], [8, 7, 7], 4.0)",
        ),
        ("swin_b", 174, "timm", "timm.create_model('bevt_swin_base', num_classes=174, checkpoint_path="),
    ],
)
def test_stock_sizes_are_called_by_name(size, classes, to, call):
    weights = Weights({}, SIZES_BY_NAME[size].arguments() | ({"num_classes": classes} if classes else {}))
    assert call in hints(to, Path("a.pth"), weights)[0]
    images = Weights({}, SIZES_BY_NAME[size].arguments(), still=True)
    stock = {"swin_t": "swin_tiny", "swin_b": "swin_base", "swin_l": "swin_large"}[size]
    assert f"'{stock}_patch4_window7_224', num_classes=0, checkpoint" in hints("timm", Path("a.pth"), images)[0]
