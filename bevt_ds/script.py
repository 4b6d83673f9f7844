"""For programs that are started as files of a checkout: that `import` finds the package which the file belongs to."""

from __future__ import annotations

import sys
from pathlib import Path


def require_own_package(file: str) -> None:
    """Take the package's folder off the import path, where its config.py and data/ would shadow other modules.

    Exits if the package that is installed is not the one around `file`: two versions of the code would mix.
    """
    here, ours = Path(file).resolve().parent, Path(__file__).resolve().parent
    if sys.path and Path(sys.path[0] or ".").resolve() == here:
        del sys.path[0]
    if here != ours:
        sys.exit(
            f"error: this is {file}, but `import bevt_ds` finds the copy installed at {ours}. Run"
            f" `pip install -e {here.parent}`, or start the installed copy with `python -m bevt_ds.{Path(file).stem}`."
        )
