"""A process that decodes clips: `python -m bevt_ds.data.decode_worker`, driven by DecodePool.

One JSON line in, one JSON line out, then the pixels as raw bytes if the line says ok. A separate program rather than a
fork: it imports neither torch nor the entry, and a decoder that crashes or hangs costs one process.
"""

from __future__ import annotations

import json
import signal
import sys
from dataclasses import asdict
from typing import Any, BinaryIO

import av
import numpy as np

from bevt_ds.data.index import BadSample, Member, read_member
from bevt_ds.data.plan import clip_frames
from bevt_ds.data.video import decode_clip, probe


def main() -> None:
    """Serve until the pipe closes, which is also what happens when the parent dies."""
    av.logging.set_level(av.logging.PANIC)
    # a terminal sends it to all; when to stop is the parent's decision
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    requests, replies = sys.stdin.buffer, sys.stdout.buffer
    for line in requests:
        request = json.loads(line)
        # If the parent is gone too, nobody else would end a decoder that hangs.
        signal.setitimer(signal.ITIMER_REAL, 2 * request["seconds"])
        serve(request, replies)
        signal.setitimer(signal.ITIMER_REAL, 0)


def serve(request: dict[str, Any], replies: BinaryIO) -> None:
    """Answer one request: {"member", "max_pixels", "seconds", "clip": [start, frames,
    stride]|None}.

    With a clip the answer carries its frames, without one it describes the file.
    """
    try:
        data = read_member(Member(**request["member"]))
        if request["clip"] is None:
            reply, pixels = asdict(probe(data, request["max_pixels"])), None
        else:
            start, frames, stride = request["clip"]
            choose = lambda total: clip_frames(start, total, frames, stride)  # noqa: E731
            pixels = decode_clip(data, choose, request["max_pixels"])
            reply = {"shape": pixels.shape}
    except BadSample as bad:
        reply, pixels = {"bad": str(bad)}, None
    replies.write(json.dumps(reply).encode() + b"\n")
    if pixels is not None:
        replies.write(np.ascontiguousarray(pixels).data)
    replies.flush()


if __name__ == "__main__":
    main()
