"""What a step is to reach on a GPU next to what was measured, so that no one computes ratios by hand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Row = dict[str, Any]
Run = Mapping[str, Row]  # by provider: rows that took turns in one process
OURS, WITH_GRAPHS = "ours", "ours, train.graphs=on"
SMALL, LARGE, CLIPS = ("resident", "8 clips 64 images"), ("resident", "32 clips 256 images"), ("fine-tuning", "8 clips")
BARE = "no tokenizer", "8 clips 64 images"
TIME, PEAK = "p50_ms", "peak_mb"
NOT_MEASURED = "not measured"
GOALS = (  # what, the case and batch of its rows, the goal, the field, whose it is compared with, form
    ("8 + 64 against eager", SMALL, "3.0x", TIME, "eager", ".2f"),
    ("8 + 64 against torch.compile", SMALL, "1.4x", TIME, "torch.compile", ".2f"),
    ("32 + 256 against eager", LARGE, "3.2x", TIME, "eager", ".2f"),
    ("8 + 64 without tokenizer against eager", BARE, "3.5x", TIME, "eager", ".2f"),
    ("the same, MFU of the measured matmul rate", BARE, "35 %", "mfu", "", ".1%"),
    ("8 + 64, share in which the device idles", SMALL, "under 5 %", "idle_share", "", ".1%"),
    ("8 + 64, launch calls", SMALL, "under 1,500", "launch_calls", "", ",d"),
    ("8 + 64, peak memory against eager", SMALL, "at most 0.44x", PEAK, "eager", ".2f"),
    ("32 + 256, peak memory against eager", LARGE, "at most 0.44x", PEAK, "eager", ".2f"),
    ("fine-tuning, 8 clips, against eager", CLIPS, "2x", TIME, "eager", ".2f"),
)


def goals(runs: Sequence[Run]) -> list[tuple[str, str, str, str]]:
    """What, goal, ours, ours with graphs; of each the last run that has it.

    Where graphs were not in a run with the rival they are compared by way of ours: "by ours".
    """
    return [
        (what, goal, *(_said(runs, setting, provider, *rest) for provider in (OURS, WITH_GRAPHS)))
        for what, setting, goal, *rest in GOALS
    ]


def _said(runs: Sequence[Run], setting: tuple[str, str], provider: str, name: str, rival: str, form: str) -> str:
    """A number, or why there is none."""
    there = [run for run in runs if any((row["case"], row["batch"]) == setting for row in run.values())]
    value, by_way = _against(there, provider, name, rival), ""
    if value is None and rival and provider != OURS:
        parts = _against(there, OURS, name, rival), _against(there, provider, name, OURS)
        value, by_way = (None if None in parts else parts[0] * parts[1]), ", by ours"
    if value is not None:
        return f"{value:{form}}{'x' * bool(rival)}{by_way}"
    reasons = [run[provider]["error"] for run in there if "error" in run.get(provider, {})]
    return f"{NOT_MEASURED}: {reasons[-1]}" if reasons else NOT_MEASURED


def _against(runs: Sequence[Run], provider: str, name: str, rival: str) -> float | None:
    """A field of a provider in the last run that has it; of time and memory its ratio to a rival's."""
    found = None
    for run in runs:
        own, other = (run.get(which, {}).get(name) for which in (provider, rival))
        if own is not None and not rival:
            found = own
        elif own and other:
            found = other / own if name == TIME else own / other
    return found
