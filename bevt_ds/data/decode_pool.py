"""Decode workers: started, given a deadline for each sample, and replaced when they hang or die."""

from __future__ import annotations

import json
import os
import queue
import select
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from math import prod
from typing import Any

import numpy as np

from bevt_ds.data import child
from bevt_ds.data.index import BadSample, Member

ATTEMPTS = 2  # a worker may die for reasons that are not the sample's: memory, a stray signal
_MAX_LINE = 1 << 16


class WorkerDied(Exception):
    """The worker's pipe closed before its answer was whole. The message is the end of its stderr."""


class DecodeWorker:
    """One decoder process and its pipes."""

    def __init__(self) -> None:
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the process
        self._process = subprocess.Popen(
            child.command("bevt_ds.data.decode_worker"),
            env=child.environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            bufsize=0,
        )
        self._poll = select.poll()
        self._poll.register(self._process.stdout, select.POLLIN)

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def ask(self, request: dict[str, Any], seconds: float) -> tuple[dict[str, Any], np.ndarray | None]:
        """The answer to a request, and its pixels uint8 (F,H,W,3) if it has any.

        TimeoutError: no answer within `seconds`. WorkerDied: there will be none.
        """
        deadline = time.monotonic() + seconds
        try:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
        except BrokenPipeError as error:
            raise WorkerDied(self._stderr_tail()) from error
        line = self._read_line(deadline)
        reply = json.loads(line)
        if "shape" not in reply:
            return reply, None
        pixels = np.empty(prod(reply["shape"]), dtype=np.uint8)
        self._read_into(memoryview(pixels), deadline)
        return reply, pixels.reshape(reply["shape"])

    def kill(self) -> None:
        """End the process at once; it holds nothing that needs saving."""
        self._process.kill()
        self._process.wait()

    def close(self) -> None:
        """End the process and release its pipes."""
        self.kill()
        self._process.stdin.close()
        self._process.stdout.close()
        self._stderr.close()

    def _stderr_tail(self) -> str:
        """The end of what the worker wrote to its standard error."""
        size = self._stderr.seek(0, os.SEEK_END)
        self._stderr.seek(max(size - 2000, 0))
        return self._stderr.read().decode(errors="replace").strip()

    def _read_line(self, deadline: float) -> bytes:
        """The header line. The pipe is unbuffered, so it is read byte by byte: it is short."""
        line = bytearray()
        byte = memoryview(bytearray(1))
        while not line.endswith(b"\n") and len(line) < _MAX_LINE:
            self._read_into(byte, deadline)
            line += byte
        return bytes(line)

    def _read_into(self, buffer: memoryview, deadline: float) -> None:
        while len(buffer):
            if not self._poll.poll(max(deadline - time.monotonic(), 0) * 1000):
                raise TimeoutError
            got = self._process.stdout.readinto(buffer)
            if not got:
                raise WorkerDied(self._stderr_tail())
            buffer = buffer[got:]


class DecodePool:
    """`workers` decoder processes behind a queue. Results are futures, so their order is the caller's.

    seconds: the deadline for one sample. max_pixels: the largest frame that is decoded.
    """

    def __init__(self, workers: int, seconds: float, max_pixels: int) -> None:
        self._seconds, self._max_pixels, self._closed = seconds, max_pixels, False
        self._idle: queue.SimpleQueue[DecodeWorker] = queue.SimpleQueue()
        self._workers = {DecodeWorker() for _ in range(workers)}
        for worker in self._workers:
            self._idle.put(worker)
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix="decode")

    @property
    def pids(self) -> list[int]:
        return [worker.pid for worker in self._workers]

    def clip(self, member: Member, start: float, frames: int, stride: int) -> Future[np.ndarray]:
        """The clip's frames: uint8 (F,H,W,3). The future raises BadSample if there are none."""
        clip = (start, frames, stride)
        return self._threads.submit(self._answer, member, clip, lambda reply, pixels: pixels)

    def frame_count(self, member: Member) -> Future[int]:
        """How many frames the video has, from its packets' headers."""
        return self._threads.submit(self._answer, member, None, lambda reply, _: reply["frames"])

    def close(self) -> None:
        """End every worker. Samples not yet begun are dropped."""
        self._closed = True
        self._threads.shutdown(wait=False, cancel_futures=True)
        for worker in list(self._workers):
            worker.kill()
        self._threads.shutdown(wait=True)
        for worker in self._workers:
            worker.close()

    def _answer(self, member: Member, clip: tuple | None, select_result: Callable) -> Any:
        request = {
            "member": asdict(member),
            "clip": clip,
            "max_pixels": self._max_pixels,
            "seconds": self._seconds,
        }
        last_words = ""
        for _ in range(ATTEMPTS):
            try:
                with self._borrowed() as worker:
                    reply, pixels = worker.ask(request, self._seconds)
            except TimeoutError:
                raise BadSample(f"not decoded within {self._seconds:g} s") from None
            except WorkerDied as death:
                if self._closed:
                    raise
                last_words = str(death)
                continue
            if "bad" in reply:
                raise BadSample(reply["bad"])
            return select_result(reply, pixels)
        raise BadSample(f"the decoder died {ATTEMPTS} times: {last_words or 'no message'}")

    @contextmanager
    def _borrowed(self) -> Iterator[DecodeWorker]:
        """An idle worker. One that hangs or dies is replaced before its place is given back."""
        worker = self._idle.get()
        try:
            if not worker.alive:  # it died between samples: not this one's doing
                worker = self._replaced(worker)
            yield worker
        except (TimeoutError, WorkerDied):
            worker = self._replaced(worker)
            raise
        finally:
            self._idle.put(worker)

    def _replaced(self, worker: DecodeWorker) -> DecodeWorker:
        if self._closed:
            return worker
        self._workers.remove(worker)
        worker.close()
        fresh = DecodeWorker()
        self._workers.add(fresh)
        return fresh
