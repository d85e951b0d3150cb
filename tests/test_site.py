"""The documentation as a site: it builds without a warning, and every link and picture of it leads somewhere."""

from __future__ import annotations

import logging
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest

ROOT = Path(__file__).resolve().parent.parent


class Page(HTMLParser):
    """What a page links to and asks for, and what can be linked to in it."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.asked: list[str] = []
        self.anchors: set[str] = set()
        self.feed(source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        known = {name: value or "" for name, value in attrs}
        self.anchors |= {known[name] for name in ("id", "name") if name in known}
        if tag == "a" and "href" in known:
            self.links.append(known["href"])
        elif tag in ("img", "script") and "src" in known:
            self.asked.append(known["src"])
        elif tag == "link" and known.get("rel") in ("stylesheet", "icon", "preconnect", "preload"):
            self.asked.append(known["href"])


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("mkdocs", reason="mkdocs is not installed (the dev extra)")
    pytest.importorskip("material", reason="mkdocs-material is not installed (the dev extra)")
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    folder = tmp_path_factory.mktemp("site")
    warned: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: warned.append(record.getMessage())  # type: ignore[method-assign]
    log = logging.getLogger("mkdocs")
    log.addHandler(handler)
    try:
        build(load_config(str(ROOT / "mkdocs.yml"), site_dir=str(folder)))
    finally:
        log.removeHandler(handler)
    assert not warned
    return folder


@pytest.mark.slow
def test_every_link_leads_somewhere(site: Path) -> None:
    pages = {path: Page(path.read_text(encoding="utf-8")) for path in site.rglob("*.html")}
    assert len(pages) > 20
    broken, abroad = [], []
    for path, page in pages.items():
        for target in [*page.links, *page.asked]:
            place, _, anchor = unquote(target).partition("#")
            if "://" in target or target.startswith(("mailto:", "data:")):
                abroad += [f"{path.name}: {target}"] if target in page.asked else []
                continue
            # The page for what is not found is shown at any depth, so its addresses begin at the site's root.
            found = (site / place.lstrip("/") if place.startswith("/") else path.parent / place) if place else path
            found = (found / "index.html" if found.is_dir() else found).resolve()
            if not found.is_file():
                broken.append(f"{path.name}: {target}")
            elif anchor and found in pages and anchor not in pages[found].anchors:
                broken.append(f"{path.name}: {target} has no such anchor")
    assert not broken
    assert not abroad, "the site asks another host"


@pytest.mark.slow
def test_blocks_of_code_are_blocks_of_code(site: Path) -> None:
    """Also those that say `run` or `step`, which most Markdown readers do not take for the beginning of a block."""
    pages = [page for page in site.rglob("*.html") if page.name != "CONTRIBUTING.html"]  # which tells of fences
    assert not [page.name for page in pages if "```" in page.read_text(encoding="utf-8")]
    tutorial = (site / "tutorial.html").read_text(encoding="utf-8")
    assert tutorial.count('class="highlight"') == 8
    assert all(f'id="{number}-' in tutorial for number in range(1, 6))


@pytest.mark.slow
def test_the_site_holds_every_page_of_the_documentation(site: Path) -> None:
    for page in (ROOT / "docs").glob("*.md"):
        name = "index-of-references.html" if page.name == "index.md" else page.with_suffix(".html").name
        assert (site / name).is_file(), page.name
    first = (site / "index.html").read_text(encoding="utf-8")
    assert "A census of memorisation for text-to-image diffusion models" in first
    assert 'href="tutorial.html"' in first
