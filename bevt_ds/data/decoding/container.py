"""Which container a video is in, and what its header claims, before FFmpeg or DALI see it."""

from __future__ import annotations

from dataclasses import dataclass

from bevt_ds.data.decoding.avi import check_avi, is_avi
from bevt_ds.data.decoding.matroska import MAGIC, check_matroska
from bevt_ds.data.decoding.mp4 import FIRST, check_mp4
from bevt_ds.data.limits import BadSample, Limits


@dataclass(frozen=True)
class Container:
    """The claims of a container's header about its first video stream."""

    name: str  # "mp4", "fragmented mp4", "matroska" or "avi"
    width: int
    height: int
    frames: int | None  # None: it does not say, or an edit list may hide some
    codec: str = ""  # as it is named there; "": that is left to FFmpeg
    may_be_turned: bool = False  # to be shown


def check_container(data: bytes, limits: Limits) -> Container:
    """BadSample: no container that is read here, cut, contradicting itself, or over a limit."""
    if not data:
        raise BadSample("it is empty")
    if len(data) > limits.file_bytes:
        raise BadSample(f"it has {len(data)} bytes, over data.max_file_bytes={limits.file_bytes}")
    if data.startswith(MAGIC):
        *facts, turned = check_matroska(data, limits)
        return Container("matroska", *facts, may_be_turned=turned)
    if is_avi(data):
        return Container("avi", *check_avi(data, limits), frames=None)
    if data[4:8].decode("latin-1") in FIRST:
        track = check_mp4(data, limits)
        name = "fragmented mp4" if track.is_fragmented else "mp4"
        frames = None if track.edited else track.frames
        return Container(name, track.width, track.height, frames, track.codec, track.may_be_turned)
    raise BadSample("it is neither MP4, WebM, Matroska nor AVI")
