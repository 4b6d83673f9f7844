"""Limits of bad samples on all ranks, skips that survive a resume, reports of waiting and bottlenecks."""

from __future__ import annotations

import json
import os
import re
import signal
import threading
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from itertools import count, islice
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bevt_ds.config.schema import Config
from bevt_ds.data.decoding.pool import DecodePool, DecodeWorker
from bevt_ds.data.graph_stream import GraphReader
from bevt_ds.data.ledger import (
    ALWAYS_ALLOWED,
    IN_A_ROW,
    DataLimitError,
    Ledger,
    Skips,
    StageTimes,
    bottleneck,
    merge_states,
    require_few_bad,
)
from bevt_ds.data.limits import BadSample
from bevt_ds.data.loader import ALONE, BackgroundLoader, Loader
from bevt_ds.data.plan import PlanEntry, StreamId
from bevt_ds.data.reading.deadline import StorageStalled
from bevt_ds.data.reading.members import Member
from bevt_ds.data.stream import PendingBatch
from bevt_ds.runtime.logging import SpeedMeter
from bevt_ds.train.loop import report_wait, write_line
from tests.loader.media import in_threads
from tests.waiting import until

MEMBER = Member("/data/s.tar", "k\x1b[31m", "mp4", 512, 10, 0)


class Ranks:
    """`world` threads that sum numbers, as processes do."""

    def __init__(self, world: int) -> None:
        self.world, self.calls = world, 0
        self._barrier, self._shares = threading.Barrier(world, timeout=60), [[] for _ in range(world)]

    def of(self, rank: int) -> SimpleNamespace:
        def total(numbers: list[int]) -> list[int]:
            self._shares[rank] = numbers
            self._barrier.wait()
            result = [sum(column) for column in zip(*self._shares, strict=True)]
            self._barrier.wait()
            return result

        return SimpleNamespace(rank=rank, world=self.world, sum_counts=total)


def run_ranks(config: Config, world: int, steps: int = 40) -> list[tuple[int, BaseException | None]]:
    """Per rank: the micro-batches it got, and what ended it."""
    ranks = Ranks(world)

    def work(rank: int) -> tuple[int, BaseException | None]:
        got = 0
        try:
            with Loader(config, ranks.of(rank)) as loader:
                for _ in islice(loader, steps):
                    got += 1
        except Exception as error:
            return got, error
        return got, None

    return in_threads(work, range(world))


@pytest.fixture
def images_only(config: Config) -> Config:
    return replace(config, train=replace(config.train, global_clips=0, micro_clips=0, micro_images=2))


def spoil(monkeypatch: pytest.MonkeyPatch, is_bad: Callable[[PlanEntry], bool], error: Exception) -> None:
    """Make some places of the plan unusable."""
    real = GraphReader._sample

    def sample(self: GraphReader, pending: PendingBatch, i: int, group: list[PlanEntry]) -> list:
        if is_bad(group[0]):
            raise error
        return real(self, pending, i, group)

    monkeypatch.setattr(GraphReader, "_sample", sample)


def test_ranks_stop_at_the_same_step_over_the_bad_sample_limit_d21(images_only: Config, monkeypatch) -> None:
    """D21, D22: only slots of rank 1 are bad; 2 slots a micro-batch and rank, so it is over after a few steps."""
    spoil(monkeypatch, lambda e: e.attempt == 0 and e.slot % 4 >= 2, BadSample("spoilt"))
    (got, error), (also_got, also_error) = run_ranks(images_only, 2)
    assert got == also_got > 0
    for e in (error, also_error):
        assert isinstance(e, DataLimitError) and e.exit_code == 3 and "data.max_bad_fraction" in str(e)
    assert got == ALWAYS_ALLOWED // 2  # the 11th bad sample is in the 6th micro-batch


def test_rank_without_a_good_substitute_stops_all_ranks(images_only: Config, monkeypatch) -> None:
    """All substitutes of one slot are bad too: there is no batch to hand out."""
    spoil(monkeypatch, lambda e: e.step == 1 and e.slot == 2, BadSample("spoilt"))
    (got, error), (also_got, also_error) = run_ranks(images_only, 2)
    assert got == also_got == 2
    assert isinstance(error, DataLimitError) and isinstance(also_error, DataLimitError)
    assert f"{IN_A_ROW} bad image samples in a row" in str(also_error) and "another rank" in str(error)


