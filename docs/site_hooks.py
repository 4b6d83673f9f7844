"""Hooks of mkdocs: files of the repository outside docs/, and pages that mkdocs.yml does not name, are in the site too.

Links are written for readers of the repository, relative to the file that holds them. What they lead to outside docs/
(a README, a table of results, an image) becomes part of the site under its path in the repository, so that every link
holds there as well. A link that leads to no file of the repository fails the strict build.
"""

from __future__ import annotations

import os
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
DOCS = "docs"
LINK = re.compile(r"(\]\()(?!https?:|mailto:|#)([^)\s#]+)(#[^)\s]*)?(\))")
REST = "More"


def in_repository(site_path: str) -> str:
    """The path in the repository of a page or file of the site."""
    inside = f"{DOCS}/{site_path}"
    return inside if (ROOT / inside).is_file() else site_path


def in_site(path: str) -> str:
    """The path in the site of a file of the repository."""
    return path.removeprefix(f"{DOCS}/")


def led_to(path: str, link: str) -> str:
    """The path in the repository that a link of a file of it leads to; of a folder, its README.md."""
    target = posixpath.normpath(posixpath.join(posixpath.dirname(path), link))
    return f"{target}/README.md" if (ROOT / target / "README.md").is_file() else target


def linked(path: str) -> Iterator[str]:
    """Files of the repository, outside docs/, that a Markdown file of it links to."""
    for match in LINK.finditer((ROOT / path).read_text(encoding="utf-8")):
        target = led_to(path, match[2])
        if not target.startswith(("../", f"{DOCS}/")) and (ROOT / target).is_file():
            yield target


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add what pages link to outside docs/, and what these link to; name the pages that the navigation lacks."""
    own = {file.src_uri for file in files.documentation_pages()}
    waiting = [in_repository(path) for path in sorted(own)]
    while waiting:
        for target in linked(waiting.pop()):
            if in_site(target) not in files.src_uris:
                files.append(File.generated(config, target, abs_src_path=str(ROOT / target)))
                waiting += [target] if target.endswith(".md") else []
    if rest := sorted(own - set(named(config.nav))):
        config.nav = [*config.nav, {REST: rest}]
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links as the site has them."""
    here = in_repository(page.file.src_uri)

    def moved(match: re.Match[str]) -> str:
        target = led_to(here, match[2])
        path = os.path.relpath(in_site(target), posixpath.dirname(page.file.src_uri) or ".")
        return f"{match[1]}{path}{match[3] or ''}{match[4]}"

    return LINK.sub(moved, markdown)


def named(nav: object) -> Iterator[str]:
    """The pages of a navigation."""
    if isinstance(nav, str):
        yield nav
    elif isinstance(nav, dict | list):
        for value in nav.values() if isinstance(nav, dict) else nav:
            yield from named(value)
