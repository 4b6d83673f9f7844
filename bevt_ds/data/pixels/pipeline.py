"""Pixels: one stateless DALI graph a stream, the same operators on a CPU and on a GPU.

On a CPU it serves images; clips go through cpu_pixels.py there, which is faster and held to this graph by a test.

The graph holds no reader and no random operator: bytes or frames and every parameter come from the sample plan through
`external_source`, so there is no pipeline state to save.

What differs from the original's OpenCV, in levels of 255 (a test holds the bounds):
- The resize to the short side is DALI's CUBIC without antialiasing. Its kernel has a = -0.5, OpenCV's -0.75: mean 0.4
  and at most 11 on real images resized to 256, 288 and 320 lines, mean 1.6 and at most 13 on noise.
- The tokenizer's view is OpenCV's LANCZOS4 at 2:1 as a filter with the same eight taps: equal, but for a level where a
  half is rounded (less than one value in a thousand).

Shape letters: B samples, T frames, S crop side, v side of the tokenizer's view.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from nvidia.dali import Pipeline, fn, types
from nvidia.dali import math as dali_math
from nvidia.dali.plugin.pytorch.torch_utils import to_torch_tensor
from nvidia.dali.tensors import TensorCPU, TensorListCPU
from torch import Tensor

from bevt_ds.batch import MEAN, STD
from bevt_ds.data.decoding.dali_images import decoded_images, refusal
from bevt_ds.data.ledger import StageTimes
from bevt_ds.data.limits import BadSample
from bevt_ds.data.plan import PlanEntry

LUMA = (0.2989, 0.587, 0.114)  # weights of the original's contrast and saturation


def lanczos4_taps() -> np.ndarray:
    """The eight weights halfway between two pixels: float32 (8,).

    Lanczos with four lobes, sinc(x) sinc(x/4), at x = +-0.5, 1.5, 2.5, 3.5; rounded to 1/2048, as OpenCV's are for
    8-bit images.
    """
    x = np.arange(8) - 3.5
    taps = np.sinc(x) * np.sinc(x / 4)
    return (np.rint(2048 * taps / taps.sum()) / 2048).astype(np.float32)


def jitter_matrix(jitter: tuple[float, float, float]) -> tuple[np.ndarray, np.float32]:
    """Colour jitter as an affine map of RGB: float32 (3,3) matrix, and the share of the mean luma to add.

    Brightness, then contrast about the image's mean luma, then saturation about each pixel's luma; nothing is
    clipped in between, so the three are one map.
    """
    brightness, contrast, saturation = jitter
    to_luma = np.tile(np.asarray(LUMA), (3, 1))
    saturate = saturation * np.eye(3) + (1 - saturation) * to_luma
    matrix = brightness * contrast * saturate
    return matrix.astype(np.float32), np.float32(brightness * (1 - contrast))


class PixelPipeline:
    """Turns a micro-batch's payloads into the two images that a stream needs.

    kind: "video" or "image". size: S. token_size: v = S/2. device: None for the CPU, else the CUDA ordinal.
    dali_decoder: "mixed" (GPU) or "cpu": DALI decodes the files; "": they arrive decoded; None: images "cpu", and clips
    "", because DALI's CPU decoder knows VP8 and VP9 only. times: where the seconds are counted. on_device: frames
    arrive as tensors on the GPU. views: whether the tokenizer's view is made at all.
    """

    def __init__(
        self,
        kind: str,
        batch_size: int,
        size: int,
        token_size: int,
        threads: int,
        device: int | None = None,
        dali_decoder: str | None = None,
        times: StageTimes | None = None,
        on_device: bool = False,
        views: bool = True,
    ) -> None:
        if 2 * token_size != size:
            raise ValueError(f"token_size must be half of size, got {token_size} and {size}")
        self.kind, self.times = kind, times or StageTimes()
        self.dali_decoder = decoder_of(kind, dali_decoder)
        self._settings, self._views = (batch_size, size, threads, device), views
        self._place = f"cuda:{device}" if on_device and device is not None else ""
        self._build()

    def without_decoder(self) -> PixelPipeline:
        """The same for clips and images that arrive decoded."""
        batch_size, size, threads, device = self._settings
        options = {"device": device, "times": self.times, "views": self._views}
        return PixelPipeline(self.kind, batch_size, size, size // 2, threads, dali_decoder="", **options)

    def _build(self) -> None:
        batch_size, size, threads, device = self._settings
        self.graph = Pipeline(
            batch_size=batch_size,
            num_threads=threads,
            device_id=device,
            prefetch_queue_depth=1,
            exec_dynamic=True,
        )
        with self.graph:
            frames = self._decoded()
            if device is not None and self.dali_decoder != "mixed" and not self._place:
                frames = frames.gpu()
            crop = _crop(frames, size)
            if self.kind == "image":
                crop = _colour_jitter(crop, frames)
            views = [_token_view(crop, size, self.kind)] if self._views else []
            self.graph.set_outputs(_normalise(crop, self.kind), *views)
        self.graph.build()
        self._stream = None if device is None else torch.cuda.Stream(device)

    def placed(self, clip: np.ndarray | Tensor) -> np.ndarray | Tensor:
        """Frames where the graph takes them: uint8 (T,H,W,3)."""
        return torch.as_tensor(clip).to(self._place) if self._place else np.asarray(clip)

    def run(self, payloads: Sequence, entries: Sequence[PlanEntry], masked: np.ndarray) -> tuple[Tensor, Tensor]:
        """Images of a micro-batch: (pixels, view) as bevt_ds.batch.Stream describes them.

        payloads: for a dali_decoder file bytes, of clips with the frames' numbers; else uint8 (H,W,3), or clips
        (T,H,W,3) as `placed` gives them.
        masked: bool (B,T), of images (B,): where the view is wanted.
        BadSample: DALI cannot decode one of them; it does not say which. The next run is as if there had been none: a
        test holds it.
        """
        return self.run_on(graph_inputs(self.kind, self.dali_decoder, payloads, entries), masked)

    def run_on(self, inputs: Mapping[str, Any], masked: np.ndarray) -> tuple[Tensor, Tensor]:
        """The same of what `graph_inputs` has made, which must stay until this returns."""
        with self.times.measured("augment", lanes=self._settings[2]):
            for name, values in inputs.items():
                self.graph.feed_input(name, values if name == "frames" and self._place else _listed(values))
            outputs = self._run_graph()
        with self.times.measured("copy"):
            return self._copied(outputs, np.flatnonzero(masked))

    @staticmethod
    def joined(parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """One micro-batch of several. On a GPU it is made when this returns, for the parts' memory is free then."""
        joined = tuple(torch.cat(tensors) for tensors in zip(*parts, strict=True))
        if joined[0].is_cuda:
            torch.cuda.current_stream(joined[0].device).synchronize()
        return joined

    def _copied(self, outputs: tuple, frames: np.ndarray) -> tuple[Tensor, Tensor]:
        """The graph's outputs as tensors of their own, for DALI uses its buffers again; of the views only `frames`."""
        if self._stream is None:
            return _own_copies(outputs, frames)
        with torch.cuda.stream(self._stream):
            tensors = _own_copies(outputs, frames)
        self._stream.synchronize()
        return tensors

    def _run_graph(self) -> tuple:
        try:
            return self.graph.run()
        except RuntimeError as error:
            reason = refusal(error)
            if not reason:
                raise
            out_of_memory = "MEMORY" in reason.upper()  # which is not the sample's fault
            raise BadSample(f"DALI cannot decode it: {reason}", transient=out_of_memory) from error

    def _decoded(self):
        """The graph's input as images: HWC, or FHWC for a clip. A copy of them would be made under Python's lock."""
        if not self.dali_decoder:
            where, layout = "gpu" if self._place else "cpu", "HWC" if self.kind == "image" else "FHWC"
            own = None if self._place else True
            return fn.external_source(name="frames", dtype=types.UINT8, layout=layout, device=where, no_copy=own)
        encoded = fn.external_source(name="encoded", dtype=types.UINT8, no_copy=True)
        if self.kind == "image":
            return decoded_images(encoded, self.dali_decoder)
        numbers = fn.external_source(name="frame_numbers", dtype=types.INT32)
        return fn.decoders.video(encoded, device=self.dali_decoder, frames=numbers)


