"""The trainer's end of a loader that has a process of its own: for a BackgroundLoader, in the place of a reader.

A micro-batch costs one message, with tensors that lie in shared memory, and on a GPU one run of DALI's graph for each
stream. Whatever is done for a single sample is done in the other process (server.py), which uses no GPU.
"""

from __future__ import annotations

import logging
import signal
import socket
import subprocess
from collections.abc import Callable
from concurrent.futures import CancelledError
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import replace
from typing import Any

import torch

from bevt_ds import exit_codes
from bevt_ds.batch import Batch, Stream
from bevt_ds.data.decoding import subprocess_env
from bevt_ds.data.ledger import LEDGER, Ledger, Skips, StageTimes
from bevt_ds.data.limits import BadSample
from bevt_ds.data.open_stream import has_kept_ids, open_graph
from bevt_ds.data.pixels.sent import ReceivedPixels
from bevt_ds.data.process.channel import Channel, Inbox, Placed
from bevt_ds.data.process.messages import Account, Answer, Begin, Opened, Opening, Refused, Said, Working
from bevt_ds.errors import UserError

SILENCE = 60.0  # seconds without a sign; twice in a row, for this process may have been stopped as well
CLOSING_SECONDS = 20.0  # for the process to end its workers and itself
_PORTABLE = 1  # cudaHostRegisterPortable

log = logging.getLogger(__name__)


class LoaderLost(UserError):
    """The loader's process is gone, or stands still."""

    exit_code = exit_codes.RANK_LOST


