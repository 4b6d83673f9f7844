"""The benchmark of decoders: what it measures on a CPU, and what it says of ways that cannot run here."""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import decode, loader_media
from benchmarks.common import read_rows
from benchmarks.decode_ways import IMAGE_WAYS, VIDEO_WAYS, Setting, Way, samples


@pytest.fixture
def rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict]:
    """Of one small run on a CPU, in this process: a codec that DALI's CPU decoder knows, and images."""
    monkeypatch.setattr(loader_media, "FRAMES", 20)
    monkeypatch.setattr(loader_media, "SIZES", {"64x48": (48, 64)})
    monkeypatch.setattr(decode, "IMAGE", (48, 64))
    monkeypatch.setattr(decode, "ProcessPoolExecutor", SameProcess)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    words = ["--media", "vp9", "jpeg", "--batch", "2", "--lanes", "1", "--stride", "1", "--files", "3"]
    decode.main([*words, "--size", "64x48", "--seconds", "0", "--out", str(tmp_path)])
    (path,) = tmp_path.glob("decode-*.jsonl")
    assert path.with_suffix(".md").exists() and path.with_suffix(".png").exists()
    return list(read_rows(path))


class SameProcess:
    """In the place of a pool of processes."""

    def __init__(self, *_: object) -> None: ...

    def __enter__(self) -> SameProcess:
        return self

    def __exit__(self, *_: object) -> None: ...

    map = staticmethod(map)


def test_decode_benchmark_measures_cpu_ways_and_gives_reasons_for_the_others(rows: list[dict]) -> None:
    by_way = {}
    for row in rows:
        by_way.setdefault(row["way"], []).append(row)
    assert by_way.keys() == {*VIDEO_WAYS, *IMAGE_WAYS}
    for name, way in {**VIDEO_WAYS, **IMAGE_WAYS}.items():
        if way.device == "cuda":
            reason = "it does not know vp9" if way.codecs else "no CUDA device"
            assert [row["not_measured"] for row in by_way[name]] == [reason]
    (part, *_), (whole, *_) = by_way["DALI decoders.image_slice, CPU"], by_way["DALI decoders.image, CPU"]
    assert part["samples_per_s"] > 0 and part.keys() == whole.keys()
    measured = by_way["our workers"] + by_way["DALI decoders.video, CPU"] + by_way["DALI decoders.image, CPU"]
    plain, again = (True, True, True, True), (False, True, True, True)
    assert [(row["fresh"], row["index"], row["listed"], row["whole"]) for row in measured] == [
        *(plain, again, (True, True, True, False)),
        *(plain, again, (True, False, True, True), (True, True, False, True)),
        *(plain, again),
    ]
    assert all(row["samples_per_s"] > 0 and row["first_ms"] > 0 and row["provenance"]["commit"] for row in measured)
    for row in measured:
        frames = 1 if row["media"] == "jpeg" else 16
        assert row["wanted_frames_per_s"] == pytest.approx(frames * row["samples_per_s"], rel=0.01)


def test_repeated_streams_are_the_same_clips_and_fresh_ones_are_not() -> None:
    setting, files = Setting(batch=2), [b"a", b"b", b"c"]
    again, fresh = (samples(files, [300, 310, 320], setting, is_fresh) for is_fresh in (False, True))
    first, second = next(again), next(again)
    assert first is second and [s.data for s in first] == [b"a", b"b"] and (np.diff(first[0].numbers) == 8).all()
    assert [[s.data for s in next(fresh)] for _ in range(3)] == [[b"a", b"b"], [b"c", b"a"], [b"b", b"c"]]


def test_ways_take_turns_and_the_round_with_the_least_cpu_time_counts() -> None:
    cases = [decode.Case(way, Setting(batch=batch), fresh=True) for way in "ab" for batch in (1, 2)]
    costs = {"a": iter((3.0, 4.0, 2.0, 5.0)), "b": iter((None,))}
    turns: list[str] = []

    def facts_of(case: decode.Case) -> dict:
        turns.append(case.way)
        cost = next(costs[case.way])
        return {"not_measured": "broken"} if cost is None else {"cpu_s_per_sample": cost}

    assert [*decode.least(cases, 2, facts_of).values()] == [
        {"cpu_s_per_sample": 2.0}, {"cpu_s_per_sample": 4.0}, {"not_measured": "broken"}
    ]  # fmt: skip
    assert turns == ["a", "a", "b", "a", "a"]


def test_what_a_library_raises_becomes_the_reason_of_its_row() -> None:
    @contextmanager
    def broken(setting: Setting):
        raise OSError("no driver\nmore lines")
        yield

    case = decode.Case("broken", Setting(), fresh=True)
    row = decode.measure({"broken": Way(broken)}, case, [b""], [0], 0.0)
    assert row == {"not_measured": "OSError: no driver"}
    assert Way(broken, needs=("no_such_module",)).reason("h264") == "no_such_module: No module named 'no_such_module'"
    assert Way(broken, codecs=frozenset({"vp9"})).reason("h264") == "it does not know h264"
