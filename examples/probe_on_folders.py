"""What frozen features are worth: python examples/probe_on_folders.py RUN TRAIN TEST OUT [key=value ...]

TRAIN and TEST hold a folder of videos for each class. Both are packed into OUT, then a linear layer is fitted to the
features of RUN's encoder; the scores go to OUT/probe.
"""

from __future__ import annotations

import sys

from bevt_ds.cli import main


def probe(run: str, train: str, test: str, out: str, settings: list[str]) -> int:
    """Pack both, probe; the exit code of the first that fails."""
    for split, folder in (("train", train), ("test", test)):
        if code := main(["shards", "pack", folder, out, "--split", split, "--class-folders"]):
            return code
    data = [f"data.train={out}/train-*.tar", f"data.val={out}/test-*.tar"]
    return main(["probe", f"weights={run}", *data, "probe.kind=linear", f"output_dir={out}/probe", *settings])


if __name__ == "__main__":
    if len(sys.argv) < 5:
        sys.exit(__doc__)
    sys.exit(probe(*sys.argv[1:5], sys.argv[5:]))
