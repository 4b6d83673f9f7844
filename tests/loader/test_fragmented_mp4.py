"""Fragmented MP4: frames, truncation, and tables that point nowhere."""

from __future__ import annotations

import struct
from collections.abc import Callable
from contextlib import suppress
from types import SimpleNamespace

import numpy as np
import pytest

from bevt_ds.data.decoding.verify import verify_video
from bevt_ds.data.decoding.video import check_container, fits_gpu, probe
from bevt_ds.data.limits import BadSample, Limits
from tests.loader.media import decode_clip, remuxed
from tests.loader.test_containers import put, u32, with_sound

LIMITS = Limits()
FRAMES = 20
FORMS = {
    "keyframes": "frag_keyframe+empty_moov",
    "after a plain part": "frag_keyframe",
    "each frame": "frag_every_frame+empty_moov",
    "base at moof": "frag_keyframe+empty_moov+default_base_moof",
    "no base": "frag_keyframe+empty_moov+omit_tfhd_offset",
    "tracks apart": "frag_keyframe+empty_moov+separate_moof",
    "DASH": "dash+frag_keyframe",
    "CMAF": "cmaf+frag_keyframe",
}


@pytest.fixture(scope="module")
def frames(make: SimpleNamespace) -> np.ndarray:
    return make.noise(FRAMES, 48, 64, softness=5.0)


@pytest.fixture(scope="module")
def plain(make: SimpleNamespace, frames: np.ndarray) -> bytes:
    return make.clip(frames, "mp4", "libx264", g="8", bf="2")


@pytest.fixture(scope="module")
def fragmented(plain: bytes) -> dict[str, bytes]:
    """The same packets."""
    return {name: remuxed(plain, "mp4", muxer={"movflags": flags}) for name, flags in FORMS.items()}


@pytest.mark.parametrize("form", FORMS)
def test_fragmented_mp4_has_the_frames_of_a_plain_mp4(plain: bytes, fragmented: dict[str, bytes], form: str) -> None:
    data = fragmented[form]
    assert b"moof" in data and check_container(data, LIMITS).name == "fragmented mp4"
    np.testing.assert_array_equal(decode_clip(data, np.arange), decode_clip(plain, np.arange))
    info = verify_video(data, LIMITS)
    assert info.frames == FRAMES and not fits_gpu(vars(info))


def test_fragmented_mp4_with_sound_is_read(frames: np.ndarray) -> None:
    data = with_sound(frames, "mp4", "libx264", "aac", muxer={"movflags": FORMS["keyframes"]}, g="8")
    assert check_container(data, LIMITS).frames in (None, FRAMES) and probe(data, LIMITS).frames == FRAMES


def test_fragmented_mp4_cut_anywhere_is_found_or_ends_with_a_fragment_d15(fragmented: dict[str, bytes]) -> None:
    """D15: nothing says how many fragments there are to be; those that are left are as they were."""
    data, left = fragmented["keyframes"], set()
    whole = decode_clip(data, np.arange)
    starts = [i - 4 for i in range(len(data)) if data[i : i + 4] == b"moof"]
    for length in range(len(data)):
        with suppress(BadSample):
            check_container(data[:length], LIMITS)
            left.add(sum(start < length for start in starts))
    assert left == {1, 2, 3}
    for fragment, end in enumerate(starts[1:], start=1):
        np.testing.assert_array_equal(decode_clip(data[:end], np.arange), whole[: 8 * fragment])


LIES: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "samples": (lambda d: put(d, b"trun", 4, u32(1 << 20)), "more than it holds"),
    "samples without fields": (lambda d: put(d, b"trun", 0, u32(1, 1 << 30)), "more than the file has bytes"),
    "offset": (lambda d: put(d, b"trun", 8, u32(1 << 30)), "points at byte"),
    "offset before the file": (lambda d: put(d, b"trun", 8, struct.pack(">i", -(1 << 30))), "points at byte"),
    "size": (lambda d: put(d, b"trun", 16, u32(1 << 24)), "points at byte"),
    "base": (lambda d: put(d, b"tfhd", 8, struct.pack(">Q", 1 << 62)), "points at byte"),
    "track": (lambda d: put(d, b"tfhd", 4, u32(9)), "a track 9 that 'mvex' does not name"),
    "not announced": (lambda d: put(d, b"mvex", -4, b"free"), "fragmented.*no 'mvex'"),
    "outside a fragment": (lambda d: d + d[d.index(b"traf") - 4 : d.index(b"mdat") - 4], "box 'traf' outside 'moof'"),
    "no header": (lambda d: put(d, b"tfhd", -4, b"free"), "0 boxes 'tfhd'"),
    "short": (lambda d: put(d, b"trun", -8, u32(12)), "stray bytes|too short|says"),
}


@pytest.mark.parametrize("lie", LIES)
def test_fragments_that_contradict_themselves_are_refused(fragmented: dict[str, bytes], lie: str) -> None:
    change, reason = LIES[lie]
    data = fragmented["keyframes"]
    assert change(data) != data
    with pytest.raises(BadSample, match=reason):
        probe(change(data), LIMITS)


def test_fragmented_mp4_over_the_frame_limit_is_refused(fragmented: dict[str, bytes]) -> None:
    with pytest.raises(BadSample, match=f"it has {FRAMES} frames, over data.max_frames=19"):
        check_container(fragmented["keyframes"], Limits(frames=FRAMES - 1))


def test_fragmented_mp4_without_a_frame_is_refused(fragmented: dict[str, bytes]) -> None:
    data = fragmented["keyframes"]
    with pytest.raises(BadSample, match="0 boxes 'mdat'|it has no frames"):
        check_container(data[: data.index(b"moof") - 4] + u32(8) + b"mdat", LIMITS)