def test_exception_on_one_rank_stops_all_ranks(images_only: Config, monkeypatch) -> None:
    spoil(monkeypatch, lambda e: e.step == 1 and e.slot == 2, ZeroDivisionError("a bug"))
    (got, error), (also_got, also_error) = run_ranks(images_only, 2)
    assert got == also_got == 2
    assert isinstance(also_error, ZeroDivisionError)
    assert isinstance(error, RuntimeError) and "failed on another rank" in str(error)


def test_storage_stall_on_one_rank_stops_all_ranks(images_only: Config, monkeypatch) -> None:
    """With the same exit code, whichever of them the launcher hears of first."""
    spoil(monkeypatch, lambda e: e.step == 1 and e.slot == 2, StorageStalled("s.tar: no answer"))
    (got, error), (also_got, also_error) = run_ranks(images_only, 2)
    assert got == also_got == 2
    assert isinstance(error, StorageStalled) and "another rank" in str(error) and error.exit_code == 5
    assert str(also_error) == "s.tar: no answer"


def test_bad_samples_under_the_limit_stop_no_rank(images_only: Config, monkeypatch) -> None:
    spoil(monkeypatch, lambda e: e.attempt == 0 and e.slot == 3 and e.step < 4, BadSample("spoilt"))
    assert run_ranks(images_only, 2, steps=12) == [(12, None)] * 2


@pytest.mark.parametrize(
    ("good", "bad", "fraction", "stops"),
    [(0, 10, 0.001, False), (0, 11, 0.001, True), (19_980, 20, 0.001, False), (19_979, 21, 0.001, True)],
)
def test_bad_sample_limits(good: int, bad: int, fraction: float, stops: bool) -> None:
    if stops:
        with pytest.raises(DataLimitError, match="over data.max_bad_fraction=0.001"):
            require_few_bad("clip", good, bad, fraction, Path("x.jsonl"))
    else:
        require_few_bad("clip", good, bad, fraction, None)


@pytest.mark.parametrize(("clips_per_video", "videos"), [(1, 2), (2, 1)])
def test_ranks_share_counts_of_good_and_bad_samples(with_data, clips_per_video: int, videos: int) -> None:
    """No limit, stall, loss or failure; good and bad videos, then images, up to the micro-batch that is handed out."""
    told = []
    ranks = SimpleNamespace(rank=0, world=1, sum_counts=lambda n: told.append(n) or n)
    with Loader(with_data(clips_per_video=clips_per_video), ranks) as loader:
        list(islice(loader, 3))
    assert told == [[0, 0, 0, 0, videos * i, 0, 4 * i, 0] for i in (1, 2, 3)]


def entry(step: int, slot: int = 0, attempt: int = 0) -> PlanEntry:
    return PlanEntry(step, slot, attempt, 0, 0, 0.0, 0.0, 64, (0.5, 0.5), False, (1.0, 1.0, 1.0))


def test_bad_samples_in_a_row_are_counted_for_each_stream(tmp_path: Path) -> None:
    """Good images do not hide that no video is readable."""
    videos, images = (Ledger(s, None, Skips()) for s in (StreamId.VIDEO, StreamId.IMAGE))
    with pytest.raises(DataLimitError, match="100 bad video samples in a row"):
        for i in range(IN_A_ROW):
            images.accept(1)
            videos.reject(entry(i), MEMBER, BadSample("broken"))


def test_control_characters_in_keys_are_escaped_s5(tmp_path: Path) -> None:
    """S5: a key is data; the ledger and the messages show its escape characters as such."""
    ledger = Ledger(StreamId.VIDEO, tmp_path / "bad.jsonl", Skips())
    with pytest.raises(DataLimitError) as caught:
        for i in range(IN_A_ROW):
            ledger.reject(entry(i), MEMBER, BadSample("broken"))
    text = (tmp_path / "bad.jsonl").read_text()
    assert "\x1b" not in text + str(caught.value)
    assert json.loads(text.splitlines()[0])["key"] == MEMBER.key


def test_secrets_of_a_url_are_not_in_the_ledger(tmp_path: Path) -> None:
    ledger = Ledger(StreamId.VIDEO, tmp_path / "bad.jsonl", Skips())
    secret = replace(MEMBER, path="https://me:word@host/a.tar?token=x")
    with pytest.raises(DataLimitError) as caught:
        for i in range(IN_A_ROW):
            ledger.reject(entry(i), secret, BadSample("broken"))
    text = (tmp_path / "bad.jsonl").read_text() + str(caught.value)
    assert "https://host/a.tar" in text and "word" not in text and "token" not in text


