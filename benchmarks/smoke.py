"""This commit against its parent: what small pieces of the step cost on a CPU, as ratios (make bench-smoke).

    python -m benchmarks.smoke                   # the working tree against the parent of its commit
    python -m benchmarks.smoke --base v0.1.0     # against another commit

Both sides run the cases of benchmarks/smoke_cases.py, each in a process of its own, in turns, some tenths of a second
at a time, so that other load on the machine affects both alike. benchmarks/compare.py judges by CPU seconds, to which
waiting for a busy core adds nothing. What looks slower is measured for the same time again before it counts. Exit code
1 where a case is slower than the threshold allows; 0 where there is no parent to compare with (a shallow clone).
"""

from __future__ import annotations

import argparse
import io
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from benchmarks.compare import compare, verdict

ROOT = Path(__file__).parents[1]
THRESHOLD = 1.2  # a commit against itself stays well below, on busy machines too
FEWEST_ROUNDS = 3
WORKER = ("-m", "benchmarks.smoke_cases")


class Side:
    """A process that runs cases with one copy of the package."""

    def __init__(self, name: str, program: Sequence[str], paths: Sequence[Path]) -> None:
        self.name, self.rows = name, []
        self._stderr = tempfile.TemporaryFile("w+")  # noqa: SIM115 - lives as long as the process
        self._process = subprocess.Popen(
            [sys.executable, "-P", *program],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths)), "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            text=True,
        )
        self.package: str | None = None
        self.cases: list[str] = []
        self.errors: dict[str, str] = {}

    def greet(self) -> None:
        """Wait until the process is ready."""
        hello = self._read()
        self.package, self.cases, self.errors = hello["package"], hello["cases"], hello["errors"]

    def run(self, case: str, number: int) -> None:
        """Measure a case once; an error is noted."""
        print(case, file=self._process.stdin, flush=True)
        answer = self._read()
        if "error" in answer:
            self.errors[case] = answer["error"]
        else:
            self.rows.append({"case": case, "round": number, **answer})

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.communicate()
        self._stderr.close()

    def _read(self) -> dict:
        line = self._process.stdout.readline()
        if not line:
            code = self._process.wait()
            self._stderr.seek(0)
            raise RuntimeError(f"{self.name}: the process ended with code {code}\n{self._stderr.read()[-2000:]}")
        return json.loads(line)


def measure(sides: tuple[Side, Side], cases: Sequence[str], seconds: float) -> None:
    """Rounds over the cases until the time is up, the sides in turns; who begins alternates."""
    began, number = time.perf_counter(), 0
    while number < FEWEST_ROUNDS or time.perf_counter() - began < seconds:
        for case in cases:
            for side in sides if number % 2 else sides[::-1]:
                if not any(case in s.errors for s in sides):
                    side.run(case, number)
        number += 1


def judge(before: Side, after: Side, seconds: float, threshold: float) -> int:
    """Measure, doubt, measure again what is in doubt, and print; returns the exit code."""
    measure((before, after), after.cases, seconds)
    doubtful = [c.row for c in compare(before.rows, after.rows) if c.certain > threshold]
    if doubtful:
        measure((before, after), doubtful, seconds)
    for case, error in after.errors.items():
        print(f"{case}: fails on this side: {error}")
    for case, error in before.errors.items():
        print(f"{case}: not compared, for {before.name} cannot run it: {error}")
    return verdict(compare(before.rows, after.rows), threshold) or int(bool(after.errors))


def find_commit(root: Path, name: str) -> str | None:
    """The full hash of a commit; None where the repository does not hold it, or there is no repository."""
    command = ["git", "rev-parse", "--verify", "--quiet", f"{name}^{{commit}}"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else None


def extract(root: Path, commit: str, folder: Path) -> None:
    """Write the files of a commit into a new folder."""
    archive = subprocess.run(["git", "archive", commit], cwd=root, capture_output=True, check=True).stdout
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        tar.extractall(folder, filter="data")


def build(tree: Path, folder: Path) -> Path:
    """Lay the package out in `folder` as that tree's own setup.py says: kernels/ becomes bevt_ds/kernels, and so on."""
    command = [sys.executable, "setup.py", "--quiet", "build_py", "--build-lib", str(folder)]
    subprocess.run(command, cwd=tree, check=True, capture_output=True)
    return folder


@contextmanager
def sides(root: Path, commit: str, folder: Path) -> Iterator[tuple[Side, Side]]:
    """The parent and the working tree, ready."""
    extract(root, commit, folder / "parent")
    places = {commit[:12]: folder / "parent", "this tree": root}
    with ExitStack() as open_sides:
        pair = []
        for i, (name, tree) in enumerate(places.items()):
            site = build(tree, folder / f"site{i}")
            pair.append(Side(name, WORKER, (site, ROOT)))
            open_sides.callback(pair[-1].close)
        for side, site in zip(pair, ("site0", "site1"), strict=True):
            side.greet()
            if not Path(side.package).is_relative_to(folder / site):
                raise RuntimeError(f"{side.name}: imported {side.package}")
        yield tuple(pair)


def main() -> int:
    """The command; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--base", default="HEAD^", help="the commit to compare with; default: %(default)s")
    parser.add_argument("--seconds", type=float, default=40, help="time to measure; default: %(default)s")
    parser.add_argument("--threshold", type=float, default=THRESHOLD, help="allowed ratio; default: %(default)s")
    options = parser.parse_args()
    commit = find_commit(ROOT, options.base)
    if commit is None:
        print(f"no commit {options.base} here (the first commit, or a shallow clone): nothing to compare")
        return 0
    with tempfile.TemporaryDirectory() as folder, sides(ROOT, commit, Path(folder)) as (before, after):
        print(f"CPU seconds of this tree over those of {before.name}:\n", flush=True)
        return judge(before, after, options.seconds, options.threshold)


if __name__ == "__main__":
    sys.exit(main())
