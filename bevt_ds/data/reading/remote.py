"""Streams of bytes from URLs, with a bound on every wait.

http and https are read with the standard library, all else (s3, gs, hf, ...) with fsspec and its package for that
scheme. The client for HTTP in fsspec 2026.9 does not serve: `cat_file` loses what came before a cut and tells no status
or ETag, `ukey` is the same for every version of a file, and `size` turns a 500 into FileNotFoundError.

`pipe:COMMAND` runs a shell and reads what it prints; shards.py lets it through only where that is allowed.
"""

from __future__ import annotations

import http.client
import importlib.util
import re
import subprocess
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import lru_cache, partial
from typing import Any, BinaryIO, TypeVar

from bevt_ds.data.reading.deadline import DeadlineExecutor
from bevt_ds.data.reading.globs import escaped

PIPE = "pipe:"
CHUNK = 1 << 20
LISTING_SECONDS = 120.0
T = TypeVar("T")
_HTTP = ("http://", "https://")
_LEFT_ALONE = "%/:?#[]@!$&'()*+,;=~"  # what has its meaning in a URL
_SCHEME = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]*://")
_WORTH_ANOTHER_TRY = frozenset({408, 425, 429, 500, 502, 503, 504})


class RemoteError(Exception):
    """A remote file cannot be had. `final`: another try would not help."""

    def __init__(self, url: str, reason: str, final: bool = False) -> None:
        super().__init__(f"cannot fetch {redacted(url)}: {reason}")
        self.final = final


def is_remote(path: str) -> bool:
    return path.startswith(PIPE) or _SCHEME.match(path) is not None


@lru_cache(maxsize=1024)  # asked for each sample, of few shards
def redacted(url: str) -> str:
    """Without user, password and query, which may be secrets."""
    if not _SCHEME.match(url):
        return url
    scheme, _, rest = url.partition("://")  # by hand: it must not fail on what is no valid URL
    host, slash, path = re.split("[?#]", rest, maxsplit=1)[0].partition("/")
    return f"{scheme}://{host.rpartition('@')[2]}{slash}{path}"


def fault_of_url(url: str) -> str:
    """Why a URL can never be fetched; empty: it may be. Other schemes than http and https have rules of their own."""
    if not url.lower().startswith(_HTTP):
        return ""
    try:
        parts = urllib.parse.urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError:
        return "its host or port cannot be read"
    if not host:
        return "it names no host"
    if "@" in parts.netloc:
        return "user and password are not sent to a web server: give a URL that needs none, a signed one for example"
    if re.search(r"[^!-~]", url):
        plain = redacted(urllib.parse.quote(url, safe=_LEFT_ALONE))
        return f"write what is no plain ASCII, and spaces, percent-encoded: {plain}"
    return ""


class Source:
    """An opened remote file. `size`: bytes of the whole file, None if unknown. `offset`: where `chunks` begins."""

    def __init__(self, chunks: Iterator[bytes], size: int | None, offset: int = 0, tag: str = "") -> None:
        self.chunks, self.size, self.offset, self.tag = chunks, size, offset, tag


def open_source(url: str, seconds: float, offset: int, tag: str) -> Source:
    """Open a URL, from `offset` on if the server can do that and still has the version `tag`.

    seconds: the longest wait for the next bytes. RemoteError: from here or while the chunks are read.
    """
    if url.startswith(PIPE):
        return Source(_translated(url, _run(url.removeprefix(PIPE), seconds)), None)
    if url.lower().startswith(_HTTP):
        return _open_http(url, seconds, offset, tag)
    return _open_fsspec(url, seconds, offset, tag)


