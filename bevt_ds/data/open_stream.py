"""What the streams of a rank are opened with: storage, decode workers, a plan, and a decoder for each.

On a GPU it is measured once which decoder is faster for these shards; see decoder_choice.py.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial

import torch

from bevt_ds.config.samples import DataConfig, ReadingConfig
from bevt_ds.config.schema import Config, UnlabelledConfig
from bevt_ds.data.decoder_choice import MEASURED, choose, clips_per_second, cores
from bevt_ds.data.decoding.nvdec import SESSIONS, nvdec, why_not
from bevt_ds.data.decoding.pool import DecodePool
from bevt_ds.data.decoding.split import Split
from bevt_ds.data.graph_stream import NVDEC, WORKERS, GraphReader
from bevt_ds.data.ledger import DataLimitError, Ledger, Skips, StageTimes
from bevt_ds.data.limits import Limits
from bevt_ds.data.pixels.cpu_pixels import ClipPixels, compute_on_one_core
from bevt_ds.data.pixels.pipeline import PixelPipeline
from bevt_ds.data.pixels.sent import SentPixels
from bevt_ds.data.plan import StreamId, StreamPlan
from bevt_ds.data.reading.index import cache_home
from bevt_ds.data.reading.members import Shard
from bevt_ds.data.reading.storage import Storage
from bevt_ds.data.stream import ClipReader, Resources, StreamReader
from bevt_ds.data.tokens import KeptIds
from bevt_ds.errors import UserError

LANES = {"nvdec": (NVDEC,), "split": (NVDEC, WORKERS)}  # data.decoder -> who decodes clips outside of DALI's graph
NVDECS = 8  # DALI decodes as many videos at a time as it has threads; an H100 has seven decoders


@dataclass(frozen=True)
class Source:
    """Where one stream's samples come from and how many a step takes."""

    stream: StreamId
    shards: str  # pattern
    global_size: int
    micro_size: int
    held_out: bool = False  # whether it takes the samples that `data.holdout` holds out, or the others


def open_resources(
    data: ReadingConfig,
    has_videos: bool,
    times: StageTimes,
    closing: ExitStack,
    device: torch.device | None = None,
) -> Resources:
    """Storage with its threads, and decoders; `closing` ends them. As many samples are read at a time as data.readers
    says, while others are decoded. device: where NVDEC may decode, if it is a GPU and data.decoder lets it.
    """
    on_gpu = has_videos and device is not None and device.type == "cuda"
    on_gpu = on_gpu and data.decoder in ("auto", *LANES) and not why_not()
    storage = Storage(data, data.readers + (data.workers if has_videos else 0) + (SESSIONS if on_gpu else 0))
    closing.callback(storage.close)
    pool, gpu = None, None
    if has_videos:
        compute_on_one_core(storage.executor)
        pool = DecodePool(data.workers, data.decode_seconds, Limits.of(data))
        closing.callback(pool.close)
    if on_gpu:
        gpu = nvdec(pool, device)
        closing.callback(gpu.sessions.close)
    return Resources(storage, pool, times, threading.Semaphore(data.threads), gpu)


def open_reader(
    source: Source,
    shards: Sequence[Shard],
    config: UnlabelledConfig,
    shared: Resources,
    device: torch.device,
    decoder: str,
    ledger: Ledger,
    kept: Sequence[KeptIds] = (),
    make_plan: type[StreamPlan] = StreamPlan,
    is_sent: bool = False,
) -> StreamReader:
    """A reader of one stream's micro-batches. kept: the ids of each shard's crops; without, a batch has none.

    is_sent: another process makes the pixels, by DALI's graphs. A batch then has what these are fed with; see sent.py.
    """
    data, kind = config.data, source.stream.kind
    counts = [len(shard) for shard in shards]
    keys = [shard.keys for shard in shards]
    plan = make_plan(source.stream, counts, data, config.train.seed, source.global_size, keys)
    parts = (plan, shards, data, shared, ledger, data.stride)
    if is_sent:
        return GraphReader(*parts, pixels=SentPixels(kind, _dali_decoder(decoder)), kept=kept)
    if kind == "video" and device.type != "cuda":
        return ClipReader(*parts, pixels=ClipPixels(data.size), kept=kept)
    split = None
    if kind == "video" and decoder in LANES:
        places = {NVDEC: shared.gpu.lanes, WORKERS: data.workers}
        split = Split({name: places[name] for name in LANES[decoder]})
    pixels = open_graph(source, data, device, decoder, shared.times, views=not kept)
    return GraphReader(*parts, pixels=pixels, split=split, kept=kept)


def open_graph(
    source: Source, data: DataConfig, device: torch.device, decoder: str, times: StageTimes, views: bool
) -> PixelPipeline:
    """DALI's graph of one stream. decoder: see `decoder_of`. views: whether the tokenizer's are made."""
    is_video = source.stream.kind == "video"
    return PixelPipeline(
        source.stream.kind,
        source.micro_size,
        data.size,
        data.token_size,
        max(data.threads, NVDECS) if decoder == "gpu" and is_video else data.threads,
        device=(device.index or 0) if device.type == "cuda" else None,
        dali_decoder=_dali_decoder(decoder),
        times=times,
        on_device=is_video and decoder in LANES,
        views=views,
    )


def _dali_decoder(decoder: str) -> str | None:
    return "mixed" if decoder == "gpu" else None


def has_kept_ids(config: UnlabelledConfig, stream: StreamId) -> bool:
    """Whether a stream's ids are read from files, so that no view is needed."""
    return isinstance(config, Config) and bool(config.tokens) and not stream.held_out


def decoder_of(
    source: Source,
    shards: Sequence[Shard],
    config: UnlabelledConfig,
    shared: Resources,
    device: torch.device,
    fingerprint: str,
) -> str:
    """Where a stream is decoded: "cpu", "gpu" (DALI's decoder), or one of LANES.

    On a GPU `auto` measures those that there are for videos, on these very shards.
    """
    wanted = config.data.decoder
    if device.type != "cuda":
        if wanted not in ("auto", "cpu"):
            raise UserError(f"data.decoder={wanted} needs a CUDA device; use data.decoder=auto")
        return "cpu"
    if source.stream.kind == "image":
        return "cpu" if wanted == "cpu" else "gpu"
    if wanted in LANES and shared.gpu is None:
        raise UserError(f"data.decoder={wanted}: {why_not()}")
    if wanted != "auto":
        return wanted
    names = ("gpu", "cpu", *(LANES if shared.gpu else ()))
    candidates = {name: partial(_clips_per_second, source, shards, config, shared, device, name) for name in names}
    data, machine = config.data, (torch.cuda.get_device_name(device), cores())
    clip = (data.frames, data.stride, data.size, data.clips_per_video, source.micro_size)
    facts = (fingerprint, machine, data.workers, data.threads, clip, *(LANES if shared.gpu else ()))
    return choose(candidates, facts, cache_home() / "decoder")


def _clips_per_second(
    source: Source,
    shards: Sequence[Shard],
    config: UnlabelledConfig,
    shared: Resources,
    device: torch.device,
    decoder: str,
) -> float:
    """The rate of one decoder over a few micro-batches. RuntimeError: it cannot decode these videos."""
    own_times = replace(shared, times=StageTimes())
    reader = open_reader(source, shards, config, own_times, device, decoder, Ledger(source.stream, None, Skips()))
    slots = range(source.micro_size)
    try:
        return clips_per_second(len(reader.finish(reader.begin(step, slots)).mask) for step in range(1 + MEASURED))
    except DataLimitError as error:
        raise RuntimeError(str(error)) from error
