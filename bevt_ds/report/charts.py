"""Line charts as SVG inside a page of HTML: text and axes take the page's colour, dark or light."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence

import matplotlib
from matplotlib.figure import Figure

INK = "#010203"  # drawn in this, shown in the page's own colour
COLOURS = ("#2f7ed8", "#d9822b", "#2a9d6f", "#c0447c", "#7a5bd0", "#8a8d00", "#00939c", "#b0413e")
STYLE = {
    "svg.fonttype": "none",
    "font.size": 9,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
}
Points = tuple[Sequence[float], Sequence[float]]


def line_chart(
    title: str,
    series: Mapping[str, Points],
    levels: Mapping[str, float] | None = None,
    marks: Sequence[int] = (),
    xlabel: str = "step",
    log: bool = False,
) -> str:
    """One chart, over the updates done if `xlabel` says nothing else.

    Args:
        series: label -> x and y.
        levels: label -> a constant, dashed in the colour of the series of its place.
        marks: steps at which a run was started again.
        log: both axes are logarithmic.
    """
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": title}):
        figure = Figure(figsize=(4.6, 2.7), layout="constrained")
        axes = figure.subplots()
        for (label, (x, y)), colour in zip(series.items(), COLOURS * len(series), strict=False):
            axes.plot(x, y, color=colour, label=label, linewidth=1.3, marker="." if len(x) < 3 else "")
        for (label, value), colour in zip((levels or {}).items(), COLOURS * len(levels or {}), strict=False):
            axes.axhline(value, color=colour, linestyle="--", linewidth=1, label=label)
        for step in marks:
            axes.axvline(step, color=INK, linestyle=":", linewidth=0.8)
        axes.set_xlabel(xlabel)
        if log:
            axes.set(xscale="log", yscale="log")
        if len(series) + len(levels or {}) > 1:
            axes.legend(fontsize=8)
        axes.margins(x=0.02)
        text = io.StringIO()
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return _for_page(text.getvalue(), title)


def _for_page(svg: str, title: str) -> str:
    """The <svg> element alone, as wide as its place, with ids that no other chart of the page has."""
    element = svg[svg.index("<svg") :].replace(INK, "currentColor")
    element = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", element, count=1)
    element = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", element, count=1)
    element = re.sub(r"<metadata>.*?</metadata>", "", element, flags=re.DOTALL)
    prefix = re.sub(r"\W+", "-", title.lower())
    element = re.sub(r'(\bid="|xlink:href="#|url\(#)', rf"\g<1>{prefix}-", element)
    return element.replace("<svg", f'<svg role="img" aria-label="{title}"', 1)
