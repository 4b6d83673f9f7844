"""GPU, driver and NCCL; and decoders that really decode a sample, which is drawn and encoded here."""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np

from bevt_ds.doctor.lines import GIB, Line, attempt

FRAMES, HEIGHT, WIDTH = 8, 128, 192  # of the sample
MOST_OFF = 6.0  # mean difference of a decoded sample from the drawn one, in levels of 255
UPDATE = "reinstall DALI: pip install nvidia-dali-cuda130 (nvidia-dali-cuda120 with a CUDA 12 driver)"
VIDEO_DRIVER = "in a container set NVIDIA_DRIVER_CAPABILITIES=compute,utility,video; or train with data.decoder=cpu"


def check_gpu() -> list[Line]:
    """Driver, GPUs and NCCL, as torch sees them."""
    import torch

    from bevt_ds.runtime.distributed import DRIVER, describe_device, driver_fault

    if not torch.cuda.is_available():
        if fault := driver_fault():
            return [Line("gpu", "mend", f"torch {torch.__version__} can use none", fault)]
        hidden = "GPUs are hidden by CUDA_VISIBLE_DEVICES" if DRIVER.exists() else "no NVIDIA driver"
        return [Line("gpu", "absent", f"{hidden}: training runs on the CPU, which is for trying things out")]
    lines = [Line("driver", "ok", driver_version(DRIVER.read_text()) if DRIVER.exists() else "is loaded")]
    for index in range(torch.cuda.device_count()):
        text, _, old = describe_device(torch.device("cuda", index)).removeprefix("device: ").partition("; ")
        memory = torch.cuda.get_device_properties(index).total_memory / GIB
        lines.append(Line(f"gpu {index}", "mend" if old else "ok", f"{text}, {memory:,.0f} GiB", old))
    nccl = ".".join(map(str, torch.cuda.nccl.version()))
    return [*lines, Line("nccl", "ok", nccl)]


def driver_version(text: str) -> str:
    """The version in /proc/driver/nvidia/version."""
    found = re.search(r"Kernel Module\D*?(?:for \S+\s+)?(\d[\d.]+)", text)
    return found[1] if found else "of unknown version"


def check_decoders(gpu: bool) -> list[Line]:
    """Videos and images on the CPU; on a GPU also those of NVDEC and nvJPEG."""
    lines = [
        attempt("cpu video", lambda: _judged(_video_by_pyav, "PyAV", "an H.264 video"), "pip install 'av>=18.1,<19'"),
        attempt("dali", lambda: _judged(_image_by_dali("cpu"), f"DALI {_dali()}", "a JPEG on the CPU"), UPDATE),
    ]
    if not gpu:
        text = "need a GPU: the CPU decodes"
        return [*lines, Line("nvdec", "absent", text), Line("nvjpeg", "absent", text)]
    return [
        *lines,
        attempt("nvdec", lambda: _judged(video_by_nvdec, "NVDEC", "an H.264 video"), VIDEO_DRIVER),
        attempt("nvjpeg", lambda: _judged(_image_by_dali("mixed"), "nvJPEG", "a JPEG"), UPDATE),
    ]


def sample() -> np.ndarray:
    """Smooth colours that change from frame to frame: uint8 (FRAMES,HEIGHT,WIDTH,3)."""
    t, y, x = np.meshgrid(*(np.linspace(0, 255, n) for n in (FRAMES, HEIGHT, WIDTH)), indexing="ij")
    return np.stack([x, y, t], -1).astype(np.uint8)


def _judged(decode: Callable[[np.ndarray], np.ndarray], who: str, what: str) -> str:
    """How `decode`, from frames to encode to frames decoded, did. RuntimeError: the pixels are not the sample's."""
    drawn = sample()
    decoded = decode(drawn)
    drawn = drawn if decoded.ndim == 4 else drawn[0]
    if decoded.shape != drawn.shape:
        raise RuntimeError(f"{who} decodes {what} of shape {drawn.shape} to {decoded.shape}")
    off = float(np.abs(decoded.astype(np.float32) - drawn).mean())
    if off > MOST_OFF:
        raise RuntimeError(f"{who} decodes {what} {off:.1f} levels off")
    return f"{who} decodes {what}, {off:.1f} levels off on average"


def _dali() -> str:
    import nvidia.dali

    return nvidia.dali.__version__


def _video_by_pyav(frames: np.ndarray) -> np.ndarray:
    from bevt_ds.data.decoding.video import opened
    from bevt_ds.data.limits import Limits
    from bevt_ds.shards.synthetic.draw_worker import encode_mp4

    with opened(encode_mp4(frames), Limits()) as video:
        return np.asarray(video.frames(np.arange(len(frames))))


def _image_by_dali(device: str) -> Callable[[np.ndarray], np.ndarray]:
    def decode(frames: np.ndarray) -> np.ndarray:
        from nvidia.dali import fn

        from bevt_ds.data.decoding.dali_images import decoded_images
        from bevt_ds.shards.synthetic.draw_worker import encode_jpeg

        graph = lambda: decoded_images(_bytes(fn), device)  # noqa: E731
        return _run_graph(graph, device, {"encoded": encode_jpeg(frames[0])})

    return decode


def video_by_nvdec(frames: np.ndarray, device: str = "mixed") -> np.ndarray:
    """The frames of uint8 (T,H,W,3), encoded and decoded by DALI on the GPU."""
    from nvidia.dali import fn, types

    from bevt_ds.shards.synthetic.draw_worker import encode_mp4

    def graph():
        numbers = fn.external_source(name="numbers", dtype=types.INT32)
        return fn.decoders.video(_bytes(fn), device=device, frames=numbers)

    return _run_graph(graph, device, {"encoded": encode_mp4(frames), "numbers": np.arange(len(frames), dtype=np.int32)})


def _bytes(fn):
    from nvidia.dali import types

    return fn.external_source(name="encoded", dtype=types.UINT8)


def _run_graph(graph: Callable, device: str, inputs: dict[str, bytes | np.ndarray]) -> np.ndarray:
    """The one output of a DALI graph over one sample, on the CPU."""
    from nvidia.dali import Pipeline
    from nvidia.dali.plugin.pytorch.torch_utils import to_torch_tensor

    place = None if device == "cpu" else 0
    pipeline = Pipeline(batch_size=1, num_threads=1, device_id=place, prefetch_queue_depth=1, exec_dynamic=True)
    with pipeline:
        pipeline.set_outputs(graph())
    pipeline.build()
    for name, value in inputs.items():
        pipeline.feed_input(name, [np.frombuffer(value, np.uint8) if isinstance(value, bytes) else value])
    (output,) = pipeline.run()
    return to_torch_tensor(output.as_tensor(), copy=True)[0].cpu().numpy()
