"""The synthetic action set: motion decides the class, and a single frame does not tell it."""

from __future__ import annotations

import io
from statistics import NormalDist

import av
import numpy as np
import pytest

from benchmarks.study_motion import COURSES, FAST, SLOW, USUAL, WOBBLE, displacements, render_action
from bevt_ds.rng import Use, generator
from bevt_ds.shards.synthetic.draw_worker import encode_mp4
from bevt_ds.shards.synthetic.scene import Extent

EXTENT = Extent(64, 64, 8)
NAMES = tuple(COURSES)
CLIPS = 24  # a class


def rng(number: int) -> np.random.Generator:
    return generator(0, Use.SYNTHETIC, 9, number)


@pytest.mark.parametrize("seed", range(4))
def test_first_frame_does_not_depend_on_the_class(seed):
    clips = [render_action(rng(seed), name, EXTENT) for name in NAMES]
    for clip in clips:
        np.testing.assert_array_equal(clip[0], clips[0][0])
    assert len({clip[-1].tobytes() for clip in clips}) == len(NAMES)


def test_shapes_wrap_around_the_frame():
    """So the ground covers about as much of any frame: no class empties the image."""
    for name in NAMES:
        clip = render_action(rng(1), name, EXTENT).astype(int)
        covered = (clip.min(-1) >= 120).mean((1, 2))
        assert covered.min() > 0.7 * covered.max() > 0


@pytest.mark.parametrize("name", NAMES)
def test_synthetic_tracks_follow_their_class(name):
    course = COURSES[name]
    for seed in range(50):
        track = displacements(rng(seed), course, 8)
        steps = np.diff(track, axis=0)
        speeds = np.hypot(*steps.T)
        assert (track[0] == 0).all()
        assert course.speed[0] <= speeds.min() and speeds.max() <= course.speed[1]
        for step, leg in ((steps[0], course.legs[0]), (steps[-1], course.legs[-1])):
            off = np.angle(np.exp(1j * (np.arctan2(*step) - np.array(leg))))
            assert np.abs(off).min() <= WOBBLE + 1e-9


def test_synthetic_speeds_do_not_overlap():
    assert SLOW[1] < USUAL[0] < USUAL[1] < FAST[0]


def pixels(clip: np.ndarray, frame: int) -> np.ndarray:
    """A frame as it comes out of the H.264 stream, at 8x8 with its square, and its sharpness."""
    with av.open(io.BytesIO(encode_mp4(clip))) as container:
        image = [f.to_ndarray(format="rgb24") for f in container.decode(video=0)][frame].astype(float)
    small = image.reshape(8, 8, 8, 8, 3).mean((1, 3)).ravel() / 255
    sharpness = [np.abs(np.diff(image, axis=axis)).mean() / 255 for axis in (0, 1)]
    return np.concatenate([small, small**2, sharpness])


def accuracy(features: np.ndarray, labels: np.ndarray) -> float:
    """Of ridge regression on the first half, on the second."""
    features = (features - features.mean(0)) / (features.std(0) + 1e-6)
    half = len(labels) // 2
    x, y = features[:half], np.eye(len(NAMES))[labels[:half]] - 1 / len(NAMES)
    weights = np.linalg.solve(x @ x.T + 30 * np.eye(half), y)
    return float(((features[half:] @ x.T @ weights).argmax(1) == labels[half:]).mean())


@pytest.fixture(scope="module")
def clips():
    labels = np.arange(2 * CLIPS * len(NAMES)) % len(NAMES)
    return [render_action(rng(100 + i), NAMES[label], EXTENT) for i, label in enumerate(labels)], labels


@pytest.mark.parametrize("frame", (0, 4, 7))
def test_single_frame_does_not_tell_the_class(clips, frame):
    drawn, labels = clips
    tested = len(labels) // 2
    chance = 1 / len(NAMES)
    bound = chance + NormalDist().inv_cdf(0.999) * (chance * (1 - chance) / tested) ** 0.5
    assert accuracy(np.stack([pixels(clip, frame) for clip in drawn]), labels) < bound


def test_track_tells_the_class(clips):
    _, labels = clips
    tracks = [displacements(rng(i), COURSES[NAMES[label]], 8) for i, label in enumerate(labels)]
    steps = np.diff(np.stack(tracks), axis=1) / FAST[1]
    features = np.concatenate([steps[:, 0], steps[:, -1], steps[:, 0] ** 2, steps[:, -1] ** 2], axis=1)
    assert accuracy(features, labels) > 0.8
