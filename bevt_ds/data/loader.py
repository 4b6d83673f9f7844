"""The loader: micro-batches of both streams in order, prepared in the background.

Its only state is the step. A loader started at step N yields what an uninterrupted one would.
"""

from __future__ import annotations

import hashlib
import queue
import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, ClassVar, Protocol, Self

import torch

from bevt_ds.batch import Batch, LabelledBatch, Stream
from bevt_ds.config.samples import ReadingConfig
from bevt_ds.config.schema import UnlabelledConfig
from bevt_ds.config.validate import micro_steps
from bevt_ds.data.decoder_choice import resumed_decoders, settled_decoders
from bevt_ds.data.holdout import split
from bevt_ds.data.ledger import LEDGER, DataLimitError, Ledger, Skips, StageTimes, bottleneck, require_few_bad
from bevt_ds.data.open_stream import LANES, Source, decoder_of, has_kept_ids, open_reader, open_resources
from bevt_ds.data.plan import StreamId, slots_of
from bevt_ds.data.process.messages import Opening
from bevt_ds.data.process.remote import LoaderLost, RemoteReader
from bevt_ds.data.reading.deadline import StorageStalled
from bevt_ds.data.reading.members import Shard
from bevt_ds.data.reading.storage import Storage
from bevt_ds.data.side_stream import SideStream, record_stream
from bevt_ds.data.stream import PendingBatch, Resources, StreamReader
from bevt_ds.data.tokens import KeptIds, contract_of, open_all
from bevt_ds.errors import UserError


class Ranks(Protocol):
    """The processes that share the global batch; bevt_ds.runtime.distributed has them."""

    @property
    def rank(self) -> int: ...

    @property
    def world(self) -> int: ...

    def sum_counts(self, counts: Sequence[int]) -> list[int]:
        """Sums over all ranks, element by element; every rank calls it."""


@dataclass(frozen=True)
class OneRank:
    """One of `world` ranks that asks no other: it judges its samples alone."""

    rank: int = 0
    world: int = 1
    sum_counts: ClassVar = list


ALONE = OneRank()


class RankReader(ABC):
    """Makes the micro-batches of one rank. `begin` starts reading and decoding, `finish` assembles.

    micro_sizes: the samples that a micro-batch takes of each stream. device: where the micro-batches end up. folder:
    where bad samples are listed. state: what an earlier run must pass on, see BackgroundLoader.state.
    """

    fingerprint: str  # digest of the samples of all shards: the data that a resumed run must find again

    def __init__(
        self,
        config: ReadingConfig,
        micro_sizes: Mapping[StreamId, int],
        ranks: Ranks,
        device: torch.device | str,
        folder: Path | None,
        state: dict[str, Any] | None,
    ) -> None:
        self._rank, self._world, self._micro_sizes = ranks.rank, ranks.world, micro_sizes
        self._device = torch.device(device)
        self.is_on_gpu = self._device.type == "cuda"
        self._context = SideStream(self._device).context if self.is_on_gpu else nullcontext
        self.skips, self.times = Skips(state), StageTimes()
        self.ledgers = {stream: Ledger(stream, folder and folder / LEDGER, self.skips) for stream in micro_sizes}
        self.decoder_choices: dict[str, str] = {}  # where streams are decoded, by names, if there was a choice
        with ExitStack() as resources:
            has_videos = any(stream.kind == "video" for stream in micro_sizes)
            shared = open_resources(config, has_videos, self.times, resources, self._device)
            self._pool, self._readers = shared.pool, self._open(shared)
            self._resources = resources.pop_all()

    @abstractmethod
    def _open(self, shared: Resources) -> dict[StreamId, Any]:
        """A reader for each stream. Sets `fingerprint`."""

    @abstractmethod
    def _joined(self, parts: dict[StreamId, Any]) -> Batch | LabelledBatch:
        """The micro-batch of what the streams' readers have made."""

    @property
    def worker_pids(self) -> list[int]:
        """The decode processes; none if there are only images."""
        return self._pool.pids if self._pool else []

    def begin(self, step: int, micro_step: int) -> dict[StreamId, PendingBatch]:
        """Start on a micro-batch."""
        return {
            stream: reader.begin(step, slots_of(micro_step, self._rank, self._world, self._micro_sizes[stream]))
            for stream, reader in self._readers.items()
        }

    def finish(self, pending: dict[StreamId, PendingBatch]) -> Batch | LabelledBatch:
        """Wait for a micro-batch that was begun."""
        with self._context():
            batch = self._joined({stream: self._readers[stream].finish(part) for stream, part in pending.items()})
            if not self.is_on_gpu:
                return batch
            with self.times.measured("copy"):
                return batch.to(self._device, non_blocking=True)

    def close(self) -> None:
        """End the decode processes and reading threads."""
        self._resources.close()


