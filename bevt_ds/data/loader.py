"""The loader: micro-batches of both streams in order, prepared in the background.

Its only state is the step. A loader started at step N yields what an uninterrupted one would.
"""

from __future__ import annotations

import hashlib
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, Self

import torch

from bevt_ds.batch import Batch
from bevt_ds.config.schema import Config, ReadingConfig
from bevt_ds.config.validate import micro_steps
from bevt_ds.data.decoder_choice import MEASURED, choose, clips_per_second, cores, taken_over
from bevt_ds.data.decoding.pool import DecodePool
from bevt_ds.data.delivery import Aside, used_here
from bevt_ds.data.holdout import split
from bevt_ds.data.ledger import DataLimitError, Ledger, Skips, require_few_bad
from bevt_ds.data.limits import Limits
from bevt_ds.data.pixels.cpu_pixels import ClipPixels
from bevt_ds.data.pixels.pipeline import PixelPipeline
from bevt_ds.data.plan import StreamId, StreamPlan, slots_of
from bevt_ds.data.reading.index import cache_home
from bevt_ds.data.reading.members import Shard
from bevt_ds.data.reading.patience import StorageStalled
from bevt_ds.data.reading.storage import Storage
from bevt_ds.data.stream import Pixels, Resources, StreamReader, Ticket
from bevt_ds.data.timing import StageTimes, bottleneck
from bevt_ds.errors import UserError

LEDGER = "bad_samples.jsonl"
NVDECS = 8  # DALI decodes as many videos at a time as it has threads; an H100 has seven decoders

Exchange = Callable[[list[int]], list[int]]  # the sums of the numbers over all ranks; every rank calls it


@dataclass(frozen=True)
class Source:
    """Where one stream's samples come from and how many a step takes."""

    stream: StreamId
    shards: str  # pattern
    global_size: int
    micro_size: int
    held_out: bool = False  # whether it takes the samples that `data.holdout` holds out, or the others


class BatchReader:
    """Makes the micro-batches of one rank. `begin` starts reading and decoding, `finish` assembles.

    rank, world: this process among those that share the global batch. device: where the micro-batches end up. folder:
    where bad samples are listed. state: what an earlier run must pass on, see Loader.state.
    """

    def __init__(
        self,
        config: Config,
        sources: Sequence[Source],
        rank: int,
        world: int,
        device: torch.device | str,
        folder: Path | None,
        state: dict[str, Any] | None = None,
    ) -> None:
        self._rank, self._world = rank, world
        self._micro_sizes = {s.stream: s.micro_size for s in sources}
        self._max_bad_fraction = config.data.max_bad_fraction
        self.skips, self.times = Skips(state), StageTimes()
        self.ledgers = {s.stream: Ledger(s.stream, folder and folder / LEDGER, self.skips) for s in sources}
        device = self._device = torch.device(device)
        with ExitStack() as resources:
            has_videos = any(source.stream.kind == "video" for source in sources)
            shared = open_resources(config.data, has_videos, self.times, resources)
            shards = {s.stream: _samples(s, shared.storage, config.data.holdout) for s in sources}
            self.samples = {s.kind: sum(map(len, parts)) for s, parts in shards.items()}
            self.fingerprint, self._pool = _fingerprint(shards), shared.pool
            self._aside = Aside(device)
            known = taken_over(state, config.data.decoder, device.type == "cuda")
            self.decoders = {
                s.stream: known.get(s.stream.name)
                or _decoder(s, shards[s.stream], config, shared, device, self.fingerprint)
                for s in sources
            }
            self._readers = {
                s.stream: _reader(
                    s,
                    shards[s.stream],
                    config,
                    _pixels(s, config, device, self.decoders[s.stream], self.times),
                    shared,
                    self.ledgers[s.stream],
                )
                for s in sources
            }
            self._resources = resources.pop_all()

    @property
    def decoder_choices(self) -> dict[str, str]:
        """Where streams are decoded, by their names, for `taken_over`; without a GPU there was no choice."""
        on_gpu = self._device.type == "cuda"
        return {stream.name: decoder for stream, decoder in self.decoders.items()} if on_gpu else {}

    @property
    def steps_an_epoch(self) -> float:
        """Steps in which each sample of the first stream is read once."""
        plan = next(iter(self._readers.values())).plan
        return plan.order.total * plan.clips_per_sample / plan.global_size

    def require_few_bad(self) -> None:
        """DataLimitError: this rank's bad samples are over the budget."""
        for stream, ledger in self.ledgers.items():
            require_few_bad(stream.kind, ledger.good, ledger.bad, self._max_bad_fraction, ledger.path)

    @property
    def worker_pids(self) -> list[int]:
        """The decode processes; none if there are only images."""
        return self._pool.pids if self._pool else []

    def begin(self, step: int, micro_step: int) -> dict[StreamId, Ticket]:
        """Start on a micro-batch."""
        return {
            stream: reader.begin(step, slots_of(micro_step, self._rank, self._world, self._micro_sizes[stream]))
            for stream, reader in self._readers.items()
        }

    def finish(self, tickets: dict[StreamId, Ticket]) -> Batch:
        """Wait for a micro-batch that was begun."""
        with self._aside.making():
            streams = {s.kind: self._readers[s].finish(ticket) for s, ticket in tickets.items()}
            return self._delivered(Batch(streams.get("video"), streams.get("image")))

    def _delivered(self, batch: Batch) -> Batch:
        """The batch with its index tensors on the device as well."""
        if self._device.type == "cpu":
            return batch
        with self.times.measured("copy"):
            return batch.to(self._device, non_blocking=True)

    def close(self) -> None:
        """End the decode processes and reading threads."""
        self._resources.close()


