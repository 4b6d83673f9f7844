"""Checkpoints of other projects: what is read gives the features of the model it is from; what is not is named."""

from __future__ import annotations

import re
from copy import deepcopy

import pytest
import timm
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file, save_file
from timm.models.swin_transformer import SwinTransformer
from timm.models.swin_transformer_v2 import SwinTransformerV2
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from torchvision.models import resnet18
from torchvision.models import swin_transformer as vision
from torchvision.models.video.swin_transformer import SwinTransformer3d

from bevt_ds import BEVT, UserError, VideoClassifier, VideoSwin
from bevt_ds.folders import weights_of
from bevt_ds.model.frozen_swin import load_frozen
from bevt_ds.model.tokenizers import DalleTokenizer
from bevt_ds.model.weights import load_init, read_weights

State = dict[str, Tensor]
SIZES = ([2, 2], [1, 2])  # depths, heads
V2 = {"block": vision.SwinTransformerBlockV2, "downsample_layer": vision.PatchMergingV2}
OTHERS = {  # what the refusal names: a small model with the names of that layout
    "torchvision's Swin V2": lambda: vision.SwinTransformer([4, 4], 8, *SIZES, [8, 8], **V2),
    "Swin V2,": lambda: SwinTransformerV2(window_size=8, embed_dim=8, depths=SIZES[0], num_heads=SIZES[1]),
    "plain vision transformer": lambda: timm.create_model("vit_tiny_patch16_224", depth=1),
    "a ResNet": resnet18,
    "DALL-E's tokenizer, which goes into tokenizer.weights": lambda: DalleTokenizer(8, 16),
}
NAMES = {  # the same by names alone
    "Hugging Face's transformers": ("videomae.embeddings.patch_embeddings.projection.weight",),
    "layout is unknown (it begins with a.b)": ("a.b",),
}


def refusal(state, folder) -> str:
    torch.save({"state_dict": state}, folder / "other.pth")
    with pytest.raises(UserError) as error:
        VideoSwin.from_pretrained(folder / "other.pth")
    return str(error.value)


@pytest.mark.parametrize("layout", OTHERS)
def test_unreadable_checkpoint_layout_is_named(layout, tmp_path):
    message = refusal(OTHERS[layout]().state_dict(), tmp_path)
    assert layout in message and "other.pth" in message
    for taken in ("config.json", "BEVT", "Video Swin", "Microsoft's Swin", "torchvision", "docs/interop.md"):
        assert taken in message


@pytest.mark.parametrize("layout", NAMES)
def test_checkpoint_layout_is_told_by_tensor_names(layout, tmp_path):
    assert layout in refusal({name: torch.zeros(4, 3, 4, 4) for name in NAMES[layout]}, tmp_path)


def test_own_weights_without_config_are_named(small_bevt, tmp_path):
    save_file(small_bevt().state_dict(), tmp_path / "mine.safetensors")
    with pytest.raises(UserError, match=r"mine\.safetensors holds this project's own .* without their config\.json"):
        BEVT.from_pretrained(tmp_path / "mine.safetensors")


# Swins of images: a still clip has the features of its image


def drawn(model: nn.Module) -> nn.Module:
    """The model in evaluation mode, every parameter drawn, so that no bias or norm is trivial."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel())) / 9)
    return model.eval()


def timm_swin(window: int = 7, patch: int = 4, **options) -> nn.Module:
    depths, heads = SIZES
    sizes = {"window_size": window, "patch_size": patch, "embed_dim": 16, "depths": depths, "num_heads": heads}
    return drawn(SwinTransformer(img_size=2 * patch * window, num_classes=3, **sizes, **options))


def microsoft(state: State) -> State:
    """timm's Swin in Microsoft's names: the merging ends a stage instead of beginning the next."""
    state = {name.replace("head.fc.", "head."): value for name, value in state.items()}
    return {re.sub(r"^layers\.1\.downsample", "layers.0.downsample", name): value for name, value in state.items()}


def beit(state: State) -> State:
    """Biases of queries and values apart; layer scale, which undoes a change of the branch's last matrix."""
    out = {}
    for name, value in microsoft(state).items():
        if name.endswith("qkv.bias"):
            out[name.replace("qkv.bias", "q_bias")], _, out[name.replace("qkv.bias", "v_bias")] = value.chunk(3)
        elif match := re.match(r"(layers.*blocks\.\d+\.)(attn\.proj|mlp\.fc2)\.(weight|bias)$", name):
            scale = torch.linspace(0.5, 2, len(value))
            out[f"{match[1]}gamma_{1 if match[2] == 'attn.proj' else 2}"] = scale
            out[name] = (value.T / scale).T
        else:
            out[name] = value
    return out


