"""A decoder that takes the place of a GPU's: the same packets, FFmpeg's frames, and faults on demand."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress

import av
import numpy as np
import torch

from bevt_ds.data.decoding.sessions import Frames, GpuRefusal, StreamKind


def nv12(frame: av.VideoFrame) -> np.ndarray:
    """The planes of a 4:2:0 frame as NVDEC stores them: uint8 (H+H/2,W)."""
    y, u, v = (np.frombuffer(p, np.uint8).reshape(-1, p.line_size)[: p.height, : p.width] for p in frame.planes)
    return np.concatenate([y, np.stack([u, v], axis=-1).reshape(u.shape[0], -1)])


class FakeGpu:
    """Opens sessions and counts them. fault: called with the packets' number so far, may raise or wait."""

    def __init__(self, fault: Callable[[int], None] = lambda packets: None) -> None:
        self.fault, self.lock = fault, threading.Lock()
        self.opened: list[StreamKind] = []
        self.closed = self.packets = self.stretches = 0

    def __call__(self, kind: StreamKind) -> FakeSession:
        with self.lock:
            self.opened.append(kind)
        return FakeSession(self, kind)


class FakeSession:
    """A session of sessions.py in which FFmpeg decodes. Its frames are in one memory, as those of a GPU may be."""

    def __init__(self, gpu: FakeGpu, kind: StreamKind) -> None:
        self._gpu, self._kind = gpu, kind
        self._context, self._memory = self._fresh(), torch.empty(kind.height * 3 // 2, kind.width, dtype=torch.uint8)

    def decode(self, packet: memoryview, number: int) -> Frames:
        with self._gpu.lock:
            self._gpu.packets += 1
            packets = self._gpu.packets
        self._gpu.fault(packets)
        part = av.Packet(bytes(packet))
        part.pts = number
        with suppress(av.error.InvalidDataError):  # a GPU shows no such thing: frames stay out
            yield from self._frames(part)

    def flush(self) -> Frames:
        yield from self._frames(None)
        with self._gpu.lock:
            self._gpu.stretches += 1
        self._context = self._fresh()

    def context(self) -> AbstractContextManager:
        return nullcontext()

    def close(self) -> None:
        with self._gpu.lock:
            self._gpu.closed += 1

    def _fresh(self) -> av.CodecContext:
        context = av.CodecContext.create(self._kind.codec, "r")
        context.thread_count = 1
        return context

    def _frames(self, part: av.Packet | None) -> Frames:
        for frame in self._context.decode(part):
            self._memory[:] = torch.from_numpy(nv12(frame))
            yield frame.pts, self._memory


def refusing(packets: int) -> None:
    """A decoder that takes nothing."""
    raise GpuRefusal("out of sessions")


def slow(packets: int) -> None:
    """A decoder that takes 2 ms a packet."""
    time.sleep(0.002)
