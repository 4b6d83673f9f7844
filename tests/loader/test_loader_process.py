"""The loader in a process of its own: the same batches, errors and counts, and no one left behind."""

from __future__ import annotations

import json
import os
import pickle
import queue
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from bevt_ds.batch import Batch
from bevt_ds.config.schema import Config
from bevt_ds.data import loader as loader_module
from bevt_ds.data import open_stream
from bevt_ds.data.decoding.pool import DecodePool
from bevt_ds.data.graph_stream import MOST_REFUSALS, GraphReader
from bevt_ds.data.ledger import LEDGER
from bevt_ds.data.limits import BadSample
from bevt_ds.data.loader import ALONE, BackgroundLoader, Loader
from bevt_ds.data.pixels.cpu_pixels import ClipPixels
from bevt_ds.data.pixels.pipeline import PixelPipeline
from bevt_ds.data.plan import StreamId
from bevt_ds.data.process import remote as remote_module
from bevt_ds.data.process.channel import Channel, Inbox, Outbox
from bevt_ds.data.process.messages import Opened, Opening, Said, Working
from bevt_ds.data.process.remote import LoaderLost, PageLock, RemoteReader
from bevt_ds.data.process.server import Server, opened, portable
from bevt_ds.errors import UserError
from bevt_ds.exit_codes import RANK_LOST
from bevt_ds.launcher import find
from bevt_ds.shards.synthetic.draw_worker import encode_mp4
from tests.batches import assert_same
from tests.loader.media import write_tar
from tests.training.processes import ROOT, SECONDS, environment

CPU = torch.device("cpu")
BY_GRAPHS = {"VIDEO": "cpu", "IMAGE": "cpu"}  # decoders; the pixels are made in this process, as on a GPU
open_here = opened


class InThread(RemoteReader):
    """A RemoteReader whose other process is a thread of this one."""

    def _start(self) -> None:
        own, other = socket.socketpair()
        self._channel, self._other = Channel(own, remote_module.SILENCE), Channel(other)
        self._process = SimpleNamespace(pid=0, wait=lambda seconds: -signal.SIGKILL)
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        requests, reader = queue.SimpleQueue(), None
        try:
            reader = open_here(self._other.receive()[0])
            self._other.send(Opened(reader.fingerprint, reader.samples, reader.steps_an_epoch))
            server = Server(self._other, reader)
            threading.Thread(target=lambda: self._work(server, requests), daemon=True).start()
            while True:
                requests.put(self._other.receive()[0])
        except UserError as error:
            self._other.send(portable(error))
        except EOFError:
            if reader is not None:
                reader.close()

    def _work(self, server: Server, requests: queue.SimpleQueue) -> None:
        try:
            server.serve(requests, threading.Event())
        except BaseException as error:
            self._other.send(portable(error))


def in_thread(config: Config, **more) -> BackgroundLoader:
    """A loader of both streams, two micro-steps a step, whose other process is a thread."""
    start_step = more.pop("start_step", 0)
    opening = Opening(config, loader_module._training_sources(config), 0, 1, **more)
    return BackgroundLoader(InThread(opening, CPU), 2, config.data, ALONE, start_step)


def take(config: Config, count: int, **more) -> list[Batch]:
    with Loader(config, **more) as loader:
        return list(islice(loader, count))


def apart(config: Config) -> Config:
    return replace(config, data=replace(config.data, loader_process="on"))


def until(holds: Callable[[], object]) -> None:
    end = time.monotonic() + SECONDS
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.fixture
def damaged(with_data: Callable[..., Config], scenes: list[np.ndarray], tmp_path: Path) -> Config:
    """Two of six videos cannot be decoded."""
    files = {f"{i}.mp4": encode_mp4(frames)[: 300 if i in (1, 4) else None] for i, frames in enumerate(scenes[:6])}
    return with_data(videos=str(write_tar(tmp_path / "s.tar", files)), max_bad_fraction=0.9)