def test_resume_state_holds_transient_skips_of_later_steps_only() -> None:
    skips = Skips()
    ledger = Ledger(StreamId.VIDEO, None, skips)
    ledger.reject(entry(3), MEMBER, BadSample("timed out", transient=True))
    ledger.reject(entry(5, 1), MEMBER, BadSample("timed out", transient=True))
    ledger.reject(entry(6), MEMBER, BadSample("broken"))
    state = json.loads(json.dumps(skips.state(4)))
    assert state == {"skips": [[0, 5, 1, 0, "timed out"]]}
    assert Skips(state).reason(StreamId.VIDEO, entry(5, 1)) == "timed out"
    assert Skips(state).reason(StreamId.VIDEO, entry(5, 1, 1)) is None
    merged = merge_states([state, skips.state(0), {"decoder": {"VIDEO": "gpu"}}])
    assert merged == {**skips.state(0), "decoder": {"VIDEO": "gpu"}}


def test_resumed_run_skips_samples_that_timed_out_before(config: Config) -> None:
    """A clip that timed out the first time decodes the second; the batches must not differ for that."""
    state = {"skips": [[int(StreamId.VIDEO), 2, 1, 0, "not decoded within 20 s"]]}
    with Loader(config, state=state) as loader:
        whole = list(islice(loader, 6))
        assert loader.bad_samples == 1
    with Loader(config) as loader:
        unskipped = list(islice(loader, 6))
    with Loader(config, start_step=2, state=state) as loader:
        resumed = list(islice(loader, 2))
        assert loader.state()["skips"] == []  # those are of a step that is done
    assert torch.equal(resumed[0].video.pixels, whole[4].video.pixels)
    assert not torch.equal(unskipped[4].video.pixels, whole[4].video.pixels)


def test_decode_timeout_is_saved_in_the_loader_state(config: Config, monkeypatch) -> None:
    real, calls = DecodePool._answered, []

    def slow_once(self, data, request):
        calls.append(request)
        if len(calls) == 1:
            raise BadSample("not decoded within 20 s", transient=True)
        return real(self, data, request)

    monkeypatch.setattr(DecodePool, "_answered", slow_once)
    with Loader(config) as loader:
        next(loader)
        state = loader.state()
    assert [row[-1] for row in Skips(state).state(0)["skips"]] in ([], ["not decoded within 20 s"])
    assert loader._reader.skips.state(0)["skips"][0][-1] == "not decoded within 20 s"


@pytest.mark.parametrize("batches", [3, pytest.param(100, marks=pytest.mark.slow)])
def test_killed_workers_change_no_batch_d20(config: Config, monkeypatch, batches: int) -> None:
    """D20: the worker is killed before every clip (200 times in the long version); order and content stay."""
    few = replace(config, train=replace(config.train, global_images=0, micro_images=0))
    with Loader(few) as loader:
        expected = [batch.video.view for batch in islice(loader, batches)]
    real, seen = DecodeWorker.ask, set()

    def killed_once(self: DecodeWorker, request: dict, data: bytes, seconds: float):
        if (place := (str(request["positions"]), len(data))) not in seen:
            seen.add(place)
            os.kill(self.pid, signal.SIGKILL)
        return real(self, request, data, seconds)

    monkeypatch.setattr(DecodeWorker, "ask", killed_once)
    with Loader(few) as loader:
        for view in expected:
            assert torch.equal(next(loader).video.view, view)
        assert loader.bad_samples == 0
    assert len(seen) >= 2 * batches


def test_bottleneck_is_the_busiest_stage() -> None:
    times = StageTimes()
    times.add("decode", 8.0)
    times.add("augment", 3.0)
    lanes = {"storage": 4, "demux": 4, "decode": 4, "augment": 1, "copy": 1}
    line = bottleneck(times.take(), lanes)
    assert line.startswith("the data's bottleneck is augment") and "decode 2.00 s" in line and "data.threads" in line
    assert sum(times.take().values()) == 0


def test_loader_reports_its_bottleneck(with_data: Callable[..., Config]) -> None:
    """A stage's seconds are shared by those who do its work."""
    with Loader(with_data(workers=3, readers=2)) as loader:
        list(islice(loader, 3))
        busy = {stage: float(s) for stage, s in re.findall(r"(\w+) ([\d.]+) s", loader.bottleneck())}
        assert busy.keys() == {"storage", "demux", "decode", "augment", "copy"} and busy["decode"] > 0
        assert loader.decoded_frames >= 3 * 2 * 8
        for stage in busy:
            loader._reader.times.add(stage, 6000.0)
        assert re.search(
            r"bottleneck is (augment|copy) .*storage 300\d.* s, demux 200\d.* s, decode 200\d.* s", loader.bottleneck()
        )