def simmim(state: State) -> State:
    state = {f"encoder.{name}": value for name, value in microsoft(state).items()}
    return state | {"encoder.mask_token": torch.ones(1, 1, 16), "decoder.0.weight": torch.zeros(3, 32, 1, 1)}


def open_mmlab(state: State) -> State:
    """Names of mmdetection's backbone; its merging reads what nn.Unfold gives."""
    number = torch.arange(4 * 16.0).view(2, 2, 16)  # [column, row, channel] -> where Microsoft's merging has it
    order = F.unfold(number.permute(2, 1, 0)[None], 2).flatten().long()
    out = {}
    for name, value in microsoft(state).items():
        name = re.sub(r"^layers\.", "backbone.stages.", name).replace(".attn.", ".attn.w_msa.")
        name = name.replace(".mlp.fc1.", ".ffn.layers.0.0.").replace(".mlp.fc2.", ".ffn.layers.1.")
        name = re.sub(r"^patch_embed\.proj", "backbone.patch_embed.projection", name)
        name = re.sub(r"^(norm)\.", r"backbone.norm1.", name)
        out[re.sub(r"^patch", "backbone.patch", name)] = value[..., order] if "downsample" in name else value
    out["backbone.norm0.weight"] = torch.ones(16)
    return out | {"neck.lateral.weight": torch.zeros(1), "bbox_head.cls.bias": torch.zeros(1)}


def keys_without_bias(model: nn.Module) -> nn.Module:
    """BEiT's attention has no bias of keys (a softmax would not see it)."""
    for name, parameter in model.named_parameters():
        if name.endswith("qkv.bias"):
            parameter.data.unflatten(0, (3, -1))[1].zero_()
    return model


def assert_same_features(weights, image_features: Tensor, image: Tensor):
    """image_features (B,H,W,C) of the model that the weights are from."""
    encoder = VideoSwin(**{key: weights.arch[key] for key in VideoSwin().arch if key in weights.arch}).eval()
    state = {name.removeprefix("encoder."): v for name, v in weights.state.items() if name.startswith("encoder.")}
    encoder.load_state_dict(state)
    frames = 2 * encoder.arch["window"][0]
    with torch.no_grad():
        still = encoder(image[:, :, None].expand(-1, -1, frames, -1, -1))
    torch.testing.assert_close(still, image_features.movedim(-1, 1)[:, :, None].expand_as(still), rtol=0, atol=1e-5)


OF_TIMM = {
    "timm": lambda state: state,
    "wrapped": lambda state: {f"module._orig_mod.model.{name}": value for name, value in state.items()},
    "fsdp": lambda state: {
        name.replace("blocks.0.", "_fsdp_wrapped_module.blocks.0._checkpoint_wrapped_module."): value
        for name, value in state.items()
    },
    "microsoft": microsoft,
    "detector": lambda state: {
        f"backbone.{re.sub('^norm', 'norm1', name)}": value for name, value in microsoft(state).items()
    },
    "simmim": simmim,
    "beit": beit,
    "open_mmlab": open_mmlab,
}


@pytest.mark.parametrize("names", OF_TIMM)
def test_image_swin_checkpoint_keeps_its_features(names, tmp_path):
    swin = timm_swin()
    if names == "beit":
        keys_without_bias(swin)
    torch.save({"model": OF_TIMM[names](swin.state_dict())}, tmp_path / "swin.pth")
    image = torch.randn(1, 3, 56, 56)
    weights = read_weights(tmp_path / "swin.pth")
    assert weights.arch["window"] == (8, 7, 7) and weights.still
    with torch.no_grad():
        assert_same_features(weights, swin.forward_features(image), image)


@pytest.mark.parametrize(("window", "patch"), [(7, 8), (4, 4), (6, 2)])
def test_image_swin_of_other_windows_and_patches(window, patch, tmp_path):
    swin = timm_swin(window, patch)
    torch.save(swin.state_dict(), tmp_path / "swin.pth")
    weights = read_weights(tmp_path / "swin.pth")
    assert weights.arch["window"] == (8, window, window) and weights.arch["patch"] == (2, patch, patch)
    image = torch.randn(1, 3, 2 * window * patch, 2 * window * patch)
    with torch.no_grad():
        assert_same_features(weights, swin.forward_features(image), image)