class BatchReader(RankReader):
    """Makes the micro-batches of pretraining. The arguments: see RankReader.

    sent: where each stream is decoded, by its name, if another process makes the pixels; see open_reader.
    """

    def __init__(
        self,
        config: UnlabelledConfig,
        sources: Sequence[Source],
        ranks: Ranks,
        device: torch.device | str,
        folder: Path | None,
        state: dict[str, Any] | None = None,
        sent: Mapping[str, str] | None = None,
    ) -> None:
        self._config, self._sources, self._state, self._sent = config, sources, state, sent or {}
        super().__init__(config.data, {s.stream: s.micro_size for s in sources}, ranks, device, folder, state)

    def _open(self, shared: Resources) -> dict[StreamId, StreamReader]:
        config, device = self._config, self._device
        shards = {s.stream: _samples(s, shared.storage, config.data.holdout) for s in self._sources}
        self.samples = {stream.kind: sum(map(len, parts)) for stream, parts in shards.items()}
        self.fingerprint = fingerprint_of(shards)
        known = self._sent or resumed_decoders(self._state, config.data.decoder, self.is_on_gpu)
        readers = {}
        for s in self._sources:
            samples = shards[s.stream]
            decoder = known.get(s.stream.name)
            if decoder is None or (decoder in LANES and shared.gpu is None):
                decoder = decoder_of(s, samples, config, shared, device, self.fingerprint)
            ledger, kept = self.ledgers[s.stream], self._kept(s, samples, shared.storage)
            parts, is_sent = (s, samples, config, shared, device, decoder, ledger, kept), bool(self._sent)
            readers[s.stream] = open_reader(*parts, is_sent=is_sent)
            if self.is_on_gpu:
                self.decoder_choices[s.stream.name] = decoder
        return readers

    def _kept(self, source: Source, shards: Sequence[Shard], storage: Storage) -> list[KeptIds]:
        """The ids that a training's configuration names, of each shard. UserError: they are not those of this run."""
        config, kind = self._config, source.stream.kind
        if not has_kept_ids(config, source.stream):
            return []
        return open_all(storage, config.tokens, shards, kind, contract_of(config, kind))

    def _joined(self, parts: dict[StreamId, Stream]) -> Batch:
        streams = {self.ledgers[stream].kind: part for stream, part in parts.items()}
        return Batch(streams.get("video"), streams.get("image"))

    @property
    def may_be_refused(self) -> bool:
        """Whether DALI decodes what this reader sends."""
        return any(reader.pixels.dali_decoder for reader in self._readers.values() if self._sent)

    def refused(self, pending: dict[StreamId, PendingBatch], kind: str, reason: str) -> Stream:
        """The stream of that kind, decoded, of a micro-batch that is finished, where DALI has refused what was sent."""
        ((stream, part),) = ((stream, part) for stream, part in pending.items() if stream.kind == kind)
        part.refusal = reason
        return self._readers[stream].finish(part)

    @property
    def steps_an_epoch(self) -> float:
        """Steps in which each sample of the first stream is read once."""
        plan = next(iter(self._readers.values())).plan
        return plan.order.total * plan.clips_per_sample / plan.global_size

    def require_few_bad(self) -> None:
        """DataLimitError: this rank's bad samples are over the budget."""
        for ledger in self.ledgers.values():
            require_few_bad(ledger.kind, ledger.good, ledger.bad, self._config.data.max_bad_fraction, ledger.path)


