"""The report in a real browser: it draws, filters and sorts, runs no foreign script and asks for nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from memscan.config import MetricConfig
from memscan.records import FLAGGED, REMOVAL
from memscan.report import render_report
from memscan.report.verification import render_verification
from pipelines.reduce.job import reduce_run
from tests.mitigation.test_verification import locality, result

Select = pytest.importorskip("selenium.webdriver.support.ui", reason="selenium is not installed").Select
WebDriverWait = pytest.importorskip("selenium.webdriver.support.ui").WebDriverWait
pytestmark = [pytest.mark.slow, pytest.mark.waits]


MANY = 50_000
CLUSTERS = 200
HOSTILE = ["zebra <script>document.title='pwned'</script>", "apple \"onerror='document.title=1'", "مرحبا blue door"]


@pytest.fixture(scope="module")
def run_dir(kit: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    prompts = [
        kit.Planted(HOSTILE[0], "VM VM VM VM", ("ref-1", "ref-2")),
        kit.Planted(HOSTILE[1], "FM FM FM NM", ("ref-3",), mapped=True),
        kit.Planted(HOSTILE[2], "BM BM NM NM", ("ref-4",)),
        kit.Planted("plain"),
    ]
    folder = tmp_path_factory.mktemp("report") / "run"
    reduce_run(str(kit.write_run(folder, prompts)))
    return Path(folder)


@pytest.fixture(scope="module")
def small(browser: Any, run_dir: Path) -> Any:
    """The report of a small run, open."""
    return opened(browser, run_dir / "report.html")


@pytest.fixture(scope="module")
def large(browser: Any, run_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A report with 50,000 flagged prompts, open."""
    census = json.loads((run_dir / "census.json").read_text())
    census["counts"]["flagged"] = MANY
    clusters = [cluster(number) for number in range(1, CLUSTERS + 1)]
    page = render_report(census, many_flagged(), clusters, REMOVAL.empty_table(), [], MetricConfig())
    path = tmp_path_factory.mktemp("large") / "report.html"
    path.write_text(page, encoding="utf-8")
    return opened(browser, path)


def opened(browser: Any, path: Path) -> Any:
    browser.get("about:blank")
    browser.get_log("performance")
    browser.get(path.as_uri())
    wait(browser, "document.documentElement.dataset.ready === 'true'")
    return browser