def test_window_that_is_not_square_is_stated_next_to_the_file(tmp_path):
    swin = drawn(vision.SwinTransformer([4, 4], 16, *SIZES, [3, 5]))
    torch.save(swin.state_dict(), tmp_path / "swin.pth")
    with pytest.raises(UserError, match=r"of 45 rows, which no square window has: state its window .*config\.json"):
        read_weights(tmp_path / "swin.pth")
    (tmp_path / "config.json").write_text('{"format": "bevt_ds", "arch": {"window": [8, 3, 5]}}')
    image = torch.randn(1, 3, 24, 40)
    with torch.no_grad():
        assert_same_features(read_weights(tmp_path / "swin.pth"), swin.norm(swin.features(image)), image)


def test_torchvision_swin_keeps_its_features(tmp_path):
    swin = drawn(vision.SwinTransformer([4, 4], 16, *SIZES, [7, 7], num_classes=3))
    torch.save(swin.state_dict(), tmp_path / "swin.pth")
    image = torch.randn(1, 3, 56, 56)
    weights = read_weights(tmp_path / "swin.pth")
    assert weights.unused["head.weight"] == "classifier of an image model"
    with torch.no_grad():
        assert_same_features(weights, swin.norm(swin.features(image)), image)


def test_hugging_face_swin_keeps_its_features(tmp_path):
    sizes = {"image_size": 56, "embed_dim": 16, "depths": SIZES[0], "num_heads": SIZES[1]}
    swin = drawn(transformers.SwinForImageClassification(transformers.SwinConfig(**sizes)))
    swin.save_pretrained(tmp_path / "hub")
    image = torch.randn(1, 3, 56, 56)
    weights = read_weights(tmp_path / "hub")
    assert weights.unused["classifier.weight"] == "classifier of an image model"
    with torch.no_grad():
        features = swin.swin(image).last_hidden_state.unflatten(1, (7, 7))
        assert_same_features(weights, features, image)


def test_backbone_without_its_last_norm_is_refused_by_name(tmp_path):
    swin = timm.create_model("swin_tiny_patch4_window7_224", features_only=True, embed_dim=8, num_heads=(1, 2, 4, 8))
    assert "lacks norm.weight, norm.bias" in refusal(swin.state_dict(), tmp_path)


def test_image_tables_are_resized_to_a_models_window(tmp_path):
    """From 7x7 of images to 4x4 of clips: bicubic in space and the same at every offset in time."""
    torch.save(timm_swin().state_dict(), tmp_path / "swin.pth")
    encoder = VideoSwin(embed_dim=16, depths=SIZES[0], num_heads=SIZES[1], window=(2, 4, 4))
    report = load_init(encoder, tmp_path / "swin.pth")
    assert len(report.resized) == 4
    table = encoder.layers[0].blocks[0].attn.relative_position_bias_table.detach().view(3, 7, 7, 1)
    original = read_weights(tmp_path / "swin.pth").state["encoder.layers.0.blocks.0.attn.relative_position_bias_table"]
    plane = F.interpolate(original[:169].view(1, 1, 13, 13), size=(7, 7), mode="bicubic", align_corners=False)
    torch.testing.assert_close(table, plane.view(1, 7, 7, 1).expand(3, -1, -1, -1), rtol=0, atol=0)


# Swins of clips


