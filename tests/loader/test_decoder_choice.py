"""The choice between DALI's decoder and the workers, and the fallback for single clips."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from bevt_ds.config.schema import Config
from bevt_ds.data import open_stream
from bevt_ds.data.decoder_choice import choose, clips_per_second, resumed_decoders
from bevt_ds.data.decoding import nvdec
from bevt_ds.data.graph_stream import GraphReader
from bevt_ds.data.limits import Limits
from bevt_ds.data.loader import Loader
from bevt_ds.data.open_stream import Source
from bevt_ds.data.pixels.cpu_pixels import ClipPixels
from bevt_ds.data.pixels.pipeline import PixelPipeline
from bevt_ds.data.plan import StreamId
from bevt_ds.errors import UserError
from tests.loader.media import decode_clip, images_of, in_threads

NO_GPU_DECODER = SimpleNamespace(gpu=None)  # what streams share, as far as it matters here


def test_faster_decoder_is_measured_once_and_remembered(tmp_path: Path) -> None:
    calls = []
    candidates = {name: lambda name=name: calls.append(name) or float(len(name)) for name in ("gpu", "slower", "c")}
    assert choose(candidates, ("these shards",), tmp_path) == "slower"
    assert choose(candidates, ("these shards",), tmp_path) == "slower"
    assert calls == ["gpu", "slower", "c"]
    choose(candidates, ("other shards",), tmp_path)
    assert len(calls) == 6
    for number, nonsense in enumerate(("[]", '{"npu": 9.0}', '{"gpu": "fast"}'), 3):
        for place in tmp_path.glob("*.json"):
            place.write_text(nonsense)
        choose(candidates, ("these shards",), tmp_path)
        assert len(calls) == 3 * number


def test_decoder_choice_is_logged_with_rates(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        choose({"gpu": lambda: 12.34, "cpu": lambda: 5.0}, (), tmp_path)
    assert "videos are decoded on the gpu: gpu 12.3 clips/s, cpu 5.0 clips/s" in caplog.text


def test_ranks_of_a_node_share_one_decoder_measurement(tmp_path: Path) -> None:
    """The second finds what the first has measured."""
    calls = []

    def measure() -> float:
        calls.append(1)
        time.sleep(0.2)
        return 1.0

    in_threads(lambda rank: choose({"cpu": measure}, (), tmp_path), range(3))
    assert len(calls) == 1


def test_decoder_that_fails_is_not_chosen(tmp_path: Path) -> None:
    def absent() -> float:
        raise RuntimeError("no NVDEC here")

    assert choose({"gpu": absent, "cpu": lambda: 1.0}, (), tmp_path) == "cpu"
    with pytest.raises(RuntimeError, match="no NVDEC"):
        choose({"gpu": absent}, (1,), tmp_path)


def test_decoder_measurement_ignores_the_first_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither its clips nor its time: by a clock that the batches set."""
    clock = [0.0]
    monkeypatch.setattr("bevt_ds.data.decoder_choice.time.perf_counter", lambda: clock[0])

    def batches(seconds: tuple[float, ...]) -> Iterator[int]:
        for each in seconds:
            clock[0] += each
            yield 4

    assert clips_per_second(batches((100.0, 1.0, 2.0, 1.0))) == 3.0


@pytest.mark.parametrize("changed", ["workers", "threads", "frames", "stride", "size", "clips_per_video"])
def test_decoder_is_measured_again_for_other_data_settings(config, monkeypatch, changed: str) -> None:
    asked = []
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    monkeypatch.setattr(open_stream, "choose", lambda candidates, facts, folder: asked.append(facts) or "gpu")
    source = Source(StreamId.VIDEO, config.data.videos, 4, 2)
    before = config.data
    for more in (0, 0, 2):
        data = replace(before, decoder="auto", **{changed: getattr(before, changed) + more})
        config = replace(config, data=data)
        open_stream.decoder_of(source, [], config, NO_GPU_DECODER, torch.device("cuda"), "the same shards")
    assert asked[0] == asked[1] != asked[2]


@pytest.fixture
def vp9(make: SimpleNamespace) -> bytes:
    frames = make.noise(12, 144, 160, softness=5.0)
    return make.clip(frames, "webm", "libvpx-vp9", deadline="realtime", **{"cpu-used": "8"})


def test_dali_and_worker_decoders_give_equal_pixels(vp9: bytes, entry: Callable) -> None:
    """DALI's CPU decoder knows VP9: its images equal those of the workers' frames, to the bit."""
    e, numbers = entry(short_side=80, crop=(0.3, 0.7), flip=True), np.array([1, 4, 7, 10])
    frames = decode_clip(vp9, lambda total: numbers, Limits())
    from_frames = images_of(PixelPipeline("video", 1, 64, 32, threads=1), [frames], [e])
    from_file = images_of(PixelPipeline("video", 1, 64, 32, threads=1, dali_decoder="cpu"), [(vp9, numbers)], [e])
    for a, b in zip(from_frames, from_file, strict=True):
        assert torch.equal(a, b)