def test_a_process_of_its_own_gives_the_same_batches_and_ends_with_its_loader(
    damaged: Config, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Bad samples are counted, listed and told of as here; signals are for the trainer; the imports are few."""
    folder = tmp_path / "run"
    with Loader(damaged, folder=folder) as loader:
        expected, bad, facts = list(islice(loader, 6)), loader.bad_samples, (loader.fingerprint, loader.samples)
    listed = events(folder)
    said = [message for message in caplog.messages if "cannot be used" in message]
    caplog.clear()
    with Loader(apart(damaged), folder=folder) as loader:
        assert loader.place == "a process of its own" and (loader.fingerprint, loader.samples) == facts
        pid = loader.worker_pids[0]
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
            os.kill(pid, number)
        assert_same(list(islice(loader, 6)), expected)
        assert loader.bad_samples == bad > 0 and loader.decoded_frames > 0 and "decode" in loader.bottleneck()
        assert not re.search("triton|deepspeed", Path(f"/proc/{pid}/maps").read_text())
        pids = [find(each) for each in loader.worker_pids]
        assert len(pids) == 2 and all(each.is_alive() for each in pids)
    assert not any(each.is_alive() for each in pids)
    assert len(said) == 1 and said == [message for message in caplog.messages if "cannot be used" in message]
    assert listed and events(folder) == listed


def events(folder: Path) -> list[str]:
    """What the ledger lists of the first three steps; it is emptied."""
    lines = (folder / LEDGER).read_text().splitlines()
    (folder / LEDGER).unlink()
    return [line for line in lines if json.loads(line)["step"] < 3]


def test_a_killed_loader_ends_the_run_with_one_line_and_none_is_left(config: Config) -> None:
    with Loader(apart(config)) as loader:
        next(loader)
        process, *workers = map(find, loader.worker_pids)
        os.kill(process.pid, signal.SIGKILL)
        with pytest.raises(LoaderLost, match=f"process {process.pid} of rank 0 was killed by SIGKILL") as lost:
            list(islice(loader, 20))
    assert lost.value.exit_code == RANK_LOST
    until(lambda: not any(worker.is_alive() for worker in workers))


def test_a_killed_trainer_leaves_no_process_behind(config: Config, tmp_path: Path) -> None:
    (tmp_path / "config").write_bytes(pickle.dumps(apart(config)))
    code = f"""
import pickle, time
from pathlib import Path
from bevt_ds.data.loader import Loader
loader = Loader(pickle.loads(Path({str(tmp_path / "config")!r}).read_bytes()))
next(loader)
print(*loader.worker_pids, flush=True)
time.sleep(600)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, cwd=ROOT, env=environment()) as trainer:
        pids = [find(int(word)) for word in trainer.stdout.readline().split()]
        assert len(pids) == 2 and all(pid.is_alive() for pid in pids)
        os.kill(pids[0].pid, signal.SIGSTOP)  # though it cannot look
        trainer.kill()
    os.kill(pids[0].pid, signal.SIGCONT)
    until(lambda: not any(pid.is_alive() for pid in pids))