@dataclass(frozen=True)
class _Prepared:
    """What the background thread hands over: a micro-batch or an error, and the counts up to there."""

    item: Any  # a batch, or a BaseException
    counts: tuple[int, ...]  # good and bad samples of each stream, since the start


class BackgroundLoader:
    """Iterates over the batches of a reader for ever: each step's micro-steps in order.

    Batches are prepared in a background thread. Use as a context manager, or call `close`.

    reader: its batches are handed out; `close` closes it. ranks: `next` sums a short list of integers over
    them once, in the caller's thread, so that all ranks find at the same micro-batch that there are too many bad
    samples, or that one of them cannot go on. start_step: the first step.
    """

    def __init__(
        self,
        reader: RankReader | RemoteReader,
        micro_steps: int,
        config: ReadingConfig,
        ranks: Ranks,
        start_step: int = 0,
    ) -> None:
        self.micro_steps, self.fingerprint = micro_steps, reader.fingerprint
        self._reader, self._config, self._ranks = reader, config, ranks
        self._ready: queue.Queue[_Prepared] = queue.Queue(config.prefetch)
        self._stopping = threading.Event()
        self._waited, self._handed_out, self._step, self._bad = 0.0, 0, start_step, 0
        self._thread = threading.Thread(target=self._prepare, args=(start_step,), name="loader", daemon=True)
        self._thread.start()

    @property
    def bad_samples(self) -> int:
        """Samples that all ranks have had to replace for the batches handed out; with OneRank, this rank."""
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
        """What a checkpoint taken now must hold next to the step, as JSON.

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
        prepared = None
        while prepared is None:
            if self._stopping.is_set():
                raise RuntimeError("the loader is closed")
            with suppress(queue.Empty):
                prepared = self._ready.get(timeout=1.0)
        self._waited += time.perf_counter() - began
        try:
            self._judge(prepared)
        except BaseException:
            self.close()
            raise
        self._handed_out += 1
        if self._reader.is_on_gpu:
            record_stream(prepared.item)
        return prepared.item

    def wait_seconds(self) -> float:
        """Seconds that `next` has blocked since the last call: what the data cost the step."""
        waited, self._waited = self._waited, 0.0
        return waited

    def bottleneck(self) -> str:
        """One line on the stage of loading that was busiest since the last call, and what would help."""
        data = self._config
        lanes = {"storage": data.readers, "demux": data.workers, "decode": data.workers, "augment": data.threads}
        return bottleneck(self._reader.times.take(), {**lanes, "copy": 1})

    def close(self) -> None:
        """Stop preparing and end every process. Calling it twice is harmless."""
        self._stopping.set()
        self._reader.close()
        self._thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _judge(self, prepared: _Prepared) -> None:
        """Raise where this rank, another, or all of them together cannot go on; the same on every rank."""
        error = prepared.item if isinstance(prepared.item, BaseException) else None
        kinds = (DataLimitError, StorageStalled, LoaderLost, BaseException)
        kind = next((kind for kind in kinds if isinstance(error, kind)), None)
        numbers = [*(int(kind is each) for each in kinds), *prepared.counts]
        limits, stalls, losses, failures, *counts = self._ranks.sum_counts(numbers)
        if error is not None:
            raise error
        if losses:
            raise LoaderLost("the loader's process of another rank is lost; see that rank's output")
        if failures:
            raise RuntimeError("reading data has failed on another rank; the reason is in that rank's output")
        if stalls:
            raise StorageStalled("another rank's disk or file server does not answer; its output names the place")
        if limits:
            raise DataLimitError("another rank has met too many bad samples in a row; its output names the last")
        self._bad = sum(counts[1::2])
        for ledger, good, bad in zip(self._reader.ledgers.values(), counts[::2], counts[1::2], strict=True):
            require_few_bad(ledger.kind, good, bad, self._config.max_bad_fraction, ledger.path)

    def _prepare(self, start_step: int) -> None:
        """The background thread: keeps `prefetch` micro-batches decoding and as many ready."""
        under_way: deque = deque()
        try:
            for step in count(start_step):
                for micro_step in range(self.micro_steps):
                    under_way.append(self._reader.begin(step, micro_step))
                    if len(under_way) > self._config.prefetch and not self._offer(
                        self._reader.finish(under_way.popleft())
                    ):
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

    device: where the batches end up. folder: where bad samples are listed; None: nowhere. state: what the run that is
    resumed passed on. The rest: see BackgroundLoader. UserError: shards missing or unusable, or sizes that do not
    divide.
    """

    def __init__(
        self,
        config: UnlabelledConfig,
        ranks: Ranks = ALONE,
        start_step: int = 0,
        device: torch.device | str = "cpu",
        folder: Path | None = None,
        state: dict[str, Any] | None = None,
    ) -> None:
        parts = micro_steps(config, ranks.world)
        reader = _opened(config, ranks, torch.device(device), folder, state)
        # How many samples are trained on, by kind; steps in which each of the first kind is read once.
        self.samples, self.steps_an_epoch = reader.samples, reader.steps_an_epoch
        self.place = "a process of its own" if isinstance(reader, RemoteReader) else "the process that trains"
        super().__init__(reader, parts, config.data, ranks, start_step)


