"""The documentation as a site: built without a network, no dead link, messages and numbers as in the code."""

from __future__ import annotations

import ast
import re
import socket
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from mkdocs.commands.build import build
from mkdocs.config import load_config

from bevt_ds.config.recipes import PRETRAINING
from bevt_ds.runtime.logging import expected_step_flops
from bevt_ds.train.dry_run import meta_model

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
FETCHED = {"script": "src", "link": "href", "img": "src", "source": "src", "iframe": "src"}  # a browser does so unasked
DALLE_FLOPS = 52e9  # a frame, forward: docs/performance.md
RATE = 170e12  # FLOP a second of the measured step: docs/recipes.md


class Page(HTMLParser):
    """Links, anchors, and what a browser fetches with the page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links, self.anchors, self.fetched = [], set(), []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        self.anchors |= {values[name] for name in ("id", "name") if name in values}
        if tag == "a" and "href" in values:
            self.links.append(values["href"])
        if tag in FETCHED and FETCHED[tag] in values and values.get("rel") != "canonical":
            self.fetched.append(values[FETCHED[tag]])


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The built site. A warning ends the build, and so does a connection."""

    def no_network(*_: object) -> None:
        raise AssertionError("the build connects to something")

    folder = tmp_path_factory.mktemp("site")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NO_MKDOCS_2_WARNING", "1")
        patch.setattr(socket.socket, "connect", no_network)
        patch.setattr(socket, "getaddrinfo", no_network)
        build(load_config(str(ROOT / "mkdocs.yml"), site_dir=str(folder), strict=True))
    return folder


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[Path, Page]:
    return {path: Page(path) for path in site.rglob("*.html")}


def test_site_fetches_nothing_from_elsewhere(pages):
    for path, page in pages.items():
        assert page.fetched
        assert [url for url in page.fetched if urlsplit(url).scheme not in ("", "data") or url.startswith("//")] == []
        assert "fonts.googleapis" not in path.read_text(encoding="utf-8")


def test_every_link_of_the_site_leads_to_a_page_and_an_anchor_of_it(site, pages):
    dead = []
    for path, page in pages.items():
        for url in [*page.links, *page.fetched]:
            parts = urlsplit(url)
            if parts.scheme or path.name == "404.html":
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            anchors = pages[target].anchors if target in pages else {parts.fragment}
            if not target.is_file() or (parts.fragment and unquote(parts.fragment) not in anchors):
                dead.append((str(path.relative_to(site)), url))
    assert dead == []


def test_navigation_of_the_site_has_every_page_of_docs(site, pages):
    shown = {unquote(urlsplit(url).path) for url in pages[site / "index.html"].links}
    wanted = {path.with_suffix(".html").name for path in DOCS.glob("*.md")} - {"index.html"}
    assert wanted and wanted <= shown


def test_reference_shows_signatures_and_docstrings(site):
    text = (site / "reference.html").read_text(encoding="utf-8")
    for name in ("create_model", "forward_video", "window_attention", "masked_cross_entropy"):
        assert name in text
    assert "Shifted-window attention with a relative position bias" in text
    assert "hidden" in (site / "search" / "search_index.json").read_text()


def strings_of(path: Path) -> list[str]:
    """Every text of a module, with what is filled in as NUL; adjacent literals are one text."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.JoinedStr):
            found.append("".join(v.value if isinstance(v, ast.Constant) else "\0" for v in node.values))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.append(node.value)
    return found


def messages() -> list[str]:
    return re.findall(r"```text\n(.*?)\n```", (DOCS / "troubleshooting.md").read_text(), re.DOTALL)


@pytest.fixture(scope="module")
def texts() -> list[str]:
    return [text for path in (ROOT / "bevt_ds").rglob("*.py") for text in strings_of(path)]


@pytest.mark.parametrize("message", messages())
def test_message_of_the_troubleshooting_page_is_printed_by_the_code(message, texts):
    parts = [re.escape(part) for part in re.split(r"'?\.\.\.'?", message)]
    pattern = re.compile(".*".join(parts), re.DOTALL)
    assert any(pattern.search(text) for text in texts), message


def test_cost_table_of_the_recipes_page_is_computed_from_the_recipes():
    number = r" ([\d,]+) \|"
    rows = re.findall(rf"^\| `(\w+)` \|{number * 4}$", (DOCS / "recipes.md").read_text(), re.MULTILINE)
    assert {row[0] for row in rows} == {name for name in PRETRAINING if "swin" in name}
    for name, *cells in rows:
        config = PRETRAINING[name]()
        train, network = config.train, expected_step_flops(config, meta_model(config).arch)
        tokenizer = DALLE_FLOPS * (0.75 * train.global_clips * config.data.frames + train.global_images)
        hours = (network + tokenizer) * train.steps / RATE / 3600
        wanted = [train.steps, network / 1e12, tokenizer / 1e12, hours]
        for cell, value in zip(cells, wanted, strict=True):
            assert abs(int(cell.replace(",", "")) - value) <= max(1, value / 100), name
