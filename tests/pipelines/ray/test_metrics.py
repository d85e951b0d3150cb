"""What a scan tells while it runs: metrics as Prometheus gets them from a node, and the log of the run."""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from memscan.redaction import HIDDEN, redact
from pipelines.ray.logs import json_line
from pipelines.ray.metrics import METRICS, Meters, Metric
from pipelines.run_folder.runs import Run
from tests.support.scraper import Scraper

FIELDS = ["time", "level", "run", "stage", "part", "message"]
# Ray's processes hand their metrics on every second here (`ray_once`); a loaded machine may take longer.
PATIENCE = 60


@pytest.mark.slow
def test_counters_are_the_counts_of_the_run(census_on_ray: tuple[Path, Scraper]) -> None:
    pytest.importorskip("opentelemetry.exporter.prometheus", reason="ray[default] exports metrics")
    out, scrape = census_on_ray
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
    assert scrape.sum("ray_memscan_workers", by="worker") == {"sample": 1, "judge": 1}
    block = run.config().resources.prompts_per_block
    assert scrape.sum("ray_memscan_block_seconds_count", worker="sample") == -(-counts.rows // block)
    assert set(scrape.sum("ray_memscan_busy_seconds_total", by="stage")) == {"index", "sample", "judge", "write"}
    assert {name for metric in METRICS for name in metric.exported} <= {name for name, _ in scrape.series}


def test_without_ray_nothing_is_counted_and_nothing_fails() -> None:
    """Ray may be there in this process; a metric that it refuses would raise."""
    nothing = Metric("memscan_nothing", "counter", "Of a test.")
    Meters("x").add(nothing, 0)
    assert all(metric.tags == tuple(dict.fromkeys(metric.tags)) for metric in METRICS)
    assert len({metric.name for metric in METRICS}) == len(METRICS)


@pytest.mark.slow
def test_the_log_tells_the_story(census_on_ray: tuple[Path, Scraper]) -> None:
    out, _ = census_on_ray
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
