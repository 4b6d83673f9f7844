"""2,000 steps of test_custom_task.py, a log line each and 40 commits: `python -m tests.training.long_run DIR`.

Every STRIDE steps a line of DIR/rows.jsonl has what the process holds.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path

from tests.training.test_custom_task import PointsLoader, Regression, regress, toy

STEPS, STRIDE, COMMITS = 2000, 100, 50


def held() -> dict[str, int]:
    """Bytes of memory that are the process's own, its threads and its open files."""
    place = Path("/proc/self")
    status = dict(line.split(":", 1) for line in (place / "status").read_text().splitlines())
    memory = sum(1024 * int(status[name].split()[0]) for name in ("RssAnon", "VmSwap"))
    return {"memory": memory, "threads": int(status["Threads"]), "files": len(list((place / "fd").iterdir()))}


@dataclass
class Counted(Regression):
    """Notes what is held; a commit, which has a thread and files, ends first."""

    def after_step(self) -> None:
        super().after_step()
        if self.updates % STRIDE == 0:
            self.setup.commits.wait()
            with (self.setup.folder.parent / "rows.jsonl").open("a") as file:
                file.write(json.dumps({"step": self.updates} | held()) + "\n")


def main(folder: Path) -> None:
    config = toy(folder / "run")
    train = replace(config.train, steps=STEPS, checkpoint_every=COMMITS)
    config = replace(config, train=train, optim=replace(config.optim, lr=0.01))
    sys.exit(regress(config, lambda setup: PointsLoader(setup.first_step, STEPS, setup.folder), Counted))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
