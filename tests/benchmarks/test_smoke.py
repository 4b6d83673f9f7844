"""The smoke benchmark against the parent commit: finds a slowdown, ignores noise, says what cannot be compared."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import smoke

ROOT = Path(__file__).parents[2]
PROGRAM = """
import os, sys, time
from benchmarks.smoke_worker import serve

def spin(seconds):
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass

def loud():
    print("a library's chatter", flush=True)
    return lambda: spin(0.01)

def broken():
    raise ImportError("no module named yesterday")

work = float(sys.argv[1])
cases = {"work": lambda: lambda: spin(work), "loud": loud}
serve({**cases, "broken": broken} if sys.argv[2:] else cases, None)
"""


def side(name: str, seconds: float, *more: str) -> smoke.Side:
    return smoke.Side(name, ["-c", PROGRAM, str(seconds), *more], [ROOT])


def judged(before: smoke.Side, after: smoke.Side) -> int:
    try:
        before.greet()
        after.greet()
        return smoke.judge(before, after, seconds=0.5, threshold=smoke.THRESHOLD)
    finally:
        before.close()
        after.close()


@pytest.mark.parametrize("seconds, code", [(0.02, 0), (0.01, 0), (0.04, 1)])
def test_only_a_slowdown_fails_the_smoke_benchmark(seconds, code, capsys):
    assert judged(side("parent", 0.02), side("tree", seconds)) == code
    assert "| work | cpu_s |" in capsys.readouterr().out


def test_benchmarks_missing_in_the_parent_are_not_compared(capsys):
    program = PROGRAM.replace("raise", "return lambda: 0 #")
    tree = smoke.Side("tree", ["-c", program, "0.01", "broken"], [ROOT])
    assert judged(side("parent", 0.01, "broken"), tree) == 0
    assert "broken: not compared, for parent cannot run it: ImportError" in capsys.readouterr().out


def test_benchmark_that_fails_in_this_tree_fails(capsys):
    assert judged(side("parent", 0.01), side("tree", 0.01, "broken")) == 1
    assert "broken: fails on this side" in capsys.readouterr().out


def test_crashed_side_of_the_comparison_is_an_error():
    dead = smoke.Side("parent", ["-c", "import sys; print('why', file=sys.stderr); sys.exit(3)"], [ROOT])
    with pytest.raises(RuntimeError, match="parent: the process ended with code 3\nwhy"):
        dead.greet()
    dead.close()


@pytest.fixture
def history(tmp_path: Path) -> Path:
    """A repository of two commits, whose file `version` says which."""
    run = lambda *words: subprocess.run(["git", *words], cwd=tmp_path / "repo", check=True, capture_output=True)  # noqa: E731
    (tmp_path / "repo").mkdir()
    run("init", "-q")
    for version in ("one", "two"):
        (tmp_path / "repo" / "version").write_text(version)
        run("add", "version")
        run("-c", "user.name=n", "-c", "user.email=e", "commit", "-q", "-m", version)
    return tmp_path / "repo"


def test_parent_commit_is_extracted(history, tmp_path):
    smoke.extract(history, smoke.find_commit(history, "HEAD^"), tmp_path / "parent")
    assert (tmp_path / "parent" / "version").read_text() == "one"


def test_commit_without_a_parent_is_an_error(history, tmp_path):
    assert smoke.find_commit(history, "HEAD^^") is None, "the first commit has none"
    clone = ["git", "clone", "-q", "--depth=1", f"file://{history}", str(tmp_path / "shallow")]
    subprocess.run(clone, check=True, capture_output=True)
    assert smoke.find_commit(tmp_path / "shallow", "HEAD") is not None
    assert smoke.find_commit(tmp_path / "shallow", "HEAD^") is None
    assert smoke.find_commit(tmp_path, "HEAD") is None, "no repository"


def test_smoke_benchmark_passes_without_a_parent(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["smoke", "--base", "no-such-commit"])
    assert smoke.main() == 0
    assert "nothing to compare" in capsys.readouterr().out


def test_extracted_package_is_complete_and_imports_itself(tmp_path):
    """The sub-packages that lie elsewhere in the tree are found in the built copy, not in the one that is installed."""
    smoke.extract(ROOT, smoke.find_commit(ROOT, "HEAD"), tmp_path / "tree")
    site = smoke.build(tmp_path / "tree", tmp_path / "site")
    code = "import bevt_ds.kernels.geometry as g, bevt_ds.config.recipes as r; print(g.__file__, r.__file__)"
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], env={"PYTHONPATH": str(site)}, capture_output=True, text=True, check=True
    )
    assert all(Path(name).is_relative_to(site) for name in done.stdout.split())