def decoder_of(kind: str, dali_decoder: str | None) -> str:
    """What a PixelPipeline does where it is not told."""
    return ("cpu" if kind == "image" else "") if dali_decoder is None else dali_decoder


def graph_inputs(kind: str, dali_decoder: str, payloads: Sequence, entries: Sequence[PlanEntry]) -> dict[str, Any]:
    """What a graph is fed with, by name: arrays of all samples, float32 (B,...) or int32 (B,), or a list."""
    inputs: dict[str, Any] = {
        "short_side": np.array([e.short_side for e in entries], np.float32),
        "crop_y": np.array([e.crop[0] for e in entries], np.float32),
        "crop_x": np.array([e.crop[1] for e in entries], np.float32),
        "flip": np.array([e.flip for e in entries], np.int32),
    }
    if kind == "image":
        matrices, shares = zip(*(jitter_matrix(e.jitter) for e in entries), strict=True)
        inputs |= {"jitter_matrix": np.stack(matrices), "jitter_luma": np.array(shares, np.float32)}
    if not dali_decoder:
        return inputs | {"frames": list(payloads)}
    if kind == "image":
        return inputs | {"encoded": [np.frombuffer(data, np.uint8) for data in payloads]}
    files, numbers = zip(*payloads, strict=True)
    inputs["encoded"] = [np.frombuffer(data, np.uint8) for data in files]
    return inputs | {"frame_numbers": [n.astype(np.int32) for n in numbers]}


