"""Media files -> WebDataset shards: `{split}-{number:06d}.tar` with `<key>.mp4|jpg|...`, `<key>.json`, `<key>.cls`."""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from bevt_ds.config.samples import DataConfig
from bevt_ds.data.decoding.images import describe_image
from bevt_ds.data.decoding.pool import DecodePool
from bevt_ds.data.decoding.transcode import Profile
from bevt_ds.data.limits import BadSample, Limits
from bevt_ds.data.reading.index import write_atomic
from bevt_ds.data.reading.members import EXTENSIONS
from bevt_ds.errors import UserError
from bevt_ds.progress import progress_bar
from bevt_ds.shards.file_lists import FILES
from bevt_ds.shards.sources import Item, list_items
from bevt_ds.shards.writer import Event, ShardLimits, ShardWriter, unfinished

SHARD_BYTES = 1 << 30
SHARD_SAMPLES = 10_000
# What a file may be; a video that takes longer to rewrite, or to check, is rejected.
READING = DataConfig(decode_seconds=600.0)
AHEAD = 3  # files under way for each process

T = TypeVar("T")
Prepare = Callable[[Item], "Future[tuple[bytes, Event]]"]


@dataclass(frozen=True)
class Packed:
    """What `pack` wrote."""

    shards: tuple[Path, ...]
    samples: int
    rejected: int
    passed_over: Mapping[str, int]  # ending -> files of the source that were left out for it
    repeated: bool = False  # an earlier call had written all of it


def pack(
    source: Path | str,
    out: Path,
    kind: str,
    split: str = "train",
    shard_bytes: int = SHARD_BYTES,
    shard_samples: int = SHARD_SAMPLES,
    progress: bool = False,
    profile: Profile | None = None,
    root: Path | None = None,
    jobs: int | None = None,
    class_folders: bool = False,
    reading: DataConfig = READING,
) -> Packed:
    """Pack the media of `kind` ("video" or "image") that a source names, in its order; see `list_items`.

    A shard is closed before it would pass `shard_bytes` or `shard_samples`. The same input gives the same tars, however
    many `jobs` (default: one a core) and however often it was killed and started again. What cannot be read is listed
    in `{split}-rejected.jsonl` with the reason; `{split}-manifest.json` says what is in the shards.

    profile: rewrite the videos; None: their bytes as they are. reading: its limits (`Limits.of`), and decode_seconds,
    hold for every file. Where the same call has ended before, nothing is done. UserError: nothing to pack, or other
    shards of this split are in `out`.
    """
    if profile and kind != "video":
        raise UserError("only videos can be rewritten: leave out the profile for images")
    listing = list_items(str(source), kind, root, class_folders)
    items = listing.items
    jobs, full = jobs or len(os.sched_getaffinity(0)), ShardLimits(shard_bytes, shard_samples)
    digest = _digest(items, kind, profile, full, Limits.of(reading))
    if finished := _finished(out, split, digest, listing.passed_over):
        return finished
    with ExitStack() as closing:
        writer = closing.enter_context(ShardWriter(out, split, full, digest))
        prepare = partial(_preparer, kind, profile, reading, jobs, closing)
        _write_all(items, writer, prepare, bool(profile), AHEAD * jobs, progress)
        shards = writer.publish()
        rejected = [event for event in writer.events if "reason" in event]
        _write_reports(writer, digest, kind, profile, shards, rejected, listing.passed_over)
        writer.remove()
    if not shards:
        first, reasons = rejected[0], out / f"{split}-rejected.jsonl"
        raise UserError(
            f"none of the {len(items)} {kind} files of {source} is usable: {str(items[first['item']].path)!r}:"
            f" {first['reason']}; {reasons} has all"
        )
    samples = sum(shard["samples"] for shard in shards)
    return Packed(tuple(out / shard["name"] for shard in shards), samples, len(rejected), listing.passed_over)


def _finished(out: Path, split: str, digest: str, passed_over: Mapping[str, int]) -> Packed | None:
    """What an earlier call with the same input wrote to its end; None: there is no such thing, or a shard is gone."""
    try:
        manifest = json.loads((out / f"{split}-manifest.json").read_text(encoding="utf-8"))
        shards = [out / shard["name"] for shard in manifest["shards"]]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if manifest.get("input") != digest or unfinished(out, split).exists() or not all(map(Path.exists, shards)):
        return None
    return Packed(tuple(shards), manifest["samples"], manifest["rejected"], passed_over, repeated=True)


def _write_all(
    items: Sequence[Item],
    writer: ShardWriter,
    preparer: Callable[[], Prepare],
    rewritten: bool,
    count: int,
    progress: bool,
) -> None:
    """Prepare the files in parallel, `ahead` of them, and write them in order, after those that are written already."""
    done = sum("item" in event for event in writer.events)
    keys = {event["key"] for event in writer.events if "key" in event}
    if done == len(items):
        return
    under_way = ahead(items[done:], preparer(), count)
    bar = progress_bar(under_way, initial=done, total=len(items), disable=not progress, unit="file")
    for i, (item, prepared) in enumerate(bar, start=done):
        note = {"item": i, "path": item.name}
        try:
            data, facts = prepared.result()
            if item.key in keys:
                raise BadSample(f"another file has the key {item.key!r} too")
        except BadSample as bad:
            writer.note({**note, "reason": str(bad)})
            continue
        keys.add(item.key)
        extension = "mp4" if rewritten else item.extension
        writer.add(_sample(item, extension, data, facts), {**note, "key": item.key, **_summary(item, facts)})


