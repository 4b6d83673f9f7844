"""Media to be damaged, and ways to damage it at random; each case is a function of its kind, a seed and a number."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TypeVar

import numpy as np
from tqdm import tqdm

from bevt_ds.data.decoding.pool import DecodePool
from bevt_ds.data.limits import Limits
from bevt_ds.data.plan import PlanEntry
from bevt_ds.shards.synthetic.draw_worker import encode_jpeg
from tests.loader.media import encode_clip, pooled_clips

DEADLINE = 5.0  # seconds a video may take; a hundred times what one of these does
LIMITS = Limits(pixels=1 << 20, frames=5000, clip_bytes=1 << 26)
FRAMES = 12
HEADER = 700  # bytes at the head of a WebM, and about the size of the tables of these MP4s

UNDER_WAY = 8  # videos that are in the pool at one time
PLAIN_VIEW = PlanEntry(0, 0, 0, 0, 0, 0.0, 0.0, 32, (0.5, 0.5), False, (1.0, 1.0, 1.0))

T = TypeVar("T")


@dataclass
class Tally:
    """What became of the cases of one kind. `curve`: memory and open files on the way, where that is looked at."""

    outcomes: Counter[str] = field(default_factory=Counter)
    slowest: float = 0.0  # seconds
    faults: list[str] = field(default_factory=list)
    curve: list[dict[str, float]] = field(default_factory=list)

    def note(self, outcome: str, seconds: float) -> None:
        self.outcomes[outcome] += 1
        self.slowest = max(self.slowest, seconds)

    def __str__(self) -> str:
        counts = ", ".join(f"{n} {outcome}" for outcome, n in sorted(self.outcomes.items()))
        return f"{sum(self.outcomes.values())} cases: {counts}; slowest {self.slowest:.2f} s; {len(self.faults)} faults"


def watched(numbers: Iterable[T], what: str) -> Iterable[T]:
    """With a progress bar, on a terminal."""
    return tqdm(numbers, desc=what, disable=None, unit="case")


def mutate(data: bytes, rng: np.random.Generator, first: int = 0, last: int | None = None) -> bytes:
    """Flipped bits, other bytes, a cut, a repeated or a missing piece, within data[first:last]."""
    last = len(data) if last is None else last
    changed = bytearray(data)
    for _ in range(int(rng.integers(1, 5))):
        at = int(rng.integers(first, last))
        match int(rng.integers(5)):
            case 0:
                changed[at] ^= 1 << int(rng.integers(8))
            case 1:
                changed[at : at + 4] = rng.bytes(4)
            case 2:
                changed[at : at + 4] = int(rng.choice([0, 1, 0xFF, 0x7FFFFFFF, 0xFFFFFFFF])).to_bytes(4, "big")
            case 3 if rng.random() < 0.2:
                del changed[at:]
                return bytes(changed)
            case 4 if rng.random() < 0.2:
                piece = int(rng.integers(1, 600))
                changed[at:at] = changed[at : at + piece] if rng.random() < 0.5 else b""
                del changed[at : at + int(rng.integers(1, 64))]
        last = min(last, len(changed))
        if first >= last:
            break
    return bytes(changed)


@contextmanager
def quiet() -> Iterator[None]:
    """libjpeg and FFmpeg inside DALI write a line for every bad file, past Python's sys.stderr."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def in_order(
    pool: DecodePool, numbers: Iterable[int], make: Callable[..., bytes]
) -> Iterator[tuple[int, bytes, Future]]:
    """Clips of the files that `make` returns, decoded by a pool: number, file, future."""
    under_way: list[tuple[int, bytes, Future]] = []
    with ThreadPoolExecutor(UNDER_WAY) as threads:
        for number in numbers:
            data = make(number, names=("h264", "webm"))
            under_way.append((number, data, threads.submit(pooled_clips, pool, data, [(0.5, 0.0)], 4, 2)))
            if len(under_way) > UNDER_WAY:
                yield under_way.pop(0)
        yield from under_way


def drawn_image() -> np.ndarray:
    """Coarse coloured squares: uint8 (48,64,3)."""
    return np.random.default_rng(0).integers(0, 255, (6, 8, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)


@lru_cache(maxsize=1)
def clips() -> dict[str, bytes]:
    """Short clips: H.264 in MP4, VP9 in WebM and in MP4."""
    frames = np.stack([np.roll(drawn_image(), 3 * i, axis=1) for i in range(FRAMES)])
    quick = {"deadline": "realtime", "cpu-used": "8"}
    return {
        "h264": encode_clip(frames, "mp4", "libx264", g="6", bf="2"),
        "webm": encode_clip(frames, "webm", "libvpx-vp9", **quick),
        "vp9": encode_clip(frames, "mp4", "libvpx-vp9", **quick),
    }


def damaged_clip(number: int, seed: int, headers_only: bool, names: tuple[str, ...]) -> bytes:
    rng = np.random.default_rng((seed, 3 + headers_only, number))
    name = names[number % len(names)]
    data = clips()[name]
    if not headers_only:
        return mutate(data, rng)
    first = 0 if name == "webm" else data.index(b"moov") - 4  # the tables, which FFmpeg writes behind the frames
    return mutate(data, rng, first, min(first + HEADER, len(data)) if name == "webm" else len(data))


def _until_scan(jpeg: bytes) -> bytes:
    return jpeg[: jpeg.index(b"\xff\xda")]


def _without_payload(clip: bytes) -> bytes:
    """The tables as they were, and nothing in the frames that they point at."""
    at = clip.index(b"mdat") + 4
    return clip[:at] + bytes(clip.index(b"moov") - 4 - at) + clip[clip.index(b"moov") - 4 :]


def _announcing(clip: bytes, width: int, height: int) -> bytes:
    """Another size in the sample description of an MP4."""
    at = clip.index(b"avc1", clip.index(b"stsd")) + 28
    return clip[:at] + width.to_bytes(2, "big") + height.to_bytes(2, "big") + clip[at + 4 :]


# name -> what is certainly refused, early or late on the way
BAD_PICTURES: dict[str, Callable[[], bytes]] = {
    "empty": lambda: b"",
    "text": lambda: b"not an image at all " * 100,
    "cut": lambda: encode_jpeg(drawn_image())[:-2],
    "no tables": lambda: encode_jpeg(drawn_image()).replace(b"\xff\xdb", b"\xff\xe9"),  # only the decoder finds that
    "no payload": lambda: _until_scan(encode_jpeg(drawn_image())) + b"\xff\xd9",
    "cut PNG": lambda: b"\x89PNG\r\n\x1a\n" + bytes(100),
}
BAD_CLIPS: dict[str, Callable[[], bytes]] = {
    "empty": lambda: b"",
    "text": lambda: b"not a video at all " * 100,
    "cut MP4": lambda: clips()["h264"][:-200],
    "cut WebM": lambda: clips()["webm"][:-200],
    "bomb": lambda: _announcing(clips()["h264"], 60000, 60000),
    "another size": lambda: _announcing(clips()["h264"], 80, 48),
    "no payload": lambda: _without_payload(clips()["h264"]),
    "no VP9 payload": lambda: _without_payload(clips()["vp9"]),
    "sound only": lambda: clips()["h264"].replace(b"vide", b"soun"),
}