@pytest.mark.parametrize("window", [(8, 7, 7), (4, 3, 3), (2, 5, 5)])
@pytest.mark.parametrize("names", ["torchvision", "mmaction 1.x"])
def test_torchvision_swin3d_gives_the_same_logits(window, names, tmp_path):
    """Whole, with its classifier: the same logits. By torchvision's names, and by those of mmaction2 1.x."""
    swin = drawn(SwinTransformer3d([2, 4, 4], 16, *SIZES, list(window), num_classes=5))
    state = swin.state_dict()
    if names == "mmaction 1.x":
        of_block = {"mlp.0": "mlp.fc1", "mlp.3": "mlp.fc2", "features.0.": "layers.0.blocks."}
        of_block |= {"features.2.": "layers.1.blocks.", "features.1.": "layers.0.downsample."}
        for theirs, mm in of_block.items():
            state = {name.replace(theirs, mm): value for name, value in state.items()}
        state = {f"backbone.{name}": value for name, value in state.items()}
        for kind in ("weight", "bias"):
            state[f"cls_head.fc_cls.{kind}"] = state.pop(f"backbone.head.{kind}")
            state[f"backbone.norm1.{kind}"] = state.pop(f"backbone.norm.{kind}")
        state["data_preprocessor.mean"] = torch.zeros(3, 1, 1, 1)
    torch.save({"state_dict": state, "meta": {"epoch": 30}}, tmp_path / "swin.pth")
    ours = VideoClassifier.from_pretrained(tmp_path / "swin.pth").eval()
    assert ours.arch["window"] == window and ours.arch["num_classes"] == 5
    clip = torch.randn(2, 3, 2 * window[0], 8 * window[1] + 8, 8 * window[2])
    with torch.no_grad():
        torch.testing.assert_close(ours(clip), swin(clip), rtol=0, atol=1e-5)


def test_running_average_of_torchs_own_is_read(tmp_path):
    """As torchvision's training saves it: `model_ema` next to `model`, with the number of averages."""
    swin = drawn(SwinTransformer3d([2, 4, 4], 16, *SIZES, [4, 3, 3], num_classes=5))
    average = AveragedModel(swin)
    average.update_parameters(drawn(deepcopy(swin)))
    torch.save({"model": swin.state_dict(), "model_ema": average.state_dict()}, tmp_path / "swin.pth")
    weights = read_weights(tmp_path / "swin.pth")
    assert weights.state["head.weight"].equal(average.module.head.weight)
    assert weights.unused["n_averaged"] == "counter of running averages"
    assert weights.unused["features.0.0.attn.relative_position_index"] == "recomputed from the window's size"


def test_part_of_a_classifier_is_refused_by_name(tmp_path):
    """A part that may be missing is missing as a whole: half a classifier is nothing to start from."""
    VideoClassifier(5, embed_dim=16, depths=SIZES[0], num_heads=SIZES[1], window=(4, 3, 3)).save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    del state["head.bias"]
    save_file(state, tmp_path / "model.safetensors")
    for read in (VideoClassifier.from_pretrained, load_frozen):
        with pytest.raises(UserError, match=r"lacks head\.bias"):
            read(tmp_path)
    del state["head.weight"]
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"lacks head\.weight, head\.bias"):
        load_frozen(tmp_path)  # which predicts; training may start a new one


def test_unknown_tensors_of_a_checkpoint_are_named(tmp_path):
    unknown = {f"layers.0.blocks.0.surprise{i}": torch.zeros(1) for i in range(14)}
    message = refusal(timm_swin().state_dict() | unknown, tmp_path)
    assert "unknown layers.0.blocks.0.surprise0, " in message and "surprise11 and 2 more" in message


@pytest.mark.parametrize("place", ["run", "newest checkpoint", "checkpoint", "weights", "file"])
def test_from_pretrained_accepts_what_init_from_accepts(place, small_bevt, tmp_path):
    run, model = tmp_path / "runs" / "demo", small_bevt()
    commit = run / "checkpoints" / "step-00000007"
    inside = {"newest checkpoint": commit, "checkpoint": commit}.get(place, run)
    older = commit.with_name("step-00000003")
    for folder in (older, inside):
        model.init_weights()
        model.save_pretrained(folder / "weights")
        (folder / "manifest.json").write_text("{}")
    (run / "log.jsonl").touch()
    given = {"checkpoint": commit, "weights": run / "weights", "file": run / "weights" / "model.safetensors"}
    path = given.get(place, run)
    assert weights_of(str(path)) in (inside / "weights", inside / "weights" / "model.safetensors")
    for kind, options in ((BEVT, {}), (VideoSwin, {}), (VideoClassifier, {"num_classes": 2})):
        loaded = kind.from_pretrained(str(path), **options)
        encoder = loaded if kind is VideoSwin else loaded.encoder
        assert all(value.equal(model.encoder.state_dict()[name]) for name, value in encoder.state_dict().items())


def test_run_without_a_checkpoint_is_named(tmp_path):
    (tmp_path / "log.jsonl").touch()
    with pytest.raises(UserError, match="has not written a checkpoint yet"):
        BEVT.from_pretrained(tmp_path)
