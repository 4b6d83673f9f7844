"""Pretrain on a folder of videos, without labels: python examples/pretrain_on_a_folder.py VIDEOS OUT [key=value ...]

Packs the videos into OUT/shards, trains `recipe=small` on them into OUT/run, and writes OUT/run/report.html. Start it
again with resume=auto to go on with a run that was stopped.
"""

from __future__ import annotations

import sys

from bevt_ds.cli import main


def pretrain(videos: str, out: str, settings: list[str]) -> int:
    """Pack, train, report; the exit code of the first that fails."""
    shards, run = f"{out}/shards", f"{out}/run"
    return (
        main(["shards", "pack", videos, shards, "--split", "mine"])
        or main(["pretrain", "recipe=small", f"data.videos={shards}/mine-*.tar", f"output_dir={run}", *settings])
        or main(["report", run])
    )


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    sys.exit(pretrain(sys.argv[1], sys.argv[2], sys.argv[3:]))
