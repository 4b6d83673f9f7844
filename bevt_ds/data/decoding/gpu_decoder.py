"""Clips by decoders of a GPU that are kept and used again: sessions by codec and size, packets from a worker.

A worker opens the container, numbers the frames and hands over the packets that a clip needs (packets.py); a session
takes them, each with its frame's number, and gives frames with the same numbers; only those that are wanted become RGB
(rgb.py). Nothing here knows which library decodes: nvdec.py has the real one, tests a stand-in.

Shape letters: F frames, H W pixels.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bevt_ds.data.decoding.pool import DecodePool, Reply
from bevt_ds.data.decoding.rgb import rgb_of_nv12
from bevt_ds.data.decoding.sessions import Frames, GpuRefusal, Session, Sessions, StreamKind

_CLOSE = 2.0  # levels of 255 in the mean: how far a codec's first frames may be from a worker's


class GpuDecoder:
    """Decodes clips of H.264 and HEVC videos; threads may share it.

    pool: workers that open the files; a session has as long for a clip as they. sessions: how many at a time. The
    first clip of each codec is decoded by a worker too: where the two are not alike, the codec is refused from then on.
    """

    def __init__(self, pool: DecodePool, open_session: Callable[[StreamKind], Session], sessions: int) -> None:
        self._pool = pool
        self.sessions = Sessions(open_session, sessions, pool.seconds)
        self.lanes = sessions
        self._lock, self._proved = threading.Lock(), {}  # codec -> why it is refused, or ""

    def clips(
        self, data: bytes, positions: Sequence[Sequence[float]], frames: int, stride: int
    ) -> tuple[list[Tensor], Reply]:
        """The frames of each clip, uint8 (F,H,W,3) on the device, and what `packets` says.

        The arguments are those of DecodePool.clips. GpuRefusal: a worker must decode them. BadSample.
        """
        clip = {"choice": "clip", "positions": positions, "frames": frames, "stride": stride}
        reply, payload = self._pool.ask(data, {"work": "packets", **clip})
        if "refused" in reply:
            raise GpuRefusal(reply["refused"], is_fault=False)
        if why := self._proved.get(reply["codec"]):
            raise GpuRefusal(why, is_fault=False)
        clips = list(self._clips(reply, payload))
        if reply["codec"] not in self._proved:
            self._prove(reply["codec"], clips, data, clip)
        return clips, reply

    def _clips(self, reply: dict[str, Any], payload: np.ndarray) -> Tensor:
        """uint8 (k,F,H,W,3)."""
        kind = StreamKind(reply["codec"], reply["width"], reply["height"])
        return self.sessions.run(kind, partial(images_of, kind=kind, reply=reply, payload=payload))

    def _prove(self, codec: str, clips: Sequence[Tensor], data: bytes, clip: dict[str, Any]) -> None:
        """Compare with a worker's frames, once for each codec."""
        with self._pool.clips(data, clip["positions"], clip["frames"], clip["stride"]) as decoded:
            ours = torch.stack(list(clips)).cpu().numpy().astype(np.int16)
            most = float(np.abs(ours - decoded.copied()).mean((0, 2, 3, 4)).max())  # of any of its frames
        why = f"its {codec} frames are {most:.1f} levels from a worker's" if most > _CLOSE else ""
        with self._lock:
            self._proved[codec] = why
        if why:
            raise GpuRefusal(why)


def images_of(session: Session, kind: StreamKind, reply: dict[str, Any], payload: np.ndarray) -> Tensor:
    """The frames of each clip, as `packets` asks for them: uint8 (k,F,H,W,3)."""
    with session.context():
        images = rgb_of_nv12(wanted_frames(session, kind, reply, payload), reply["full_range"])
        return images[torch.tensor(reply["places"], device=images.device)]


def wanted_frames(session: Session, kind: StreamKind, reply: dict[str, Any], payload: np.ndarray) -> Tensor:
    """The frames that are wanted, as they are stored: uint8 (n,H+H/2,W). GpuRefusal: not all of them come out."""
    rows = {number: row for row, number in enumerate(reply["wanted"])}
    stored, shape = None, (kind.height * 3 // 2, kind.width)
    for number, frame in decoded(session, reply, payload):
        if (row := rows.pop(number, None)) is None:
            continue
        if frame.shape != shape:
            raise GpuRefusal(f"its frames are {tuple(frame.shape)}, not {shape}")
        if stored is None:
            stored = frame.new_empty((len(reply["wanted"]), *shape))
        stored[row] = frame
    if rows or stored is None:
        raise GpuRefusal(f"{len(rows)} of its frames do not come out of the decoder")
    return stored


def decoded(session: Session, reply: dict[str, Any], payload: np.ndarray) -> Frames:
    """All frames of a clip's packets, which lie one behind the other in `payload`."""
    data, ends = memoryview(payload), frozenset(accumulate(reply["lengths"]))
    places = pairwise(accumulate(reply["sizes"], initial=0))
    for count, (number, (begin, end)) in enumerate(zip(reply["numbers"], places, strict=True), start=1):
        yield from session.decode(data[begin:end], number)
        if count in ends:
            yield from session.flush()
