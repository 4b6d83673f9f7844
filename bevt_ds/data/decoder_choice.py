"""Which decoder of videos is the fastest: measured once, on the run's own shards, and remembered."""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from bevt_ds.data.reading.index import write_atomic

log = logging.getLogger(__name__)

PHRASES = {"nvdec": "by NVDEC", "split": "by NVDEC and workers"}  # what a choice means; the others are devices
MEASURED = 6  # micro-batches, after one that is not counted


def choose(candidates: dict[str, Callable[[], float]], facts: tuple, folder: Path) -> str:
    """The name of the candidate with the highest rate.

    candidates: name -> measures clips a second; one that raises RuntimeError cannot be used here. facts: what the
    answer depends on; for the same facts a file in `folder` has it. Raises the last RuntimeError if none works.
    """
    folder.mkdir(parents=True, exist_ok=True)
    place = folder / f"{hashlib.sha256(repr(facts).encode()).hexdigest()[:32]}.json"
    with place.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the ranks of a node must not measure each other
        rates = _stored(place, candidates)
        if rates is None:
            rates = _rates(candidates)
            write_atomic(place, json.dumps(rates).encode())
    best = max(rates, key=rates.__getitem__)
    measured = ", ".join(f"{name} {rate:.1f} clips/s" for name, rate in rates.items())
    log.info("videos are decoded %s: %s", PHRASES.get(best, f"on the {best}"), measured)
    return best


def resumed_decoders(state: dict[str, Any] | None, setting: str, on_gpu: bool) -> dict[str, str]:
    """Stream -> decoder that a resumed run need not measure again. Only `auto` leaves a choice, and only on a GPU.

    state: BackgroundLoader.state of the run that is resumed. setting: data.decoder.
    """
    return (state or {}).get("decoder", {}) if setting == "auto" and on_gpu else {}


def settled_decoders(kinds: Mapping[str, str], setting: str, state: dict[str, Any] | None) -> dict[str, str] | None:
    """Stream -> where it is decoded on a GPU; None: that must be measured. kinds: stream -> "video" or "image"."""
    known = resumed_decoders(state, setting, on_gpu=True)
    names = {"image": "cpu" if setting == "cpu" else "gpu", "video": None if setting == "auto" else setting}
    decoders = {stream: known.get(stream, names[kind]) for stream, kind in kinds.items()}
    return None if None in decoders.values() else decoders


def _stored(place: Path, candidates: Collection[str]) -> dict[str, float] | None:
    """The rates measured before, if they are of these candidates."""
    with suppress(OSError, ValueError, TypeError, AttributeError):
        rates = {name: float(rate) for name, rate in json.loads(place.read_text(encoding="utf-8")).items()}
        return rates if rates and rates.keys() <= set(candidates) else None
    return None


def _rates(candidates: dict[str, Callable[[], float]]) -> dict[str, float]:
    rates: dict[str, float] = {}
    failure: RuntimeError | None = None
    for name, measure in candidates.items():
        try:
            rates[name] = measure()
        except RuntimeError as error:
            log.warning("videos cannot be decoded on the %s here: %s", name, error)
            failure = error
    if failure is not None and not rates:
        raise failure
    return rates


def clips_per_second(batches: Iterable[int]) -> float:
    """The rate of an iterable that makes batches and yields their sizes; the first is not counted."""
    batches = iter(batches)
    next(batches)
    began = time.perf_counter()
    return sum(batches) / (time.perf_counter() - began)


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0))
