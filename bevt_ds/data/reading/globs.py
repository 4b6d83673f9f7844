"""Globs in which a name that exists wins over what its characters mean: a folder may be called `data[v2]`."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Callable

Exists = Callable[[str], bool]


def literal_length(pattern: str, exists: Exists) -> int:
    """How many characters at the beginning are a name that exists, though some of them have a meaning in patterns.

    All of them, those of the longest leading folders, or 0.
    """
    special = re.search(r"[*?[{}]", pattern)
    if special is None or exists(pattern):
        return len(pattern)
    ends = [i + 1 for i, char in enumerate(pattern) if char == "/" and i > special.start()]
    return next((end for end in reversed(ends) if exists(pattern[:end])), 0)


def escaped(pattern: str, exists: Exists) -> str:
    """The same pattern, in which the beginning that exists means itself."""
    length = literal_length(pattern, exists)
    return glob.escape(pattern[:length]) + pattern[length:]


def is_wildcard(pattern: str, exists: Exists) -> bool:
    """Whether the pattern stands for whatever matches, and not for one name."""
    return glob.has_magic(pattern) and glob.has_magic(pattern[literal_length(pattern, exists) :])


def find_local(pattern: str) -> list[str]:
    """Sorted paths of the local files and folders that match."""
    return sorted(glob.glob(escaped(pattern, os.path.lexists)))
