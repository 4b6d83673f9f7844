"""The classes of a labelled data set: how many there are, their names, and the one of each sample.

A label is the text of `<key>.cls`, or "label" in `<key>.json`: the number of a class, or its name. A data set has one
kind of them. Where a sample has both files they say the same.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from bevt_ds.data.reading.members import Shard
from bevt_ds.data.reading.remote import is_remote, redacted
from bevt_ds.errors import UserError

MOST_CLASSES = 1 << 14  # more are a mistake, such as a video's number or caption; their confusion matrix has 2 GiB
NAMED = 10  # classes that a message lists
MOST_SHOWN = 60  # characters of a label in a message

_NUMBER = re.compile(r"-?[0-9]{1,18}")

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Classes:
    """Class names in label order. Where labels are numbers and nothing names them, a name is the number."""

    names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.names)

    def labels(self, shard: Shard) -> np.ndarray:
        """The class of each sample: int64 (samples,).

        UserError: a label that is no class; the message names shard and key.
        """
        return np.array([self._number(shard, i) for i in range(len(shard))], dtype=np.int64)

    @cached_property
    def _numbers(self) -> dict[str, int]:
        return {name: number for number, name in enumerate(self.names)}

    def _number(self, shard: Shard, i: int) -> int:
        label = shard.labels[i]
        number = int(label) if _is_number(label) else self._numbers.get(label, -1)
        if not label:
            raise _unlabelled(shard, i)
        if not 0 <= number < len(self):
            raise UserError(
                f"{_place(shard, i)} has the label {_quoted(label)}, which is none of the {len(self)} classes"
                f" {_listed(self.names)}: correct it, or name all classes with data.classes=FILE, a line each"
            )
        return number


def read_classes(train: Sequence[Shard], val: Sequence[Shard], file: str = "") -> Classes:
    """The classes of a data set, after every label of it has been checked.

    file: class names, a line each in label order; empty: those that the manifests of `train` count and those seen in
    it, in alphabetical order, or 0 to the largest where labels are numbers. Without `train`, the same of `val`.
    Classes that only one split has are worth a warning, but no validation sample may be of a class that is never
    trained.

    UserError: a sample without a label, or with two, numbers among names, a number that is out of range, a name that is
    not in the file, a class of `val` that is not in `train`; the message names shard and key.
    """
    _require_one_label([*train, *val])
    numbers = _are_numbers([*train, *val])
    classes = Classes(_from_file(file) if file else _found(train or val, numbers))
    trained = _members_of(train, classes)
    validated = _members_of(val, classes)
    if train and (unknown := sorted(validated.keys() - trained.keys())):
        raise UserError(
            f"{validated[unknown[0]]} is of class {_quoted(classes.names[unknown[0]])}, which no training sample has:"
            f" {len(unknown)} of the {len(validated)} validation classes are never trained"
        )
    for split, present in (("train", trained), ("val", validated)):
        if present and (absent := [name for c, name in enumerate(classes.names) if c not in present]):
            log.warning("data.%s lacks %d of the %d classes: %s", split, len(absent), len(classes), _listed(absent))
    return classes


def expected_count(shards: Sequence[Shard], stated: int = 0) -> int:
    """How many samples the whole set of these shards has, for a statement of coverage.

    That is what is `stated`, else the samples that their manifests count, packed and rejected, and those indexed in
    shards that no manifest names.
    """
    if stated:
        return stated
    counted, named = 0, set()
    for path, facts in _manifests(shards):
        counted += int(facts.get("samples", 0)) + int(facts.get("rejected", 0))
        named |= {path.with_name(shard["name"]) for shard in facts["shards"]}
    return counted + sum(len(shard) for shard in shards if Path(shard.path) not in named)


def _require_one_label(shards: Sequence[Shard]) -> None:
    """UserError: a sample's `.cls` and JSON say different things."""
    for shard in shards:
        i = next((i for i, label in enumerate(shard.json_labels) if label), None)
        if i is not None:
            raise UserError(
                f"{_place(shard, i)} has the label {_quoted(shard.labels[i])} in its .cls and"
                f" {_quoted(shard.json_labels[i])} in its .json: correct one of them, or leave one out"
            )


