"""Write WebDataset shards so that a process that is killed can go on where it was, and the bytes come out the same.

Samples are appended one by one, each followed by a line in a journal. What lies behind the last line is dropped at the
next start. Finished shards, each with its index, wait in a hidden folder and take their names together at the end.
"""

from __future__ import annotations

import fcntl
import hashlib
import io
import json
import os
import shutil
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from bevt_ds.data.reading.index import SUFFIX, load_shard
from bevt_ds.errors import UserError

_RECORD = 10240  # bytes; a tar is padded to a multiple
_END = 1024  # bytes of zeros that end a tar

Event = dict[str, Any]


@dataclass(frozen=True)
class ShardLimits:
    """When a shard is full. A sample larger than `size` gets a shard of its own."""

    size: int  # bytes of samples
    samples: int


def unfinished(out: Path, split: str) -> Path:
    """Where shards are made, until all of them have their names in `out`."""
    return out / f".{split}.unfinished"


class ShardWriter:
    """Shards `{split}-{number:06d}.tar` in the making. Use as a context manager.

    digest: what the output depends on; an unfinished folder of another digest is refused. `events` holds the journal of
    the process before, if it was killed: continue after them.
    """

    def __init__(self, out: Path, split: str, limits: ShardLimits, digest: str) -> None:
        self.out, self.split, self.limits = out, split, limits
        self.folder = unfinished(out, split)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot make the folder {self.folder}: {error.strerror}. Choose another OUT") from error
        self._tar: BinaryIO | None = None
        self._number = self._samples = self._size = 0
        self._journal = (self.folder / "journal.jsonl").open("a+b")
        self._lock()
        self.events = _whole_lines(self._journal)
        self._require_same(digest)
        self._recover()

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, *_: object) -> None:
        if self._tar is not None:
            self._tar.close()
        self._journal.close()

    def add(self, sample: dict[str, Any], note: Event) -> None:
        """Append a webdataset sample and journal `note` with it."""
        size = sum(len(value) for name, value in sample.items() if name != "__key__")
        if self._tar is not None and (self._samples == self.limits.samples or self._size + size > self.limits.size):
            self._close_shard()
        if self._tar is None:
            self._tar = self._path(self._number).open("wb")
        self._tar.write(sample_records(sample))
        self._tar.flush()
        self._samples, self._size = self._samples + 1, self._size + size
        self.note({**note, "shard": self._number, "end": self._tar.tell(), "size": size})

    def note(self, event: Event) -> None:
        """Append a line to the journal."""
        self._journal.write(json.dumps(event).encode() + b"\n")
        self._journal.flush()
        self.events.append(event)

    def publish(self) -> list[Event]:
        """Close the last shard and give all their names; returns name, samples, bytes and SHA-256 of each."""
        if self._tar is not None:
            self._close_shard()
        closed = [event for event in self.events if "closed" in event]
        for event in closed:
            for name in (event["name"] + SUFFIX, event["name"]):
                with suppress(FileNotFoundError):  # moved by the process that was killed while doing this
                    os.rename(self.folder / name, self.out / name)
        return [{name: event[name] for name in ("name", "samples", "bytes", "sha256")} for event in closed]

    def remove(self) -> None:
        """Drop the journal: everything it was for is in place."""
        shutil.rmtree(self.folder)

    def _path(self, number: int) -> Path:
        return self.folder / f"{self.split}-{number:06d}.tar"

    def _lock(self) -> None:
        try:
            fcntl.flock(self._journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(
                f"another process is packing split {self.split!r} into {self.out}: wait for it, or take another --split"
            ) from error

    def _require_same(self, digest: str) -> None:
        if not self.events:
            present = sorted(self.out.glob(f"{self.split}-{'[0-9]' * 6}.tar"))
            if present:
                self.__exit__()
                self.remove()
                raise UserError(
                    f"{present[0]} exists: remove the shards of split {self.split!r} or choose another folder"
                )
            self.note({"digest": digest})
        elif self.events[0].get("digest") != digest:
            self.__exit__()
            raise UserError(
                f"{self.folder} holds an unfinished packing of other files or with other options: repeat that one, or"
                " remove the folder"
            )

    def _recover(self) -> None:
        """Take up the shard that was being written, without what the journal does not know of."""
        closed = [event["closed"] for event in self.events if "closed" in event]
        self._number = len(closed)
        current = [event for event in self.events if event.get("shard") == self._number]
        if not current:
            return
        end = current[-1]["end"]
        self._tar = self._path(self._number).open("r+b")
        self._tar.truncate(end)
        self._tar.seek(end)
        self._samples, self._size = len(current), sum(event["size"] for event in current)

    def _close_shard(self) -> None:
        """Pad the tar as tarfile does, flush it to the disk, and journal its checksum."""
        end = self._tar.tell() + _END
        self._tar.truncate(end + -end % _RECORD)
        self._tar.flush()
        os.fsync(self._tar.fileno())
        self._tar.close()
        path = self._path(self._number)
        with path.open("rb") as tar:
            checksum = hashlib.file_digest(tar, "sha256").hexdigest()
        load_shard(str(path), fresh=True)  # indexed now: from here on a flipped bit is found, whoever copies the tar
        closed = {"closed": self._number, "name": path.name, "samples": self._samples}
        self.note({**closed, "bytes": path.stat().st_size, "sha256": checksum})
        self._tar, self._number, self._samples, self._size = None, self._number + 1, 0, 0


def sample_records(sample: dict[str, Any]) -> bytes:
    """A sample as webdataset writes it: tar headers and data, without the archive's end.

    Nothing of the time, the user or the machine is in the headers.
    """
    from webdataset import TarWriter  # which imports torch: a second, that `bevt shards --help` need not wait

    buffer = io.BytesIO()
    writer = TarWriter(buffer, user="root", group="root", mtime=0)
    writer.write(sample)
    end = writer.tarstream.offset
    writer.close()
    return buffer.getvalue()[:end]


def _whole_lines(journal: BinaryIO) -> list[Event]:
    """The journal's lines; one that was cut by a kill is removed."""
    journal.seek(0)
    data = journal.read()
    whole = data[: data.rfind(b"\n") + 1]
    journal.truncate(len(whole))
    journal.seek(len(whole))
    return [json.loads(line) for line in whole.splitlines()]
