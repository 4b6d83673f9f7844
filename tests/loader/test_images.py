"""Image checks: what DALI decodes passes; EXIF orientation."""

from __future__ import annotations

import io
import json
import struct
import tarfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image, ImageOps

from bevt_ds.data.decoding.dali_images import ImageDecoder
from bevt_ds.data.decoding.geometry import UPRIGHT, Turn, turn_of_exif
from bevt_ds.data.decoding.images import decode_image, describe_image, turn_of
from bevt_ds.data.limits import BadSample, Limits
from bevt_ds.shards.check import check, survey
from bevt_ds.shards.pack import pack
from tests.loader.media import deep_jpeg, encoded

LIMITS = Limits()
ROTATIONS = {1: 0, 2: 0, 3: 180, 4: 180, 5: 270, 6: 90, 7: 90, 8: 270}
MIRRORED = {2, 4, 5, 7}


@pytest.fixture(scope="module")
def decoder() -> ImageDecoder:
    return ImageDecoder()


def segment(marker: int, content: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, marker, len(content) + 2) + content


@pytest.mark.parametrize("encoding", ["JPEG", "PNG"])
@pytest.mark.parametrize("orientation", [None, *range(10)])
def test_exif_orientation_is_read_as_dali_reads_it(make, decoder, encoding: str, orientation: int | None) -> None:
    data = encoded(make.noise(32, 48), encoding, orientation)
    stored = decoder.decode(encoded(make.noise(32, 48), encoding))
    turn = turn_of(data)
    assert turn == turn_of_exif(orientation or 0)
    np.testing.assert_array_equal(decoder.decode(data), turn.applied(stored))
    height, width = (48, 32) if orientation in (5, 6, 7, 8) else (32, 48)
    facts = {"rotation": ROTATIONS.get(orientation, 0), "mirrored": orientation in MIRRORED}
    assert decode_image(data, LIMITS) == {"width": width, "height": height, **facts}


def test_exif_orientation_is_a_mirror_then_a_rotation(make: SimpleNamespace) -> None:
    """As the JSON says it; Pillow rotates the other way round."""
    image = Image.fromarray(make.noise(20, 30))
    for orientation, rotation in ROTATIONS.items():
        turn = turn_of_exif(orientation)
        mirrored = ImageOps.mirror(image) if turn.mirrored else image
        np.testing.assert_array_equal(turn.applied(np.asarray(image)), mirrored.rotate(-rotation, expand=True))
        assert turn.facts == {"rotation": rotation, "mirrored": orientation in MIRRORED}


@pytest.mark.parametrize("order", ["<", ">"])
def test_exif_byte_order_is_that_of_its_segment(make: SimpleNamespace, decoder: ImageDecoder, order: str) -> None:
    plain = encoded(make.noise(32, 48), "JPEG")
    tiff = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}IHHHIHH", 8, 1, 0x112, 3, 1, 6, 0)
    data = plain[:2] + segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0") + segment(0xE1, b"Exif\0\0" + tiff) + plain[2:]
    assert turn_of(data) == Turn(transposed=True, flipped_x=True)
    assert decoder.decode(data).shape == (48, 32, 3)
    for cut in range(len(tiff) - 4):
        damaged = plain[:2] + segment(0xE1, b"Exif\0\0" + tiff[:cut]) + plain[2:]
        assert turn_of(damaged) == UPRIGHT and decoder.decode(damaged).shape == (32, 48, 3)


def refused_by_pillow(make: SimpleNamespace) -> bytes:
    """Its Adobe segment ends before its version: Pillow gives up, decoders in C pass over it."""
    plain = encoded(make.noise(32, 48), "JPEG")
    data = plain[:2] + segment(0xEE, b"Adobe") + plain[2:]
    with pytest.raises((OSError, SyntaxError, struct.error)):
        Image.open(io.BytesIO(data)).load()
    return data


def test_images_that_dali_decodes_pass_the_check(tmp_path: Path, make: SimpleNamespace, decoder: ImageDecoder) -> None:
    data = refused_by_pillow(make)
    assert decoder.decode(data).shape == (32, 48, 3)
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jpg").write_bytes(data)
    packed = pack(tmp_path / "in", tmp_path / "out", "image", jobs=1)
    report = check([str(packed.shards[0])], jobs=1)
    assert (report.samples, report.findings) == (1, [])


def test_images_that_dali_cannot_decode_fail_the_check(tmp_path: Path, make: SimpleNamespace) -> None:
    good = encoded(make.noise(32, 48), "JPEG")
    deep = deep_jpeg()
    tar = make.tar(tmp_path / "s.tar", {"a.jpg": deep, "b.jpg": good, "c.jpg": deep, "d.jpg": good})
    report = check([str(tar)], jobs=1)
    assert [finding["key"] for finding in report.findings] == ["a", "c"]
    assert all("DALI cannot decode it" in finding["reason"] for finding in report.findings)
    with pytest.raises(BadSample, match="DALI cannot decode it"):
        decode_image(deep, LIMITS)


def test_image_size_is_that_of_the_upright_image(tmp_path: Path, make: SimpleNamespace) -> None:
    (tmp_path / "in").mkdir()
    data = encoded(make.noise(32, 48), "JPEG", 6)
    (tmp_path / "in" / "a.jpg").write_bytes(data)
    packed = pack(tmp_path / "in", tmp_path / "out", "image", jobs=1)
    expected = {"width": 32, "height": 48, "rotation": 90, "mirrored": False}
    assert describe_image(data, LIMITS) == expected
    with tarfile.open(packed.shards[0]) as tar:
        facts = json.load(tar.extractfile("a.json"))
    assert facts == {"source": "a.jpg", **expected}
    for look in (check, survey):
        (found,) = look([str(packed.shards[0])], jobs=1).facts
        assert {name: found[name] for name in expected} == expected
