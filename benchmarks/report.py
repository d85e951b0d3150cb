"""What a reader waits for: a report opened in a headless Chromium from disk, and its first paint, filters and sorting.

By default for the report of a synthetic census of 1,000,000 prompts, 50,000 of them flagged, which is written, reduced
and removed again (half an hour on a small machine; `python -m benchmarks.reduce --folder DIR` keeps its runs, and
`--run DIR/1000000` takes one). First paint is what the browser says (PerformancePaintTiming, from the start of the
navigation), in a new profile every time; the other times are a click's or a key's until the list shows its outcome.
There is no other tool to compare with: the ratio is of the same list as one HTML table without a script.
"""

from __future__ import annotations

import argparse
import html
import json
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from benchmarks.synthetic_run import write_synthetic_run

TARGET_SECONDS = 2.0
FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
)
READY = "document.documentElement.dataset.ready === 'true'"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--run", type=Path, default=None, help="a reduced run, instead of a synthetic one")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--shots", type=Path, default=None, help="folder for pictures of the page")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        run = arguments.run or _reduced(Path(scratch) / "run", arguments.rows)
        plain = _as_plain_table(run, Path(scratch) / "plain.html")
        figures = [_visit(run / "report.html", Path(scratch), arguments.shots) for _ in range(arguments.repeats)]
        ours = {name: [one[name] for one in figures] for name in figures[0] if name != "requests"}
        theirs = [_first_paint(plain, Path(scratch)) for _ in range(arguments.repeats)]
        size = (run / "report.html").stat().st_size / 2**20
        flagged = pq.read_metadata(run / "flagged" / "flagged.parquet").num_rows
    print(f"{flagged:,} flagged prompts, {size:.1f} MiB; seconds, median and most of {arguments.repeats}")
    for name, values in {**ours, "first paint of a plain table": theirs}.items():
        print(f"{name:>34}{statistics.median(values):10.2f}{max(values):10.2f}")
    result = {
        "benchmark": "report",
        "settings": {"rows": arguments.rows, "repeats": arguments.repeats, "run": arguments.run is not None},
        "flagged": flagged,
        "mebibytes": size,
        "seconds": {name: statistics.median(values) for name, values in ours.items()},
        "requests": max(one["requests"] for one in figures),
        "reached": max(ours["first paint"]) < TARGET_SECONDS,
        "ratio": statistics.median(theirs) / statistics.median(ours["first paint"]),
    }
    print(json.dumps(result))


def _reduced(folder: Path, rows: int) -> Path:
    from pipelines.reduce.job import reduce_run

    reduce_run(str(write_synthetic_run(folder, rows)))
    return folder


def _as_plain_table(run: Path, path: Path) -> Path:
    table = pq.read_table(run / "flagged" / "flagged.parquet", columns=["caption", "label", "severity", "match_ids"])
    rows = ("".join(f"<td>{html.escape(str(value))}</td>" for value in row.values()) for row in table.to_pylist())
    path.write_text(f"<!doctype html><meta charset=utf-8><table><tr>{'<tr>'.join(rows)}</table>", encoding="utf-8")
    return path


def _browser(scratch: Path) -> Any:
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or shutil.which("google-chrome") or ""
    for flag in (*FLAGS, "--window-size=1280,1600", f"--user-data-dir={tempfile.mkdtemp(dir=scratch)}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    return webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))


def _first_paint(page: Path, scratch: Path) -> float:
    driver = _browser(scratch)
    try:
        driver.get(page.as_uri())
        return _painted(driver)
    finally:
        driver.quit()


def _painted(driver: Any) -> float:
    script = "return performance.getEntriesByName('first-contentful-paint')[0]?.startTime"
    return float(_until(lambda: driver.execute_script(script))) / 1000


def _until(found: Any) -> Any:
    end = time.monotonic() + 120
    while (value := found()) in (None, False):
        if time.monotonic() > end:
            raise SystemExit("the page did not do what was waited for")
        time.sleep(0.005)
    return value


def _visit(page: Path, scratch: Path, shots: Path | None) -> dict[str, Any]:
    driver = _browser(scratch)
    try:
        started = time.perf_counter()
        driver.get(page.as_uri())
        _until(lambda: driver.execute_script(f"return {READY}"))
        seconds = {"list ready": time.perf_counter() - started, "first paint": _painted(driver)}
        seconds |= {name: _acted(driver, script) for name, script in ACTIONS.items()}
        errors = [entry["message"] for entry in driver.get_log("browser")]
        if errors:
            raise SystemExit(f"the page wrote to the console: {errors[0]}")
        if shots:
            shots.mkdir(parents=True, exist_ok=True)
            driver.save_screenshot(str(shots / "report.png"))
        return {**seconds, "requests": _requests(driver, page)}
    finally:
        driver.quit()


# Each changes a control as a reader does, and is over when the list has been drawn and painted again.
ACTIONS = {
    "filter by class": "form.querySelector('input[value=VM]').click();",
    "sort by caption": "form.sort.value = 'caption'; form.sort.dispatchEvent(new Event('change', {bubbles: true}));",
    "search": "form.text.value = 'tower'; form.text.dispatchEvent(new Event('input', {bubbles: true}));",
}
_WATCH = """
const form = document.getElementById('controls'), list = document.getElementById('cards'), done = arguments[0];
const start = performance.now();
const watch = new MutationObserver(() => { watch.disconnect();
  requestAnimationFrame(() => setTimeout(() => done(performance.now() - start))); });
watch.observe(list, {childList: true});
"""


def _acted(driver: Any, script: str) -> float:
    driver.set_script_timeout(60)
    return float(driver.execute_async_script(_WATCH + script)) / 1000


def _requests(driver: Any, page: Path) -> int:
    """Requests for anything but the page itself and data URIs."""
    events = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
    sent = [event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"]
    return sum(not url.startswith(("data:", "chrome:", page.as_uri())) for url in sent)


if __name__ == "__main__":
    main()
