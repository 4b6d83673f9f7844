"""A process that works on one video at a time: `python -m bevt_ds.data.decoding.worker NUMBER`, driven by DecodePool.

A JSON line and the file's bytes in; JSON behind its length and, where it says so, bytes out. Pixels go to the
SharedMemory of that file NUMBER. A separate program rather than a fork: it imports neither torch nor the entry, and a
decoder that crashes or hangs costs one process.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any, BinaryIO

import av
import numpy as np

from bevt_ds.data.decoding.geometry import Box, Crop, source_box
from bevt_ds.data.decoding.images import decode_image, describe_image
from bevt_ds.data.decoding.packets import packets
from bevt_ds.data.decoding.pool import LENGTH, READY, SharedMemory
from bevt_ds.data.decoding.subprocess_env import begin_watch, ignore_signals
from bevt_ds.data.decoding.transcode import Profile, transcode
from bevt_ds.data.decoding.verify import verify_video
from bevt_ds.data.decoding.video import opened, probe
from bevt_ds.data.limits import BadSample, Limits
from bevt_ds.data.plan import CHOICES

Answer = tuple[dict[str, Any], bytes]
Work = Callable[[bytes, Limits, dict[str, Any]], Answer]
_PAGE = os.sysconf("SC_PAGE_SIZE")


def main() -> None:
    """Serve until the pipe closes, or the parent dies."""
    begin_watch()
    av.logging.set_level(av.logging.PANIC)
    ignore_signals()
    requests, replies = sys.stdin.buffer, sys.stdout.buffer
    gc.freeze()  # what has been imported stays: no collection needs to look at it
    works = {**WORKS, "clips": partial(clips, SharedMemory(int(sys.argv[1])))}
    replies.write(READY)
    replies.flush()
    for line in requests:
        request = json.loads(line)
        # If the parent is gone too, no one else would end a decoder that hangs.
        signal.setitimer(signal.ITIMER_REAL, 2 * request["seconds"])
        serve(works, request, requests.read(request["size"]), replies)
        signal.setitimer(signal.ITIMER_REAL, 0)


def serve(works: dict[str, Work], request: dict[str, Any], data: bytes, replies: BinaryIO) -> None:
    """Answer one request: {"work", "size", "limits", "seconds", ...}; see the functions that do it for the rest."""
    try:
        reply, payload = works[request["work"]](data, Limits(**request["limits"]), request)
    except BadSample as bad:
        reply, payload = {"bad": str(bad)}, b""
    with open("/proc/self/statm", encoding="ascii") as file:  # a decoder that leaks shows here
        reply |= {"size": len(payload), "resident": int(file.read().split()[1]) * _PAGE}
    header = json.dumps(reply).encode()
    replies.write(LENGTH.pack(len(header)) + header)
    replies.write(payload)
    replies.flush()


def clips(memory: SharedMemory, data: bytes, limits: Limits, request: dict[str, Any]) -> Answer:
    """{"choice", "positions", "frames", "stride"} -> images (n,H,W,3) in `memory`, and their {"shape"}.

    {"crops"}: of each clip the fields of its Crop, of which no more is to be made; null: all of it. "places": for each
    clip, the image of each of its frames, (k,F). "seconds": when each is shown, from the video's first frame on, (k,F);
    null where {"crops"} are given. "total": frames of the video. "decoded" counts frames; "demux" and "decode" are
    seconds.
    """
    began = time.perf_counter()
    with opened(data, limits) as video:
        demuxed = time.perf_counter()
        total = video.total
        frames, stride, choose = request["frames"], request["stride"], CHOICES[request["choice"]]
        wanted = [choose(total, frames, stride, position) for position in request["positions"]]
        numbers, places = np.unique(wanted, return_inverse=True)
        times = video.times() if request["crops"] is None else None  # training, which crops, has no use for them
        places = places.reshape(len(wanted), frames)
        width, height = video.size
        boxes = [source_box(height, width, Crop(*crop)) for crop in request["crops"] or ()]
        images = video.decode_into(numbers, memory.grown, needed(places, boxes))
    reply = {
        "shape": images.shape,
        "places": places.tolist(),
        "seconds": None if times is None else times[np.array(wanted)].tolist(),
        "total": total,
        "decoded": video.decoded,
        "demux": demuxed - began,
        "decode": time.perf_counter() - demuxed,
    }
    return reply, b""


def needed(places: np.ndarray, boxes: Sequence[Box]) -> list[Box] | None:
    """What clips need of each image: the smallest box around theirs. places: int (k,F); boxes: k, or none."""
    around: dict[int, Box] = {}
    for rows, box in zip(places.tolist(), boxes, strict=bool(boxes)):
        for row in set(rows):
            around[row] = around[row].with_other(box) if row in around else box
    return [around[row] for row in sorted(around)] or None


def describe(data: bytes, limits: Limits, request: dict[str, Any]) -> Answer:
    """{"kind"} -> the fields of VideoInfo, or those of `describe_image`, from headers and a video's first frame."""
    if request["kind"] == "image":
        return describe_image(data, limits), b""
    return asdict(probe(data, limits)), b""


def check(data: bytes, limits: Limits, request: dict[str, Any]) -> Answer:
    """{"kind"} -> the fields of VideoInfo, or those of `decode_image`, once all is decoded; see verify.py."""
    if request["kind"] == "image":
        return decode_image(data, limits), b""
    return asdict(verify_video(data, limits)), b""


def rewrite(data: bytes, limits: Limits, request: dict[str, Any]) -> Answer:
    """{"profile": fields of Profile} -> the facts of a transcoded video, and the file."""
    video, facts = transcode(data, Profile(**request["profile"]), limits)
    return facts, video


WORKS: dict[str, Work] = {"describe": describe, "check": check, "packets": packets, "rewrite": rewrite}


if __name__ == "__main__":
    main()
