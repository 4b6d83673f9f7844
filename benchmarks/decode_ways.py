"""Ways to decode clips, each behind one interface: DALI's decoders, our workers, and other libraries."""

from __future__ import annotations

import io
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from importlib import import_module
from itertools import count
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
import torch

from bevt_ds.data.decoding.geometry import Crop
from bevt_ds.data.decoding.pool import DecodePool
from bevt_ds.data.limits import Limits
from bevt_ds.data.plan import clip_frames

PART = (
    (0.15, 0.2),
    (0.7, 0.55),
)  # of an image, from where and how much: a crop of 224 of 500x375 at the short side 288
CROP = Crop(short_side=256, y=0.5, x=0.5, size=224)
DEADLINE = 120.0  # seconds for a sample of a worker


class Sample(NamedTuple):
    """A file, and of a video the frames that are wanted."""

    data: bytes
    start: float = 0.0  # of the clip, a fraction of the possible ones
    numbers: np.ndarray | None = None  # the same as numbers of frames; None: an image


@dataclass(frozen=True)
class Setting:
    """How a way is used. What a way does not know it ignores, and its rows do not vary it."""

    batch: int = 8
    lanes: int = 1  # threads or processes that decode at a time
    frames: int = 16
    stride: int = 8
    index: bool = True  # DALI's build_index
    listed: bool = True  # frames by their numbers; else by start and stride
    whole: bool = True  # all of a frame; else what a crop of 224 pixels needs


Decode = Callable[[Sequence[Sample]], int]  # a batch -> how many frames came out


@dataclass(frozen=True)
class Way:
    """Who decodes. needs: modules; a CUDA device, if it is not for the CPU; codecs it may know, all if empty."""

    open: Callable[[Setting], AbstractContextManager[Decode]]
    device: str = "cpu"
    needs: tuple[str, ...] = ()
    codecs: frozenset[str] = frozenset()
    varies: tuple[str, ...] = ()  # fields of Setting that it knows, besides `batch` and `lanes`

    def reason(self, codec: str) -> str | None:
        """Why it cannot run here; None: it can be tried."""
        if self.codecs and codec not in self.codecs:
            return f"it does not know {codec}"
        if self.device == "cuda" and not torch.cuda.is_available():
            return "no CUDA device"
        for name in self.needs:
            try:
                import_module(name)
            except (ImportError, OSError, RuntimeError) as error:  # a library of the system is missing
                return f"{name}: {(str(error).strip().splitlines() or ['cannot be imported'])[0][:120]}"
        return None


@contextmanager
def workers(setting: Setting) -> Iterator[Decode]:
    """Our decode workers, as a run has them: in memory that is shared with this process; on a CPU the crop's part."""
    with ExitStack() as closing:
        pool = DecodePool(setting.lanes, DEADLINE, Limits())
        closing.callback(pool.close)
        threads = closing.enter_context(ThreadPoolExecutor(setting.batch))

        crops = None if setting.whole else [CROP]

        def one(sample: Sample) -> int:
            start = (sample.start, 0.0)
            with pool.clips(sample.data, [start], setting.frames, setting.stride, crops=crops) as decoded:
                return decoded.places.size

        yield lambda samples: sum(threads.map(one, samples))


@contextmanager
def nvdec_sessions(setting: Setting) -> Iterator[Decode]:
    """data.decoder=nvdec: `lanes` sessions that are kept, and as many workers that open the files."""
    from bevt_ds.data.decoding.gpu_decoder import GpuDecoder
    from bevt_ds.data.decoding.nvdec import NvdecSession

    library, device = import_module("PyNvVideoCodec"), torch.device("cuda", 0)
    with ExitStack() as closing:
        pool = DecodePool(setting.lanes, DEADLINE, Limits())
        closing.callback(pool.close)
        decoder = GpuDecoder(pool, lambda kind: NvdecSession(library, kind, device), setting.lanes)
        closing.callback(decoder.sessions.close)
        threads = closing.enter_context(ThreadPoolExecutor(setting.lanes))

        def one(sample: Sample) -> int:
            clips, _ = decoder.clips(sample.data, [(sample.start, 0.0)], setting.frames, setting.stride)
            return sum(map(len, clips))

        yield lambda samples: sum(threads.map(one, samples))


