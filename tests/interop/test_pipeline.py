"""`bevt_ds.pipeline`: of a file and of frames, what the models themselves say of them."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.models.video.swin_transformer import SwinTransformer3d

import bevt_ds
from bevt_ds import BEVT, UserError, VideoClassifier
from bevt_ds.config.parse import to_dict
from bevt_ds.config.recipes import finetune_demo
from bevt_ds.shards.synthetic.draw_worker import encode_mp4

SIZES = {"embed_dim": 16, "depths": (1, 1), "num_heads": (1, 2), "window": (2, 3, 3)}
FRAMES = np.random.default_rng(0).integers(0, 256, (12, 48, 64, 3), np.uint8)
SMALL = {"frames": 4, "stride": 2, "size": 32}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A classifier and a joint model of ours where they lie, a video file and an image file."""
    folder = tmp_path_factory.mktemp("pipeline")
    torch.manual_seed(0)
    models = {
        "classifier": VideoClassifier(2, classes=("left", "right"), **SIZES).eval(),
        "joint": BEVT(vocab_size=16, **SIZES).eval(),
    }
    for name, model in models.items():
        model.save_pretrained(folder / name)
    (folder / "clip.mp4").write_bytes(encode_mp4(FRAMES))
    Image.fromarray(FRAMES[0]).save(folder / "image.png")
    return folder, models


def same(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)


def test_classifier_gives_named_probabilities_best_first(made):
    folder, models = made
    shares = bevt_ds.pipeline(folder / "classifier", **SMALL)(folder / "clip.mp4")
    assert list(shares.items()) == [
        (name, pytest.approx(share, abs=1e-5))
        for name, share in bevt_ds.predict(models["classifier"], folder / "clip.mp4", **SMALL)
    ]
    assert sum(shares.values()) == pytest.approx(1, abs=1e-5)


def test_features_of_a_file_are_those_of_the_function(made):
    folder, models = made
    for name, model in models.items():
        pipe = bevt_ds.pipeline(folder / name, task="features", **SMALL)
        same(pipe(folder / "clip.mp4"), bevt_ds.features(model, folder / "clip.mp4", **SMALL))
    dense = bevt_ds.pipeline(folder / "joint", dense=True, **SMALL)(folder / "clip.mp4")
    assert dense.shape == (2, 4, 4, 32)


@torch.no_grad()
def test_images_use_their_own_stem(made):
    folder, models = made
    joint = models["joint"]
    image = bevt_ds.load_image(folder / "image.png", 32)[None]
    tokens = joint.encoder.features_of(image, joint.image_embed, joint.image_windows)[0, :, 0].movedim(0, -1)
    same(bevt_ds.pipeline(folder / "joint", **SMALL)(folder / "image.png"), tokens.mean((0, 1)))
    same(bevt_ds.pipeline(folder / "joint", dense=True, **SMALL)(FRAMES[0]), tokens)


def test_frames_are_chosen_as_from_a_video_unless_there_are_just_so_many(made):
    pipe = bevt_ds.pipeline(made[0] / "joint", **SMALL)
    chosen = FRAMES[2:10:2]
    assert torch.equal(pipe.pixels(FRAMES), pipe.pixels(chosen))  # the middle one of 5 possible clips
    assert torch.equal(pipe(list(chosen)), pipe(torch.from_numpy(chosen)))
    assert torch.equal(pipe.pixels([Image.fromarray(frame) for frame in chosen]), pipe.pixels(chosen))
    assert pipe.pixels(FRAMES[:1]).shape == (3, 4, 32, 32)


def test_sampling_is_that_of_the_run(made, tmp_path):
    made[1]["classifier"].save_pretrained(tmp_path / "weights")
    config = finetune_demo()
    config = replace(config, data=replace(config.data, sampling="segments", frames=6, size=64))
    (tmp_path / "config.json").write_text(json.dumps(to_dict(config)))
    (tmp_path / "log.jsonl").touch()
    pipe = bevt_ds.pipeline(tmp_path)
    assert (pipe.data.sampling, pipe.data.frames, pipe.data.size) == ("segments", 6, 64)
    assert torch.equal(pipe.pixels(FRAMES), pipe.pixels(FRAMES[[1, 3, 5, 6, 8, 10]]))
    assert bevt_ds.pipeline(made[0] / "classifier").data.frames == 32  # as the original fine-tunes
    assert bevt_ds.pipeline(made[0] / "joint").data.stride == 8  # as it pretrains


@torch.no_grad()
def test_weights_of_another_library_work_as_they_are(tmp_path):
    torch.manual_seed(0)
    swin = SwinTransformer3d([2, 4, 4], 16, [2, 2], [1, 2], [4, 3, 3], num_classes=5).eval()
    torch.save(swin.state_dict(), tmp_path / "swin3d.pth")
    pipe = bevt_ds.pipeline(tmp_path / "swin3d.pth", frames=8, size=32)
    expected = swin(pipe.pixels(FRAMES[:8])[None]).softmax(-1)[0]
    shares = pipe(FRAMES[:8])
    same(torch.tensor([shares[str(i)] for i in range(5)]), expected)


def test_mistakes_are_named(made):
    folder, _ = made
    pipe = bevt_ds.pipeline(folder / "joint", **SMALL)
    for call, words in [
        (lambda: bevt_ds.pipeline(folder / "none"), "weights=.*none: no such file"),
        (lambda: bevt_ds.pipeline(folder / "joint", task="classes"), "has no classifier"),
        (lambda: bevt_ds.pipeline(folder / "joint", task="embed"), "task='embed': choose one of auto, features"),
        (lambda: bevt_ds.pipeline(folder / "classifier", dense=True), "say task='features' with it"),
        (lambda: pipe(FRAMES.astype(np.float32)), r"type float32: wanted are uint8 \(T,H,W,3\)"),
        (lambda: pipe(FRAMES.transpose(0, 3, 1, 2)), r"shape \(12, 3, 48, 64\)"),
        (lambda: pipe(folder / "absent.mp4"), "absent.mp4 cannot be read"),
    ]:
        with pytest.raises(UserError, match=words):
            call()
