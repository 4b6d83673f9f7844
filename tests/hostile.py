"""A pickle that does something when it is loaded carelessly."""

from __future__ import annotations

import os
from pathlib import Path


class Canary:
    """Pickles as a call that makes a folder: whoever unpickles it naively runs it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)
