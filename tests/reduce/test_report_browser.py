"""The report in a real browser: it draws, filters and sorts, runs no foreign script and asks for nothing."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from typing import Any

import pytest

from pipelines.reduce import reduce_run

webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
Select = pytest.importorskip("selenium.webdriver.support.ui").Select
BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
pytestmark = [
    pytest.mark.skipif(BROWSER is None or DRIVER is None, reason="no Chromium with chromedriver on this machine"),
    pytest.mark.slow,
]
FLAGS = [
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
]


@pytest.fixture(scope="module")
def browser(kit: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    folder = tmp_path_factory.mktemp("browser")
    prompts = [
        kit.Planted("zebra <script>document.title='pwned'</script>", "VM VM VM VM", ("ref-1", "ref-2")),
        kit.Planted("apple \"onerror='document.title=1'", "FM FM FM NM", ("ref-3",)),
        kit.Planted("مرحبا blue door", "BM BM NM NM", ("ref-4",)),
        kit.Planted("plain"),
    ]
    reduce_run(str(kit.write_run(folder / "run", prompts)))
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for flag in [*FLAGS, f"--user-data-dir={folder / 'profile'}"]:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    try:
        driver.get_log("performance")
        driver.get((folder / "run" / "report.html").as_uri())
        yield driver
    finally:
        driver.quit()


def shown(browser: Any) -> list[str]:
    return [
        card.find_element("tag name", "h3").text.split()[0]
        for card in browser.find_elements("css selector", "#cards > li")
        if card.is_displayed()
    ]


def test_no_error_no_request_no_injection(browser: Any) -> None:
    assert browser.title == "synthetic: census of memorisation"
    assert browser.get_log("browser") == []
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    pages = [e["params"] for e in events if e["method"] == "Network.requestWillBeSent"]
    urls = [page["request"]["url"] for page in pages if page["documentURL"].startswith("file:")]
    assert urls, "the log holds the page itself"
    assert all(url.startswith(("file:", "data:")) for url in urls)
    assert sum(url.startswith("file:") for url in urls) == 1


def test_pictures_are_drawn(browser: Any) -> None:
    widths = browser.execute_script("return Array.from(document.images, (image) => image.naturalWidth)")
    assert len(widths) == 12
    assert all(widths)


def test_filter_and_sort(browser: Any) -> None:
    assert shown(browser) == ["zebra", "apple", "مرحبا"]
    Select(browser.find_element("name", "sort")).select_by_value("caption")
    assert shown(browser)[:2] == ["apple", "zebra"]
    box = browser.find_element("css selector", "input[value=VM]")
    box.click()
    assert "zebra" not in shown(browser)
    box.click()
    search = browser.find_element("name", "text")
    search.send_keys("BLUE ref-4")
    assert shown(browser) == ["مرحبا"]
    assert browser.find_element("id", "shown").text == "1 of 3 shown"
    search.send_keys(" nowhere")
    assert shown(browser) == []
    assert browser.find_element("id", "empty").is_displayed()
    search.clear()
    search.send_keys(" ")
    assert len(shown(browser)) == 3


def test_blur(browser: Any) -> None:
    browser.find_element("name", "blur").click()
    image = browser.find_element("css selector", ".photo img")
    assert "blur" in browser.execute_script("return getComputedStyle(arguments[0]).filter", image)
    browser.find_element("name", "blur").click()
