"""References that could not be indexed are counted with their reasons, where a run and its report show them."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from memscan.index.rejects import rejects_of
from memscan.report.words import notices
from pipelines.commands.census import failed_in_models


def manifest(**facts: int) -> Any:
    return SimpleNamespace(**facts)


def test_reasons_of_all_builds_are_counted(tmp_path: Path) -> None:
    for name, reasons in (("rejects.parquet", ["embedding_failed"] * 2), ("rejects-000002.parquet", ["image_missing"])):
        pq.write_table(pa.table({"reason": reasons}), tmp_path / name)
    (tmp_path / "shards").mkdir()
    pq.write_table(pa.table({"reason": ["no"]}), tmp_path / "shards" / "rejects.parquet")
    found = rejects_of(str(tmp_path), manifest(rejected=3, source_rows=9))
    reasons = {"embedding_failed": 2, "image_missing": 1}
    assert found == {"source_rows": 9, "rejected": 3, "reasons": reasons}
    assert failed_in_models(found["reasons"]) == 2


def test_damaged_reasons_leave_the_count(tmp_path: Path) -> None:
    (tmp_path / "rejects.parquet").write_bytes(b"no parquet")
    found = rejects_of(str(tmp_path), manifest(rejected=3, source_rows=9))
    assert found == {"source_rows": 9, "rejected": 3, "reasons": {}}
    assert rejects_of("/nowhere", manifest(rejected=0, source_rows=9))["rejected"] == 0


def test_the_report_alerts_to_them_and_to_unsuited_settings() -> None:
    census: dict[str, Any] = {
        "counts": {"rejected": 0, "distinct_prompts": 9},
        "run": {},
        "references": {"missing": 0},
        "partial": False,
        "index": {"rejects": {"source_rows": 9, "rejected": 3, "reasons": {"embedding_failed": 3}}},
        "method": {"generator": {"warnings": ["generator.steps 50 do not suit"]}, "thresholds": {"source": "mine"}},
    }
    references, settings = notices(census, 0)
    assert references["title"] == "3 references of 9 could not be indexed."
    assert "embedding_failed 3" in references["text"]
    assert settings["kind"] == "alert"
    assert settings["text"] == "generator.steps 50 do not suit."
    assert notices({**census, "index": None, "method": {**census["method"], "generator": None}}, 0) == []