def dali(device: str, kind: str) -> Callable[[Setting], AbstractContextManager[Decode]]:
    """DALI's operator on files in memory. device: "cpu" or "mixed". kind: "video", "image", or
    "part" of an image."""

    @contextmanager
    def opened(setting: Setting) -> Iterator[Decode]:
        from nvidia.dali import Pipeline, fn, types

        from bevt_ds.data.decoding.dali_images import decoded_images

        graph = Pipeline(setting.batch, setting.lanes, None if device == "cpu" else 0, prefetch_queue_depth=1)
        with graph:
            encoded = fn.external_source(name="encoded", dtype=types.UINT8)
            if kind == "image":
                graph.set_outputs(decoded_images(encoded, device))
            elif kind == "part":
                options = {"output_type": types.RGB, "jpeg_fancy_upsampling": True, "axes": [0, 1]}
                start, shape = PART
                part = fn.decoders.image_slice(encoded, device=device, rel_start=start, rel_shape=shape, **options)
                graph.set_outputs(part)
            elif setting.listed:
                numbers = fn.external_source(name="numbers", dtype=types.INT32)
                graph.set_outputs(fn.decoders.video(encoded, device=device, frames=numbers, build_index=setting.index))
            else:
                start = fn.external_source(name="numbers", dtype=types.INT32, ndim=0)
                clip = {"start_frame": start, "stride": setting.stride, "sequence_length": setting.frames}
                graph.set_outputs(fn.decoders.video(encoded, device=device, build_index=setting.index, **clip))
        graph.build()

        def decode(samples: Sequence[Sample]) -> int:
            graph.feed_input("encoded", [np.frombuffer(s.data, np.uint8) for s in samples])
            if kind == "video":
                numbers = [s.numbers.astype(np.int32) for s in samples]
                graph.feed_input("numbers", numbers if setting.listed else [n[0] for n in numbers])
            (out,) = graph.run()
            return sum(shape[0] if kind == "video" else 1 for shape in out.shape())

        yield decode

    return opened


def dali_reader(device: str) -> Callable[[Setting], AbstractContextManager[Decode]]:
    """DALI's reader of files, which chooses its clips itself: the first batch's files, clips one after the other.

    device: "gpu", or "cpu", for which only the experimental one is made.
    """

    @contextmanager
    def opened(setting: Setting) -> Iterator[Decode]:
        from nvidia.dali import Pipeline, fn

        readers = fn.readers if device == "gpu" else fn.experimental.readers
        with tempfile.TemporaryDirectory() as folder:
            graph: list[Pipeline] = []

            def decode(samples: Sequence[Sample]) -> int:
                if not graph:
                    names = [Path(folder) / f"{i}.mp4" for i in range(len(samples))]
                    for path, sample in zip(names, samples, strict=True):
                        path.write_bytes(sample.data)
                    gpu = 0 if device == "gpu" else None
                    graph.append(Pipeline(setting.batch, setting.lanes, gpu, prefetch_queue_depth=1))
                    with graph[0]:
                        clip = {"sequence_length": setting.frames, "stride": setting.stride, "random_shuffle": True}
                        graph[0].set_outputs(readers.video(device=device, filenames=list(map(str, names)), **clip))
                    graph[0].build()
                (out,) = graph[0].run()
                return sum(shape[0] for shape in out.shape())

            yield decode

    return opened


def torchcodec(device: str) -> Callable[[Setting], AbstractContextManager[Decode]]:
    """A decoder a file, in threads. Of its two ways to seek the one without a scan of the file."""

    def one(setting: Setting, sample: Sample) -> int:
        from torchcodec.decoders import VideoDecoder

        decoder = VideoDecoder(sample.data, num_ffmpeg_threads=1, seek_mode="approximate", device=device)
        return len(decoder.get_frames_at(sample.numbers.tolist()).data)

    return in_threads(one)