def test_a_loader_resumes_in_the_middle_and_passes_skips_on(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """A clip that was given up for want of time is in the state, and a resumed run does without it too."""
    real, calls = DecodePool._answered, []

    def slow_once(self: DecodePool, data: bytes, request: dict):
        calls.append(request)
        if len(calls) == 1:
            raise BadSample("not decoded within 20 s", transient=True)
        return real(self, data, request)

    monkeypatch.setattr(DecodePool, "_answered", slow_once)
    with in_thread(config) as loader:
        whole, state = list(islice(loader, 6)), {}
        state = loader._reader.skips.state(0)
    assert [row[-1] for row in state["skips"]] == ["not decoded within 20 s"]
    with in_thread(config, state=state) as loader:
        assert_same(list(islice(loader, 2)), whole[:2])
    with in_thread(config, state=state, start_step=2) as loader:
        assert_same(list(islice(loader, 2)), whole[4:])
        assert loader.state()["skips"] == []


def test_pixels_are_made_here_of_what_is_decoded_there(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: equal bits, though other memory holds what goes into the graphs."""
    with in_thread(config, decoders=BY_GRAPHS) as loader:
        batches = list(islice(loader, 6))

    def by_graph(*arguments, pixels: ClipPixels, **more) -> GraphReader:
        return GraphReader(*arguments, pixels=PixelPipeline("video", 2, 64, 32, 1), **more)

    monkeypatch.setattr(open_stream, "ClipReader", by_graph)
    assert_same(batches, take(config, 6))


@pytest.mark.parametrize("is_always", [False, True])
def test_what_a_graph_here_refuses_is_sent_again_decoded(
    config: Config, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, is_always: bool
) -> None:
    """Now and then, or always: then it is decoded there from some batch on."""
    train = replace(config.train, global_clips=0, micro_clips=0)
    images, count = replace(config, train=train), MOST_REFUSALS + 8 if is_always else 9
    expected, run, asked = take(images, count), PixelPipeline.run_on, []

    def refusing(self: PixelPipeline, inputs: dict, masked: np.ndarray):
        asked.append("encoded" in inputs)
        if asked[-1] and (is_always or len(asked) % 3 == 1):
            raise BadSample("nvJPEG says no")
        return run(self, inputs, masked)

    monkeypatch.setattr(PixelPipeline, "run_on", refusing)
    with in_thread(images, decoders={"IMAGE": "cpu"}) as loader:
        assert_same(list(islice(loader, count)), expected)
        assert loader.bad_samples == 0
        good = loader._reader.ledgers[StreamId.IMAGE].good
    assert good % 4 == 0 and good >= 4 * count, "each sample counts once"
    if is_always:
        assert MOST_REFUSALS <= sum(asked) < count and not asked[-1]
        assert "DALI's decoder of images decodes no more: nvJPEG says no" in caplog.text


def test_a_mistake_is_told_as_here(with_data: Callable[..., Config]) -> None:
    with pytest.raises(UserError, match=r"no file matches .*no-\*\.tar") as told:
        in_thread(with_data(images="no-*.tar"))
    assert type(told.value) is UserError


class Broken(RuntimeError):
    """An error that does not come back from pickle: another number of arguments."""

    def __init__(self, one: str, two: str) -> None:
        super().__init__(one + two)


def test_any_error_can_be_sent_with_its_place() -> None:
    def sent(error: BaseException) -> BaseException:
        try:
            raise error
        except BaseException as raised:
            return pickle.loads(pickle.dumps(portable(raised)))

    known, odd = sent(UserError("no such shard")), sent(Broken("a", "b"))
    assert type(known) is UserError and str(known) == "no such shard" and "raise error" in known.__notes__[0]
    assert type(odd) is RuntimeError and "Broken" in str(odd) and "raise error" in str(odd)


def test_a_silent_loader_is_lost(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is stopped; a sign in between is enough."""

    class Silent(InThread):
        def _serve(self) -> None:
            self._other.receive()
            self._other.send(Opened("", {}, 1.0))

    reader = Silent(Opening(config, [], 0, 1), CPU)
    heard = [TimeoutError(), Working(), TimeoutError(), Said("a", 0, "b"), TimeoutError(), TimeoutError(), Working()]

    def receive() -> tuple[object, None]:
        if isinstance(came := heard.pop(0), TimeoutError):
            raise came
        return came, None

    monkeypatch.setattr(reader._channel, "receive", receive)
    with pytest.raises(LoaderLost, match=r"has given no sign for 120 s; resume=auto continues"):
        reader.finish(reader.begin(0, 0))
    assert len(heard) == 1
    reader.close()


def test_a_loader_that_cannot_be_ended_is_left_behind(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where a disk does not answer: what has gone wrong must be told all the same."""
    reader, killed = InThread(Opening(config, loader_module._training_sources(config), 0, 1), CPU), []

    def wait(seconds: float) -> int:
        raise subprocess.TimeoutExpired("loader", seconds)

    reader._process = SimpleNamespace(pid=0, wait=wait, kill=lambda: killed.append(True))
    reader.close()
    assert killed == [True]


def test_signals_that_come_while_the_process_starts_are_for_the_trainer(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A terminal's Ctrl-C reaches all processes, and the first instants are Python's own."""
    start = RemoteReader._start

    def start_and_interrupt(self: RemoteReader) -> None:
        start(self)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
            os.kill(self._process.pid, number)

    monkeypatch.setattr(RemoteReader, "_start", start_and_interrupt)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    with Loader(apart(config)) as loader:
        next(loader)
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == before


def test_all_ranks_end_where_one_has_lost_its_loader(config: Config) -> None:
    """The code is the same on each."""
    lost_elsewhere = SimpleNamespace(rank=0, world=1, sum_counts=lambda numbers: [0, 0, 1, 0, *numbers[4:]])
    with Loader(config, lost_elsewhere) as loader, pytest.raises(LoaderLost, match="of another rank is lost"):
        next(loader)


def test_closing_ends_the_waiting(config: Config) -> None:
    loader = in_thread(config)
    next(loader)
    loader.close()
    loader.close()
    with pytest.raises(RuntimeError, match="the loader is closed"):
        list(islice(loader, 20))
    assert not loader._thread.is_alive()


def test_a_channel_carries_large_messages_and_files_in_order(tmp_path: Path) -> None:
    """Larger than a socket holds, so that they arrive in parts."""
    (tmp_path / "file").write_text("in it")
    ends = [Channel(end) for end in socket.socketpair()]
    messages = [b"first", bytes(range(256)) * 20_000, "last"]

    def send() -> None:
        with (tmp_path / "file").open() as file:
            for message in messages:
                ends[0].send(message, file.fileno() if isinstance(message, bytes) else None)
        ends[0].close()

    sender = threading.Thread(target=send)
    sender.start()
    for message in messages:
        got, number = ends[1].receive()
        assert got == message and (number is None) == isinstance(message, str)
        if number is not None:
            os.close(number)
    with pytest.raises(EOFError):
        ends[1].receive()
    sender.join()
    ends[1].close()


def test_a_message_that_stops_in_its_middle_goes_on_behind_the_silence(tmp_path: Path) -> None:
    """Nothing of it is lost, nor of the next one, though whoever waits has been told of the silence."""
    (tmp_path / "file").write_text("in it")
    ends = socket.socketpair()
    whole = b"".join(_sent(message) for message in (list(range(1000)), "next"))
    channel = Channel(ends[1], 0.01)
    with (tmp_path / "file").open() as file:
        socket.send_fds(ends[0], [whole[:3]], [file.fileno()])
    for begin, end in ((3, 100), (100, len(whole))):
        with pytest.raises(TimeoutError):
            channel.receive()
        ends[0].sendall(whole[begin:end])
    got, number = channel.receive()
    assert got == list(range(1000)) and Path(f"/proc/self/fd/{number}").read_text() == "in it"
    os.close(number)
    assert channel.receive() == ("next", None)
    channel.close()
    ends[0].close()


def _sent(message: object) -> bytes:
    """The bytes with which a channel sends a message."""
    here, there = socket.socketpair()
    with here, there:
        Channel(here).send(message)
        return there.recv(1 << 16)


def through(outbox: Outbox, inbox: Inbox, message: object) -> object:
    placed, file = outbox.place(message)
    return inbox.message(placed, None if file is None else os.dup(file))


def test_memory_is_used_again_once_nothing_refers_to_it() -> None:
    """Not before, be it by a slice alone; messages that have outgrown a block get another in its place."""
    outbox, inbox, there = Outbox(), Inbox(), set()
    kept = through(outbox, inbox, torch.full((1000,), -1.0))[10:12]
    for i in range(50):
        outbox.free(inbox.freed())
        values = {"ids": torch.arange(i, i + 9), "frames": [np.full((4, i + 1), i, np.uint8), np.zeros(0)], "name": "a"}
        got = through(outbox, inbox, values)
        assert torch.equal(got["ids"], values["ids"]) and got["name"] == "a"
        for array, sent in zip(got["frames"], values["frames"], strict=True):
            assert np.array_equal(array, sent) and array.dtype == sent.dtype
        there |= set(inbox._blocks)
    assert len(there) <= 3 and kept.tolist() == [-1.0, -1.0]
    del got
    outbox.free(inbox.freed())
    large = through(outbox, inbox, np.ones(1 << 16))
    assert large.sum() == 1 << 16 and len(inbox._blocks) <= 3


def test_blocks_are_page_locked_for_a_gpu_while_they_are_there(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    locked, codes, devices, launched = {}, [0, 2, 0], [], []

    def register(place: int, size: int, flags: int) -> int:
        if not (code := codes.pop(0)):
            locked[place] = (size, flags)
        return code

    def launch(size: int, device: torch.device) -> None:
        launched.append(device)
        raise RuntimeError("CUDA error: out of memory")

    cudart = SimpleNamespace(cudaHostRegister=register, cudaHostUnregister=lambda place: locked.pop(place))
    monkeypatch.setattr(torch.cuda, "cudart", lambda: cudart)
    monkeypatch.setattr(torch, "zeros", launch)
    monkeypatch.setattr(torch.cuda, "device", lambda device: devices.append(device) or nullcontext())
    pages = PageLock(torch.device("cuda", 3))
    outbox, inbox = Outbox(), Inbox(pages.lock, pages.unlock)
    for size in (10, 1 << 14, 1 << 16):
        array = through(outbox, inbox, np.ones(size))
        (block,) = inbox._blocks.values()
        assert list(locked.values()) == ([] if size == 1 << 14 else [(len(block), 1)])
        del array, block
        outbox.free(inbox.freed())
    del inbox
    assert not locked and set(devices) == {torch.device("cuda", 3)}
    assert launched == [torch.device("cuda", 3)], "CUDA's error is taken from this thread"
    assert len(caplog.messages) == 1 and "cannot be page-locked (CUDA's error 2)" in caplog.text


@pytest.mark.parametrize(
    ("setting", "decoder", "device", "expected"),
    [
        ("auto", "auto", "cpu", "here"),
        ("on", "auto", "cpu", ("apart", None)),
        ("off", "gpu", "cuda:0", "here"),
        ("auto", "cpu", "cuda:0", ("apart", {"VIDEO": "cpu", "IMAGE": "cpu"})),
        ("auto", "gpu", "cuda:0", ("apart", {"VIDEO": "gpu", "IMAGE": "gpu"})),
        ("auto", "nvdec", "cuda:0", "here"),
        ("auto", "auto", "cuda:0", ("apart", {"VIDEO": "measured", "IMAGE": "gpu"})),
        ("on", "split", "cuda:0", "NVDEC sessions are the trainer's"),
    ],
)
def test_where_the_loader_runs(
    with_data: Callable[..., Config],
    monkeypatch: pytest.MonkeyPatch,
    setting: str,
    decoder: str,
    device: str,
    expected: object,
) -> None:
    """By default in a process of its own on a GPU, and not where that would need a GPU there too."""
    measured = SimpleNamespace(decoder_choices={"VIDEO": "measured", "IMAGE": "gpu"}, close=list)
    monkeypatch.setattr(loader_module, "BatchReader", lambda *_: measured)
    monkeypatch.setattr(loader_module, "RemoteReader", lambda opening, *_: ("apart", opening.decoders))
    monkeypatch.setattr(loader_module, "SideStream", lambda device: SimpleNamespace(context=None))
    arguments = (with_data(loader_process=setting, decoder=decoder), ALONE, torch.device(device), None, None)
    if isinstance(expected, str) and expected != "here":
        with pytest.raises(UserError, match=expected):
            loader_module._opened(*arguments)
        return
    found = loader_module._opened(*arguments)
    assert found == (measured if expected == "here" else expected)
