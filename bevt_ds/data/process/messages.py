"""What the trainer and its loader's process tell each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from bevt_ds.config.schema import UnlabelledConfig
from bevt_ds.data.open_stream import Source


@dataclass(frozen=True)
class Opening:
    """What the process is to read. The fields are arguments of BatchReader."""

    config: UnlabelledConfig
    sources: Sequence[Source]
    rank: int
    world: int
    folder: Path | None = None
    state: dict[str, Any] | None = None
    decoders: Mapping[str, str] | None = None
    log_level: int = 0  # of what it has to say


class Opened(NamedTuple):
    """What the process has found. The fields are attributes of BatchReader."""

    fingerprint: str
    samples: Mapping[str, int]
    steps_an_epoch: float


class Begin(NamedTuple):
    """Start on the next micro-batch. freed: see Inbox. finished: how many of them need nothing any more."""

    step: int
    micro_step: int
    freed: Sequence[int]
    finished: int


class Refused(NamedTuple):
    """DALI's decoder refuses samples of that kind in the micro-batch of that number: send them decoded."""

    number: int
    kind: str
    reason: str


class Account(NamedTuple):
    """What the process has counted: `times` and `skips` since the last one, the rest since its start."""

    counts: Sequence[tuple[int, int]]  # good and bad samples of each stream
    times: Mapping[str, float]
    decoded_frames: int
    skips: Mapping[tuple, str]  # see Skips.added
    pids: Sequence[int]  # of its decode workers


class Answer(NamedTuple):
    """To Begin: a Batch. To Refused: a Stream. Where pixels are sent as in sent.py, with these."""

    number: int
    kind: str  # "" where it is to Begin
    item: Any
    account: Account


class Said(NamedTuple):
    """A line for the log."""

    name: str
    level: int
    text: str


class Working(NamedTuple):
    """The process lives, and has not done yet what it was asked for."""