def cluster(number: int) -> dict[str, Any]:
    shares = dict.fromkeys(("VM", "FM", "BM"), MANY // CLUSTERS // 3)
    text = {"name": f"words of {number}", "caption": "a caption", "words": ["words"], "medoid": "0" * 16}
    return {"cluster": number, "prompts": MANY // CLUSTERS, "severity": 9.0, "images": 3} | shares | text | QUALITY


QUALITY = {"persistence": 0.5, "stability": None}


def many_flagged() -> pa.Table:
    """50,000 rows, classes and clusters in turn, a signal that grows along them."""
    numbers = range(MANY)
    rows = {
        "prompt_id": [f"{number:016x}" for number in numbers],
        "caption": [f"caption-{number} <b onclick=alert(1)>of a prompt with some words</b>" for number in numbers],
        "count": [1] * MANY,
        "label": [("VM", "FM", "BM")[number % 3] for number in numbers],
        "severity": [2.0 - number / MANY for number in numbers],
        "share": [1.0] * MANY,
        "samples": [4] * MANY,
        "foreground": [0.9] * MANY,
        "background": [0.9] * MANY,
        "margin": [0.1] * MANY,
        "noise_norm": [None] * MANY,
        "match_ids": [[f"ref-{number // 5}", f"ref-{number // 5 + 1}"] for number in numbers],
        "match_urls": [[f"https://example.org/{number // 5}.jpg", None] for number in numbers],
        "url": [None] * MANY,
        "source": ["prompts.csv"] * MANY,
        "row": list(numbers),
        "match_counts": [[3, 1]] * MANY,
        "match_groups": [[f"ref-{number // 5}", f"ref-{number // 5 + 1}"] for number in numbers],
        "reach": [2] * MANY,
        "component": [1] * MANY,
        "cluster": [1 + number % CLUSTERS for number in numbers],
        "signals": [[("one_step_norm", float(number // 10))] for number in numbers],
        "agreement": [None] * MANY,
        "evidence_file": [None] * MANY,
        "evidence_sample": [0] * MANY,
        "alike_ids": [None] * MANY,
    }
    return pa.table(rows, schema=FLAGGED)


def shown(browser: Any) -> list[str]:
    return [card.find_element("tag name", "h3").text.split()[0] for card in cards(browser)]


def cards(browser: Any) -> list[Any]:
    return [card for card in browser.find_elements("css selector", "#cards > li") if card.is_displayed()]


def said(browser: Any) -> str:
    return str(browser.find_element("id", "shown").text)


def wait(browser: Any, script: str) -> None:
    """Until the script returns true."""
    WebDriverWait(browser, 60, 0.05).until(lambda _: browser.execute_script(f"return {script}"))


def quiet(browser: Any, title: str = "synthetic: census of memorisation") -> None:
    """No error on the console, no foreign script, no request but for the page itself."""
    assert browser.title == title
    assert browser.get_log("browser") == []
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    pages = [e["params"] for e in events if e["method"] == "Network.requestWillBeSent"]
    urls = [page["request"]["url"] for page in pages if page["documentURL"].startswith("file:")]
    assert all(url.startswith(("file:", "data:")) for url in urls)
    assert sum(url.startswith("file:") for url in urls) <= 1


def test_pictures_are_drawn(small: Any) -> None:
    wait(small, "Array.from(document.images).every((image) => image.complete)")
    widths = small.execute_script("return Array.from(document.images, (image) => image.naturalWidth)")
    # generation, foreground, background, similarity; match, its foreground, its background; a map over its generation
    assert len(widths) == 3 * 7 + 2
    assert all(widths)
    assert all(image.get_attribute("alt") for image in small.find_elements("tag name", "img"))


def test_a_localisation_map_lies_over_its_generation(small: Any) -> None:
    """In the one card that has a map: light where it is, in the generation's place, which is seen through it."""
    (layers,) = small.find_elements("css selector", ".layers")
    image, drawn = layers.find_elements("tag name", "img")
    assert image.rect == drawn.rect
    assert image.rect["width"] == image.rect["height"] == 112
    others = layers.find_elements("xpath", "ancestor::div[@class='pictures']//figure/img")
    assert image.rect["y"] == max(other.rect["y"] for other in others)  # in line with the pictures beside it
    assert 0.3 < float(drawn.value_of_css_property("opacity")) < 0.8
    assert "localisation agrees 75%" in layers.find_element("xpath", "ancestor::li").text
    brightness = small.execute_script(
        """const drawn = document.querySelector(".layers .over"), canvas = document.createElement("canvas");
        canvas.width = canvas.height = 112;
        const brush = canvas.getContext("2d", {willReadFrequently: true});
        brush.drawImage(drawn, 0, 0, 112, 112);
        const colours = (x) => brush.getImageData(x, 20, 20, 70).data.filter((_, at) => at % 4 < 3);
        return [10, 85].map((x) => colours(x).reduce((a, b) => a + b));"""
    )
    assert brightness[0] > 2 * brightness[1]


def test_filter_and_sort(small: Any) -> None:
    assert shown(small) == ["zebra", "apple", "مرحبا"]
    Select(small.find_element("name", "sort")).select_by_value("caption")
    assert shown(small)[:2] == ["apple", "zebra"]
    box = small.find_element("css selector", "input[value=VM]")
    box.click()
    assert "zebra" not in shown(small)
    box.click()
    search = small.find_element("name", "text")
    search.send_keys("BLUE ref-4")
    wait(small, "document.querySelectorAll('#cards > li').length === 1")
    assert shown(small) == ["مرحبا"]
    assert said(small) == "1 of 3 prompts"
    search.send_keys(" nowhere")
    wait(small, "document.querySelectorAll('#cards > li').length === 0")
    assert small.find_element("id", "empty").is_displayed()
    search.clear()
    search.send_keys(" ")
    wait(small, "document.querySelectorAll('#cards > li').length === 3")
    quiet(small)


def test_hostile_captions_are_text(small: Any) -> None:
    captions = [card.find_element("tag name", "h3").text for card in cards(small)]
    assert {HOSTILE[0], HOSTILE[1]} <= set(captions)
    assert small.find_elements("css selector", "#cards script, #cards iframe, #cards [onerror]") == []
    quiet(small)


def test_blur(small: Any) -> None:
    small.find_element("name", "blur").click()
    wait(small, "getComputedStyle(document.querySelector('.photo img')).filter.includes('blur')")
    small.find_element("name", "blur").click()


def test_fifty_thousand_prompts(large: Any) -> None:
    assert said(large) == f"{MANY:,} of {MANY:,} prompts"
    assert len(cards(large)) == 24
    first = shown(large)
    for button, page in (("next", 2), ("last", -(-MANY // 24)), ("previous", -(-MANY // 24) - 1), ("first", 1)):
        large.find_element("css selector", f"[data-go={button}]").click()
        assert large.find_element("id", "page").text == f"Page {page:,} of {-(-MANY // 24):,}"
    assert shown(large) == first
    for label, kept in (("VM", 2 * MANY // 3), ("FM", MANY // 3)):
        large.find_element("css selector", f"input[value={label}]").click()
        assert abs(int(said(large).split()[0].replace(",", "")) - kept) <= 1
    assert {card.find_element("css selector", ".chip").text for card in cards(large)} == {"BM"}
    for label in ("VM", "FM"):
        large.find_element("css selector", f"input[value={label}]").click()
    Select(large.find_element("name", "sort")).select_by_value("signal:one_step_norm")
    assert shown(large)[0] == f"caption-{MANY - 10}"  # the signal grows; equal ones stay worst first
    large.find_element("name", "text").send_keys(f"caption-{MANY // 2} ")
    wait(large, "document.querySelectorAll('#cards > li').length === 1")
    assert shown(large) == [f"caption-{MANY // 2}"]
    large.find_element("name", "text").clear()
    large.find_element("name", "text").send_keys(" ")
    wait(large, f"document.getElementById('shown').textContent.startsWith('{MANY:,} of')")
    large.execute_script("location.hash = '#cluster-7'")
    wait(large, "document.querySelector('#cluster h3')?.textContent.startsWith('Cluster 7:')")
    assert said(large) == f"{MANY // CLUSTERS:,} of {MANY:,} prompts"
    quiet(large)


def test_keyboard_alone_turns_pages(large: Any) -> None:
    large.execute_script("location.hash = '#flagged'")
    wait(large, f"document.getElementById('shown').textContent.startsWith('{MANY:,} of')")
    body = large.find_element("tag name", "body")
    body.send_keys("n")
    assert large.find_element("id", "page").text.startswith("Page 2 ")
    body.send_keys("p")
    assert large.find_element("id", "page").text.startswith("Page 1 ")
    body.send_keys("/")
    assert large.switch_to.active_element.get_attribute("name") == "text"


def test_verification_page(browser: Any, tmp_path: Path) -> None:
    """Hostile names and captions: nothing runs, nothing is fetched, nothing is wider than the window."""
    pictures = np.full((1, 8, 8, 3), 128, np.uint8)
    results = [result(name, HOSTILE[0]) for name in ("nemo", HOSTILE[1], "finetune", "wanda", "dedup", "nemo_c", "own")]
    shown = {one["name"]: pictures for one in results}
    path = tmp_path / "report.html"
    path.write_text(render_verification(results, pictures, shown, [None], locality(HOSTILE[0])), encoding="utf-8")
    browser.get("about:blank")
    browser.get_log("performance")
    browser.get(path.as_uri())
    quiet(browser, f"{HOSTILE[0]}: do the repairs hold?")
    assert len(browser.find_elements("css selector", "table.repairs thead th")) == 9 + 4
    assert len(browser.find_elements("css selector", ".row img")) == 8
    assert browser.execute_script("return document.documentElement.scrollWidth <= window.innerWidth")
    widths = browser.execute_script("return Array.from(document.images, (image) => image.naturalWidth)")
    assert all(widths)