def _listed(arrays: np.ndarray | Sequence[np.ndarray]) -> TensorListCPU:
    """An array of all samples, or one of each, as DALI has them, uncopied; it would ask each a dozen questions."""
    if isinstance(arrays, np.ndarray):
        return TensorListCPU(arrays)
    return TensorListCPU([TensorCPU(array) for array in arrays], contiguous=False)


def _own_copies(outputs: tuple, frames: np.ndarray) -> tuple[Tensor, Tensor]:
    pixels, *views = (to_torch_tensor(output.as_tensor(), copy=True) for output in outputs)
    if not views:
        return pixels, pixels.new_empty((0, 3, *(side // 2 for side in pixels.shape[-2:])))
    (view,) = views
    index = torch.from_numpy(frames).to(view.device)
    return pixels, view.flatten(0, -4).index_select(0, index)


def _scalar(name: str, dtype: types.DALIDataType):
    return fn.external_source(name=name, dtype=dtype, ndim=0)


def _constant(values, like):
    """A constant where the image `like` is: DALI does not move it there by itself."""
    return types.Constant(np.asarray(values, dtype=np.float32), device=like.device)


def _crop(frames, size: int):
    """Resize to the short side, cut `size` x `size`, flip: uint8, (F)HWC.

    The cut's offset is the floor of fraction x (extent - size): as in the original, the last possible offset is never
    used.
    """
    crop = fn.resize_crop_mirror(
        frames,
        resize_shorter=_scalar("short_side", types.FLOAT),
        subpixel_scale=False,  # the ratio follows from the rounded size, as in OpenCV
        interp_type=types.INTERP_CUBIC,
        antialias=False,
        crop=(size, size),
        crop_pos_y=_scalar("crop_y", types.FLOAT),
        crop_pos_x=_scalar("crop_x", types.FLOAT),
        rounding="truncate",
    )
    return fn.flip(crop, horizontal=_scalar("flip", types.INT32))


def _colour_jitter(crop, image):
    """The affine map of `jitter_matrix`: uint8 HWC, clipped once. The mean luma is the whole image's."""
    matrix = fn.external_source(name="jitter_matrix", dtype=types.FLOAT, ndim=2)
    channels = fn.reductions.mean(image, axes=(0, 1))
    luma = fn.reductions.sum(channels * _constant(LUMA, image), axes=0)
    mapped = fn.coord_transform(crop, M=matrix, dtype=types.FLOAT)
    return fn.cast(mapped + _scalar("jitter_luma", types.FLOAT) * luma, dtype=types.UINT8)


def _normalise(crop, kind: str):
    """Float CHW, zero mean and unit variance of the training set; a clip becomes (3,T,S,S)."""
    # On a CPU the operator moves the frames' axis as it goes, which saves a pass over 10 MB a clip.
    turns_frames = kind == "video" and crop.device == "cpu"
    layout = "CFHW" if turns_frames else "FCHW" if kind == "video" else "CHW"
    pixels = fn.crop_mirror_normalize(crop, dtype=types.FLOAT, output_layout=layout, mean=list(MEAN), std=list(STD))
    return fn.transpose(pixels, perm=[1, 0, 2, 3]) if layout == "FCHW" else pixels


def _token_view(crop, size: int, kind: str):
    """Half-size image of the same crop: float RGB in [0,1], (T,3,v,v) or (3,v,v).

    Pixel i of the view lies halfway between pixels 2i and 2i+1, so its taps are 2i-3 .. 2i+4; the filter runs along
    columns, every second one is kept, and the same along rows.
    """
    half = size // 2
    layout, lead = ("FHWC", [-1]) if kind == "video" else ("HWC", [])
    taps = lanczos4_taps()
    along = {"dtype": types.FLOAT, "border": "clamp"}
    wide = fn.filter(crop, _constant(taps[None, :], crop), anchor=[0, 3], **along)
    narrow = _every_second(wide, [*lead, size, half, 2, 3], layout)
    tall = fn.filter(narrow, _constant(taps[:, None], crop), anchor=[3, 0], **along)
    view = _every_second(tall, [*lead, half, 2, half, 3], layout)
    levels = dali_math.clamp(fn.cast(view, dtype=types.INT32), 0, 255)
    channels_first = [0, 3, 1, 2] if kind == "video" else [2, 0, 1]
    return fn.transpose(fn.cast(levels, dtype=types.FLOAT) / 255.0, perm=channels_first)


def _every_second(image, pairs: list[int], layout: str):
    """The first of each pair of pixels: `pairs` is the shape with the halved axis as (n, 2)."""
    paired = fn.reshape(image, shape=pairs, layout="")
    axis = pairs.index(2, 1)
    first = paired[tuple(0 if i == axis else slice(None) for i in range(len(pairs)))]
    return fn.reshape(first, layout=layout)
