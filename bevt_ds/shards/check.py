"""Look at every sample of some shards: are its bytes those that were packed, and can all of it be decoded?"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from typing import Any

import numpy as np

from bevt_ds.config.samples import DataConfig
from bevt_ds.data.decoding.pool import DecodePool, Reply
from bevt_ds.data.decoding.video import fits_gpu
from bevt_ds.data.limits import BadSample, Limits
from bevt_ds.data.reading.deadline import StorageStalled
from bevt_ds.data.reading.members import EXTENSIONS, Member, Shard
from bevt_ds.data.reading.storage import Storage
from bevt_ds.errors import UserError
from bevt_ds.progress import progress_bar
from bevt_ds.shards import manifest
from bevt_ds.shards.pack import READING, ahead

AHEAD = 4  # samples under way for each process
READ_AHEAD = 2  # threads that may hold a file while all workers are busy


@dataclass
class Report:
    """What was found. `findings` are faults; `facts` has a row for each good sample of `shards`, which can be read."""

    samples: int = 0
    shards: list[Shard] = field(default_factory=list)
    findings: list[dict[str, str]] = field(default_factory=list)
    facts: list[dict[str, Any]] = field(default_factory=list)

    def add(self, shard: str, key: str, reason: str) -> None:
        self.findings.append({"shard": shard, "key": key, "reason": reason})


def check(
    paths: Sequence[str],
    jobs: int | None = None,
    progress: bool = False,
    whole: bool = False,
    reading: DataConfig = READING,
) -> Report:
    """Read, hash and fully decode every sample of the shards, in parallel.

    whole: `paths` are to be all shards of their manifests. reading: its limits and times hold.
    """
    report, jobs = Report(), jobs or len(os.sched_getaffinity(0))
    report.shards = _openable(paths, report, reading)
    names = [shard.path for shard in report.shards]
    for path, reason in manifest.compare(names, jobs, progress, whole, reading.read_seconds):
        report.add(path, "", reason)
    for shard in report.shards:
        _check_labels(shard, report)
    _find_twins(report.shards, report)
    _each_sample(report, "check", jobs, progress, reading)
    return report


def survey(
    paths: Sequence[str], jobs: int | None = None, progress: bool = False, reading: DataConfig = READING
) -> Report:
    """What the headers of every sample say; only a frame of each video is decoded. reading: as of `check`."""
    report, jobs = Report(), jobs or len(os.sched_getaffinity(0))
    report.shards = _openable(paths, report, reading)
    _each_sample(report, "describe", jobs, progress, reading)
    return report


def outlook(facts: Sequence[dict[str, Any]]) -> list[str]:
    """What is no fault, but worth to know before training on these videos."""
    odd = Counter(_kind(f) for f in facts if "codec" in f and not fits_gpu(f))
    notes = [f"{n} videos ({what}) are not for GPU decoding" for what, n in sorted(odd.items())]
    if gaps := [f["keyframe_gap"] for f in facts if f.get("keyframe_gap", 0) > 32]:
        notes.append(f"{len(gaps)} videos have up to {max(gaps)} frames between keyframes: decoding starts far ahead")
    return notes


def _kind(facts: dict[str, Any]) -> str:
    """A video's kind, for those that a GPU's decoder is not given."""
    kind = f"{facts['codec']} {facts['pixel_format']} in {facts['container']}"
    if facts["rotation"] or facts["mirrored"]:
        kind += ", turned to be upright"
    if facts["gpu_obstacle"]:
        kind += f", {facts['gpu_obstacle']}"
    return kind if facts["is_plain"] else f"{kind}, whose timestamps or keyframes do not tell its frames"


def _openable(paths: Sequence[str], report: Report, reading: DataConfig) -> list[Shard]:
    shards = []
    with closing(Storage(reading)) as storage:
        for path in paths:
            try:
                shards.append(storage.load_shard(path))
            except StorageStalled:  # says nothing of the tar, and the next one is likely to lie there too
                raise
            except UserError as error:
                report.add(path, "", str(error))
    return shards


def _check_labels(shard: Shard, report: Report) -> None:
    """Whoever needs labels refuses a sample with two; see labels.py."""
    for key, label, other in zip(shard.keys, shard.labels, shard.json_labels, strict=True):
        if other:
            report.add(shard.path, key, f"its .cls has the label {label[:60]!r}, its .json {other[:60]!r}")


def _find_twins(shards: Sequence[Shard], report: Report) -> None:
    """The same key with the same bytes in two shards: an epoch would show that sample twice."""
    first: dict[tuple[str, int, int], str] = {}
    for shard in shards:
        for member in shard.members():
            other = first.setdefault((member.key, member.size, member.crc), shard.path)
            if other != shard.path:
                report.add(shard.path, member.key, f"the same sample is in {other} too")


def _each_sample(report: Report, work: str, jobs: int, progress: bool, reading: DataConfig) -> None:
    """Send every sample to the decode workers and note what comes back."""
    shards = report.shards
    storage = Storage(reading, jobs + READ_AHEAD)
    pool = DecodePool(jobs, reading.decode_seconds, Limits.of(reading))
    labels = {(shard.path, key): label for shard in shards for key, label in zip(shard.keys, shard.labels, strict=True)}
    total = sum(map(len, shards))
    try:
        members = chain.from_iterable(shard.members() for shard in shards)
        under_way = ahead(members, partial(storage.executor.submit, _work_on, storage, pool, work), AHEAD * jobs)
        for member, future in progress_bar(under_way, total=total, disable=not progress, unit="sample"):
            report.samples += 1
            try:
                facts, _ = future.result()
            except BadSample as bad:
                report.add(member.path, member.key, str(bad))
                continue
            del facts["resident"]
            report.facts.append({**facts, "size": member.size, "label": labels[member.path, member.key]})
    finally:
        pool.close()
        storage.close()


def _work_on(storage: Storage, pool: DecodePool, work: str, member: Member) -> tuple[Reply, np.ndarray]:
    kind = "image" if member.extension in EXTENSIONS["image"] else "video"
    return pool.ask(storage.read(member), {"work": work, "kind": kind})
