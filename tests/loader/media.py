"""Media that the data tests make, and the plainest way to look at what is in them."""

from __future__ import annotations

import io
import os
import tarfile
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any, TypeVar

import av
import numpy as np
from nvidia.dali import fn, pipeline_def
from PIL import Image
from torch import Tensor

from bevt_ds.data.decoding.geometry import Crop
from bevt_ds.data.decoding.pool import DecodePool
from bevt_ds.data.decoding.video import VideoInfo, opened
from bevt_ds.data.limits import Limits
from bevt_ds.data.pixels.cpu_pixels import ClipPixels
from bevt_ds.data.pixels.pipeline import PixelPipeline
from bevt_ds.data.reading.index import load_shard, usable
from bevt_ds.data.reading.members import Shard

FPS = 25
T, R = TypeVar("T"), TypeVar("R")


def in_threads(work: Callable[[T], R], items: Sequence[T]) -> list[R]:
    """What `work` returns for each item, each in a thread of its own, all at the same time; or the first error."""
    with ThreadPoolExecutor(len(items)) as threads:
        return list(threads.map(work, items))


def write_tar(
    path: Path, members: dict[str, bytes], format: int = tarfile.PAX_FORMAT, special: Iterable[tarfile.TarInfo] = ()
) -> Path:
    """A tar by Python's own tarfile: not the writer that the package uses. special: members behind those."""
    with tarfile.open(path, "w", format=format) as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
        for info in special:
            tar.addfile(info)
    return path


def repacked(tars: Iterable[Path], out: Path, change: Callable[[str, bytes], bytes]) -> str:
    """A tar of all members of others, in order of their names; change: what becomes of a member's name and data."""
    members: dict[str, bytes] = {}
    for path in sorted(tars):
        with tarfile.open(path) as tar:
            members |= {info.name: change(info.name, tar.extractfile(info).read()) for info in tar}
    return str(write_tar(out, members))


def special_member(name: str, kind: bytes, to: str = "/etc/passwd") -> tarfile.TarInfo:
    """A member that is no file: a link, a device, a folder."""
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, to
    return info


def encoded(pixels: np.ndarray, encoding: str, orientation: int | None = None) -> bytes:
    """An image file, with an EXIF orientation."""
    exif = Image.Exif()
    if orientation is not None:
        exif[0x112] = orientation
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, encoding, exif=exif)
    return buffer.getvalue()


def deep_jpeg() -> bytes:
    """Of 12 bits a level, which DALI does not decode."""
    data = encoded(noise(20, 30), "JPEG")
    frame = data.index(b"\xff\xc0")
    return data[: frame + 4] + b"\x0c" + data[frame + 5 :]


