"""The loader: the same batches on any number of ranks and after any resume, with good and bad samples."""

from __future__ import annotations

import json
import re
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import islice, pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from bevt_ds.batch import Batch
from bevt_ds.config.schema import Config
from bevt_ds.data import ledger as ledger_module
from bevt_ds.data.decoding import pool as pool_module
from bevt_ds.data.decoding.pool import DecodeWorker
from bevt_ds.data.ledger import DataLimitError, Ledger, Skips
from bevt_ds.data.limits import BadSample
from bevt_ds.data.loader import LEDGER, Loader, OneRank, eval_batches
from bevt_ds.data.plan import StreamId
from bevt_ds.data.reading.index import load_shard
from bevt_ds.data.reading.members import Member, split_name
from bevt_ds.data.reading.storage import Storage
from bevt_ds.errors import UserError
from bevt_ds.train.loop import report_bad
from tests.batches import assert_same
from tests.loader.media import repacked


def take(config: Config, batches: int, **arguments) -> list[Batch]:
    with Loader(config, **arguments) as loader:
        return list(islice(loader, batches))


@pytest.fixture(scope="module")
def batches(config: Config) -> list[Batch]:
    """The first six micro-batches (three steps) of one rank."""
    return take(config, 6)


def test_batch_shapes_and_dtypes(batches: list[Batch]) -> None:
    video, image = batches[0].video, batches[0].image
    assert video.pixels.shape == (2, 3, 8, 64, 64) and image.pixels.shape == (4, 3, 64, 64)
    masked = int(video.mask.any(dim=(2, 3)).sum()) * 2
    assert video.view.shape == (masked, 3, 32, 32) and image.view.shape == (4, 3, 32, 32)
    assert video.mask.shape == (2, 4, 4, 4) and image.mask.shape == (4, 4, 4)
    assert video.sample_keys.shape == (2,) and image.sample_keys.shape == (4,)
    for stream in (video, image):
        assert stream.pixels.dtype == stream.view.dtype == torch.float32
        assert stream.mask.dtype == torch.bool and stream.rows.dtype == torch.int64
        assert stream.view.min() >= 0 and stream.view.max() <= 1 and stream.targets is None


def test_masked_count_is_that_of_the_global_batch(batches: list[Batch]) -> None:
    for name, frames in (("video", 2), ("image", 1)):
        for step in range(3):
            streams = [getattr(b, name) for b in batches[2 * step : 2 * step + 2]]
            cells = sum(int(s.mask.sum()) for s in streams) * frames
            assert [s.count for s in streams] == [cells] * 2
            assert sum(int((s.rows >= 0).sum()) for s in streams) == cells


def test_sample_keys_are_unique(batches: list[Batch]) -> None:
    """It decides on a sample's drop-path."""
    keys = torch.cat([stream.sample_keys for b in batches for stream in (b.video, b.image)])
    assert len(keys.unique()) == len(keys) == 6 * (2 + 4)


def test_token_view_and_pixels_show_the_same_crop(batches: list[Batch]) -> None:
    """The 2:1 view is, up to its filter, what averaging pixel pairs gives."""
    mean, std = torch.tensor([123.675, 116.28, 103.53]), torch.tensor([58.395, 57.12, 57.375])
    image = batches[0].image
    levels = image.pixels * std[:, None, None] + mean[:, None, None]
    halves = torch.nn.functional.avg_pool2d(levels, 2)
    assert (halves - image.view * 255).abs().mean() < 4


@pytest.mark.parametrize("resumed_at", [1, 2])
def test_loader_started_at_a_later_step_gives_the_same_batches(config, batches, resumed_at: int) -> None:
    later = take(config, 6 - 2 * resumed_at, start_step=resumed_at)
    assert_same(later, batches[2 * resumed_at :])