def ahead(items: Iterable[T], start: Callable[[T], Future], count: int) -> Iterator[tuple[T, Future]]:
    """Each item with the future that `start` gives for it, `count` of them under way."""
    under_way: deque[tuple[T, Future]] = deque()
    for item in items:
        under_way.append((item, start(item)))
        if len(under_way) > count:
            yield under_way.popleft()
    yield from under_way


def _preparer(kind: str, profile: Profile | None, reading: DataConfig, jobs: int, closing: ExitStack) -> Prepare:
    """A function Item -> future of (bytes, facts); the future raises BadSample."""
    limits = Limits.of(reading)
    threads = closing.enter_context(ThreadPoolExecutor(jobs + 2))
    if kind == "image":
        return lambda item: threads.submit(_prepare_image, item, limits)
    pool = DecodePool(jobs, reading.decode_seconds, limits)
    closing.callback(pool.close)
    work = {"work": "rewrite", "profile": asdict(profile)} if profile else {"work": "describe", "kind": "video"}
    return lambda item: threads.submit(_prepare_video, item, pool, work, limits)


def _prepare_image(item: Item, limits: Limits) -> tuple[bytes, Event]:
    data = _read(item, "image", limits)
    return data, describe_image(data, limits)


def _prepare_video(item: Item, pool: DecodePool, work: Event, limits: Limits) -> tuple[bytes, Event]:
    data = _read(item, "video", limits)
    facts, rewritten = pool.ask(data, work)
    facts = {name: value for name, value in facts.items() if name not in ("size", "resident")}
    return (rewritten.tobytes() if work["work"] == "rewrite" else data), facts


def _read(item: Item, kind: str, limits: Limits) -> bytes:
    if item.fault:
        raise BadSample(item.fault)
    try:
        facts = item.path.stat()
        if stat.S_ISDIR(facts.st_mode):
            raise BadSample("it is a folder: frames in folders are packed once ffmpeg has made a video of them")
        if not stat.S_ISREG(facts.st_mode):
            raise BadSample("it is no regular file")  # a pipe would be waited for, for ever
        if item.extension not in EXTENSIONS[kind]:  # as a member of that name it would be no sample
            raise BadSample(f"it is no {kind} by its name, which ends with none of {', '.join(FILES[kind])}")
        limits.check_file(facts.st_size)
        return item.path.read_bytes()
    except OSError as error:
        raise BadSample(f"cannot read it: {error.strerror}") from error


def _sample(item: Item, extension: str, data: bytes, facts: Event) -> dict[str, Any]:
    """A webdataset sample."""
    facts = {"source": item.name, **({"label": item.label} if item.label else {}), **facts}
    sample = {"__key__": item.key, extension: data, "json": json.dumps(facts, sort_keys=True).encode()}
    return sample | ({"cls": item.label.encode()} if item.label else {})


def _summary(item: Item, facts: Event) -> Event:
    """What the manifest adds up."""
    return {name: facts[name] for name in ("codec", "duration", "frames") if name in facts} | {"label": item.label}


def _write_reports(
    writer: ShardWriter,
    digest: str,
    kind: str,
    profile: Profile | None,
    shards: list[Event],
    rejected: list[Event],
    passed_over: Mapping[str, int],
) -> None:
    samples = [event for event in writer.events if "shard" in event]
    manifest = {
        "version": 1,
        "input": digest,
        "kind": kind,
        "profile": profile and asdict(profile),
        "samples": len(samples),
        "rejected": len(rejected),
        "passed_over": dict(sorted(passed_over.items())),
        "bytes": sum(shard["bytes"] for shard in shards),
        "shards": shards,
        "labels": dict(sorted(Counter(event["label"] for event in samples if event["label"]).items())),
    }
    if kind == "video":
        manifest["seconds"] = round(sum(event["duration"] for event in samples), 3)
        manifest["frames"] = sum(event["frames"] for event in samples)
        manifest["codecs"] = dict(sorted(Counter(event["codec"] for event in samples).items()))
    lines = [json.dumps({"path": event["path"], "reason": event["reason"]}) + "\n" for event in rejected]
    if lines:
        write_atomic(writer.out / f"{writer.split}-rejected.jsonl", "".join(lines).encode())
    text = json.dumps(manifest, indent=1, sort_keys=True) + "\n"
    write_atomic(writer.out / f"{writer.split}-manifest.json", text.encode())


def _digest(items: Sequence[Item], kind: str, profile: Profile | None, full: ShardLimits, limits: Limits) -> str:
    """What the shards depend on: names, labels, sizes and times of the files, how they are rewritten, and parted."""
    rewriting = profile and repr(profile).replace(", codec='h264'", "")  # as it was before there was another codec
    digest = hashlib.sha256(f"({kind!r}, {rewriting}, {full!r}, {limits!r})".encode())
    for item in items:
        try:
            facts = item.path.stat()
            state = (facts.st_size, facts.st_mtime_ns)
        except OSError:
            state = (-1, -1)
        digest.update(repr((item.name, item.label, state)).encode())
    return digest.hexdigest()
