"""docs/scaling.md: the command writes it, and what is committed is what the command writes."""

import re
from xml.etree import ElementTree

import pytest

from benchmarks import scaling_plan
from benchmarks.scaling_plan import DOCS, Point, filled, planned, ranges


def block(page: str, name: str) -> str:
    """What stands between the marks of that name, without the widths of its columns."""
    text = re.search(rf"<!-- {name}: [^>]*-->(.*?)<!-- end -->", page, re.DOTALL)[1]
    return re.sub(r"-{2,}", "--", re.sub(r" +", " ", text))


def test_page_is_what_its_command_writes(tmp_path):
    """One backbone here; the other blocks of the page stay as they are."""
    committed = (DOCS / "scaling.md").read_text()
    scaling_plan.main(["--backbones", "swin_t", "--out", str(tmp_path)])
    written = (tmp_path / "scaling.md").read_text()
    for name in ("assumptions", "measured", "swin_t"):
        assert block(written, name) == block(committed, name), "run python -m benchmarks.scaling_plan"
    (row,) = [line for line in block(written, "bounds").splitlines() if "swin_t" in line]
    assert row in block(committed, "bounds")
    assert block(written, "swin_g") == block(committed, "swin_g")
    figures = [ElementTree.parse(folder / "scaling.svg") for folder in (tmp_path, DOCS)]
    texts = [{element.text for element in figure.iter("{http://www.w3.org/2000/svg}text")} for figure in figures]
    assert {"swin_t", "weak, ZeRO-1", "strong, ZeRO-3", "bound: launch"} <= texts[0]
    assert set(scaling_plan.BACKBONES) <= texts[1]
    assert (DOCS / "scaling.svg").stat().st_size < 100_000


def test_a_block_that_is_missing_is_an_error():
    mark = "<!-- a: python -m benchmarks.scaling_plan -->\n\n<!-- end -->"
    assert filled(f"x {mark} y", "a", "text").count("text") == 1
    with pytest.raises(ValueError, match="0 blocks named b"):
        filled(mark, "b", "text")


def test_points_say_what_bounds_them():
    """Ranges of one bound join; a link that adds a tenth of a step is named."""
    points = [Point(planned("swin_g", "strong", gpus, 1), 1.0) for gpus in (8, 512, 1024)]
    assert points[0].bound == "compute" and points[0].waiting < 0.1
    assert points[1].bound == points[2].bound == "launch + link" and points[2].waiting > 0.1
    assert ranges(points) == "compute 8, launch + link 512 to 1,024"
    plan = points[2].plan
    assert plan.step * (1 - points[2].waiting) == pytest.approx(plan.seconds["launch"])
    assert points[2].cell == f"{1024 / plan.step:,.0f} (100%) launch + link"