def test_two_ranks_get_disjoint_halves_of_the_global_batch(config: Config, batches: list[Batch]) -> None:
    by_rank = [take(config, 3, ranks=OneRank(rank, 2)) for rank in range(2)]
    dealt = [by_rank[i % 2][i // 2] for i in range(6)]
    assert_same(dealt, batches)


def test_workers_threads_and_prefetch_change_no_batch(with_data: Callable, batches: list[Batch]) -> None:
    assert_same(take(with_data(workers=3, threads=2, prefetch=1), 6), batches)


@pytest.mark.parametrize("absent", ["video", "image"])
def test_loader_with_one_stream_only(config: Config, batches: list[Batch], absent: str) -> None:
    missing = {"video": "clips", "image": "images"}[absent]
    alone = replace(
        config,
        data=replace(config.data, **{f"{absent}s": "", f"eval_{absent}s": ""}),
        train=replace(config.train, **{f"global_{missing}": 0}),
    )
    present = "image" if absent == "video" else "video"
    for batch, both in zip(take(alone, 2), batches, strict=False):
        assert getattr(batch, absent) is None
        assert_same(getattr(batch, present), getattr(both, present))
    assert all(getattr(b, absent) is None for b in eval_batches(alone))


def test_held_out_batches_are_the_same_every_time_and_split_over_ranks(config: Config) -> None:
    first, again = list(eval_batches(config)), list(eval_batches(config))
    assert_same(first, again)
    assert len(first) == 2
    for name, frames in (("video", 2), ("image", 1)):
        streams = [getattr(b, name) for b in first]
        assert {s.count for s in streams} == {sum(int(s.mask.sum()) for s in streams) * frames}
    by_rank = [list(eval_batches(replace(config, train=replace(config.train, eval_batches=1)), r, 2)) for r in (0, 1)]
    assert_same([by_rank[0][0], by_rank[1][0]], first)


def test_no_held_out_shards_give_no_batches(with_data: Callable) -> None:
    assert list(eval_batches(with_data(eval_videos="", eval_images=""))) == []


def test_closing_the_loader_ends_threads_and_processes(config: Config, is_alive: Callable[[int], bool]) -> None:
    loader = Loader(config)
    next(loader)
    pids = loader.worker_pids
    loader.close()
    loader.close()
    assert pids and not any(is_alive(pid) for pid in pids)
    assert not loader._thread.is_alive()


def test_fingerprint_depends_on_data_not_on_paths(config, with_data, shards, tmp_path) -> None:
    for shard in shards.glob("*.tar"):
        shutil.copy(shard, tmp_path / shard.name)
    moved = with_data(videos=f"{tmp_path}/video-*.tar", images=f"{tmp_path}/image-*.tar")
    fewer = with_data(videos=f"{shards}/video-00000{{0..1}}.tar")
    other = shutil.copy(shards / "video-000000.tar", tmp_path / "other-000000.tar")
    member = load_shard(str(shards / "video-000000.tar")).member(0)
    with open(other, "r+b") as tar:
        tar.seek(member.offset + member.size // 2)
        tar.write(bytes(8))
    changed = with_data(videos=f"{other},{shards}/video-00000{{1..2}}.tar")
    prints = []
    for c in (config, moved, fewer, changed):
        with Loader(c) as loader:
            prints.append(loader.fingerprint)
    assert prints[0] == prints[1] and len(set(prints)) == 3


@pytest.fixture
def damaged(shards: Path, tmp_path: Path, with_data: Callable) -> Callable[..., Config]:
    """Shards in which some samples are broken before they are indexed, so that only decoding can tell."""

    def build(broken: dict[str, Callable[[bytes], bytes]], kind: str = "image") -> Config:
        def change(name: str, data: bytes) -> bytes:
            key, extension = split_name(name)
            return broken[key](data) if key in broken and extension != "json" else data

        return with_data(**{f"{kind}s": repacked(shards.glob(f"{kind}-*.tar"), tmp_path / f"{kind}-0.tar", change)})

    return build


BROKEN = {
    "header": lambda data: data[: len(data) // 2],  # found before decoding
    "decoder": lambda data: data.replace(b"\xff\xdb", b"\xff\xe9"),  # without its tables: libjpeg finds it
}


@pytest.mark.parametrize("how", BROKEN)
def test_bad_images_are_replaced_listed_and_the_same_after_resume(damaged, tmp_path: Path, how: str) -> None:
    config = damaged({f"image-{i:02d}": BROKEN[how] for i in (2, 9, 17)})
    with Loader(config, folder=tmp_path) as loader:
        whole = list(islice(loader, 6))
        found = loader.bad_samples
    events = [json.loads(line) for line in (tmp_path / LEDGER).read_text().splitlines()]
    assert 1 <= found <= len(events)
    assert {e["key"] for e in events} <= {"image-02", "image-09", "image-17"}
    assert all(e["reason"] and e["shard"].endswith(".tar") and e["stream"] == "image" for e in events)
    assert_same(take(config, 4, start_step=1), whole[2:])


def test_bad_videos_are_replaced(damaged, tmp_path: Path) -> None:
    config = damaged({f"clip-{i:02d}": lambda data: data[:300] for i in (1, 4)}, kind="video")
    with Loader(config, folder=tmp_path) as loader:
        whole = list(islice(loader, 6))
    events = [json.loads(line) for line in (tmp_path / LEDGER).read_text().splitlines()]
    assert {e["key"] for e in events} == {"clip-01", "clip-04"}
    for e, following in pairwise(events):  # a substitute that is bad too is the next to be replaced
        if e["substitute"] in ("clip-01", "clip-04") and following["slot"] == e["slot"]:
            assert (following["key"], following["attempt"]) == (e["substitute"], e["attempt"] + 1)
    final = [e for e in events if e["substitute"] not in ("clip-01", "clip-04")]
    assert final and all(e["substitute"].startswith("clip-") and e["substitute_shard"] for e in final)
    assert_same(take(config, 2, start_step=2), whole[4:])


@pytest.mark.parametrize("how", BROKEN)
def test_bad_samples_between_good_ones_are_not_in_a_row(damaged, monkeypatch, how: str) -> None:
    """However large the micro-batch: here it meets about as many bad images as good ones, never twelve in a row."""
    monkeypatch.setattr(ledger_module, "IN_A_ROW", 12)
    config = damaged({f"image-{i:02d}": BROKEN[how] for i in range(0, 24, 2)})
    train = replace(config.train, global_clips=0, global_images=64, micro_images=64)
    config = replace(config, data=replace(config.data, videos="", max_bad_fraction=0.9), train=train)
    with Loader(config) as loader:
        next(loader)
        assert loader.bad_samples > 24


def test_bad_held_out_samples_are_listed_and_limited(damaged, tmp_path: Path) -> None:
    config = damaged({f"image-{i:02d}": BROKEN["header"] for i in range(0, 24, 2)})
    config = replace(config, train=replace(config.train, eval_batches=6))

    def held_out(max_bad_fraction: float) -> list[Batch]:
        data = replace(config.data, eval_images=config.data.images, max_bad_fraction=max_bad_fraction)
        return list(eval_batches(replace(config, data=data), folder=tmp_path))

    assert len(held_out(0.9)) == 6
    events = [json.loads(line) for line in (tmp_path / LEDGER).read_text().splitlines()]
    assert {e["stream"] for e in events} == {"eval_image"} and len(events) > 10
    with pytest.raises(DataLimitError, match="over data.max_bad_fraction=0.001"):
        held_out(0.001)


def test_first_bad_sample_is_logged_as_a_warning(damaged, tmp_path: Path, caplog, capsys) -> None:
    """And at the end of a run their number; of all ranks, in each line of the log."""
    config = damaged({f"clip-{i:02d}": lambda data: data[:300] for i in (1, 4)}, kind="video")
    two_alike = SimpleNamespace(rank=0, world=1, sum_counts=lambda numbers: [2 * n for n in numbers])
    with Loader(config, two_alike, folder=tmp_path) as loader:
        assert all(next(loader) for _ in range(6))
        events = (tmp_path / LEDGER).read_text().splitlines()
        assert 2 <= loader.bad_samples <= 2 * len(events)
    said = [message for message in caplog.messages if "cannot be used" in message]
    assert len(said) == 1 and "'clip-0" in said[0] and "All such samples are listed in" in said[0]
    report_bad(tmp_path, steps=100)
    assert capsys.readouterr().out == f"\ncould not be used: {len(events)} of video; see {tmp_path / LEDGER}\n"


def test_bad_samples_are_counted_once_and_up_to_the_last_step(tmp_path: Path, capsys) -> None:
    """What a run has read ahead, or again after a crash that cut a line short, is in the list and not in the count."""
    ledger, member = Ledger(StreamId.VIDEO, tmp_path / LEDGER, Skips()), SimpleNamespace(key="a", path="s.tar")
    for step, slot in ((0, 1), (0, 2), (0, 1), (4, 0)):
        ledger.reject(SimpleNamespace(step=step, slot=slot, attempt=0), member, BadSample("cut"))
    with (tmp_path / LEDGER).open("a") as file:
        file.write('{"stream": "vid')
    ledger.reject(SimpleNamespace(step=3, slot=0, attempt=1), member, BadSample("cut"))
    report_bad(tmp_path, steps=4)
    assert capsys.readouterr().out == f"\ncould not be used: 3 of video; see {tmp_path / LEDGER}\n"
    report_bad(tmp_path / "clean", steps=4)
    assert capsys.readouterr().out == ""


def test_slow_worker_start_is_not_a_bad_sample(with_data: Callable, monkeypatch) -> None:
    """A sample's deadline begins when the worker runs; one that never does ends the run and is not blamed on data."""
    config = with_data(images="", decode_seconds=0.3)
    config = replace(config, train=replace(config.train, global_images=0))
    real = DecodeWorker._await_start
    monkeypatch.setattr(DecodeWorker, "_await_start", lambda self: (time.sleep(0.5), real(self)))
    with Loader(config) as loader:
        assert next(loader).video is not None and loader.bad_samples == 0
    monkeypatch.setattr(DecodeWorker, "_await_start", real)
    monkeypatch.setattr(pool_module, "START_SECONDS", 0.0)
    never = "decode workers cannot start: process [0-9]+ (got no further|computed for more than)"
    with Loader(config) as loader, pytest.raises(UserError, match=never):
        next(loader)


def test_video_shorter_than_a_clip_is_warned_of(with_data: Callable, caplog) -> None:
    with Loader(with_data(stride=9)) as loader:
        next(loader)
    assert len(caplog.messages) == 1
    assert re.search(r"video-00000\d.tar/clip-\d+ has \d+ frames, and a clip spans 64", caplog.messages[0])


def test_reads_of_videos_overlap(with_data: Callable, monkeypatch) -> None:
    """As many at a time as data.readers says, though one worker decodes."""
    together, read = threading.Barrier(4, timeout=20), Storage.read

    def waits_for_others(self: Storage, member: Member) -> bytes:
        together.wait()
        return read(self, member)

    config = with_data(images="", readers=4, workers=1, prefetch=4)
    config = replace(config, train=replace(config.train, global_images=0))
    monkeypatch.setattr(Storage, "read", waits_for_others)
    with Loader(config) as loader:
        assert all(next(loader).video is not None for _ in range(2))
        together.abort()
        monkeypatch.setattr(Storage, "read", read)


def test_closed_loader_raises(config: Config) -> None:
    with Loader(config) as loader:
        next(loader)
    with pytest.raises(RuntimeError, match="the loader is closed"):
        next(loader)


def test_too_many_bad_samples_end_the_run(damaged) -> None:
    config = damaged({f"image-{i:02d}": BROKEN["header"] for i in range(23)})
    with pytest.raises(DataLimitError, match="in a row. The last: 'image-.*cut|data.max_bad_fraction=0.001") as caught:
        take(config, 50)
    assert caught.value.exit_code == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"videos": "nothing-{0..3}.tar"}, "4 of 4 shards"),
        ({"images": "no-*.tar"}, "no file matches"),
        ({"decoder": "gpu"}, "needs a CUDA device"),
    ],
)
def test_data_mistakes_are_named_before_the_first_batch(with_data: Callable, changes: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Loader(with_data(**changes))


@pytest.mark.parametrize(
    "cap", [{"max_pixels": 6911}, {"max_frames": 19}, {"max_file_bytes": 500}, {"max_clip_bytes": 165_887}]
)
def test_data_limits_of_the_configuration_hold_d17(config: Config, cap: dict) -> None:
    """D17: for videos of 20 frames of 96x72; each cap is one below what a clip of 8 frames needs, or far below."""
    ((name, value),) = cap.items()
    few = replace(config, data=replace(config.data, **cap), train=replace(config.train, global_images=0))
    with pytest.raises(DataLimitError, match=f"over data.{name}={value}"):
        take(few, 1)


def test_batch_that_does_not_divide_over_ranks_is_refused(config: Config) -> None:
    with pytest.raises(UserError, match="micro_clips"):
        Loader(config, OneRank(0, 3))


def test_epoch_shows_every_sample_once(config: Config, shards: Path) -> None:
    """24 images in steps of 8: three steps see 24 different images, though crops differ."""
    upright = replace(config.data, short_side=(64, 64), flip=0.0, image_jitter=(0.0, 0.0, 0.0))
    batches = take(replace(config, data=upright), 6)
    images = np.concatenate([b.image.view.mean(dim=(2, 3)).numpy() for b in batches])
    assert len(np.unique(images.round(4), axis=0)) == 24