class RemoteReader:
    """Micro-batches that a process of their own reads.

    device: where they end up, and where DALI's graphs run if `opening.decoders` says so. context: in which a
    micro-batch is made. What goes wrong in the process is raised here. LoaderLost: it ends, or is silent for too long.
    """

    def __init__(
        self,
        opening: Opening,
        device: torch.device,
        context: Callable[[], AbstractContextManager] = nullcontext,
    ) -> None:
        self._device, self._context, self.is_on_gpu = device, context, device.type == "cuda"
        self.skips, self.times = Skips(opening.state), StageTimes()
        path = opening.folder and opening.folder / LEDGER
        self.ledgers = {s.stream: Ledger(s.stream, path, self.skips) for s in opening.sources}
        self.decoder_choices = dict(opening.decoders or {}) if self.is_on_gpu else {}
        pages = PageLock(device)
        self._rank, self._inbox = opening.rank, Inbox(pages.lock, pages.unlock) if self.is_on_gpu else Inbox()
        self._begun = self._finished = 0  # micro-batches
        self._answers: dict[tuple[int, str], Any] = {}  # those that have come before their turn
        self._pids: list[int] = []
        self._is_closed = False
        self._start()
        try:
            self._channel.send(replace(opening, log_level=logging.getLogger().getEffectiveLevel()))
            opened: Opened = self._receive()
            self.fingerprint, self.samples, self.steps_an_epoch = opened
            self._graphs = {s.stream.kind: self._graph(opening, s) for s in opening.sources if opening.decoders}
        except BaseException:
            self.close()
            raise

    @property
    def worker_pids(self) -> list[int]:
        """The loader's process and its decode workers."""
        return [self._process.pid, *self._pids]

    def begin(self, step: int, micro_step: int) -> int:
        """Start on a micro-batch: its number."""
        self._channel.send(Begin(step, micro_step, self._inbox.freed(), self._finished))
        self._begun += 1
        return self._begun - 1

    def finish(self, number: int) -> Batch:
        """Wait for a micro-batch that was begun. Its tensors lie on the GPU, or on a CPU in shared memory."""
        batch: Batch = self._answer(number)
        with self._context():
            if self._graphs:
                video, image = (stream and self._made(number, stream, kind) for kind, stream in vars(batch).items())
                batch = Batch(video, image)
            self._finished = number + 1
            if not self.is_on_gpu:
                return batch
            with self.times.measured("copy"):
                return batch.to(self._device, non_blocking=True)

    def close(self) -> None:
        """End the process, and with it its workers. Twice is harmless."""
        self._is_closed = True
        self._channel.close()
        try:
            self._process.wait(CLOSING_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            with suppress(subprocess.TimeoutExpired):  # a disk that does not answer may keep it from ending
                self._process.wait(CLOSING_SECONDS)

    def _start(self) -> None:
        own, other = socket.socketpair()
        with other, subprocess_env.deaf_at_first():
            self._process = subprocess.Popen(
                subprocess_env.command("bevt_ds.data.process", str(other.fileno())),
                env={**subprocess_env.environment(), "CUDA_VISIBLE_DEVICES": ""},
                pass_fds=[other.fileno()],
                stdin=subprocess.DEVNULL,
            )
        self._channel = Channel(own, SILENCE)

    def _graph(self, opening: Opening, source: Any) -> ReceivedPixels:
        decoder, has_views = opening.decoders[source.stream.name], not has_kept_ids(opening.config, source.stream)
        return ReceivedPixels(open_graph(source, opening.config.data, self._device, decoder, self.times, has_views))

    def _made(self, number: int, stream: Stream, kind: str) -> Stream:
        """A stream with the pixels that its graph makes; where DALI refuses its samples, of what the CPU decodes."""
        while True:
            try:
                return stream.with_pixels(*self._graphs[kind].made(stream.pixels))
            except BadSample as bad:
                self._channel.send(Refused(number, kind, str(bad)))
                stream = self._answer(number, kind)

    def _answer(self, number: int, kind: str = "") -> Any:
        while (number, kind) not in self._answers:
            answer: Answer = self._receive()
            self._answers[answer.number, answer.kind] = answer.item
            self._take(answer.account)
        return self._answers.pop((number, kind))

    def _take(self, account: Account) -> None:
        for ledger, (good, bad) in zip(self.ledgers.values(), account.counts, strict=True):
            ledger.good, ledger.bad = good, bad
        for stage, seconds in account.times.items():
            self.times.add(stage, seconds)
        self.times.decoded_frames, self._pids = account.decoded_frames, list(account.pids)
        self.skips.update(account.skips)

    def _receive(self) -> Any:
        """What the process sends next, but for lines of the log, which are written here."""
        is_silent = False
        while True:
            try:
                message, file = self._channel.receive()
            except TimeoutError as error:
                if is_silent:
                    raise self._lost(f"has given no sign for {2 * SILENCE:g} s") from error
                is_silent = True
                continue
            except EOFError as error:
                raise self._lost(None) from error
            is_silent = False
            if isinstance(message, BaseException):
                raise message
            if isinstance(message, Said):
                logging.getLogger(message.name).log(message.level, "%s", message.text)
            elif not isinstance(message, Working):
                return self._inbox.message(message, file) if isinstance(message, Placed) else message

    def _lost(self, how: str | None) -> BaseException:
        if self._is_closed:
            return CancelledError()
        if how is None:
            try:
                code = self._process.wait(CLOSING_SECONDS)
            except subprocess.TimeoutExpired:
                code = 0
            how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"has ended with code {code}"
        return LoaderLost(f"the loader's process {self._process.pid} of rank {self._rank} {how}; resume=auto continues")


class PageLock:
    """Lets a GPU copy from memory without the CPU. Where the system allows no more of that, copies are only slower."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._locked: set[int] = set()  # addresses

    def lock(self, address: int, size: int) -> None:
        """For a block that has come."""
        with torch.cuda.device(self._device):  # or a thread that has none would start up the first GPU
            code = int(torch.cuda.cudart().cudaHostRegister(address, size, _PORTABLE))
            if not code:
                self._locked.add(address)
                return
            with suppress(RuntimeError):  # or CUDA would tell that error of the next kernel that this thread launches
                torch.zeros(1, device=self._device)
        log.warning("%d bytes of shared memory cannot be page-locked (CUDA's error %d)", size, code)

    def unlock(self, address: int) -> None:
        """For a block that goes."""
        if address not in self._locked:
            return
        self._locked.remove(address)
        with torch.cuda.device(self._device):
            torch.cuda.cudart().cudaHostUnregister(address)
