"""load_video, load_image, predict and features on files: equal to evaluation and probes on shards."""

from __future__ import annotations

import pytest
import torch
from PIL import Image
from PIL.Image import Exif

import bevt_ds
from bevt_ds import UserError, VideoClassifier, VideoSwin, create_model
from bevt_ds.config.samples import ViewsConfig
from bevt_ds.data.labelled_loader import test_batches as view_batches
from bevt_ds.data.labels import Classes
from bevt_ds.eval.features import features_of
from bevt_ds.eval.videos import shards_of
from tests.downstream.conftest import CLASS_NAMES

TINY = {"embed_dim": 8, "depths": (1, 1), "num_heads": (1, 2), "window": (2, 2, 2)}


@pytest.fixture
def clip_file(tmp_path, labelled_videos):
    path = tmp_path / "clip.mp4"
    path.write_bytes(labelled_videos["clip-00.mp4"])
    return path


def test_load_video_equals_the_evaluation_view(labelled, clip_file):
    views = ViewsConfig(clips=1, crops=1, short_side=72, micro_videos=1)
    shards = shards_of(labelled.val, labelled)
    batches = view_batches(labelled, views, 0, 1, "cpu", shards, Classes(CLASS_NAMES), None)
    seen = {key: batch.pixels[0, 0] for batch in batches for key in batch.keys}
    theirs = next(pixels for key, pixels in seen.items() if key.endswith("clip-00"))
    ours = bevt_ds.load_clip(clip_file, frames=8, stride=2, size=64, short_side=72)
    assert torch.equal(ours, theirs)


def test_load_image_is_rotated_resized_and_normalised(tmp_path):
    """Left half black, right half white; the EXIF orientation 6 turns it by 90 degrees: black is on top."""
    image = Image.new("RGB", (80, 60))
    image.paste((255, 255, 255), (40, 0, 80, 60))
    exif = Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "a.png", exif=exif)
    pixels = bevt_ds.load_image(tmp_path / "a.png", size=32)
    assert pixels.shape == (3, 32, 32)
    mean, std = torch.tensor(bevt_ds.MEAN), torch.tensor(bevt_ds.STD)
    black, white = -mean / std, (255 - mean) / std
    torch.testing.assert_close(pixels[:, 0, 16], black)
    torch.testing.assert_close(pixels[:, -1, 16], white)


def test_predictions_are_ordered_and_named(clip_file):
    model = VideoClassifier(3, classes=CLASS_NAMES, dropout=0.5, **TINY).train()
    found = bevt_ds.predict(model, clip_file, top=2, frames=4, stride=2, size=64)
    pixels = bevt_ds.load_clip(clip_file, frames=4, stride=2, size=64)
    expected = model.eval()(pixels[None])[0].softmax(-1)
    assert [name for name, _ in found] == [CLASS_NAMES[i] for i in expected.argsort(descending=True)[:2]]
    assert found[0][1] == pytest.approx(float(expected.max().detach()))


def test_predict_keeps_the_model_mode_and_numbers_unnamed_classes(clip_file):
    model = VideoClassifier(2, **TINY).train()
    assert {name for name, _ in bevt_ds.predict(model, clip_file, frames=4, stride=2, size=64)} == {"0", "1"}
    assert model.training and model.encoder.training


@pytest.mark.parametrize("kind", ["encoder", "bevt", "classifier"])
def test_features_equal_those_of_a_linear_probe(clip_file, kind):
    model = {
        "encoder": lambda: VideoSwin(**TINY),
        "bevt": lambda: create_model("tiny", vocab_size=8),
        "classifier": lambda: VideoClassifier(2, **TINY),
    }[kind]()
    encoder = model if kind == "encoder" else model.encoder
    ours = bevt_ds.features(model, clip_file, frames=8, stride=2, size=64)
    pixels = bevt_ds.load_clip(clip_file, frames=8, stride=2, size=64)
    with torch.no_grad():
        theirs = features_of(encoder.eval(), torch.float32, "linear")(pixels[None])[0]
    assert torch.equal(ours, theirs)
    assert ours.dtype == torch.float32 and ours.ndim == 1


def test_file_mistakes_are_named(tmp_path, clip_file):
    (tmp_path / "no.mp4").write_bytes(b"not a video")
    (tmp_path / "no.jpg").write_bytes(b"\xff\xd8\xff" + b"cut")
    for call, words in [
        (lambda: bevt_ds.load_clip(tmp_path / "absent.mp4"), "absent.mp4 cannot be read: No such file"),
        (lambda: bevt_ds.load_clip(tmp_path), "cannot be read: Is a directory"),
        (lambda: bevt_ds.load_clip(tmp_path / "no.mp4"), "no.mp4 cannot be used"),
        (lambda: bevt_ds.load_image(tmp_path / "no.jpg"), "no.jpg cannot be used"),
        (lambda: bevt_ds.load_image(clip_file), "clip.mp4 cannot be used: it is neither JPEG nor PNG"),
        (lambda: bevt_ds.load_clip(clip_file, frames=0), "frames=0: must be a whole number"),
        (lambda: bevt_ds.load_clip(clip_file, stride=0.5), "stride=0.5: must be a whole number"),
        (lambda: bevt_ds.load_clip(clip_file, size=64, short_side=32), "short_side=32: a side below size=64"),
    ]:
        with pytest.raises(UserError, match=words):
            call()


def test_public_names_are_listed():
    assert {"BEVT", "load_clip", "load_image", "predict", "features", "MEAN", "STD"} <= set(dir(bevt_ds))
