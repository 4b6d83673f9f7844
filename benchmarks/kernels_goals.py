"""What the kernels are to reach on an H100 or H200 (bf16, Swin-B by depth), and what the rows of a run say about it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from .kernels_cases import default_cases
from .report import newest

GOALS = (  # name, goal, stretch goal, unit
    ("clips, forward + backward against eager", 8.0, 10.0, "x"),
    ("clips, against the best of compile, sdpa, flex", 4.0, 5.0, "x"),
    ("clips, forward", 170.0, 220.0, "TFLOP/s"),
    ("clips, backward", 120.0, 170.0, "TFLOP/s"),
    ("images, forward + backward, of the copy roof", 60.0, 75.0, "%"),
    ("masked head, against eager", 3.3, None, "x"),
    ("masked head, peak, at most", 300.0, None, "MB"),
)
RIVALS = ("compile", "sdpa", "flex")  # those that run every case
FASTER = ("sdpa_cudnn", "sdpa_efficient", "sdpa_flash", "sdpa_math", "flex_flash")  # count where they run
CLIPS, IMAGES = "video", "image"

Row = dict[str, Any]


def index_rows(rows: Iterable[Row]) -> dict[tuple[str, str, str, str], Row]:
    """Rows by (op, case, direction, provider); a later row replaces an earlier one."""
    return {(row["op"], row["case"], row["direction"], row["provider"]): row for row in rows}


def by_depth(stream: str, least: Callable[[str], float | None]) -> float | None:
    """`least` of each case of Swin-B's blocks of a stream, summed by depth; None where a part is missing."""
    parts = [(case.blocks, least(case.name)) for case in default_cases() if case.stream == stream]
    return None if any(part is None for _, part in parts) else sum(count * part for count, part in parts)


def ratio(over: float | None, under: float | None) -> float | None:
    """None where one of them is missing."""
    return over / under if over and under else None


def figures(rows: list[Row]) -> dict[str, float | None]:
    """What was measured of each of `GOALS` at the last row's commit; None where a part is missing."""
    found = index_rows(newest(rows))

    def value(case: str, direction: str, provider: str, of: str) -> float | None:
        return found.get(("window_attention", case, direction, provider), {}).get(of)

    def total(stream: str, direction: str, provider: str = "bevt_ds", of: str = "p50_ms") -> float | None:
        return by_depth(stream, lambda case: value(case, direction, provider, of))

    def best(case: str) -> float | None:
        times = {name: value(case, "both", name, "p50_ms") for name in (*RIVALS, *FASTER)}
        return None if any(times[name] is None for name in RIVALS) else min(t for t in times.values() if t is not None)

    def rate(direction: str) -> float | None:
        return ratio(total(CLIPS, direction, of="dense_flops"), total(CLIPS, direction))

    head = {name: row for (op, _, way, name), row in found.items() if (op, way) == ("masked_head", "both")}
    ours, eager = head.get("bevt_ds", {}), head.get("eager", {})
    forward, backward = (rate_ and 1e-9 * rate_ for rate_ in (rate("forward"), rate("backward")))
    roof = ratio(total(IMAGES, "both", of="roof_ms"), total(IMAGES, "both"))
    values = (
        ratio(total(CLIPS, "both", "eager"), total(CLIPS, "both")),
        ratio(by_depth(CLIPS, best), total(CLIPS, "both")),
        forward,
        backward,
        roof and 100 * roof,
        ratio(eager.get("p50_ms"), ours.get("p50_ms")),
        ours.get("peak_mb"),
    )
    return {name: measured for (name, *_), measured in zip(GOALS, values, strict=True)}
