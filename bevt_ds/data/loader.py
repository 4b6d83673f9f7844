"""The loader: micro-batches of both streams in order, prepared in the background.

Its only state is the step. A loader started at step N yields what an uninterrupted one would.
"""

from __future__ import annotations

import hashlib
import queue
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import torch

from bevt_ds.batch import Batch
from bevt_ds.config import Config
from bevt_ds.data.decode_pool import DecodePool
from bevt_ds.data.index import Shard, load_shards
from bevt_ds.data.ledger import Ledger
from bevt_ds.data.pipeline import PixelPipeline
from bevt_ds.data.plan import StreamId, StreamPlan, slots_of
from bevt_ds.data.shards import expand
from bevt_ds.data.stream import StreamReader, Ticket
from bevt_ds.errors import UserError
from bevt_ds.validate import micro_steps

LEDGER = "bad_samples.jsonl"
READ_THREADS = 4


@dataclass(frozen=True)
class Source:
    """Where one stream's samples come from and how many a step takes."""

    stream: StreamId
    shards: str  # pattern
    global_size: int
    micro_size: int


class BatchReader:
    """Makes the micro-batches of one rank. `begin` starts reading and decoding, `finish` assembles.

    rank, world: this process among those that share the global batch. device: where the pictures end up; index tensors
    stay on the host. folder: where bad samples are listed.
    """

    def __init__(
        self,
        config: Config,
        sources: Sequence[Source],
        rank: int,
        world: int,
        device: torch.device | str,
        folder: Path | None,
    ) -> None:
        self._rank, self._world = rank, world
        self._micro_sizes = {s.stream: s.micro_size for s in sources}
        self.ledger = Ledger(folder and folder / LEDGER, config.data.max_bad_fraction)
        shards = {s.stream: load_shards(expand(s.shards), s.stream.kind) for s in sources}
        self.fingerprint = _fingerprint(shards)
        with ExitStack() as resources:
            threads = resources.enter_context(ThreadPoolExecutor(READ_THREADS))
            pool = _decode_pool(config, sources)
            if pool is not None:
                resources.callback(pool.close)
            self._readers = {
                s.stream: StreamReader(
                    _plan(s, shards[s.stream], config),
                    shards[s.stream],
                    config.data,
                    _pixels(s, config, torch.device(device)),
                    threads,
                    pool,
                    self.ledger,
                )
                for s in sources
            }
            self._resources = resources.pop_all()

    def begin(self, step: int, micro_step: int) -> dict[StreamId, Ticket]:
        """Start on a micro-batch."""
        return {
            stream: reader.begin(step, slots_of(micro_step, self._rank, self._world, self._micro_sizes[stream]))
            for stream, reader in self._readers.items()
        }

    def finish(self, tickets: dict[StreamId, Ticket]) -> Batch:
        """Wait for a micro-batch that was begun."""
        streams = {s.kind: self._readers[s].finish(ticket) for s, ticket in tickets.items()}
        return Batch(streams.get("video"), streams.get("image"))

    def close(self) -> None:
        """End the decode processes and reading threads."""
        self._resources.close()


class Loader:
    """Iterates over the `Batch`es of this rank for ever: each step's micro-steps in order.

    Batches are prepared in a background thread. Use as a context manager, or call `close`.

    rank, world: this process among those that share the global batch. start_step: the first step. device: where the
    pictures end up. folder: where bad samples are listed; None: nowhere. UserError: shards missing or unusable, or
    sizes that do not divide.
    """

    def __init__(
        self,
        config: Config,
        rank: int = 0,
        world: int = 1,
        start_step: int = 0,
        device: torch.device | str = "cpu",
        folder: Path | None = None,
    ) -> None:
        self.micro_steps = micro_steps(config, world)
        self._reader = BatchReader(config, _training_sources(config), rank, world, device, folder)
        self._ready: queue.Queue[Batch | BaseException] = queue.Queue(config.data.prefetch)
        self._stopping = threading.Event()
        self._waited = 0.0
        self._thread = threading.Thread(
            target=self._prepare, args=(start_step, config.data.prefetch), name="loader", daemon=True
        )
        self._thread.start()

    @property
    def fingerprint(self) -> str:
        """Digest of the samples of all shards: the data that a resumed run must find again."""
        return self._reader.fingerprint

    @property
    def bad_samples(self) -> int:
        """Samples that this rank has had to replace."""
        return self._reader.ledger.bad

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        began = time.perf_counter()
        item = self._ready.get()
        self._waited += time.perf_counter() - began
        if isinstance(item, BaseException):
            self.close()
            raise item
        return _use_on_current_stream(item)

    def wait_seconds(self) -> float:
        """Seconds that `next` has blocked since the last call: what the data cost the step."""
        waited, self._waited = self._waited, 0.0
        return waited

    def close(self) -> None:
        """Stop preparing and end every process. Calling it twice is harmless."""
        self._stopping.set()
        self._reader.close()
        self._thread.join()

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _prepare(self, start_step: int, ahead: int) -> None:
        """The background thread: keeps `ahead` micro-batches decoding and as many ready."""
        try:
            for batch in _in_order(self._reader, self.micro_steps, start_step, ahead):
                if not self._offer(batch):
                    return
        except BaseException as error:  # raised again in the thread that trains
            self._offer(error)

    def _offer(self, item: Batch | BaseException) -> bool:
        """Queue an item; False once the loader is closing."""
        while not self._stopping.is_set():
            try:
                self._ready.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False