def noise(*shape: int, seed: int = 0, softness: float = 30.0) -> np.ndarray:
    """Waves with noise on top: uint8 (*shape, 3), busy enough to tell two resize kernels apart."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[: shape[-2], : shape[-1]]
    waves = np.stack([np.sin(x / 7), np.cos(y / 5), np.sin((x + y) / 9)], axis=-1)
    return np.clip(128 + 80 * waves + rng.normal(0, softness, (*shape, 3)), 0, 255).astype(np.uint8)


def shades(frames: int, height: int = 48, width: int = 64) -> np.ndarray:
    """Plain grey frames, each 5 levels brighter than the one before: uint8 (N,H,W,3)."""
    return np.stack([np.full((height, width, 3), 20 + 5 * i, np.uint8) for i in range(frames)])


def numbers_of(pixels: np.ndarray) -> list[int]:
    """Which frames of `shades` these are: uint8 (N,H,W,3)."""
    return np.rint((pixels.mean((1, 2, 3)) - 20) / 5).astype(int).tolist()


@contextmanager
def own_scheduling() -> Iterator[None]:
    """After the block this thread is scheduled as before it.

    SVT-AV1, called by root, makes its caller a real-time thread: what that starts is one too, and starves all others.
    """
    policy, parameters = os.sched_getscheduler(0), os.sched_getparam(0)
    try:
        yield
    finally:
        os.sched_setscheduler(0, policy, parameters)


@own_scheduling()
def encode_clip(
    frames: np.ndarray,
    container: str,
    codec: str,
    pixel_format: str = "yuv420p",
    times: Sequence[int] | None = None,
    muxer: dict[str, str] | None = None,
    matrix: Sequence[int] | None = None,
    **options: str,
) -> bytes:
    """A clip with any codec of FFmpeg: uint8 (N,H,W,3) -> file bytes.

    times: when each frame is shown, in 1/25 s; None: one after the other. muxer, options: FFmpeg's, of the container
    and of the encoder. matrix: how it is turned to be shown, nine numbers.
    """
    with tempfile.NamedTemporaryFile() as file, av.open(file.name, "w", format=container, options=muxer or {}) as out:
        stream = out.add_stream(codec, rate=Fraction(FPS))
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = pixel_format
        stream.options = options
        stream.codec_context.time_base = Fraction(1, FPS)
        stream.set_display_matrix(matrix)
        for image, time in zip(frames, times or range(len(frames)), strict=True):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts, frame.time_base = time, Fraction(1, FPS)
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
        out.close()
        return Path(file.name).read_bytes()


def remuxed(
    data: bytes,
    container: str,
    change: Callable[[av.Packet], None] = lambda packet: None,
    first: int = 0,
    payload: Callable[[int, bytes], bytes] | None = None,
    muxer: dict[str, str] | None = None,
) -> bytes:
    """A stream copy into another container.

    change: of each packet; first: packets before it are left out; payload: other bytes for the i-th packet.
    muxer: FFmpeg's options.
    """
    buffer = io.BytesIO()
    with av.open(io.BytesIO(data)) as source, av.open(buffer, "w", format=container, options=muxer or {}) as out:
        stream = source.streams.video[0]
        copy = out.add_stream_from_template(stream)
        packets = [packet for packet in source.demux(stream) if packet.size]
        for i, packet in enumerate(packets[first:], start=first):
            if payload:
                other = av.Packet(payload(i, bytes(packet)))
                other.pts, other.dts, other.duration = packet.pts, packet.dts, packet.duration
                other.time_base, other.is_keyframe = packet.time_base, packet.is_keyframe
                packet = other
            change(packet)
            packet.stream = copy
            out.mux(packet)
    return buffer.getvalue()


def decode_clip(data: bytes, choose: Callable[[int], np.ndarray], limits: Limits | None = None) -> np.ndarray:
    """Some frames of a video: uint8 (F,H,W,3) RGB. BadSample: it cannot be decoded that far.

    choose: given the number of frames, returns the wanted frame numbers, in any order and with repeats.
    """
    with opened(data, limits or Limits()) as video:
        return video.frames(choose(video.total))


def at_any_size(info: VideoInfo) -> dict[str, Any]:
    """The facts of a video, had it a size that every decoder of a GPU takes."""
    return {**vars(info), "width": 256, "height": 256}


def by_dali(decoder: Callable, files: Sequence[bytes], **arguments: Any) -> list[np.ndarray]:
    """What a CPU decoder of DALI, one of `fn.decoders`, makes of each file."""

    @pipeline_def(batch_size=len(files), num_threads=1, device_id=None)
    def graph():
        return decoder(fn.external_source(name="encoded"), device="cpu", **arguments)

    pipe = graph()
    pipe.build()
    pipe.feed_input("encoded", [np.frombuffer(file, np.uint8) for file in files])
    (decoded,) = pipe.run()
    return [np.asarray(decoded[i]) for i in range(len(files))]


def pooled_clips(pool: DecodePool, data: bytes, *arguments: Any) -> np.ndarray:
    """The frames of clips that a pool decodes: uint8 (k,F,H,W,3). The arguments are those of `DecodePool.clips`."""
    with pool.clips(data, *arguments) as decoded:
        return decoded.copied()


def clip_pixels(pixels: ClipPixels, frames: np.ndarray, entries: Sequence, masked: np.ndarray | None = None) -> tuple:
    """Pixels and views that are made of the same frames, uint8 (T,H,W,3), for each entry; as `images_of` has them."""
    every = np.ones((len(entries), len(frames)), dtype=bool)
    batch = pixels.batch(every if masked is None else masked)
    for i, e in enumerate(entries):
        crop = pixels.crop(frames, np.arange(len(frames)), Crop(e.short_side, *e.crop, batch.pixels.shape[-1]))
        pixels.fill(batch, i, crop, e.flip)
    return batch.pixels, batch.view.unflatten(0, every.shape) if masked is None else batch.view


def images_of(pipeline: PixelPipeline, payloads: Sequence, entries: Sequence) -> tuple[Tensor, Tensor]:
    """A micro-batch's pixels and the views of all its frames, masked or not: (B,T,3,v,v), or of images (B,3,v,v)."""
    clip = payloads[0][1] if isinstance(payloads[0], tuple) else payloads[0]
    shape = (len(payloads),) if isinstance(clip, bytes) else (len(payloads), len(clip))
    pixels, view = pipeline.run(payloads, entries, np.ones(shape, dtype=bool))
    return pixels, view.unflatten(0, shape)


def load_shards(paths: Sequence[str], kind: str) -> list[Shard]:
    """The samples of `kind` of local shards, as a run has them."""
    return usable(map(load_shard, paths), kind)