def pyav(setting: Setting, sample: Sample) -> int:
    """As a data set with PyAV does it: from the keyframe in front of the first frame on, numbers by timestamps."""
    with av.open(io.BytesIO(sample.data)) as container:
        stream, wanted, images = container.streams.video[0], set(sample.numbers.tolist()), []
        stream.codec_context.thread_count, ticks = 1, 1 / (stream.average_rate * stream.time_base)
        container.seek(int(min(wanted) * ticks) + (stream.start_time or 0), stream=stream)
        for frame in container.decode(stream):
            number = round((frame.pts - (stream.start_time or 0)) / ticks)
            if number in wanted:
                images.append(frame.to_ndarray(format="rgb24"))
            if number >= max(wanted):
                break
    return len(images)


def decord(setting: Setting, sample: Sample) -> int:
    """Its wheel is for CPUs. It reads a file of its own kind from memory."""
    from decord import VideoReader, cpu

    return len(VideoReader(io.BytesIO(sample.data), ctx=cpu(0), num_threads=1).get_batch(sample.numbers).asnumpy())


def pynvvideocodec(setting: Setting, sample: Sample) -> int:
    """Its own demuxer and decoder on the file's bytes, RGB on the GPU; it keeps decoders for files to come."""
    from PyNvVideoCodec import OutputColorType, SimpleDecoder

    decoder = SimpleDecoder(sample.data, use_device_memory=True, output_color_type=OutputColorType.RGB)
    return len(decoder.get_batch_frames_by_index(sample.numbers.tolist()))


def in_threads(one: Callable[[Setting, Sample], int]) -> Callable[[Setting], AbstractContextManager[Decode]]:
    """A way that decodes sample by sample, `lanes` of them at a time."""

    @contextmanager
    def opened(setting: Setting) -> Iterator[Decode]:
        with ThreadPoolExecutor(setting.lanes) as threads:
            yield lambda samples: sum(threads.map(lambda sample: one(setting, sample), samples))

    return opened


OF_DALI = ("index", "listed")
VIDEO_WAYS = {
    "our workers": Way(workers, varies=("whole",)),
    "our NVDEC sessions": Way(nvdec_sessions, "cuda", ("PyNvVideoCodec",), codecs=frozenset({"h264", "hevc"})),
    "DALI decoders.video, CPU": Way(dali("cpu", "video"), codecs=frozenset({"vp9"}), varies=OF_DALI),
    "DALI decoders.video, NVDEC": Way(dali("mixed", "video"), "cuda", varies=OF_DALI),
    "DALI experimental.readers.video, CPU": Way(dali_reader("cpu"), codecs=frozenset({"vp9"})),
    "DALI readers.video, NVDEC": Way(dali_reader("gpu"), "cuda"),
    "torchcodec, CPU": Way(torchcodec("cpu"), needs=("torchcodec.decoders",)),
    "torchcodec, CUDA": Way(torchcodec("cuda"), "cuda", ("torchcodec.decoders",)),
    "PyAV": Way(in_threads(pyav)),
    "decord, CPU": Way(in_threads(decord), needs=("decord",)),
    "PyNvVideoCodec, SimpleDecoder": Way(in_threads(pynvvideocodec), "cuda", ("PyNvVideoCodec",)),
}
IMAGE_WAYS = {
    "DALI decoders.image, CPU": Way(dali("cpu", "image")),
    "DALI decoders.image_slice, CPU": Way(dali("cpu", "part")),
    "DALI decoders.image, nvJPEG": Way(dali("mixed", "image"), "cuda"),
    "DALI decoders.image_slice, nvJPEG": Way(dali("mixed", "part"), "cuda"),
}


def samples(files: Sequence[bytes], totals: Sequence[int], setting: Setting, fresh: bool) -> Iterator[list[Sample]]:
    """Batches without end. fresh: other files and clips each time; else the first batch again and again.

    totals: frames of each file; 0: an image.
    """
    rng, at = np.random.default_rng(0), count()
    batch: list[Sample] = []
    while True:
        if fresh or not batch:
            chosen = [next(at) % len(files) for _ in range(setting.batch)]
            starts = rng.random(setting.batch).tolist()
            batch = [
                Sample(files[i], start, clip_frames(start, totals[i], setting.frames, setting.stride))
                if totals[i]
                else Sample(files[i])
                for i, start in zip(chosen, starts, strict=True)
            ]
        yield batch