def test_share_of_time_spent_waiting_for_data(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the time since the last reading."""
    clock = iter((100.0, 110.0, 114.0))
    monkeypatch.setattr("bevt_ds.runtime.logging.time.perf_counter", clock.__next__)
    speed = SpeedMeter(config.train, 1.0, 1, torch.device("cpu"))
    speed.steps = 5
    first = speed.read(2.0)
    assert (first["data_wait"], first["clips_per_s"], first["images_per_s"]) == (0.2, 2.0, 4.0)
    assert speed.read(1.0)["data_wait"] == 0.25


LANES = {"storage": 4, "demux": 2, "decode": 2, "augment": 1, "copy": 1}


def test_long_wait_is_reported_with_its_cause(capsys: pytest.CaptureFixture) -> None:
    """Over 5 % of the time; the cause is what was busy since the last look, whether or not that was reported."""
    times = StageTimes()
    loader = SimpleNamespace(bottleneck=lambda: bottleneck(times.take(), LANES))
    times.add("decode", 1000.0)
    report_wait(7, 0.05, loader)
    assert capsys.readouterr().out == ""
    times.add("storage", 8.0)
    report_wait(8, 0.051, loader)
    line = capsys.readouterr().out
    assert line.startswith(
        "step 8: 5% of the time went into waiting; the data's bottleneck is storage (busy: storage 2.00"
    )


@pytest.mark.parametrize("is_main", [True, False])
def test_wait_report_comes_from_the_main_rank_only(is_main: bool, capsys: pytest.CaptureFixture) -> None:
    """On the main rank alone, from what the loop has waited since its last line."""
    none = lambda *_: None  # noqa: E731
    task = SimpleNamespace(
        ranks=SimpleNamespace(is_main=is_main, world=1, device=torch.device("cpu")),
        setup=SimpleNamespace(commits=SimpleNamespace(figures=dict)),
        loader=SimpleNamespace(wait_seconds=lambda: 3.0, bottleneck=lambda: "it is decode", bad_samples=0),
        engine=SimpleNamespace(last_lr=0.1, grad_norm=none, optimizer_bytes=none, skipped_steps=0),
        metrics=lambda totals, step: {"loss": totals["loss"]},
        measurements=lambda step: {},
        shown={"loss": ".3f"},
    )
    speed = SimpleNamespace(read=lambda waited: {"data_wait": waited / 10}, paused=nullcontext)
    sums = SimpleNamespace(totals=lambda ranks: {"loss": 2.0})
    assert write_line(task, SimpleNamespace(write=none), speed, sums, 4) == "loss 2.000"
    assert capsys.readouterr().out == ("step 4: 30% of the time went into waiting; it is decode\n" if is_main else "")


class NoReader:
    """Serves as a BatchReader whose batches are nothing but their place; counts them."""

    ledgers, is_on_gpu, fingerprint = {}, False, ""

    def __init__(self) -> None:
        self.begun = self.finished = 0

    def begin(self, step: int, micro_step: int) -> tuple[int, int]:
        self.begun += 1
        return step, micro_step

    def finish(self, ticket: tuple[int, int]) -> tuple[int, int]:
        self.finished += 1
        return ticket

    def close(self) -> None:
        pass


def test_wait_seconds_add_up(with_data: Callable[..., Config], monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that goes on by a second at each look."""
    with BackgroundLoader(NoReader(), 1, with_data().data, ALONE) as loader:
        monkeypatch.setattr("bevt_ds.data.loader.time.perf_counter", count().__next__)
        assert list(islice(loader, 4)) == [(step, 0) for step in range(4)]
        assert loader.wait_seconds() == 4 and loader.wait_seconds() == 0


def test_loader_prefetches_batches_up_to_its_limit(with_data: Callable[..., Config]) -> None:
    """`prefetch` ready, one that waits for its place, and `prefetch` more being decoded; then it stops."""
    reader = NoReader()
    with BackgroundLoader(reader, 2, with_data(prefetch=3).data, ALONE, 5) as loader:
        until(lambda: (reader.finished, reader.begun) >= (4, 7))
        time.sleep(0.1)  # for one that would go on
        assert (reader.finished, reader.begun) == (4, 7)
        assert list(islice(loader, 3)) == [(5, 0), (5, 1), (6, 0)]
