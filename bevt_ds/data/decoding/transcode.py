"""Rewrite a video so that training decodes it cheaply. Runs in decode workers: neither torch nor DALI."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from fractions import Fraction
from typing import Any

import av
import numpy as np

from bevt_ds.data.decoding.geometry import UPRIGHT, Turn
from bevt_ds.data.decoding.video import UNKNOWN_FPS, Video, opened
from bevt_ds.data.limits import Limits

# Chosen by measurement, see docs/data.md: what makes decoding dear is the deblocking filter and CABAC, which
# `fastdecode` leaves out; one reference frame and no B-frames let a clip start at any keyframe without detours.
_X264 = {"preset": "veryfast", "tune": "fastdecode", "bf": "0", "refs": "1", "sc_threshold": "0"}
# The same for HEVC, whose `fastdecode` leaves out the loop filters. One thread: the same bytes each time.
_X265 = {"preset": "veryfast", "tune": "fastdecode"}
_X265_PARAMS = "bframes=0:ref=1:scenecut=0:open-gop=0:pools=none:frame-threads=1:wpp=0:log-level=none"
SLOWEST = Fraction(1, 1001)  # frames a second; of a time lapse that is slower, frames are repeated
CRF = {"h264": 20, "hevc": 22}  # of each codec, about as good as the other


@dataclass(frozen=True)
class Profile:
    """What `bevt shards pack --profile train` makes of a video: 4:2:0, constant frame rate, no sound."""

    short_side: int = 256  # pixels; a smaller video is not enlarged
    keyframe_every: int = 16  # frames
    crf: int = CRF["h264"]  # the encoder's quality, lower is better
    fps: float = 0.0  # frames a second; 0: the source's average
    codec: str = "h264"  # or "hevc"


def transcode(data: bytes, profile: Profile, limits: Limits) -> tuple[bytes, dict[str, Any]]:
    """The rewritten file, the same bytes each time, and what is to be known of it. BadSample: it cannot be decoded.

    The facts hold the source's frame rate and, for each frame, its time in the source in seconds, so that a clip can
    be sampled by time as if from the source.
    """
    with opened(data, limits) as video:
        source = video.info
        rate = max(Fraction(profile.fps or source.fps or UNKNOWN_FPS).limit_denominator(1001), SLOWEST)
        source_times, ticks = video.times(), max(round(source.duration * rate), 1)
        limits.check_frames(ticks)
        numbers = nearest(source_times, np.arange(ticks) / float(rate))
        times = source_times[numbers]
        buffer = io.BytesIO()
        size = _scaled(source.width, source.height, profile.short_side)
        _encode(buffer, _repeated(video, numbers), rate, size, video.turn, profile)
    facts = {
        "frames": len(numbers),
        "width": size[0],
        "height": size[1],
        "fps": float(rate),
        "codec": profile.codec,
        "duration": len(numbers) / float(rate),
        "original": asdict(source),
        "times": [round(t, 4) for t in times.tolist()],
    }
    return buffer.getvalue(), facts


def nearest(times: np.ndarray, moments: np.ndarray) -> np.ndarray:
    """For each moment, which ascend, the number of the frame that is nearest in time, the earlier of two: int64.

    times: of the frames, ascending; both in seconds from the first frame.
    """
    after = np.clip(np.searchsorted(times, moments), 1, max(len(times) - 1, 1))
    before = after - 1
    after = np.minimum(after, len(times) - 1)
    return np.where(moments - times[before] <= times[after] - moments, before, after)


def _repeated(video: Video, numbers: np.ndarray) -> Iterator[av.VideoFrame]:
    """The frames with these numbers, which ascend and may repeat."""
    wanted, repeats = np.unique(numbers, return_counts=True)
    for (_, frame), times in zip(video.pick(wanted), repeats.tolist(), strict=True):
        for _ in range(times):
            yield frame


def _scaled(width: int, height: int, short_side: int) -> tuple[int, int]:
    """Even sides, as 4:2:0 needs, the shorter one at most `short_side`."""
    scale = min(short_side / min(width, height), 1.0)
    return tuple(max(round(side * scale / 2) * 2, 2) for side in (width, height))


def _encode(
    buffer: io.BytesIO,
    frames: Iterator[av.VideoFrame],
    rate: Fraction,
    size: tuple[int, int],
    turn: Turn,
    profile: Profile,
) -> None:
    """Levels become those of limited range, as whoever decodes plain yuv420p takes them to be; pixels are turned."""
    convert = {"format": "yuv420p", "interpolation": "AREA", "dst_color_range": "MPEG", "threads": 1}
    with av.open(buffer, "w", format="mp4") as container:
        encoder, options = _encoder(profile)
        stream = container.add_stream(encoder, rate=rate)
        stream.width, stream.height = size
        stream.pix_fmt = "yuv420p"
        stream.codec_context.thread_count = 1  # with several the bytes would depend on their number
        stream.options = options
        for i, frame in enumerate(frames):
            image = _turned(frame.reformat(*turn.size(*size), **convert), turn)
            image.pts, image.time_base = i, 1 / rate
            image.pict_type = 0  # the source's choice of keyframes is not ours
            container.mux(stream.encode(image))
        container.mux(stream.encode(None))


def _encoder(profile: Profile) -> tuple[str, dict[str, str]]:
    """FFmpeg's name of it, and its options."""
    crf, every = str(profile.crf), str(profile.keyframe_every)
    if profile.codec == "hevc":
        params = f"{_X265_PARAMS}:keyint={every}:min-keyint={every}"
        return "libx265", {**_X265, "crf": crf, "x265-params": params}
    return "libx264", {**_X264, "crf": crf, "g": every}


def _turned(frame: av.VideoFrame, turn: Turn) -> av.VideoFrame:
    """A frame of planes of 8 bits, turned; both sides are even."""
    if turn == UPRIGHT:
        return frame
    shown = av.VideoFrame(*turn.size(frame.width, frame.height), frame.format.name)
    for source, target in zip(frame.planes, shown.planes, strict=True):
        stored, upright = (np.frombuffer(p, np.uint8).reshape(-1, p.line_size) for p in (source, target))
        upright[: target.height, : target.width] = turn.applied(stored[: source.height, : source.width])
    for name in ("color_range", "colorspace", "color_primaries", "color_trc"):
        setattr(shown, name, getattr(frame, name))
    return shown
