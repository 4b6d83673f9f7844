"""What `bevt shards pack --profile train` costs and gives, by codec, keyframe spacing and frame rate.

`python -m benchmarks.packing --media FOLDER` rewrites each video of the folder (default: drawn ones) with each setting
and decodes clips of 16 frames from the copies, all in one thread, timed by its CPU time. Rows go to
benchmarks/results/packing-DEVICE.jsonl.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Any

import av
import numpy as np

from benchmarks import report
from benchmarks.common import add_row, command_line, provenance, rows_of
from benchmarks.loader_media import draw_clip, psnr
from bevt_ds.data.decoding.packets import needed
from bevt_ds.data.decoding.transcode import CRF, Profile, transcode
from bevt_ds.data.decoding.video import opened
from bevt_ds.data.limits import Limits
from bevt_ds.data.plan import clip_frames

KEYFRAMES = (1, 4, 8, 16, 32, 64)
STRIDES = {0.0: 8, 3.75: 1}  # frames a second of the copies (0: the source's) -> stride of clips that last as long
FRAMES, CLIPS = 16, 6  # of a clip; clips a video


@dataclass
class Decoded:
    """Of the clips of one video."""

    seconds: float  # CPU time
    packets: int  # that they need: what NVDEC would decode


def decoded(data: bytes, stride: int, clips: int) -> Decoded:
    """Decode clips from evenly spaced starts, as a worker does."""
    began, packets = time.process_time(), 0
    for start in np.linspace(0, 0.999, clips).tolist():
        with opened(data, Limits()) as video:
            wanted = np.unique(clip_frames(start, video.total, FRAMES, stride))
            video.decode_into(wanted, lambda size: np.empty(size, np.uint8))
            packets += sum(map(len, needed(video.index, wanted.tolist())))
    return Decoded(time.process_time() - began, packets)


def row(sources: Sequence[bytes], profile: Profile, clips: int = CLIPS) -> dict[str, Any]:
    """The means over all videos."""
    began = time.process_time()
    copies = [transcode(data, profile, Limits()) for data in sources]
    encoding, frames = time.process_time() - began, sum(facts["frames"] for _, facts in copies)
    clip = [decoded(data, STRIDES[profile.fps], clips) for data, _ in copies]
    total = clips * len(sources)
    return {
        "codec": profile.codec,
        "crf": profile.crf,
        "keyframe_every": profile.keyframe_every,
        "fps": profile.fps,
        "videos": len(sources),
        "bytes_per_frame": round(sum(len(data) for data, _ in copies) / frames, 1),
        "of_source": round(sum(len(data) for data, _ in copies) / sum(map(len, sources)), 3),
        "psnr_db": round(mean(psnr(a, b, facts) for a, (b, facts) in zip(sources, copies, strict=True)), 2),
        "pack_frame_ms": round(1000 * encoding / frames, 3),
        "decode_clip_ms": round(1000 * sum(each.seconds for each in clip) / total, 3),
        "packets_per_clip": round(sum(each.packets for each in clip) / total, 1),
    }


def profiles(codecs: Sequence[str], keyframes: Sequence[int], rates: Sequence[float]) -> Iterator[Profile]:
    """Every setting."""
    for codec, fps, every in product(codecs, rates, keyframes):
        yield Profile(keyframe_every=every, crf=CRF[codec], fps=fps, codec=codec)


def main(words: Sequence[str] | None = None) -> None:
    parser = command_line(__doc__)
    parser.add_argument("--media", type=Path, help="folder of .mp4 files; default: 4 drawn videos of 10 s")
    parser.add_argument("--codec", nargs="+", choices=sorted(CRF), default=sorted(CRF))
    parser.add_argument("--keyframe-every", type=int, nargs="+", default=KEYFRAMES)
    parser.add_argument("--fps", type=float, nargs="+", choices=STRIDES, default=list(STRIDES))
    arguments = parser.parse_args(words)
    av.logging.set_level(av.logging.PANIC)
    paths = sorted(arguments.media.glob("*.mp4")) if arguments.media else []
    sources = [path.read_bytes() for path in paths] or [draw_clip(i, "340x256") for i in range(4)]
    path = rows_of("packing", provenance("cpu")["device"], arguments.out)
    for profile in profiles(arguments.codec, arguments.keyframe_every, arguments.fps):
        add_row(path, {"media": "real" if paths else "drawn", **row(sources, profile)})
    report.write(path)


if __name__ == "__main__":
    main()
