"""Configurations and run manifests of any content: read, or refused in one line."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from memscan.config import CensusConfig, PromptsConfig, load_config, parse_config
from memscan.errors import MemscanError
from memscan.prompts.table import read_prompts
from pipelines.run_folder.runs import Run
from tests.fuzz.damage import ANY, one_line, spoilt

SECTIONS = st.dictionaries(st.sampled_from(list(CensusConfig.model_fields)), ANY, max_size=6)
QUIET = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


@QUIET
@given(st.binary(max_size=200))
def test_a_configuration_of_any_bytes(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "census.yaml").write_bytes(content)
    one_line(lambda: load_config(tmp_path / "census.yaml"))


@given(SECTIONS)
def test_a_configuration_of_any_values(data: dict[str, Any]) -> None:
    one_line(lambda: parse_config(data))


@given(st.text(max_size=40))
def test_an_override_of_any_text(text: str) -> None:
    one_line(lambda: parse_config({}, [text]))


@QUIET
@given(st.binary(max_size=100) | ANY.map(lambda value: json.dumps(value).encode()))
def test_a_run_manifest_of_any_content(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "run.json").write_bytes(content)
    with pytest.raises(MemscanError):
        Run.load(str(tmp_path))


KEYS = ("name", "state", "identity", "config", "models", "index", "prompts", "counts")


@QUIET
@given(st.dictionaries(st.sampled_from(KEYS), ANY, max_size=8))
def test_a_run_manifest_with_any_value_in_its_keys(tmp_path: Path, values: dict[str, Any]) -> None:
    good: dict[str, Any] = {"name": "n", "state": "running", "index": None, "prompts": None, "counts": None}
    good |= {"format": 1, "identity": {}, "config": {}, "models": {}, "error": None, "code_version": "0"}
    good |= {"fingerprint": "0", "config_fingerprint": "0"}
    good |= dict.fromkeys(("created", "updated"), "2026-11-25T00:00:00+00:00")
    (tmp_path / "run.json").write_text(json.dumps({**good, **values}))
    try:
        run = Run.load(str(tmp_path))
    except MemscanError as error:
        assert "\n" not in str(error)
    else:
        assert run.state in ("running", "interrupted", "failed", "complete")
        assert len(run.parts) >= 0


def a_table() -> bytes:
    out = io.BytesIO()
    pq.write_table(pa.table({"caption": ["a cat", "a dog", None], "url": ["https://x/1", "", None]}), out)
    return out.getvalue()


FILES = st.tuples(st.binary(max_size=300), st.sampled_from(["csv", "tsv", "jsonl", "txt", "parquet"]))


@QUIET
@given(FILES | st.tuples(spoilt(a_table()), st.just("parquet")))
def test_a_prompt_file_of_any_bytes(tmp_path: Path, file: tuple[bytes, str]) -> None:
    """Read with every row accounted for, or refused in one line."""
    content, kind = file
    (tmp_path / f"prompts.{kind}").write_bytes(content)
    config = PromptsConfig(paths=[str(tmp_path / f"prompts.{kind}")])
    try:
        found = read_prompts(config)
    except MemscanError as error:
        assert "\n" not in str(error)
    else:
        assert sum(found.table["count"].to_pylist()) == found.rows_read