@dataclass(frozen=True)
class _Prepared:
    """What the background thread hands over: a micro-batch or an error, and the counts up to there."""

    item: Any  # a batch, or a BaseException
    counts: tuple[int, ...]  # good and bad samples of each stream, since the start


class BackgroundLoader:
    """Iterates over the batches of a reader for ever: each step's micro-steps in order.

    Batches are prepared in a background thread. Use as a context manager, or call `close`.

    reader: a BatchReader, or what serves as one; `close` closes it. start_step: the first step. exchange: sums a short
    list of integers over all ranks; `next` calls it once, in the caller's thread, so that all ranks find at the same
    micro-batch that there are too many bad samples, or that one of them cannot go on. None: this rank judges alone.
    """

    def __init__(
        self, reader: Any, micro_steps: int, config: ReadingConfig, start_step: int, exchange: Exchange | None
    ) -> None:
        self.micro_steps = micro_steps
        self._reader, self._config, self._exchange = reader, config, exchange or list
        self._ready: queue.Queue[_Prepared] = queue.Queue(config.prefetch)
        self._stopping = threading.Event()
        self._waited, self._handed_out, self._step, self._bad = 0.0, 0, start_step, 0
        self._thread = threading.Thread(
            target=self._prepare, args=(start_step, config.prefetch), name="loader", daemon=True
        )
        self._thread.start()

    @property
    def fingerprint(self) -> str:
        """Digest of the samples of all shards: the data that a resumed run must find again."""
        return self._reader.fingerprint

    @property
    def bad_samples(self) -> int:
        """Samples that all ranks have had to replace for the batches handed out; without an exchange, this rank."""
        return self._bad

    @property
    def worker_pids(self) -> list[int]:
        """The processes that decode for this rank."""
        return self._reader.worker_pids

    @property
    def decoded_frames(self) -> int:
        """Video frames that the CPU's decoders have put out for this rank, wanted or not."""
        return self._reader.times.decoded_frames

    def state(self) -> dict[str, Any]:
        """What a checkpoint taken now must hold beside the step, as JSON.

        Samples given up for want of time, memory or storage, which another run might find good; and where each stream
        is decoded. A resumed run takes the states of all ranks: ledger.merge_states.
        """
        done, rest = divmod(self._handed_out, self.micro_steps)
        skips = self._reader.skips.state(self._step + done + (rest > 0))
        return {**skips, "decoder": self._reader.decoder_choices}

    def __iter__(self) -> Iterator:
        return self

    def __next__(self) -> Any:
        began = time.perf_counter()
        prepared = self._next_prepared()
        self._waited += time.perf_counter() - began
        try:
            self._judge(prepared)
        except BaseException:
            self.close()
            raise
        self._handed_out += 1
        return prepared.item

    def _next_prepared(self) -> _Prepared:
        while not self._stopping.is_set():
            with suppress(queue.Empty):
                return self._ready.get(timeout=1.0)
        raise RuntimeError("the loader is closed")

    def wait_seconds(self) -> float:
        """Seconds that `next` has blocked since the last call: what the data cost the step."""
        waited, self._waited = self._waited, 0.0
        return waited

    def bottleneck(self) -> str:
        """One line on the stage of loading that was busiest since the last call, and what would help."""
        return bottleneck(self._reader.times.take(), self._lanes())

    def close(self) -> None:
        """Stop preparing and end every process. Calling it twice is harmless."""
        self._stopping.set()
        self._reader.close()
        self._thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _lanes(self) -> dict[str, int]:
        """How many threads or processes share a stage's work."""
        data = self._config
        return {"storage": data.readers, "demux": data.workers, "decode": data.workers, "augment": 1, "copy": 1}

    def _judge(self, prepared: _Prepared) -> None:
        """Raise where this rank, another, or all of them together cannot go on; the same on every rank."""
        error = prepared.item if isinstance(prepared.item, BaseException) else None
        over, stalled = isinstance(error, DataLimitError), isinstance(error, StorageStalled)
        failed = error is not None and not over and not stalled
        limits, stalls, failures, *counts = self._exchange([int(over), int(stalled), int(failed), *prepared.counts])
        if error is not None:
            raise error
        if failures:
            raise RuntimeError("reading data has failed on another rank; the reason is in that rank's output")
        if stalls:
            raise StorageStalled("another rank's disk or file server does not answer; its output names the place")
        if limits:
            raise DataLimitError("another rank has met too many bad samples in a row; its output names the last")
        self._bad = sum(counts[1::2])
        for (stream, ledger), good, bad in zip(self._reader.ledgers.items(), counts[::2], counts[1::2], strict=True):
            require_few_bad(stream.kind, good, bad, self._config.max_bad_fraction, ledger.path)

    def _prepare(self, start_step: int, ahead: int) -> None:
        """The background thread: keeps `ahead` micro-batches decoding and as many ready."""
        try:
            for batch in _in_order(self._reader, self.micro_steps, start_step, ahead):
                if not self._offer(batch):
                    return
        except BaseException as error:  # raised again in the thread that trains
            self._offer(error)

    def _offer(self, item: Any) -> bool:
        """Queue an item; False once the loader is closing."""
        counts = tuple(n for ledger in self._reader.ledgers.values() for n in (ledger.good, ledger.bad))
        while not self._stopping.is_set():
            try:
                self._ready.put(_Prepared(item, counts), timeout=0.1)
                return True
            except queue.Full:
                continue
        return False


