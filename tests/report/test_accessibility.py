"""Pages for everybody: axe-core in a real browser, and what can be checked without one.

axe-core is Deque's (MPL-2.0) and no part of this repository: it comes with `axe-core-python` of the dev extra. A newer
one is taken from `node_modules` or from the file that MEMSCAN_AXE names.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from html.parser import HTMLParser
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from memscan.census.policy import PolicyConfig
from memscan.census.rates import rate
from memscan.report.page import read_part
from memscan.report.trend import render_trend
from memscan.report.verification import render_verification
from pipelines.reduce.diff import diff_runs, write_diff
from pipelines.reduce.job import reduce_run
from tests.mitigation.test_verification import locality, result
from tests.support.synthetic_run import scene

pytestmark = pytest.mark.waits  # for a process that it started

ROOT = Path(__file__).resolve().parents[2]
PAGES = ("report", "trend", "diff", "verification")
# WCAG 2.2 at levels A and AA, and what axe calls best practice.
TAGS = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"]
SCREENS = {"wide": (1400, "light"), "wide and dark": (1400, "dark"), "narrow": (400, "light")}


def axe_file() -> Path | None:
    """axe.min.js, the newest that is at hand."""
    package = find_spec("axe_core_python")
    folders = [Path(place) for place in (package.submodule_search_locations or ())] if package else []
    places = [ROOT / "node_modules" / "axe-core", *folders]
    named = [Path(os.environ["MEMSCAN_AXE"])] if os.environ.get("MEMSCAN_AXE") else []
    return next((file for file in [*named, *(place / "axe.min.js" for place in places)] if file.is_file()), None)


@pytest.fixture(scope="module")
def pages(kit: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One of each page, with everything in it that it can hold."""
    folder = tmp_path_factory.mktemp("pages")
    labels = {
        "a fox": ("NM NM NM NM", "VM VM VM NM"),
        "a door": ("FM FM FM FM", "NM NM NM NM"),
        "a harbour": ("BM BM BM BM", "VM VM VM VM"),
        "a poster": ("VM VM VM VM", "VM VM VM VM"),
        "plain": ("NM NM NM NM", "NM NM NM NM"),
    }
    runs = []
    for side, name in enumerate(("before", "after")):
        prompts = [kit.Planted(one, both[side], (f"ref-{1 + side}",), mapped=True) for one, both in labels.items()]
        reduce_run(str(kit.write_run(folder / name, prompts, part_size=20)))
        runs.append(str(folder / name))
    write_diff(str(folder / "diff"), diff_runs(*runs, pictures=True))
    picture = scene(1)[0][None]
    results = [result(name, "a red fox", method=name) for name in ("nemo", "finetune")]
    verified = render_verification(
        results, picture, {one["name"]: picture for one in results}, [picture[0]], locality("a red fox")
    )
    (folder / "trend.html").write_text(trend(), encoding="utf-8")
    (folder / "verification.html").write_text(verified, encoding="utf-8")
    return {
        "report": folder / "after" / "report.html",
        "trend": folder / "trend.html",
        "diff": folder / "diff" / "diff.html",
        "verification": folder / "verification.html",
    }


def trend() -> str:
    """Two checkpoints, the second of which fails two rules."""
    records = []
    for at, vm in enumerate((4, 35)):
        figures = {name: rate(vm, 100).as_dict() for name in ("memorised", "vm", "fm", "bm")}
        broken = [
            {"name": "max_vm_rate", "limit": 0.1, "value": vm / 100, "against": "", "ids": []},
            {"name": "max_new_flagged", "limit": 3, "value": float(vm), "against": "step-100", "ids": ["x"]},
        ]
        message = "limit 3: VM 'a fox'"
        change = {"name": "step-100", "counts": {"new": vm, "gone": 1}} if at else None
        records.append(
            {
                "name": f"step-{100 * (at + 1)}",
                "slug": f"s{at}",
                "model": "m@1",
                "scanned": "2026-11-30T00:00:00+00:00",
                "passed": not at,
                "run": f"runs/{at}",
                "same_as": None,
                "figures": {**figures, "severity": vm / 50, "rejected": 0.0},
                "changes": {"previous": change, "baseline": None},
                "policy": [{**one, "state": "failed" if at else "passed", "message": message} for one in broken],
            }
        )
    policy = PolicyConfig(max_vm_rate=0.1, max_severity=0.5)
    return render_trend("nightly", "step-100", records, policy, {("s1", "previous"): "diffs/a/diff.html"})


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES)
def test_axe_finds_nothing(browser: Any, pages: dict[str, Path], page: str) -> None:
    file = axe_file()
    if file is None:
        pytest.skip("axe-core is not installed (pip install axe-core-python)")
    for screen, (width, scheme) in SCREENS.items():
        sized = {"width": width, "height": 1000, "deviceScaleFactor": 1, "mobile": False}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", sized)
        features = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", features)
        browser.get(pages[page].as_uri())
        browser.execute_script("for (const one of document.querySelectorAll('details')) one.open = true;")
        assert browser.execute_script("return document.documentElement.scrollWidth <= window.innerWidth"), screen
        browser.execute_script(file.read_text(encoding="utf-8"))
        found = browser.execute_async_script(
            """const done = arguments[arguments.length - 1];
            axe.run(document, {runOnly: arguments[0], resultTypes: ["violations"]})
               .then((found) => done(found.violations), (error) => done([{id: String(error), nodes: []}]));""",
            TAGS,
        )
        told = [(one["id"], [node["target"] for node in one["nodes"]][:3]) for one in found]
        assert told == [], f"{screen}: {json.dumps(told)}"
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


