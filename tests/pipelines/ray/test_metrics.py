"""What a scan tells while it runs: metrics as Prometheus gets them from a node, and the log of the run."""

from __future__ import annotations

import json
import os
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from memscan.redaction import HIDDEN, redact
from pipelines.ray.logs import json_line
from pipelines.ray.metrics import METRICS, Meters, Metric
from pipelines.run_folder.runs import Run

FIELDS = ["time", "level", "run", "stage", "part", "message"]
# Ray's processes hand their metrics on every second here (`ray_once`); a loaded machine may take longer.
PATIENCE = 60


@pytest.fixture(scope="module")
def metered(
    tiny_world: Any, ray_once: None, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Path, Scraper]]:
    from pipelines.scan.job import scan

    out = tmp_path_factory.mktemp("metered") / "run"
    with Scraper() as scraper:
        scan(tiny_world.config(out, name="metered", part_size=6))
        yield out, scraper


class Scraper:
    """What Prometheus would know of a run: the last value of every series, asked for over HTTP again and again."""

    def __init__(self) -> None:
        self.series: dict[tuple[str, frozenset[tuple[str, str]]], float] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, daemon=True)

    def __enter__(self) -> Scraper:
        self._thread.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self._stop.set()
        self._thread.join()

    def sum(self, name: str, by: str | None = None, **tags: str) -> Any:
        """Sum over all processes, or one a value of the tag `by`; zeros are left out."""
        found: Counter[str] = Counter()
        for (other, labels), value in list(self.series.items()):
            if other == name and tags.items() <= labels:
                found[dict(labels)[by] if by else ""] += value
        return {tag: value for tag, value in found.items() if value} if by else found[""]

    def _follow(self) -> None:
        import ray

        while not self._stop.wait(0.3):
            node = ray.nodes()[0]
            try:
                address = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
                with urllib.request.urlopen(address, timeout=10) as answer:
                    self._take(answer.read().decode())
            except (OSError, ValueError):
                continue  # the exporter is not there yet, or not at all without ray[default]

    def _take(self, text: str) -> None:
        from prometheus_client.parser import text_string_to_metric_families

        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                if sample.labels.get("run") == "metered":
                    self.series[sample.name, frozenset(sample.labels.items())] = sample.value


@pytest.mark.slow
def test_counters_are_the_counts_of_the_run(metered: tuple[Path, Scraper]) -> None:
    pytest.importorskip("opentelemetry.exporter.prometheus", reason="ray[default] exports metrics")
    out, scrape = metered
    run = Run.load(str(out))
    counts, until = run.progress(), time.monotonic() + PATIENCE
    last = [("ray_memscan_committed_rows", {}), ("ray_memscan_rows_total", {"stage": "write"})]
    while any(scrape.sum(name, **tags) < counts.rows for name, tags in last) and time.monotonic() < until:
        time.sleep(0.2)

    for stage in ("sample", "judge"):
        rows = scrape.sum("ray_memscan_rows_total", by="status", stage=stage)
        assert rows == {"done": counts.done, "rejected": counts.rejected}
    assert scrape.sum("ray_memscan_rejects_total", by="reason", stage="judge") == counts.reasons
    assert scrape.sum("ray_memscan_generations_total", by="label") == counts.labels
    # Two steps with and without the caption for each generation.
    assert scrape.sum("ray_memscan_denoiser_calls_total") == counts.generations * 2 * 2
    assert scrape.sum("ray_memscan_rows_total", by="status", stage="index") == {"done": 24, "rejected": 1}
    assert scrape.sum("ray_memscan_rejects_total", by="reason", stage="index") == {"image_undecodable": 1}

    assert scrape.sum("ray_memscan_committed_rows", by="status") == {"done": counts.done, "rejected": counts.rejected}
    assert scrape.sum("ray_memscan_parts", by="state") == {"committed": len(run.parts), "total": len(run.parts)}
    assert scrape.sum("ray_memscan_queue_rows") == 0
    assert scrape.sum("ray_memscan_workers", by="worker") == {"census": 1}
    block = run.config().resources.prompts_per_block
    assert scrape.sum("ray_memscan_block_seconds_count", worker="census") == -(-counts.rows // block)
    assert set(scrape.sum("ray_memscan_busy_seconds_total", by="stage")) == {"index", "sample", "judge", "write"}
    assert {name for metric in METRICS for name in metric.exported} <= {name for name, _ in scrape.series}


def test_without_ray_nothing_is_counted_and_nothing_fails() -> None:
    """Ray may be there in this process; a metric that it refuses would raise."""
    nothing = Metric("memscan_nothing", "counter", "Of a test.")
    Meters("x").add(nothing, 0)
    assert all(metric.tags == tuple(dict.fromkeys(metric.tags)) for metric in METRICS)
    assert len({metric.name for metric in METRICS}) == len(METRICS)


@pytest.mark.slow
def test_the_log_tells_the_story(metered: tuple[Path, Scraper]) -> None:
    out, _ = metered
    lines = [json.loads(line) for line in (out / "logs" / "memscan.jsonl").read_text().splitlines()]
    assert all(list(line)[: len(FIELDS)] == FIELDS for line in lines)
    assert {line["run"] for line in lines} == {"metered"}
    told = [line for line in lines if line["stage"] != "ray"]
    assert told[0]["message"] == "scan begins"
    assert told[-1]["message"] == "scan is complete"
    commits = [line for line in told if line["message"] == "part committed"]
    assert [line["part"] for line in commits] == sorted(line["part"] for line in commits)
    counts = Run.load(str(out)).progress()
    assert sum(line["rows"] for line in commits) == counts.rows
    assert sum((Counter(line["reasons"]) for line in commits), Counter()) == counts.reasons


def test_a_failed_scan_is_told(tiny_world: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pipelines.scan.job import scan

    def broken(*arguments: object) -> None:
        raise ZeroDivisionError("a bug at https://user:hunter22@host/x?X-Amz-Signature=abcdef")

    monkeypatch.setattr("pipelines.scan.job.read_prompts", broken)
    with pytest.raises(ZeroDivisionError):
        scan(tiny_world.config(tmp_path / "run"))
    (line,) = map(json.loads, (tmp_path / "run" / "logs" / "memscan.jsonl").read_text().splitlines())
    assert (line["level"], line["message"]) == ("error", "scan failed")
    assert line["error"] == f"ZeroDivisionError: a bug at https://{HIDDEN}@host/x?X-Amz-Signature={HIDDEN}"


@pytest.mark.parametrize(
    "text",
    [
        "AKIAABCDEFGHIJKLMNOP",
        "s3 said: Authorization: Bearer abcdef.0123456789",
        "https://bucket/key?X-Amz-Credential=who%2Fwhere&X-Amz-Signature=0123456789abcdef",
        "https://hub/model?token=hf_0123456789",
        "sent s3cr3t-of-the-environment",
    ],
)
def test_secrets_are_hidden(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_SERVICE_TOKEN", "s3cr3t-of-the-environment")
    told = redact(text)
    assert HIDDEN in told
    for secret in ("AKIAABC", "abcdef", "who%2F", "hf_0", "s3cr3t"):
        assert secret not in told
    assert HIDDEN in json.loads(json_line(text))["message"]


@pytest.mark.parametrize(
    "text", ["sample 5/10 prompts (50 %)", "s3://bucket/key: cannot read", "a caption: token, key=3"]
)
def test_ordinary_words_stay(text: str) -> None:
    assert "TOKENIZERS_PARALLELISM" not in os.environ or redact("false") == "false"
    assert redact(text) == text