def _opened(
    config: UnlabelledConfig, ranks: Ranks, device: torch.device, folder: Path | None, state: dict[str, Any] | None
) -> BatchReader | RemoteReader:
    """A reader in this process or, as data.loader_process says, in one of its own; that has no NVDEC sessions."""
    sources, setting, is_on_gpu = _training_sources(config), config.data.loader_process, device.type == "cuda"
    here = partial(BatchReader, config, sources, ranks, device, folder, state)
    if setting == "off" or (setting == "auto" and not is_on_gpu):
        return here()
    decoders = None
    if is_on_gpu:
        kinds = {source.stream.name: source.stream.kind for source in sources}
        decoders = settled_decoders(kinds, config.data.decoder, state)
        if decoders is None:  # a reader measures them
            with closing(here()) as reader:
                decoders = reader.decoder_choices
        if not LANES.keys().isdisjoint(decoders.values()):
            if setting == "on":
                raise UserError("data.loader_process=on: NVDEC sessions are the trainer's; use data.decoder=cpu or gpu")
            return here()
    opening = Opening(config, sources, ranks.rank, ranks.world, folder, state, decoders)
    return RemoteReader(opening, device, SideStream(device).context if is_on_gpu else nullcontext)


def eval_batches(
    config: UnlabelledConfig,
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
    reader = BatchReader(config, sources, OneRank(rank, world), device, folder)
    try:
        for micro_step in range(config.train.eval_batches):
            batch = reader.finish(reader.begin(0, micro_step))
            record_stream(batch)
            yield batch
        reader.require_few_bad()
    finally:
        reader.close()


def _training_sources(config: UnlabelledConfig) -> list[Source]:
    data, train = config.data, config.train
    candidates = [
        Source(StreamId.VIDEO, data.videos, train.global_clips, train.micro_clips),
        Source(StreamId.IMAGE, data.images, train.global_images, train.micro_images),
    ]
    return [source for source in candidates if source.global_size]


def _eval_sources(config: UnlabelledConfig, world: int) -> list[Source]:
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


def fingerprint_of(shards: Mapping[StreamId, Sequence[Shard]]) -> str:
    """Names, sizes and checksums of the samples; where the tars lie does not matter."""
    digest = hashlib.sha256()
    for stream, parts in shards.items():
        for part in parts:
            digest.update(repr((int(stream), part.keys, part.sizes, part.crcs)).encode())
    return digest.hexdigest()
