"""Registration of the models with timm, and timm's options."""

from __future__ import annotations

import functools
import subprocess
import sys

import pytest
import timm
import torch

from bevt_ds import BEVT, UserError, VideoClassifier, VideoSwin


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


@pytest.mark.parametrize("imports", ["import bevt_ds, timm", "import timm, bevt_ds"])
def test_timm_registry_with_either_order_of_imports(imports):
    code = f"{imports}; print(type(timm.create_model('bevt_tiny', vocab_size=8)).__name__)"
    assert run(code) == "BEVT"


BUILT = {"bevt_tiny": (BEVT, VideoSwin), "video_tiny": (VideoSwin, VideoSwin)}  # without num_classes, with 0


@pytest.mark.parametrize("name", BUILT)
def test_timm_num_classes_chooses_the_model(name):
    make = functools.partial(timm.create_model, name)
    assert [type(make()), type(make(num_classes=0))] == [*BUILT[name]]
    classifier = make(num_classes=7, drop_path=0.1, classes=tuple("abcdefg"))
    assert type(classifier) is VideoClassifier and classifier.arch["num_classes"] == 7
    assert classifier.arch["embed_dim"] == 32 and classifier.arch["classes"] == tuple("abcdefg")


@pytest.mark.parametrize("name", BUILT)
def test_timm_features_only_matches_feature_info(name):
    clip = torch.randn(1, 3, 4, 64, 64)
    model = timm.create_model(name, features_only=True).eval()
    outputs, info = model(clip), model.feature_info
    assert info.channels() == [32, 64, 128, 256] and info.reduction() == [4, 8, 16, 32]
    assert [x.shape[1:] for x in outputs] == [
        (c, 2, 64 // r, 64 // r) for c, r in zip(info.channels(), info.reduction(), strict=True)
    ]
    assert all(hasattr(model.encoder.get_submodule(module), "blocks") for module in info.module_name())
    chosen = timm.create_model(name, features_only=True, out_indices=(1, -1)).eval()
    chosen.load_state_dict(model.state_dict())
    assert all(torch.equal(a, outputs[i]) for a, i in zip(chosen(clip), (1, 3), strict=True))
    assert chosen.feature_info.channels() == [64, 256]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"img_size": 224}, "unknown argument img_size: sizes of a model are embed_dim, "),
        ({"num_classes": 3, "drop_path_rate": 0.1}, "unknown argument drop_path_rate .did you mean drop_path"),
        ({"num_classes": 0, "vocab_size": 8}, "unknown argument vocab_size"),
        ({"features_only": True, "in_chans": 1}, "unknown argument in_chans"),
        ({"features_only": True, "out_indices": (4,)}, "no stage 4, the model has 4"),
        ({"out_indices": (1,)}, "out_indices needs features_only=True"),
        ({"pretrained": True}, "no weights to download"),
    ],
)
def test_unknown_timm_arguments_are_named(arguments, message):
    with pytest.raises(UserError, match=message):
        timm.create_model("bevt_tiny", **arguments)


def test_import_of_bevt_ds_loads_neither_torch_nor_timm():
    assert run("import sys, bevt_ds; print([m for m in ('torch', 'timm') if m in sys.modules])") == "[]"
