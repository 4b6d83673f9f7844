"""Streams of bytes from URLs, with a bound on every wait.

http and https are read with the standard library, all else (s3, gs, hf, ...) with fsspec and its package for that
scheme. `pipe:COMMAND` runs a shell and reads what it prints; shards.py lets it through only where that is allowed.
"""

from __future__ import annotations

import http.client
import importlib.util
import queue
import re
import subprocess
import threading
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any, BinaryIO, TypeVar

PIPE = "pipe:"
CHUNK = 1 << 20
LISTING_SECONDS = 120.0
T = TypeVar("T")
_SCHEME = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]*://")
_WORTH_ANOTHER_TRY = frozenset({408, 425, 429, 500, 502, 503, 504})


class RemoteError(Exception):
    """A remote file cannot be had. `final`: another try would not help."""

    def __init__(self, url: str, reason: str, final: bool = False) -> None:
        super().__init__(f"cannot fetch {redacted(url)}: {reason}")
        self.final = final


def is_remote(path: str) -> bool:
    return path.startswith(PIPE) or _SCHEME.match(path) is not None


def redacted(url: str) -> str:
    """Without user, password and query, which may be secrets."""
    if not _SCHEME.match(url):
        return url
    parts = urllib.parse.urlsplit(url)
    return urllib.parse.urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


class Source:
    """An opened remote file. `size`: bytes of the whole file, None if unknown. `offset`: where `chunks` begins."""

    def __init__(self, chunks: Iterator[bytes], size: int | None, offset: int = 0, tag: str = "") -> None:
        self.chunks, self.size, self.offset, self.tag = chunks, size, offset, tag


def open_source(url: str, seconds: float, offset: int = 0, tag: str = "") -> Source:
    """Open a URL, from `offset` on if the server can do that and still has the version `tag`.

    seconds: the longest wait for the next bytes. RemoteError: from here or while the chunks are read.
    """
    if url.startswith(PIPE):
        return Source(_translated(url, _run(url.removeprefix(PIPE), seconds)), None)
    if url.startswith(("http://", "https://")):
        return _open_http(url, seconds, offset, tag)
    return _open_fsspec(url, seconds)


def _open_http(url: str, seconds: float, offset: int, tag: str) -> Source:
    headers = {"Accept-Encoding": "identity"}
    if offset and tag:
        headers |= {"Range": f"bytes={offset}-", "If-Range": tag}
    try:
        reply = urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=seconds)
    except urllib.error.HTTPError as error:
        raise RemoteError(url, f"HTTP {error.code} {error.reason}", error.code not in _WORTH_ANOTHER_TRY) from error
    except (OSError, http.client.HTTPException) as error:
        raise RemoteError(url, str(error) or type(error).__name__) from error
    length = reply.headers.get("Content-Length")
    resumed = reply.status == 206 and (reply.headers.get("Content-Range") or "").startswith(f"bytes {offset}-")
    begins = offset if resumed else 0
    size = begins + int(length) if length and length.isdigit() else None
    return Source(_translated(url, _read_all(reply)), size, begins, reply.headers.get("ETag") or "")


def _open_fsspec(url: str, seconds: float) -> Source:
    def sized(file_system: Any, path: str) -> tuple[Any, str, int]:
        return file_system, path, file_system.size(path)

    file_system, path, size = _with_file_system(url, seconds, sized)

    def chunks() -> Iterator[bytes]:
        with closing(file_system.open(path, "rb")) as file:
            yield from _read_all(file)

    return Source(_translated(url, _bounded(chunks(), seconds)), size)


def glob_remote(pattern: str, seconds: float = LISTING_SECONDS) -> list[str]:
    """The URLs that match a pattern, where the scheme can list files. RemoteError: none can be had."""

    def found(file_system: Any, path: str) -> list[str]:
        return sorted(map(file_system.unstrip_protocol, file_system.glob(path)))

    return _with_file_system(pattern, seconds, found)


def _with_file_system(url: str, seconds: float, work: Callable[[Any, str], T]) -> T:
    """`work(file system, path)`. Connecting may block as well, so that it is bounded too. RemoteError: it fails."""
    import fsspec

    try:
        return _within(seconds, lambda: work(*fsspec.core.url_to_fs(url)))
    except (ImportError, ValueError) as error:
        raise RemoteError(url, f"{error} (scheme {url.partition('://')[0]!r})", final=True) from error
    except FileNotFoundError as error:
        raise RemoteError(url, "there is no such file", final=True) from error
    except OSError as error:
        raise RemoteError(url, str(error) or type(error).__name__) from error


def can_list(url: str) -> bool:
    """Whether files can be listed there: HTTP has no such thing."""
    return not url.startswith(("http://", "https://", PIPE)) and importlib.util.find_spec("fsspec") is not None


def _read_all(file: BinaryIO) -> Iterator[bytes]:
    read = getattr(file, "read1", file.read)
    while chunk := read(CHUNK):
        yield chunk


def _run(command: str, seconds: float) -> Iterator[bytes]:
    """What a shell command prints. OSError: it failed."""
    process = subprocess.Popen(command, shell=True, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL)
    try:
        yield from _bounded(_read_all(process.stdout), seconds)
        if code := process.wait(timeout=seconds):
            raise OSError(f"the command ended with code {code}")
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def _translated(url: str, chunks: Iterator[bytes]) -> Iterator[bytes]:
    """The same chunks; what goes wrong on the way becomes RemoteError."""
    try:
        yield from chunks
    except (OSError, http.client.HTTPException, subprocess.TimeoutExpired) as error:
        raise RemoteError(url, str(error) or type(error).__name__) from error


def _bounded(chunks: Iterator[bytes], seconds: float) -> Iterator[bytes]:
    """The same chunks, or TimeoutError after a longer wait than `seconds` for one of them.

    The reading thread cannot be interrupted; it is left behind, and ends with the read that holds it.
    """
    ready: queue.Queue[Any] = queue.Queue(maxsize=2)
    stop = threading.Event()
    threading.Thread(target=_pump, args=(chunks, ready, stop), daemon=True).start()
    try:
        while (item := _take(ready, seconds)) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stop.set()


def _take(ready: queue.Queue[Any], seconds: float) -> Any:
    try:
        return ready.get(timeout=seconds)
    except queue.Empty:
        raise TimeoutError(f"no bytes for {seconds:g} s") from None


def _pump(chunks: Iterator[bytes], ready: queue.Queue[Any], stop: threading.Event) -> None:
    """Move chunks into a queue until they end, or nobody takes them any more. None marks the end."""
    try:
        for chunk in chunks:
            if not _put(ready, chunk, stop):
                return
        _put(ready, None, stop)
    except BaseException as error:  # raised again by the reader
        _put(ready, error, stop)


def _put(ready: queue.Queue[Any], item: Any, stop: threading.Event) -> bool:
    while not stop.is_set():
        try:
            ready.put(item, timeout=0.1)
            return True
        except queue.Full:
            continue
    return False


def _within(seconds: float, call: Callable[[], T]) -> T:
    """A call's result, or TimeoutError."""
    return next(_bounded((make() for make in [call]), seconds))
