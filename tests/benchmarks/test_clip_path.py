"""The counter of what a clip crosses: it sees the trainer's threads and the decode worker, in steady state alone."""

import re

import pytest

from benchmarks import clip_path
from benchmarks.clip_path import WORKER, Call, counts, report


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return clip_path.clip_path(clip_path.drawn_shards(tmp_path_factory.mktemp("clips")))


def test_steady_state_calls_are_counted_in_all_threads_and_the_worker(found):
    assert {call.function for call in found if call.thread == WORKER} > {"serve", "clips"}
    assert Call("bevt_ds/data/loader.py", "BackgroundLoader.__next__", "MainThread") in found
    assert any(call.file == "bevt_ds/data/masks.py" for call in found)


def test_clip_path_has_at_most_120_functions_in_20_files(found):
    """To read what happens to a clip takes 20 files at most; what is not entered by one is out of its way."""
    numbers = counts(found)
    assert numbers["functions"] <= 120 and numbers["files"] <= 20 and numbers["threads"] <= 3, report(found)


def test_calls_of_start_up_are_not_counted(found):
    started_once = {"DecodePool.__init__", "DecodeWorker.__init__", "open_resources", "main", "get_recipe"}
    assert not {call.function for call in found} & started_once


def test_report_ends_with_the_counts(found):
    last = report(found).splitlines()[-1]
    numbers = counts(found)
    assert [int(n) for n in re.findall(r"\d+", last)] == [numbers[k] for k in ("functions", "files", "threads")]


def test_function_in_two_threads_is_counted_once():
    calls = {Call("a.py", "f", "loader"), Call("a.py", "f", "read"), Call("b.py", "f", WORKER)}
    assert counts(calls) == {"functions": 2, "files": 2, "threads": 2}