def _open_http(url: str, seconds: float, offset: int, tag: str) -> Source:
    headers = {"Accept-Encoding": "identity"}
    if offset and tag:
        headers |= {"Range": f"bytes={offset}-", "If-Range": tag}
    try:
        reply = urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=seconds)
    except urllib.error.HTTPError as error:
        raise RemoteError(url, f"HTTP {error.code} {error.reason}", error.code not in _WORTH_ANOTHER_TRY) from error
    except (http.client.InvalidURL, ValueError) as error:  # the server may have sent us there
        raise RemoteError(url, "it leads to what is no valid URL", final=True) from error
    except (OSError, http.client.HTTPException) as error:
        raise RemoteError(url, _reason(error)) from error
    length = reply.headers.get("Content-Length")
    resumed = reply.status == 206 and (reply.headers.get("Content-Range") or "").startswith(f"bytes {offset}-")
    begins = offset if resumed else 0
    size = begins + int(length) if length and length.isdigit() else None
    return Source(_translated(url, _read_all(reply)), size, begins, reply.headers.get("ETag") or "")


def _open_fsspec(url: str, seconds: float, offset: int, tag: str) -> Source:
    def opened(file_system: Any, path: str) -> tuple[BinaryIO, int, int, str]:
        file_system.invalidate_cache(path)  # size and version are to be today's, not those of a listing
        size, version = file_system.size(path), file_system.ukey(path)
        file = file_system.open(path, "rb")
        begins = offset if version == tag and file.seekable() else 0
        if begins:
            file.seek(begins)
        return file, size, begins, version

    file, size, begins, version = _with_file_system(url, seconds, opened)

    def chunks() -> Iterator[bytes]:
        with closing(file):
            yield from _read_all(file)

    return Source(_translated(url, _bounded(chunks(), seconds)), size, begins, version)


def glob_remote(pattern: str, seconds: float = LISTING_SECONDS) -> list[str]:
    """The URLs that match a pattern, where the scheme can list files. RemoteError: none can be had."""

    def found(file_system: Any, path: str) -> list[str]:
        names = [path] if file_system.exists(path) else file_system.glob(escaped(path, file_system.exists))
        return sorted(map(file_system.unstrip_protocol, names))

    return _with_file_system(pattern, seconds, found)


def _with_file_system(url: str, seconds: float, work: Callable[[Any, str], T]) -> T:
    """`work(file system, path)`. Connecting may block as well, so that it is bounded too. RemoteError: it fails.

    Each package behind fsspec has errors of its own, so that any kind of them is one of the remote file.
    """
    import fsspec

    with closing(DeadlineExecutor(1, "remote")) as executor:
        try:
            file_system, path = _within(seconds, lambda: fsspec.core.url_to_fs(url), executor)
        except (ImportError, ValueError) as error:
            raise RemoteError(url, f"{error} (scheme {url.partition('://')[0]!r})", final=True) from error
        except Exception as error:
            raise RemoteError(url, _reason(error)) from error
        try:
            return _within(seconds, lambda: work(file_system, path), executor)
        except FileNotFoundError as error:
            raise RemoteError(url, "there is no such file", final=True) from error
        except Exception as error:
            raise RemoteError(url, _reason(error)) from error


def can_list(url: str) -> bool:
    """Whether files can be listed there: HTTP has no such thing."""
    return not url.lower().startswith((*_HTTP, PIPE)) and importlib.util.find_spec("fsspec") is not None


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
    """The same chunks; whatever goes wrong on the way becomes RemoteError."""
    try:
        yield from chunks
    except Exception as error:
        raise RemoteError(url, _reason(error)) from error


def _reason(error: Exception) -> str:
    """What an error says, under its name where that is not one of Python's own for files and sockets."""
    name, text = type(error).__name__, str(error)
    return text if text and isinstance(error, OSError) else f"{name}: {text}".removesuffix(": ")


def _bounded(chunks: Iterator[bytes], seconds: float) -> Iterator[bytes]:
    """The same chunks, or TimeoutError after a longer wait than `seconds` for one of them."""
    with closing(DeadlineExecutor(1, "remote")) as executor:
        while chunk := _within(seconds, partial(next, chunks, b""), executor):
            yield chunk


def _within(seconds: float, call: Callable[[], T], executor: DeadlineExecutor) -> T:
    """A call's result, or TimeoutError. Its thread cannot be interrupted then; it ends with the read that holds it."""
    future = executor.submit(call)
    try:
        future.exception(seconds)
    except TimeoutError:
        executor.give_up(future)
        raise TimeoutError(f"no bytes for {seconds:g} s") from None
    return future.result()