class Loader(BackgroundLoader):
    """Iterates over the `Batch`es of this rank for ever.

    rank, world: this process among those that share the global batch. device: where the batches end up. folder: where
    bad samples are listed; None: nowhere. state: what the run that is resumed passed on. The rest: see
    BackgroundLoader. UserError: shards missing or unusable, or sizes that do not divide.
    """

    def __init__(
        self,
        config: Config,
        rank: int = 0,
        world: int = 1,
        start_step: int = 0,
        device: torch.device | str = "cpu",
        folder: Path | None = None,
        state: dict[str, Any] | None = None,
        exchange: Exchange | None = None,
    ) -> None:
        parts = micro_steps(config, world)
        reader = BatchReader(config, _training_sources(config), rank, world, device, folder, state)
        super().__init__(reader, parts, config.data, start_step, exchange)

    @property
    def steps_an_epoch(self) -> float:
        """Steps in which each video, or image where there are no videos, is read once."""
        return self._reader.steps_an_epoch

    @property
    def samples(self) -> dict[str, int]:
        """How many samples are trained on, by kind."""
        return self._reader.samples

    def __next__(self) -> Batch:
        return _used_here(super().__next__())


def eval_batches(
    config: Config,
    rank: int = 0,
    world: int = 1,
    device: torch.device | str = "cpu",
    folder: Path | None = None,
) -> Iterator[Batch]:
    """This rank's held-out micro-batches, the same at every call: centre crops and fixed masks.

    All of them, over all ranks, form one global batch: `Stream.count` is the whole evaluation's, so the sum of the
    losses is the mean over every masked cell. Nothing is yielded without held-out samples. A rank gets
    train.eval_batches of them. folder: where bad samples are listed. DataLimitError, at the end: too many of them.
    """
    sources = _eval_sources(config, world)
    if not sources:
        return
    reader = BatchReader(config, sources, rank, world, device, folder)
    try:
        for micro_step in range(config.train.eval_batches):
            yield _used_here(reader.finish(reader.begin(0, micro_step)))
        reader.require_few_bad()
    finally:
        reader.close()