def _are_numbers(shards: Sequence[Shard]) -> bool:
    """Whether labels are numbers. UserError: one is missing, or they are of both kinds."""
    first: tuple[Shard, int] | None = None
    for shard in shards:
        for i, label in enumerate(shard.labels):
            if not label:
                raise _unlabelled(shard, i)
            first = first or (shard, i)
            other = first[0].labels[first[1]]
            if _is_number(label) != _is_number(other):
                raise UserError(
                    f"labels are numbers in some samples and names in others: {_place(*first)} has {_quoted(other)},"
                    f" {_place(shard, i)} has {_quoted(label)}"
                )
    return first is not None and _is_number(first[0].labels[first[1]])


def _from_file(file: str) -> tuple[str, ...]:
    try:
        lines = Path(file).read_text(encoding="utf-8-sig").split("\n")  # Unicode's separators may be in a name
        names = tuple(line.strip() for line in lines if line.strip())
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read data.classes={file}: {error}") from error
    if not names:
        raise UserError(f"data.classes={file} is empty: write the name of a class into each line")
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise UserError(f"data.classes={file} names {_quoted(twice)} twice")
    return names


def _found(shards: Sequence[Shard], numbers: bool) -> tuple[str, ...]:
    """Class names from the manifests and the labels of these shards."""
    labels = {label for shard in shards for label in shard.labels}
    for path, facts in _manifests(shards):
        if strange := [label for label in facts["labels"] if _is_number(label) != numbers]:
            raise UserError(f"{path} counts the label {_quoted(strange[0])}: labels are numbers in some samples only")
        labels |= facts["labels"].keys()
    if not numbers:
        if len(labels) > MOST_CLASSES:
            raise UserError(
                f"the labels name {len(labels)} classes, {_listed(sorted(labels))}: more than {MOST_CLASSES} are"
                " refused. A label is the name of a class, not of a video"
            )
        return tuple(sorted(labels))
    largest = max(map(int, labels))
    if largest >= MOST_CLASSES:
        shard, i = next((s, i) for s in shards for i, label in enumerate(s.labels) if int(label) == largest)
        raise UserError(
            f"{_place(shard, i)} has the label {largest}: classes are numbered from 0, without gaps, and more than"
            f" {MOST_CLASSES} are refused"
        )
    return tuple(map(str, range(largest + 1)))


def _members_of(shards: Sequence[Shard], classes: Classes) -> dict[int, str]:
    """For each class that occurs, the place of its first sample."""
    places: dict[int, str] = {}
    for shard in shards:
        numbers, first = np.unique(classes.labels(shard), return_index=True)
        for number, i in zip(numbers.tolist(), first.tolist(), strict=True):
            places.setdefault(number, _place(shard, i))
    return places


def _manifests(shards: Sequence[Shard]) -> Iterator[tuple[Path, dict[str, Any]]]:
    local = [Path(shard.path) for shard in shards if not is_remote(shard.path)]
    for folder in sorted({path.parent for path in local}):
        names = {path.name for path in local if path.parent == folder}
        for path in sorted(folder.glob("*-manifest.json")):
            facts = _read_manifest(path)
            if names & {shard["name"] for shard in facts["shards"]}:
                yield path, facts


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(facts["labels"], dict) or not all("name" in shard for shard in facts["shards"]):
            raise ValueError("not what `bevt shards pack` writes")
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"cannot use the manifest {path}: {error}. Pack again, or remove it") from error
    return facts


def _is_number(label: str) -> bool:
    return _NUMBER.fullmatch(label) is not None


def _unlabelled(shard: Shard, i: int) -> UserError:
    return UserError(
        f"{_place(shard, i)} has no label: add {shard.keys[i]}.cls, or 'label' to its .json, a whole number or a name;"
        " `bevt shards pack` takes labels from a list, or from folders with --class-folders"
    )


def _place(shard: Shard, i: int) -> str:
    return f"sample {shard.keys[i]!r} of {redacted(shard.path)}"


def _listed(names: Sequence[str]) -> str:
    return ", ".join(map(_quoted, names[:NAMED])) + (", ..." if len(names) > NAMED else "")


def _quoted(label: str) -> str:
    """A label on one short line: it is whatever somebody put into a tar."""
    return repr(label if len(label) <= MOST_SHOWN else f"{label[:MOST_SHOWN]}...")
