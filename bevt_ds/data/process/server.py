"""The loader's process: reads what the trainer asks for, until the trainer is gone."""

from __future__ import annotations

import logging
import os
import pickle
import queue
import socket
import threading
import traceback
from collections import deque
from collections.abc import Callable
from contextlib import ExitStack, suppress

from bevt_ds.data.loader import BatchReader, OneRank
from bevt_ds.data.process.channel import Channel, Outbox
from bevt_ds.data.process.messages import Account, Answer, Begin, Opened, Opening, Refused, Said, Working

SIGN_EVERY = 5.0  # seconds


class Server:
    """Answers requests one after the other, in the order in which they come."""

    def __init__(self, channel: Channel, reader: BatchReader) -> None:
        self._channel, self._reader, self._outbox = channel, reader, Outbox()
        self._under_way: deque = deque()  # (number, what `begin` has returned)
        self._sent: dict[int, dict] = {}  # of the same, those of which DALI may refuse a sample
        self._begun = 0

    def serve(self, requests: queue.SimpleQueue, has_work: threading.Event) -> None:
        """Work on requests for ever. has_work: is set while the trainer waits for something."""
        while True:
            if not self._under_way:
                has_work.clear()
                self._take(requests.get())
                has_work.set()
            while not requests.empty():
                self._take(requests.get())
            if self._under_way:
                number, pending = self._under_way.popleft()
                self._answer(number, "", self._reader.finish(pending))

    def _take(self, request: Begin | Refused) -> None:
        if isinstance(request, Refused):
            stream = self._reader.refused(self._sent[request.number], request.kind, request.reason)
            self._answer(request.number, request.kind, stream)
            return
        self._outbox.free(request.freed)
        for number in [n for n in self._sent if n < request.finished]:
            del self._sent[number]
        pending = self._reader.begin(request.step, request.micro_step)
        self._under_way.append((self._begun, pending))
        if self._reader.may_be_refused:
            self._sent[self._begun] = pending
        self._begun += 1

    def _answer(self, number: int, kind: str, item: object) -> None:
        self._channel.send(*self._outbox.place(Answer(number, kind, item, self._account())))

    def _account(self) -> Account:
        reader = self._reader
        counts = [(ledger.good, ledger.bad) for ledger in reader.ledgers.values()]
        skips = reader.skips.added()
        return Account(counts, reader.times.take(), reader.times.decoded_frames, skips, reader.worker_pids)


class Forward(logging.Handler):
    """Sends what is logged to the trainer."""

    def __init__(self, channel: Channel) -> None:
        super().__init__()
        self._channel = channel

    def emit(self, record: logging.LogRecord) -> None:
        self._channel.send(Said(record.name, record.levelno, record.getMessage()))


def main(number: int) -> None:
    """Serve the trainer at the other end of the socket of that number. Does not return."""
    channel, requests, has_work = Channel(socket.socket(fileno=number)), queue.SimpleQueue(), threading.Event()
    has_work.set()
    closing = ExitStack()
    _in_background(lambda: _receive(channel, requests, closing))
    _in_background(lambda: _give_signs(channel, has_work))
    try:
        opening: Opening = requests.get()
        logging.root.addHandler(Forward(channel))
        logging.root.setLevel(opening.log_level)
        reader = opened(opening)
        closing.callback(reader.close)
        channel.send(Opened(reader.fingerprint, reader.samples, reader.steps_an_epoch))
        Server(channel, reader).serve(requests, has_work)
    except BaseException as error:  # raised again in the trainer, which then closes the channel
        channel.send(portable(error))
        threading.Event().wait()


def opened(opening: Opening) -> BatchReader:
    """A reader on a CPU."""
    ranks = OneRank(opening.rank, opening.world)
    return BatchReader(opening.config, opening.sources, ranks, "cpu", opening.folder, opening.state, opening.decoders)


def _in_background(work: Callable[[], None]) -> None:
    threading.Thread(target=work, daemon=True).start()


def _receive(channel: Channel, requests: queue.SimpleQueue, closing: ExitStack) -> None:
    """Take requests until there are no more; then end the workers, and this process whatever else it is at."""
    try:
        with suppress(EOFError):
            while True:
                requests.put(channel.receive()[0])
        closing.close()
    except BaseException:
        traceback.print_exc()  # nothing else would say why the process is gone
        os._exit(1)
    os._exit(0)


def _give_signs(channel: Channel, has_work: threading.Event) -> None:
    pause = threading.Event()
    while not pause.wait(SIGN_EVERY):
        if has_work.is_set():
            channel.send(Working())


def portable(error: BaseException) -> BaseException:
    """The error as it can be sent, with what it says of its place."""
    error.add_note(f"In the loader's process:\n{''.join(traceback.format_exception(error))}")
    try:
        pickle.loads(pickle.dumps(error))
    except (TypeError, ValueError, AttributeError, pickle.PicklingError):
        return RuntimeError(f"{type(error).__name__} in the loader's process", *error.__notes__)
    return error
