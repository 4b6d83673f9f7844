"""Shard patterns -> files: paths, URLs, globs, brace ranges, and lists of them separated by commas."""

from __future__ import annotations

import glob
import os
import re
from collections import Counter
from itertools import chain

from braceexpand import UnbalancedBracesError, braceexpand

from bevt_ds.data.reading.deadline import heartbeat
from bevt_ds.data.reading.globs import find_local, is_wildcard, literal_length
from bevt_ds.data.reading.remote import PIPE, RemoteError, can_list, fault_of_url, glob_remote, is_remote, redacted
from bevt_ds.errors import UserError

_INNERMOST_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(-?[0-9]+)\.\.(-?[0-9]+)(?:\.\.-?[0-9]+)?")
MOST_ALTERNATIVES = 1_000_000  # of one pattern's braces


def expand(patterns: str, allow_pipe: bool = False) -> list[str]:
    """Paths of the tar files that `patterns` names, in the order given; a glob's matches are sorted.

    What exists as it is written is that file or folder, whatever brackets, braces and commas would mean elsewhere.
    Examples: `a.tar`, `k400-*.tar`, `in1k-{000000..000127}.tar`, `a.tar,b-{x,y}.tar`, `s3://bucket/k400-*.tar`.
    UserError: nothing matches, a local file is missing, a folder or a URL that cannot be is given, a shard is named
    twice, or `pipe:` without `allow_pipe`.
    """
    paths = list(chain.from_iterable(_expand_one(p, allow_pipe) for p in _split(patterns)))
    if not paths:
        raise UserError(f"no shard in {patterns!r}: give tar files, for example 'train-*.tar'")
    _require_files([path for path in paths if not is_remote(path)], patterns)
    name, times = Counter(paths).most_common(1)[0]
    if times > 1:
        raise UserError(f"shard {name} is named {times} times in {patterns!r}")
    return paths


def has_wildcard(patterns: str) -> bool:
    """Whether a part of `patterns` stands for whatever files there are, and is not a name. UserError: as `expand`."""
    paths = chain.from_iterable(map(_braces_expanded, _split(patterns)))
    return any(_is_glob(path) for path in paths)


def _split(patterns: str) -> list[str]:
    """Split at the commas that are outside braces, and in no name that exists."""
    parts, depth, start = [], 0, 0
    if "," in patterns and _exists(patterns.strip()):
        return [patterns.strip()]
    for i, char in enumerate(patterns):
        depth += (char == "{") - (char == "}")
        if char == "," and depth == 0 and not _is_in_folder(patterns[start:], i - start):
            parts.append(patterns[start:i])
            start = i + 1
    parts.append(patterns[start:])
    return [part.strip() for part in parts if part.strip()]


def _is_in_folder(text: str, comma: int) -> bool:
    """Whether the comma is in the name of a folder that exists, at the beginning of the text."""
    slash = text.find("/", comma)
    return slash >= 0 and _exists(text[:slash].strip())


def _expand_one(pattern: str, allow_pipe: bool) -> list[str]:
    """A pipe's braces are the shell's; where none is allowed, braces may not hide one either."""
    if allow_pipe and pattern.startswith(PIPE):
        return [pattern]
    paths = _braces_expanded(pattern)
    if pipe := next((path for path in paths if path.startswith(PIPE)), None):
        raise UserError(f"{pipe!r} would run a shell command; give the path of a tar file, or data.allow_pipe=true")
    return list(chain.from_iterable(map(_glob, paths)))


def _braces_expanded(pattern: str) -> list[str]:
    """The alternatives of a pattern; braces in the part of it that exists are a part of its name."""
    if pattern.startswith(PIPE):
        return [pattern]
    length = literal_length(pattern, _exists)
    return [pattern[:length] + rest for rest in _expand_braces(pattern[length:], pattern)]


def _expand_braces(pattern: str, whole: str) -> list[str]:
    """`a{1..3}` and `a{x,y}` -> one string an alternative; a range keeps its zero padding. whole: for messages."""
    try:
        if _alternatives(pattern, whole) > MOST_ALTERNATIVES:
            raise UserError(
                f"{whole!r} may stand for more than {MOST_ALTERNATIVES} shards: give fewer, or several patterns with"
                " commas between"
            )
        return list(braceexpand(pattern, escape=False))
    except UnbalancedBracesError as error:
        raise UserError(f"unbalanced brace in {whole!r}") from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, braces a thousand deep
        raise UserError(f"the braces in {whole[:80]!r} cannot be expanded: {error}") from error


def _alternatives(pattern: str, whole: str) -> int:
    """No fewer than braces stand for; braceexpand holds all of a range in memory. UserError: one counts down."""
    count = 1
    while match := _INNERMOST_BRACES.search(pattern):
        pattern = pattern[: match.start()] + pattern[match.end() :]
        if (limits := _RANGE.fullmatch(match[1])) is None:
            count *= match[1].count(",") + 1
            continue
        first, last = limits.groups()
        if int(first) > int(last):
            raise UserError(f"{{{match[1]}}} in {whole!r} counts down: write {{{last}..{first}}}")
        count *= int(last) - int(first) + 1
    return count


def _glob(path: str) -> list[str]:
    if fault := fault_of_url(path):
        raise UserError(f"{redacted(path)} is no valid URL: {fault}")
    if not _is_glob(path):
        return [path]
    heartbeat(redacted(path))
    found = _listed(path) if is_remote(path) else find_local(path)
    if not found:
        where = "" if is_remote(path) else f" (working folder: {os.getcwd()})"
        raise UserError(f"no file matches {path!r}{where}")
    return found


def _is_glob(path: str) -> bool:
    """A question mark in a URL is no wildcard, and what a remote name means its file system says."""
    return glob.has_magic(path) and can_list(path) if is_remote(path) else is_wildcard(path, _exists)


def _listed(pattern: str) -> list[str]:
    try:
        return glob_remote(pattern)
    except RemoteError as error:
        raise UserError(str(error)) from error


def _require_files(paths: list[str], patterns: str) -> None:
    missing = [path for path in paths if not _exists(path)]
    if missing:
        raise UserError(
            f"{len(missing)} of {len(paths)} shards of {patterns!r} do not exist, "
            f"the first is {missing[0]} (working folder: {os.getcwd()})"
        )
    for path in paths:
        heartbeat(path)
        if os.path.isdir(path):
            raise UserError(f"{path} is a folder: write {os.path.join(path, '*.tar')!r}")


def _exists(path: str) -> bool:
    heartbeat(redacted(path))
    return not is_remote(path) and os.path.exists(path)
