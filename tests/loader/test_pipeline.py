"""DALI's pixel graph against OpenCV and numpy."""

from __future__ import annotations

import io
from collections.abc import Callable
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from bevt_ds.batch import MEAN, STD
from bevt_ds.data.decoding.images import check_image
from bevt_ds.data.limits import BadSample, Limits
from bevt_ds.data.pixels.pipeline import LUMA, PixelPipeline, jitter_matrix, lanczos4_taps
from bevt_ds.data.plan import PlanEntry
from tests.loader.media import encoded, images_of

S, V = 96, 48
ROUNDING = 1e-3  # levels: single precision through normalising and back
VIEWS = [
    {"short_side": 120, "crop": (0.3, 0.7)},
    {"short_side": 160, "crop": (0.0, 0.999), "flip": True},
    {"short_side": 97, "crop": (0.999, 0.0)},
]


@pytest.fixture(scope="module")
def video() -> PixelPipeline:
    return PixelPipeline("video", 4, S, V, threads=1)


@pytest.fixture(scope="module")
def image() -> PixelPipeline:
    return PixelPipeline("image", 4, S, V, threads=1)


def opencv_crop(image: np.ndarray, entry: PlanEntry) -> np.ndarray:
    """The original's view: cv2 cubic resize of the short side, crop, flip: uint8 (S,S,3)."""
    height, width = image.shape[:2]
    scale = entry.short_side / min(height, width)
    size = (int(width * scale + 0.5), int(height * scale + 0.5))
    resized = cv2.resize(image, size, interpolation=cv2.INTER_CUBIC)
    top, left = (int(f * (n - S)) for f, n in zip(entry.crop, resized.shape, strict=False))
    crop = resized[top : top + S, left : left + S]
    return crop[:, ::-1] if entry.flip else crop


def levels(pixels: torch.Tensor) -> np.ndarray:
    """Normalised (3,...) -> levels of 8-bit RGB (...,3)."""
    return np.moveaxis(pixels.numpy(), 0, -1) * STD + MEAN


def encode(image: np.ndarray, suffix: str = ".png") -> bytes:
    return cv2.imencode(suffix, image[..., ::-1])[1].tobytes()


def test_dali_resize_crop_and_flip_equal_opencv(video: PixelPipeline, make: SimpleNamespace, entry: Callable) -> None:
    frames, entries = make.noise(4, 120, 150), [entry(**view) for view in VIEWS]
    pixels, view = images_of(video, [frames] * 3, entries)
    assert pixels.shape == (3, 3, 4, S, S) and view.shape == (3, 4, 3, V, V)
    assert pixels.dtype == view.dtype == torch.float32
    differences = []
    for i, e in enumerate(entries):
        reference = np.stack([opencv_crop(frame, e) for frame in frames]).astype(float)
        differences.append(np.abs(levels(pixels[i]) - reference))
    assert differences[0].max() < ROUNDING  # 120 lines stay 120 lines: the very same pixels
    # The kernels differ (a = -0.5, OpenCV -0.75): here 1.6 levels on average, 13 at most.
    assert max(d.mean() for d in differences) < 2.5
    assert max(d.max() for d in differences) < 20


def test_dali_resize_of_smooth_images_is_close_to_opencv(video: PixelPipeline, make: SimpleNamespace, entry) -> None:
    """Without noise, the difference that the docstring states."""
    frames = make.noise(1, 120, 150, softness=0.0)
    for view in VIEWS:
        pixels, _ = images_of(video, [frames], [entry(**view)])
        difference = np.abs(levels(pixels[0])[0] - opencv_crop(frames[0], entry(**view)).astype(float))
        assert difference.mean() < 1.0 and difference.max() < 6


@pytest.mark.parametrize("kind", ["video", "image"])
def test_dali_token_view_equals_opencv_lanczos4(kind: str, video, image, make: SimpleNamespace, entry) -> None:
    """The same taps; OpenCV sums them as integers, DALI in single precision, so that a half may round otherwise."""
    frames, views = make.noise(3, 120, 150), [entry(**view) for view in VIEWS]
    if kind == "video":
        pixels, view = images_of(video, [frames] * 3, views)
        crops, small = pixels[:, :, 0], view[:, 0]
    else:
        crops, small = images_of(image, [encode(frame) for frame in frames], views)
    for crop, got in zip(crops, small, strict=True):
        exact = np.rint(levels(crop)).astype(np.uint8)
        reference = cv2.resize(exact, (V, V), interpolation=cv2.INTER_LANCZOS4)
        difference = np.abs(np.moveaxis(got.numpy(), 0, -1) * 255 - reference)
        assert difference.max() < 1 + ROUNDING and (difference > 0.5).mean() < 1e-3
    assert small.min() >= 0 and small.max() <= 1


def test_token_view_taps_are_symmetric_and_sum_to_one() -> None:
    taps = lanczos4_taps()
    np.testing.assert_array_equal(taps, taps[::-1])
    assert abs(taps.sum() - 1) < 8 / 2 / 2048  # each is rounded to 1/2048


@pytest.mark.parametrize("jitter", [(1.3, 0.7, 1.4), (0.6, 1.4, 0.6), (1.4, 1.4, 1.4), (1.0, 1.0, 1.0)])
def test_dali_colour_jitter_equals_double_precision(image: PixelPipeline, make, entry, jitter: tuple) -> None:
    """Three factors in sequence in double precision, clipped once; the mean luma is the whole image's."""
    drawn = make.noise(120, 150)
    pixels, _ = images_of(image, [encode(drawn)], [entry(short_side=120, crop=(0.3, 0.7), jitter=jitter)])
    x = opencv_crop(drawn, entry(short_side=120, crop=(0.3, 0.7))).astype(float)
    brightness, contrast, saturation = jitter
    mean_luma = (drawn.reshape(-1, 3).mean(0) * brightness) @ np.asarray(LUMA)
    x = (x * brightness - mean_luma) * contrast + mean_luma
    luma = (x @ np.asarray(LUMA))[..., None]
    x = (x - luma) * saturation + luma
    difference = np.abs(levels(pixels[0]) - np.clip(np.rint(x), 0, 255))
    # The weights of the luma sum to 0.9999: half a level may round either way in a few places.
    assert difference.max() < 1 + ROUNDING and (difference > 0.5).mean() < 0.02


