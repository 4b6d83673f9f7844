"""confusion.png: which classes are taken for which, readable for five classes and for four hundred."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

COUNTED = 20  # up to so many classes the cells hold their share in percent
NAMED = 60  # up to so many the axes hold the names; beyond, the matrix has numbers
PAIRS = 30  # the commonest mistakes that are listed next to a matrix without names
LONGEST = 28  # characters of a name


def draw_confusion(counts: np.ndarray, names: tuple[str, ...], path: Path) -> None:
    """Draw counts int64 (K,K), rows labels, columns predictions, as shares of a row; grey: a label without videos."""
    shares = row_shares(counts)
    short = [shortened(name) for name in names]
    side = 3 + 0.24 * min(len(names), NAMED)
    if len(names) <= NAMED:
        figure = Figure(figsize=(side + 1.5, side), layout="constrained")
        axes = figure.subplots()
        _name_axes(axes, short)
    else:
        figure = Figure(figsize=(18, 9), layout="constrained")
        axes, next_to = figure.subplots(1, 2, width_ratios=(2, 1))
        _list_mistakes(next_to, counts, short)
    image = axes.imshow(shares, vmin=0, vmax=1, cmap="magma_r", interpolation="nearest")
    axes.set_facecolor("0.85")
    axes.set(xlabel="prediction", ylabel="label")
    if len(names) <= COUNTED:
        _write_shares(axes, shares)
    figure.colorbar(image, ax=axes, label="share of the label's videos", shrink=0.7)
    figure.savefig(path, dpi=110)


def row_shares(counts: np.ndarray) -> np.ndarray:
    """float (K,K): each row divided by its sum; NaN for a label that does not occur."""
    totals = counts.sum(axis=1, keepdims=True)
    return np.divide(counts, totals, out=np.full(counts.shape, np.nan), where=totals > 0)


def mistakes(counts: np.ndarray, most: int) -> list[tuple[int, int]]:
    """(label, prediction) of the commonest mistakes by share of the label's videos, then by count; at most `most`."""
    shares = np.nan_to_num(row_shares(counts))
    pairs = [(int(i), int(j)) for i, j in np.argwhere(counts) if i != j]
    return sorted(pairs, key=lambda p: (-shares[p], -counts[p], p))[:most]


def shortened(name: str) -> str:
    """The name, without its middle where the image has no room: long names often begin alike."""
    half = LONGEST // 2
    return name if len(name) <= LONGEST else f"{name[:half]}…{name[1 - half :]}"


def _name_axes(axes: Axes, names: list[str]) -> None:
    ticks = range(len(names))
    axes.set_xticks(ticks, names, rotation=60, ha="right", rotation_mode="anchor", fontsize=8)
    axes.set_yticks(ticks, names, fontsize=8)


def _write_shares(axes: Axes, shares: np.ndarray) -> None:
    for (label, prediction), share in np.ndenumerate(shares):
        if share > 0:
            colour = "white" if share > 0.5 else "black"
            axes.text(prediction, label, f"{share:.0%}", ha="center", va="center", fontsize=7, color=colour)


def _list_mistakes(axes: Axes, counts: np.ndarray, names: list[str]) -> None:
    pairs, shares = mistakes(counts, PAIRS), row_shares(counts)
    rows = range(len(pairs))
    axes.barh(rows, [shares[pair] for pair in pairs], color="tab:red")
    axes.set_yticks(rows, [f"{names[i]} ({i}) → {names[j]} ({j})" for i, j in pairs], fontsize=8)
    axes.invert_yaxis()
    axes.set(title="commonest mistakes: label → prediction", xlabel="share of the label's videos")