def eval_batches(config: Config, rank: int = 0, world: int = 1, device: torch.device | str = "cpu") -> Iterator[Batch]:
    """This rank's held-out micro-batches, the same at every call: centre crops and fixed masks.

    All of them, over all ranks, form one global batch: `Stream.count` is the whole evaluation's, so the sum of the
    losses is the mean over every masked cell. Nothing is yielded without held-out shards. A rank gets
    train.eval_batches of them.
    """
    sources = _eval_sources(config, world)
    if not sources:
        return
    reader = BatchReader(config, sources, rank, world, device, folder=None)
    try:
        for micro_step in range(config.train.eval_batches):
            yield _use_on_current_stream(reader.finish(reader.begin(0, micro_step)))
    finally:
        reader.close()


def _in_order(reader: BatchReader, micro_steps: int, start_step: int, ahead: int) -> Iterator[Batch]:
    under_way: deque[dict[StreamId, Ticket]] = deque()
    for step in count(start_step):
        for micro_step in range(micro_steps):
            under_way.append(reader.begin(step, micro_step))
            if len(under_way) > ahead:
                yield reader.finish(under_way.popleft())


def _training_sources(config: Config) -> list[Source]:
    data, train = config.data, config.train
    candidates = [
        Source(StreamId.VIDEO, data.videos, train.global_clips, train.micro_clips),
        Source(StreamId.IMAGE, data.images, train.global_images, train.micro_images),
    ]
    return [source for source in candidates if source.global_size]


def _eval_sources(config: Config, world: int) -> list[Source]:
    """Held-out streams of the modalities that are trained; together they form one global batch."""
    data, train = config.data, config.train
    share = train.eval_batches * world
    candidates = [
        Source(StreamId.EVAL_VIDEO, data.eval_videos, share * train.micro_clips, train.micro_clips),
        Source(StreamId.EVAL_IMAGE, data.eval_images, share * train.micro_images, train.micro_images),
    ]
    return [source for source in candidates if source.global_size and source.shards]


def _fingerprint(shards: dict[StreamId, list[Shard]]) -> str:
    """Names, sizes and checksums of the samples; where the tars lie does not matter."""
    digest = hashlib.sha256()
    for stream, parts in shards.items():
        for part in parts:
            digest.update(repr((int(stream), part.keys, part.sizes, part.crcs)).encode())
    return digest.hexdigest()


def _decode_pool(config: Config, sources: Sequence[Source]) -> DecodePool | None:
    data = config.data
    if not any(source.stream.kind == "video" for source in sources):
        return None
    return DecodePool(data.workers, data.decode_seconds, data.max_pixels)


def _plan(source: Source, shards: Sequence[Shard], config: Config) -> StreamPlan:
    counts = [len(shard) for shard in shards]
    return StreamPlan(source.stream, counts, config.data, config.train.seed, source.global_size)


def _pixels(source: Source, config: Config, device: torch.device) -> PixelPipeline:
    data = config.data
    on_cuda = device.type == "cuda"
    if data.decoder == "gpu" and not on_cuda:
        raise UserError("data.decoder=gpu needs a CUDA device; use data.decoder=auto")
    return PixelPipeline(
        source.stream.kind,
        source.micro_size,
        data.size,
        data.token_size,
        data.threads,
        device=(device.index or 0) if on_cuda else None,
        decode_on_gpu=on_cuda and data.decoder != "cpu",
    )


def _use_on_current_stream(batch: Batch) -> Batch:
    """Tell CUDA's allocator that the caller's stream uses the pictures, made on another stream."""
    for stream in (batch.video, batch.image):
        if stream is not None and stream.pixels.is_cuda:
            for tensor in (stream.pixels, stream.view):
                tensor.record_stream(torch.cuda.current_stream(tensor.device))
    return batch
