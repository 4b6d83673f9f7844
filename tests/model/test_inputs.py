"""Checks of the model's inputs: messages, and that they cost neither a sync nor a graph break."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from bevt_ds import BEVT, MEAN, STD, Batch, UserError, VideoClassifier, VideoSwin
from bevt_ds.model.tokenizers import DalleTokenizer, RandomProjectionTokenizer

SIZES = {"embed_dim": 32, "depths": (1, 1), "num_heads": (1, 2), "window": (2, 2, 2)}
LEVELS = torch.randint(256, (1, 3, 4, 64, 64), generator=torch.Generator().manual_seed(0))
CLIP = (LEVELS - torch.tensor(MEAN).view(3, 1, 1, 1)) / torch.tensor(STD).view(3, 1, 1, 1)
VIDEO_MASK, IMAGE_MASK = torch.ones(1, 2, 4, 4, dtype=torch.bool), torch.ones(1, 4, 4, dtype=torch.bool)
BAD_PIXELS = {  # by what is wrong: (the change, what the message says)
    "nothing": (lambda x: None, "is None: .* must be a float tensor"),
    "an array": (lambda x: x.numpy(), "is a ndarray"),
    "levels": (
        lambda x: x.long(),
        r"holds int64: .*\(level - MEAN\) / STD",
    ),
    "bytes": (lambda x: x.to(torch.uint8), "holds uint8"),
    "floats of levels": (lambda x: x.abs() * 100, "has values from .*normalised RGB"),
    "unbatched": (lambda x: x[0], r"\[None\] makes a batch of one"),
    "channels last": (lambda x: x.movedim(1, -1), r"movedim\(-1, 1\) puts channels second"),
    "grey": (lambda x: x[:, :1], r"has the shape \(1, 1, .*float tensor"),
    "empty": (lambda x: x[..., :0], "holds no pixel"),
}


def methods() -> dict[str, tuple[Callable, torch.Tensor]]:
    """Each public method of the models that takes pixels, and pixels that it takes."""
    encoder, classifier, image = VideoSwin(**SIZES), VideoClassifier(2, **SIZES), CLIP[:, :, 0]
    return {
        "VideoSwin.forward": (encoder, CLIP),
        "VideoSwin.forward_features": (encoder.forward_features, CLIP),
        "VideoSwin.forward_intermediates": (encoder.forward_intermediates, CLIP),
        "VideoClassifier.forward": (classifier, CLIP),
        "BEVT.forward_video": (lambda x: bevt().forward_video(x, VIDEO_MASK), CLIP),
        "BEVT.forward_image": (lambda x: bevt().forward_image(x, IMAGE_MASK), image),
    }


def bevt() -> BEVT:
    return BEVT(**{**SIZES, "depths": (1, 1, 1, 1), "num_heads": (1, 2, 4, 8)}, vocab_size=8)


@pytest.mark.parametrize("wrong", BAD_PIXELS)
@pytest.mark.parametrize("method", methods())
def test_pixels_of_wrong_shape_or_dtype_are_named(method, wrong):
    call, good = methods()[method]
    change, message = BAD_PIXELS[wrong]
    with pytest.raises(UserError, match=message):
        call(change(good))


@pytest.mark.parametrize("method", methods())
def test_valid_pixels_give_no_warning(method):
    call, good = methods()[method]
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("error")
        call(good)
        call(good.to(torch.bfloat16))


def test_time_before_channels_is_named():
    with pytest.raises(UserError, match=r"\(1, 4, 3, 64, 64\): .*movedim\(2, 1\) puts channels before time"):
        VideoSwin(**SIZES)(CLIP.movedim(1, 2))


@pytest.mark.parametrize("method", methods())
def test_pixels_in_unit_range_are_warned_of(method):
    """They may be right: a hazy clip. So it is a warning."""
    call, good = methods()[method]
    with pytest.warns(UserWarning, match="as if it were RGB between 0 and 1"), torch.no_grad():
        call(torch.rand_like(good))


@pytest.mark.parametrize("stream", ["video", "image"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: None, "mask is None"),
        (lambda m: m.float(), r"mask holds float32: .*bool.*mask\.bool\(\)"),
        (lambda m: m.long(), "mask holds int64"),
        (lambda m: m[0], "mask has the shape"),
        (lambda m: m[..., :2], "mask has the shape .*, 4, 4"),
    ],
)
def test_masks_of_wrong_shape_or_dtype_are_named(stream, change, message):
    model = bevt()
    call, pixels, mask = {
        "video": (model.forward_video, CLIP, VIDEO_MASK),
        "image": (model.forward_image, CLIP[:, :, 0], IMAGE_MASK),
    }[stream]
    with pytest.raises(UserError, match=message):
        call(pixels, change(mask))


@pytest.mark.parametrize("keys", [torch.zeros(1), torch.zeros(2, dtype=torch.int64), [1]])
def test_sample_keys_of_wrong_shape_or_dtype_are_named(keys):
    for call in (VideoSwin(**SIZES), VideoClassifier(2, **SIZES), lambda x, k: bevt().forward_video(x, VIDEO_MASK, k)):
        with pytest.raises(UserError, match=r"sample_keys is .*int64 tensor \(1,\)"):
            call(CLIP, keys)


def test_invalid_batches_are_named(small_bevt, small_batch):
    model, video = small_bevt(), small_batch.video
    for wrong, message in (
        (None, "batch is None"),
        (CLIP, "batch is a Tensor"),
        (Batch(None, None), "neither video nor image"),
        (Batch(CLIP, None), "has a Tensor as a stream"),
        (Batch(replace(video, targets=None), None), "no targets yet: .*tokenize"),
        (Batch(replace(video, pixels=video.pixels.byte()), None), "clip holds uint8"),
        (Batch(None, video), "image has the shape"),
        (Batch(replace(video, mask=video.mask[:, :1]), None), "mask has the shape"),
    ):
        with pytest.raises(UserError, match=message):
            model(wrong)


@pytest.mark.parametrize("make", [lambda: DalleTokenizer(8, 16), lambda: RandomProjectionTokenizer(16)])
def test_tokenizer_frames_of_wrong_shape_or_dtype_are_named(make):
    good = torch.rand(2, 3, 16, 16)
    assert make().encode(good).shape == (2, 2, 2)
    for wrong, message in (
        (None, "frames is None"),
        (good[0], r"frames\[None\]"),
        (good[:, :, None], r"frames\.movedim\(2, 1\)\.flatten\(0, 1\)"),
        (good.movedim(1, -1), "channels second"),
        ((good * 255).byte(), "frames holds uint8"),
        (good * 255, "divided by 255"),
        (good * 4 - 2, "has values from .*RGB between 0 and 1"),
        (good[..., :12], "multiples of 8"),
    ):
        with pytest.raises(UserError, match=message):
            make().encode(wrong)


class Counted(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts reads of a tensor's values into Python: on a GPU each would wait for it."""

    def __init__(self):
        super().__init__()
        self.reads = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.reads += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def reads(call: Callable) -> int:
    with Counted() as counted, torch.no_grad():
        call()
    return counted.reads


def test_input_checks_of_a_training_step_read_no_value(small_bevt, small_batch):
    model, classifier = small_bevt(), VideoClassifier(2, **SIZES).train()
    assert reads(lambda: model(small_batch)) == 0
    assert reads(lambda: classifier(CLIP)) == 2, "lowest and highest, once"
    assert reads(lambda: classifier(CLIP)) == 0
    assert reads(lambda: classifier.eval()(CLIP)) == 2, "in host memory it costs nothing"


def test_input_checks_break_no_graph():
    """fullgraph raises at a break; a backend that runs the graph as it is keeps this fast."""
    forward = bevt().eval().forward_video
    torch._dynamo.reset()
    with torch.no_grad():
        compiled = torch.compile(forward, backend="eager", fullgraph=True)(CLIP, VIDEO_MASK)
        torch.testing.assert_close(compiled, forward(CLIP, VIDEO_MASK))
    torch._dynamo.reset()