class Outline(HTMLParser):
    """What a page says of itself to a reader who does not see it."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.headings: list[int] = []
        self.ids: list[str] = []
        self.feed(source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        known = dict(attrs)
        self.elements.append((tag, known))
        if re.fullmatch(r"h[1-6]", tag):
            self.headings.append(int(tag[1]))
        if known.get("id"):
            self.ids.append(str(known["id"]))

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.mark.parametrize("page", PAGES)
def test_a_page_says_what_it_shows(pages: dict[str, Path], page: str) -> None:
    outline = Outline(pages[page].read_text(encoding="utf-8"))
    (root,) = outline.all("html")
    assert root.get("lang") == "en"
    assert len(outline.all("main")) == 1
    assert len(outline.ids) == len(set(outline.ids)), "an id is given twice"
    for named in (a for _, a in outline.elements if a.get("aria-labelledby")):
        assert set(str(named["aria-labelledby"]).split()) <= set(outline.ids)
    assert outline.headings[0] == 1
    assert outline.headings.count(1) == 1
    steps = zip(outline.headings, outline.headings[1:], strict=False)
    assert all(after <= before + 1 for before, after in steps), "a heading skips a level"
    assert all(image.get("alt") is not None for image in outline.all("img"))
    assert all(head.get("scope") for head in outline.all("th")), "a heading of a table names no scope"
    assert all(drawing.get("aria-label") or drawing.get("aria-hidden") for drawing in outline.all("svg"))
    scrolled = [a for _, a in outline.elements if "scroll" in str(a.get("class")).split()]
    assert all(one.get("tabindex") == "0" and one.get("role") and one.get("aria-label") for one in scrolled)


def luminance(colour: str) -> float:
    """Relative luminance of "#rrggbb" (WCAG 2.2)."""
    parts = np.array([int(colour[at : at + 2], 16) for at in (1, 3, 5)]) / 255
    linear = np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
    return float(linear @ np.array([0.2126, 0.7152, 0.0722]))


def contrast(one: str, other: str) -> float:
    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def test_contrast_is_measured_as_wcag_does() -> None:
    assert contrast("#ffffff", "#000000") == pytest.approx(21.0)
    assert contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.01)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colours_of_text_stand_out(scheme: str) -> None:
    """4.5:1 (WCAG 2.2, 1.4.3, AA) for every colour of text on every ground that it is written on."""
    sheet = read_part("report.css")
    blocks = re.findall(r":root {(.*?)}", sheet, re.DOTALL)
    colours: dict[str, str] = {}
    for block in blocks[: 1 if scheme == "light" else 2]:
        colours |= dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6});", block))
    grounds: dict[str, tuple[str, ...]] = {
        "ink": ("paper", "card", "faint"),
        "soft": ("paper", "card", "faint", "NM-wash"),
        "link": ("paper", "card"),
        "VM": ("paper", "VM-wash"),
        "FM": ("FM-wash",),
        "BM": ("BM-wash",),
        "alert": ("alert-wash",),
    }
    weak = [
        (text, ground, round(contrast(colours[text], colours[ground]), 2))
        for text, over in grounds.items()
        for ground in over
        if contrast(colours[text], colours[ground]) < 4.5
    ]
    assert weak == []


def test_the_newest_axe_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find: Callable[[], Path | None] = axe_file
    (tmp_path / "axe.min.js").write_text("")
    monkeypatch.setenv("MEMSCAN_AXE", str(tmp_path / "axe.min.js"))
    assert find() == tmp_path / "axe.min.js"
