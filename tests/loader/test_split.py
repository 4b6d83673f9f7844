"""Clips dealt out to a GPU's decoder and to workers: the same batches whoever decodes, and no lane that idles."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice
from types import SimpleNamespace

import pytest
import torch

from bevt_ds.batch import Batch
from bevt_ds.config.schema import Config
from bevt_ds.data import open_stream
from bevt_ds.data.decoding.gpu_decoder import GpuDecoder
from bevt_ds.data.decoding.sessions import GpuRefusal, Sessions
from bevt_ds.data.decoding.split import Split
from bevt_ds.data.graph_stream import NVDEC, WORKERS, GraphReader
from bevt_ds.data.loader import Loader
from bevt_ds.data.pixels.pipeline import PixelPipeline
from tests.loader.fake_gpu import FakeGpu, refusing, slow
from tests.loader.media import in_threads

STEPS = 4


@pytest.fixture(scope="module")
def clips(config: Config, make: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> Config:
    """Clips only, of which NVDEC takes some: H.264 and HEVC; not MPEG-4, AVI and 4:4:4."""
    frames = [make.noise(24, 72, 96, seed=seed, softness=8.0) for seed in range(6)]
    members = {
        "a.mp4": make.clip(frames[0], "mp4", "libx264", g="8", bf="2"),
        "b.mp4": make.clip(
            make.noise(24, 144, 160, seed=1, softness=8.0),
            "mp4",
            "libx265",
            **{"x265-params": "log-level=none:keyint=8"},
        ),
        "c.mp4": make.clip(frames[2], "mp4", "mpeg4"),
        "d.avi": make.clip(frames[3], "avi", "mpeg4"),
        "e.mp4": make.clip(frames[4], "mp4", "libx264", pixel_format="yuv444p"),
        "f.mp4": make.clip(frames[5][:, :64], "mp4", "libx264", g="8"),
    }
    tar = make.tar(tmp_path_factory.mktemp("split") / "s.tar", members)
    data = replace(config.data, videos=str(tar), images="", eval_videos="", eval_images="", clips_per_video=2)
    return replace(config, data=data, train=replace(config.train, global_images=0, micro_images=0))


@pytest.fixture
def read(clips: Config, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable]:
    """Batches of a run whose clips go through DALI's graph on the CPU, decoded by these lanes; and the split."""

    def run(
        lanes: tuple[str, ...], gpu: FakeGpu | None = None, start_step: int = 0, seconds: float = 60.0
    ) -> tuple[list[Batch], Split]:
        splits: list[Split] = []

        def reader(*arguments, pixels, **more) -> GraphReader:
            plan, shards, data, shared, *rest = arguments
            decoder = gpu and GpuDecoder(shared.pool, gpu, sessions=2)
            if decoder:
                decoder.sessions = Sessions(gpu, 2, seconds)
            shared = replace(shared, gpu=decoder)
            splits.append(Split(dict.fromkeys(lanes, 2)) if lanes else None)
            graph = PixelPipeline("video", 2, data.size, data.size // 2, 1)
            return GraphReader(plan, shards, data, shared, *rest, pixels=graph, split=splits[0], **more)

        monkeypatch.setattr(open_stream, "ClipReader", reader)
        with Loader(clips, start_step=start_step) as loader:
            batches = list(islice(loader, 2 * (STEPS - start_step)))
            assert loader.bad_samples == 0
        return batches, splits[0]

    yield run


@pytest.fixture
def expected(read: Callable) -> list[Batch]:
    """By workers alone."""
    return read(())[0]


def require_equal(batches: list[Batch], expected: list[Batch]) -> None:
    for a, b in zip(batches, expected, strict=True):
        assert a.video.keys == b.video.keys and torch.equal(a.video.sample_keys, b.video.sample_keys)
        assert torch.equal(a.video.pixels, b.video.pixels) and torch.equal(a.video.view, b.video.view)


def fault_now_and_then(packets: int) -> None:
    if packets % 60 == 0:
        refusing(packets)


def test_batches_are_the_same_whoever_decodes_and_after_a_resume(read: Callable, expected: list[Batch]) -> None:
    """A fast and a slow GPU, one that fails now and then, and one that fails always; MPEG-4, AVI and 4:4:4 refused."""
    faults = {"fast": lambda packets: None, "slow": slow, "faulty": fault_now_and_then, "dead": refusing}
    for name, fault in faults.items():
        gpu = FakeGpu(fault)
        batches, split = read((NVDEC, WORKERS), gpu)
        require_equal(batches, expected)
        done = split.done()
        assert (done[NVDEC] > 0) == (gpu.stretches > 0) == (name != "dead"), name
    require_equal(read((NVDEC, WORKERS), FakeGpu(), start_step=2)[0], expected[4:])


def test_gpu_alone_decodes_what_it_can_and_workers_the_rest(read: Callable, expected: list[Batch]) -> None:
    gpu = FakeGpu()
    batches, split = read((NVDEC,), gpu)
    require_equal(batches, expected)
    assert split.done().keys() == {NVDEC} and gpu.stretches >= split.done()[NVDEC] > 0
    assert len(gpu.opened) <= 2 + 2 * len(set(gpu.opened)), "sessions are kept, and two of three kinds at a time"


@pytest.mark.parametrize("lanes", [(NVDEC,), (NVDEC, WORKERS)])
def test_decoder_that_hangs_is_given_up_and_the_run_goes_on(
    read: Callable, expected: list[Batch], lanes: tuple[str, ...], caplog: pytest.LogCaptureFixture
) -> None:
    released, before = threading.Event(), set(threading.enumerate())
    gpu = FakeGpu(lambda packets: released.wait(60.0) and None)
    batches, split = read(lanes, gpu, seconds=0.1)
    require_equal(batches, expected)
    assert split.done()[NVDEC] == 0 and 1 <= len(gpu.opened) <= 2 and gpu.closed == 0
    refusals = [record.message for record in caplog.records if "goes from NVDEC to a worker" in record.message]
    assert len(refusals) == 1 and "it has not answered within 0.1 s" in refusals[0]
    released.set()
    for thread in set(threading.enumerate()) - before:
        thread.join(60.0)
    assert gpu.closed == len(gpu.opened) and set(threading.enumerate()) <= before


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    return SimpleNamespace(now=0.0)


def dealt(split: Split, clock: SimpleNamespace, seconds: dict[str, float], clips: int) -> list[str]:
    """The lanes of clips that are done one after the other, each in the seconds of its lane."""
    lanes: list[str] = []

    def work(name: str) -> bool:
        lanes.append(name)
        clock.now += seconds[name]
        return True

    for _ in range(clips):
        assert split.run({name: lambda name=name: work(name) for name in seconds})
    return lanes


def test_a_clip_goes_to_the_lane_that_would_finish_it_first(clock: SimpleNamespace) -> None:
    split = Split({"gpu": 2, "cpu": 2}, lambda: clock.now)
    lanes = dealt(split, clock, {"gpu": 1.0, "cpu": 3.0}, 20)
    assert lanes == ["gpu"] * 3 + ["cpu"] * 3 + ["gpu"] * 14, "each is tried, then the fast one"
    assert split.rates() == {"gpu": pytest.approx(2.0), "cpu": pytest.approx(2 / 3)}


def test_both_lanes_work_where_one_has_no_place_left(clock: SimpleNamespace) -> None:
    """With 8 clips at a time, 2 places each, and a lane that is twice as slow: it takes its third of them."""
    split, release = Split({"gpu": 2, "cpu": 2}, lambda: clock.now), threading.Event()
    dealt(split, clock, {"gpu": 1.0, "cpu": 2.0}, 6)
    begun = {"gpu": 0, "cpu": 0}

    def work(name: str) -> bool:
        return release.wait(60)

    threads = []
    for _ in range(9):
        before = dict(split.given())
        threads.append(
            threading.Thread(target=split.run, args=({name: lambda name=name: work(name) for name in begun},))
        )
        threads[-1].start()
        while split.given() == before:
            pass
    assert split.given() == {"gpu": 6, "cpu": 3}
    release.set()
    for thread in threads:
        thread.join()
    assert split.given() == {"gpu": 0, "cpu": 0}


def test_a_slow_lane_is_tried_again_and_may_win(clock: SimpleNamespace) -> None:
    split = Split({"gpu": 1, "cpu": 1}, lambda: clock.now)
    dealt(split, clock, {"gpu": 9.0, "cpu": 1.0}, 6)
    lanes = dealt(split, clock, {"gpu": 0.01, "cpu": 1.0}, 4000)
    assert lanes[:90].count("gpu") == 0 < lanes[:110].count("gpu") and set(lanes[-50:]) == {"gpu"}


def test_a_lane_that_fails_always_is_left_alone_and_says_so_once(clock: SimpleNamespace, caplog) -> None:
    split, calls = Split({"gpu": 1}, lambda: clock.now), []

    def fail() -> None:
        calls.append(1)
        raise GpuRefusal("no memory")

    for _ in range(30):
        assert split.run({"gpu": fail}) is None
    assert len(calls) == 20
    assert [record.getMessage() for record in caplog.records] == [
        "a clip goes from gpu to a worker: no memory",
        "gpu decodes no more: it has failed 20 times in a row, the last time with: no memory",
    ]


def test_files_that_are_not_for_a_lane_are_no_faults_of_it(clock: SimpleNamespace) -> None:
    def refuse() -> None:
        raise GpuRefusal("MPEG-4", is_fault=False)

    split = Split({"gpu": 1}, lambda: clock.now)
    assert [split.run({"gpu": refuse}) for _ in range(50)] == [None] * 50
    assert dealt(split, clock, {"gpu": 1.0}, 1) == ["gpu"]


def test_what_the_work_raises_leaves_no_clip_in_its_lane(clock: SimpleNamespace) -> None:
    split = Split({"gpu": 1}, lambda: clock.now)
    with pytest.raises(ZeroDivisionError):
        split.run({"gpu": lambda: 1 / 0})
    assert split.given() == {"gpu": 0} and dealt(split, clock, {"gpu": 1.0}, 1) == ["gpu"]


def test_rates_of_both_lanes_are_logged(clock: SimpleNamespace, caplog: pytest.LogCaptureFixture) -> None:
    split = Split({"gpu": 4, "cpu": 2}, lambda: clock.now)
    with caplog.at_level(logging.INFO):
        dealt(split, clock, {"gpu": 0.1, "cpu": 0.5}, 100)
    assert "of 100 clips were decoded by gpu 97% at 40.0 clips/s, cpu 3% at 4.0 clips/s" in caplog.text


def test_first_clips_of_a_lane_do_not_count_against_it(clock: SimpleNamespace) -> None:
    """They open sessions and start processes: as many as it works on at a time take a hundred times as long."""
    split = Split({"gpu": 4, "cpu": 2}, lambda: clock.now)
    assert dealt(split, clock, {"gpu": 10.0, "cpu": 1.0}, 4) == ["gpu"] * 4
    lanes = dealt(split, clock, {"gpu": 0.1, "cpu": 1.0}, 60)
    assert lanes.count("cpu") == 3 and split.rates() == {"gpu": pytest.approx(40.0), "cpu": pytest.approx(2.0)}


def test_no_deadlock_with_many_threads_and_faults(clock: SimpleNamespace) -> None:
    split = Split({"gpu": 2, "cpu": 2}, lambda: clock.now)

    def clip(number: int) -> None:
        def gpu() -> bool:
            if number % 3 == 0:
                raise GpuRefusal("now and then", is_fault=False)
            return True

        for _ in range(100):
            split.run({"gpu": gpu, "cpu": lambda: True})

    in_threads(clip, range(8))
    assert split.given() == {"gpu": 0, "cpu": 0} and sum(split.done().values()) > 400