def _in_order(reader: Any, micro_steps: int, start_step: int, ahead: int) -> Iterator:
    under_way: deque = deque()
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
    sources = []
    for stream, own, named, total, micro in (
        (StreamId.EVAL_VIDEO, data.videos, data.eval_videos, train.global_clips, train.micro_clips),
        (StreamId.EVAL_IMAGE, data.images, data.eval_images, train.global_images, train.micro_images),
    ):
        if total and (named or data.holdout):
            sources.append(Source(stream, named or own, share * micro, micro, held_out=not named))
    return sources


def _samples(source: Source, storage: Storage, share: float) -> list[Shard]:
    """The shards of a source: without what is held out of a run's own, or only with that."""
    shards = storage.shards(source.shards, source.stream.kind)
    if source.stream.held_out and not source.held_out:
        return shards
    rest, held = split(shards, share, source.stream.kind)
    return held if source.held_out else rest


def _fingerprint(shards: dict[StreamId, list[Shard]]) -> str:
    """Names, sizes and checksums of the samples; where the tars lie does not matter."""
    digest = hashlib.sha256()
    for stream, parts in shards.items():
        for part in parts:
            digest.update(repr((int(stream), part.keys, part.sizes, part.crcs)).encode())
    return digest.hexdigest()


def open_resources(data: ReadingConfig, has_videos: bool, times: StageTimes, closing: ExitStack) -> Resources:
    """Threads, decode workers and storage; `closing` ends them."""
    storage = Storage(data)
    threads = closing.enter_context(ThreadPoolExecutor(data.readers))
    pool = None
    if has_videos:
        pool = DecodePool(data.workers, data.decode_seconds, Limits.of(data))
        closing.callback(pool.close)
    closing.callback(storage.close)  # the first to be called: nobody goes on waiting for a read
    return Resources(storage, threads, pool, times)


def _plan(source: Source, shards: Sequence[Shard], config: Config) -> StreamPlan:
    counts = [len(shard) for shard in shards]
    return StreamPlan(source.stream, counts, config.data, config.train.seed, source.global_size)


def _reader(
    source: Source, shards: Sequence[Shard], config: Config, pixels: Pixels, shared: Resources, ledger: Ledger
) -> StreamReader:
    return StreamReader(_plan(source, shards, config), shards, config.data, pixels, shared, ledger)


def _decoder(
    source: Source, shards: Sequence[Shard], config: Config, shared: Resources, device: torch.device, fingerprint: str
) -> str:
    """Where a stream is decoded, "cpu" or "gpu". On a GPU `auto` measures both for videos, on these very shards."""
    wanted = config.data.decoder
    if device.type != "cuda":
        if wanted == "gpu":
            raise UserError("data.decoder=gpu needs a CUDA device; use data.decoder=auto")
        return "cpu"
    if wanted != "auto" or source.stream.kind == "image":
        return "cpu" if wanted == "cpu" else "gpu"
    candidates = {
        name: partial(_clips_per_second, source, shards, config, shared, device, name) for name in ("gpu", "cpu")
    }
    data, machine = config.data, (torch.cuda.get_device_name(device), cores())
    clip = (data.frames, data.stride, data.size, data.clips_per_video, source.micro_size)
    return choose(candidates, (fingerprint, machine, data.workers, data.threads, clip), cache_home() / "decoder")


def _clips_per_second(
    source: Source, shards: Sequence[Shard], config: Config, shared: Resources, device: torch.device, decoder: str
) -> float:
    """The rate of one decoder over a few micro-batches. RuntimeError: it cannot decode these videos."""
    pixels = _pixels(source, config, device, decoder, StageTimes())
    reader = _reader(source, shards, config, pixels, shared, Ledger(source.stream, None, Skips()))
    slots = range(source.micro_size)
    try:
        return clips_per_second(len(reader.finish(reader.begin(step, slots)).mask) for step in range(1 + MEASURED))
    except DataLimitError as error:
        raise RuntimeError(str(error)) from error


def _pixels(source: Source, config: Config, device: torch.device, decoder: str, times: StageTimes) -> Pixels:
    data = config.data
    if source.stream.kind == "video" and device.type != "cuda":
        return ClipPixels(data.size, data.threads, times)
    return PixelPipeline(
        source.stream.kind,
        source.micro_size,
        data.size,
        data.token_size,
        max(data.threads, NVDECS) if decoder == "gpu" and source.stream.kind == "video" else data.threads,
        device=(device.index or 0) if device.type == "cuda" else None,
        dali_decoder="mixed" if decoder == "gpu" else None,
        times=times,
    )


def _used_here(batch: Batch) -> Batch:
    used_here(batch.video, batch.image)
    return batch