def through_dali(monkeypatch: pytest.MonkeyPatch, decoder: str | None) -> None:
    """Clips go through DALI's graph, as on a GPU, with its decoder on the CPU or with the workers'."""

    def reader(*arguments, pixels: ClipPixels, **more) -> GraphReader:
        size = arguments[2].size
        graph = PixelPipeline("video", 2, size, size // 2, 1, dali_decoder=decoder)
        return GraphReader(*arguments, pixels=graph, **more)

    monkeypatch.setattr(open_stream, "ClipReader", reader)


@pytest.mark.parametrize("clips_per_video", [1, 2])
def test_clips_that_dali_cannot_decode_go_to_workers(tmp_path, make, vp9, config, monkeypatch, clips_per_video) -> None:
    """VP9 by DALI, H.264 in 4:4:4 by a worker, in one batch: the same images as by workers alone."""
    other = make.clip(make.noise(12, 72, 96, seed=1), "mp4", "libx264", pixel_format="yuv444p")
    tar = make.tar(tmp_path / "s.tar", {"a.webm": vp9, "b.mp4": other, "c.webm": vp9, "d.mp4": other})
    train = replace(config.train, global_images=0, micro_images=0)
    mixed = replace(
        config, data=replace(config.data, videos=str(tar), frames=4, clips_per_video=clips_per_video), train=train
    )
    through_dali(monkeypatch, None)
    with Loader(mixed) as loader:
        expected = list(islice(loader, 4))
    through_dali(monkeypatch, "cpu")
    with Loader(mixed, folder=tmp_path) as loader:
        batches = list(islice(loader, 4))
        assert loader.bad_samples == 0
    for a, b in zip(batches, expected, strict=True):
        assert torch.equal(a.video.pixels, b.video.pixels)


def test_video_that_fails_in_dali_is_decoded_by_a_worker(tmp_path, make, vp9: bytes, config, monkeypatch) -> None:
    """With the rest of its batch: no sample is lost to what a GPU cannot decode, and nothing is rebuilt."""
    tar = make.tar(tmp_path / "s.tar", {f"{i}.webm": vp9 for i in range(4)})
    train = replace(config.train, global_images=0, micro_images=0)
    data = replace(config.data, videos=str(tar), frames=4, max_bad_fraction=0.9)
    real_run, failed = PixelPipeline.run, []

    def run(self: PixelPipeline, payloads: list, entries: list, masked: np.ndarray):
        if self.dali_decoder and any((e.step, e.slot) == (0, 1) for e in entries):
            failed.append(len(entries))
            payloads = [
                (b"", numbers) if e.slot == 1 else (d, numbers)
                for (d, numbers), e in zip(payloads, entries, strict=True)
            ]
        return real_run(self, payloads, entries, masked)

    through_dali(monkeypatch, "cpu")
    config = replace(config, data=data, train=train)
    with Loader(config) as loader:
        expected = list(islice(loader, 4))
    monkeypatch.setattr(PixelPipeline, "run", run)
    with Loader(config, folder=tmp_path) as loader:
        batches = list(islice(loader, 4))
        assert loader.bad_samples == 0
    assert all(torch.equal(a.video.pixels, b.video.pixels) for a, b in zip(batches, expected, strict=True))
    assert failed == [2] and all(len(batch.video.pixels) == 2 for batch in batches)


@pytest.fixture
def chosen(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple]:
    """What `choose` would be asked for clips of a configuration on a GPU; else where they are decoded."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    monkeypatch.setattr(open_stream, "choose", lambda candidates, facts, folder: (tuple(candidates), facts))

    def ask(config: Config, stream: StreamId = StreamId.VIDEO, device: str = "cuda", shared=NO_GPU_DECODER):
        source = open_stream.Source(stream, "s.tar", 4, 2)
        return open_stream.decoder_of(source, [], config, shared, torch.device(device), "these shards")

    return ask


def test_decoder_auto_measures_videos_on_a_gpu_only(with_data: Callable[..., Config], chosen: Callable) -> None:
    assert chosen(with_data())[0] == ("gpu", "cpu")
    assert chosen(with_data(), StreamId.IMAGE) == "gpu"
    assert [chosen(with_data(decoder=name)) for name in ("gpu", "cpu")] == ["gpu", "cpu"]


def test_decoder_auto_measures_nvdec_and_the_split_where_their_library_is(with_data, chosen) -> None:
    """They are asked for by installing it; what was measured without it is not taken for an answer."""
    candidates, facts = chosen(with_data(), shared=SimpleNamespace(gpu="a decoder"))
    assert candidates == ("gpu", "cpu", "nvdec", "split") and facts != chosen(with_data())[1]
    for name in ("nvdec", "split"):
        assert chosen(with_data(decoder=name), shared=SimpleNamespace(gpu="a decoder")) == name
        assert chosen(with_data(decoder=name), StreamId.IMAGE) == "gpu"


@pytest.mark.parametrize("name", ["nvdec", "split"])
def test_nvdec_needs_a_gpu_and_its_library(with_data, chosen, monkeypatch, name: str) -> None:
    with pytest.raises(UserError, match=f"data.decoder={name} needs a CUDA device"):
        chosen(with_data(decoder=name), device="cpu")
    monkeypatch.setattr(nvdec, "_LIBRARY", "no_such_library")
    with pytest.raises(UserError, match=rf"data.decoder={name}: no_such_library is not installed \(pip install"):
        chosen(with_data(decoder=name))


def test_resumed_run_keeps_its_decoder(config: Config) -> None:
    """Not where the setting says which, and not where there is no GPU, though the run before had one."""
    state = {"decoder": {"VIDEO": "gpu", "IMAGE": "gpu"}}
    assert resumed_decoders(state, "auto", on_gpu=True) == state["decoder"]
    assert resumed_decoders(state, "cpu", on_gpu=True) == resumed_decoders(state, "auto", on_gpu=False) == {}
    assert resumed_decoders(None, "auto", on_gpu=True) == resumed_decoders({"skips": []}, "auto", on_gpu=True) == {}
    with Loader(config, state=state) as loader:
        assert next(loader).video is not None and loader.state()["decoder"] == {}