def test_dali_without_jitter_is_the_identity() -> None:
    matrix, share = jitter_matrix((1.0, 1.0, 1.0))
    np.testing.assert_array_equal(matrix, np.eye(3, dtype=np.float32))
    assert share == 0


@pytest.mark.parametrize(("mode", "suffix"), [("L", "PNG"), ("RGBA", "PNG"), ("L", "JPEG"), ("CMYK", "JPEG")])
def test_grey_cmyk_and_alpha_images_become_rgb(image: PixelPipeline, make, entry, mode, suffix) -> None:
    buffer = io.BytesIO()
    Image.fromarray(make.noise(110, 130)).convert(mode).save(buffer, suffix)
    pixels, view = images_of(image, [buffer.getvalue()], [entry(short_side=100)])
    assert pixels.shape == (1, 3, S, S) and pixels.isfinite().all() and pixels.std() > 0.1


@pytest.mark.parametrize(
    ("kind", "operators"),
    [
        ("video", {"ResizeCropMirror", "Flip", "CropMirrorNormalize", "Transpose", "Filter"}),
        ("image", {"Image", "ResizeCropMirror", "Flip", "CoordTransform", "Mean", "CropMirrorNormalize", "Filter"}),
    ],
)
def test_dali_graph_operators_and_statelessness(kind: str, operators: set, video, image) -> None:
    graph = {"video": video, "image": image}[kind].graph
    names = {op.name.strip("_").split("_")[0] for op in graph._ops}
    assert operators <= names
    inputs = {"frames", "encoded", "short", "crop", "flip", "jitter"}
    arithmetic = {"Constant", "Reshape", "TensorSubscript", "Cast", "ArithmeticGenericOp", "Sum", "Transpose"}
    assert names <= operators | inputs | arithmetic  # no reader and nothing random


def test_broken_image_fails_its_batch_and_no_later_one(make: SimpleNamespace, entry: Callable) -> None:
    """The graph goes on after an error, with the inputs of the next batch."""
    pipeline = PixelPipeline("image", 2, S, V, threads=1)
    good, entries = [encode(make.noise(120, 150, seed=i)) for i in range(2)], [entry(), entry(crop=(0.1, 0.9))]
    before = images_of(pipeline, good, entries)
    for _ in range(20):
        with pytest.raises(BadSample, match="DALI cannot decode it: nvImageCodec"):
            images_of(pipeline, [good[1], good[0][:60] + bytes(50)], entries[::-1])
        after = images_of(pipeline, good, entries)
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_dali_graph_error_is_not_a_bad_sample(make: SimpleNamespace, entry: Callable) -> None:
    """Frames of two channels are the caller's mistake: no substitute, but a traceback."""
    pipeline = PixelPipeline("video", 1, S, V, threads=1)
    with pytest.raises(RuntimeError, match="crop_mirror_normalize"):
        images_of(pipeline, [np.ascontiguousarray(make.noise(1, 120, 150)[..., :2])], [entry()])


def header(jpeg: bytes, width: int, height: int) -> bytes:
    """The JPEG with another size in its frame header."""
    at = jpeg.index(b"\xff\xc0")
    return jpeg[: at + 5] + height.to_bytes(2, "big") + width.to_bytes(2, "big") + jpeg[at + 9 :]


def test_image_headers_are_checked_before_decoding(make: SimpleNamespace) -> None:
    image = make.noise(40, 60)
    jpeg, png = encode(image, ".jpg"), encode(image)
    limits = Limits(pixels=10_000)
    assert check_image(jpeg, limits) == check_image(png, limits) == (60, 40)
    bad = {
        "empty": b"",
        "neither JPEG nor PNG": b"GIF89a" + bytes(100),
        "over data.max_pixels": header(jpeg, 30_000, 30_000),
        "0x40 pixels": header(jpeg, 0, 40),
        "no end marker": jpeg[:-2],
        "before its image data": jpeg[:100],
        "segment expected": jpeg[:20] + b"\x00" + jpeg[21:],
        "no end chunk": png[:-20],
        "no header chunk": png[:20],
        "101 scans": jpeg[:-2] + b"\xff\xda\x00\x02" * 100 + jpeg[-2:],
    }
    for reason, data in bad.items():
        with pytest.raises(BadSample, match=reason):
            check_image(data, limits)


def test_progressive_jpeg_passes() -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (30, 20)).save(buffer, "JPEG", progressive=True, exif=b"Exif\0\0" + bytes(500))
    assert check_image(buffer.getvalue(), Limits(pixels=1000)) == (30, 20)


def test_dali_applies_exif_orientation(image: PixelPipeline, make: SimpleNamespace, entry: Callable) -> None:
    """Orientation 6, a quarter turn, as OpenCV's reader applies it too."""
    jpeg = encoded(make.noise(110, 130), "JPEG", 6)
    upright = cv2.imdecode(np.frombuffer(jpeg, np.uint8), cv2.IMREAD_COLOR)[..., ::-1]
    assert upright.shape == (130, 110, 3)
    pixels, _ = images_of(image, [jpeg], [entry(short_side=110)])
    assert np.abs(levels(pixels[0]) - opencv_crop(upright, entry(short_side=110))).mean() < 0.5
