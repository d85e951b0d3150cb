"""The three files of the flagged list: the same rows, nothing lost, nothing that a spreadsheet would run."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memscan.census import flagged
from memscan.errors import InputError
from memscan.records import FLAGGED

HOSTILE = [
    "=cmd|' /C calc'!A0",
    "+1+1",
    "-2",
    "@SUM(A1)",
    "\t=1+1",
    "\r=1+1",
    "\n=1+1",
    "  =1+1",
    "\ufeff=1+1",
    "\uff1d1+1",
    "'=already quoted",
    "'",
    'quote " and "" more',
    "comma, semicolon; tab\there",
    "line one\nline two\r\nline three",
    "\u202eright to left\u202c مرحبا 🌍 é",
    "line\u2028separator\u0085next",
    "{{ 7 * 7 }} <script>alert(1)</script>",
    "None",
    "ordinary",
]


def row(caption: str, **changes: Any) -> dict[str, Any]:
    return {
        "prompt_id": "00ff00ff00ff00ff",
        "caption": caption,
        "count": 3,
        "label": "VM",
        "severity": 1.75,
        "share": 0.9,
        "samples": 4,
        "foreground": 0.95,
        "background": 0.93,
        "margin": 0.13,
        "noise_norm": None,
        "match_ids": [caption, "ref-1"],
        "match_urls": ["https://example.org/a?b=1&c=2", None],
        "url": caption,
        "source": "data/prompts.csv",
        "row": 12,
        "match_counts": [3, 1],
        "match_groups": [caption, "ref-0"],
        "reach": 2,
        "component": 1,
        "cluster": 0,
        "signals": [("one_step_norm", 12.5), (caption, 0.25)],
        "agreement": 0.75,
        "evidence_file": "census/part-00000/0.parquet",
        "evidence_sample": 1,
        **changes,
    }


def table(captions: list[str]) -> pa.Table:
    return pa.Table.from_pylist([row(caption) for caption in captions], schema=FLAGGED)


def test_csv_gives_back_every_value() -> None:
    original = table(HOSTILE)
    assert flagged.read_csv(flagged.to_csv(original)).equals(original)


text = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x00"), min_size=1, max_size=40)
single = st.floats(width=32, allow_nan=False, allow_infinity=False)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(text, single, st.lists(text, max_size=3)), max_size=4))
def test_csv_and_jsonl_give_back_any_text_and_number(values: list[tuple[str, float, list[str]]]) -> None:
    rows = [row(caption, margin=margin, match_ids=ids) for caption, margin, ids in values]
    original = pa.Table.from_pylist(rows, schema=FLAGGED)
    assert flagged.read_csv(flagged.to_csv(original)).equals(original)
    lines = flagged.to_jsonl(original).decode().splitlines()
    assert pa.Table.from_pylist([json.loads(line) for line in lines], schema=FLAGGED).equals(original)


def test_pandas_reads_the_csv() -> None:
    frame = pd.read_csv(io.BytesIO(flagged.to_csv(table(HOSTILE))), keep_default_na=False)
    assert list(frame.columns) == FLAGGED.names
    neutral = [caption[1:] if caption.startswith("'") else caption for caption in frame["caption"]]
    assert neutral == HOSTILE
    assert frame["severity"].tolist() == [1.75] * len(HOSTILE)
    assert json.loads(frame["match_ids"][0]) == [HOSTILE[0], "ref-1"]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("soffice") is None, reason="no LibreOffice on this machine")
def test_libreoffice_keeps_every_caption(tmp_path: Path) -> None:
    """CSV to spreadsheet and back by LibreOffice: no formula is computed, no caption cut, no letter lost."""
    captions = [caption for caption in HOSTILE if "\r" not in caption]  # a spreadsheet's cells end lines with \n alone
    (tmp_path / "in.csv").write_bytes(flagged.to_csv(table(captions)))
    office = ["soffice", f"-env:UserInstallation={(tmp_path / 'profile').as_uri()}", "--headless", "--convert-to"]
    options = {"capture_output": True, "check": True, "cwd": tmp_path, "timeout": 240}
    # Comma, double quote, UTF-8 (76); text cells as they are.
    subprocess.run([*office, "ods", "--infilter=CSV:44,34,76,1", "in.csv"], **options)
    subprocess.run([*office, "csv:Text - txt - csv (StarCalc):44,34,76", "--outdir", "out", "in.ods"], **options)
    frame = pd.read_csv(tmp_path / "out" / "in.csv", keep_default_na=False, dtype=str)
    assert list(frame.columns) == FLAGGED.names
    read = [one.removeprefix("'") for one in frame["caption"]]  # as `read_csv`
    assert read == [caption.replace("\t", "") for caption in captions]  # LibreOffice keeps no tabs in a cell


def test_no_cell_begins_as_a_formula() -> None:
    # Read as text, by another reader than ours: nothing but numbers may begin with an operator.
    frame = pd.read_csv(io.BytesIO(flagged.to_csv(table(HOSTILE))), dtype=str, keep_default_na=False)
    for column in ("caption", "url", "match_ids", "source", "label"):
        for cell in frame[column]:
            assert not cell.lstrip(" \ufeff").startswith(("=", "+", "-", "@", "\t", "\r", "\n", "\uff1d"))


@pytest.mark.parametrize("text", ["=1", "+1", "-1", "@x", "\tx", "\rx", " =1", "\u200b=1", "\uff0b1", "'quoted"])
def test_dangerous_text_is_neutralised(text: str) -> None:
    assert flagged.neutralise(text) == f"'{text}"


@pytest.mark.parametrize("text", ["", "a=1", "1-2", " plain", "https://example.org/-", "é"])
def test_harmless_text_stays(text: str) -> None:
    assert flagged.neutralise(text) == text


def test_csv_opens_in_spreadsheets() -> None:
    data = flagged.to_csv(table(["Zürich, 東京"]))
    assert data.startswith(b"\xef\xbb\xbf")  # or Excel takes it for its old code page
    assert data.count(b"\r\n") == 2


def test_numbers_are_short_and_exact() -> None:
    line = json.loads(flagged.to_jsonl(table(["x"])))
    assert line["share"] == 0.9
    assert np.float32(line["share"]) == np.float32(0.9)


def test_jsonl_is_one_line_a_row_for_every_reader() -> None:
    data = flagged.to_jsonl(table(HOSTILE))
    assert len(data.decode().splitlines()) == len(HOSTILE)
    assert [json.loads(line)["caption"] for line in data.splitlines()] == HOSTILE


def test_files(tmp_path: Path) -> None:
    original = table(HOSTILE)
    paths = flagged.write_flagged(str(tmp_path / "flagged"), original, {"fingerprint": "abc"})
    assert [Path(path).name for path in paths] == list(flagged.NAMES)
    assert flagged.read_parquet(paths[0]).equals(original)
    metadata = pq.read_schema(paths[0]).metadata
    assert metadata[b"memscan.fingerprint"] == b"abc"
    assert b"memscan.schema_version" in metadata


def test_empty_list(tmp_path: Path) -> None:
    paths = flagged.write_flagged(str(tmp_path), FLAGGED.empty_table(), {})
    assert flagged.read_parquet(paths[0]).num_rows == 0
    assert flagged.read_csv(Path(paths[1]).read_bytes()).num_rows == 0
    assert Path(paths[2]).read_bytes() == b""


def test_unreadable_list_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="memscan reduce"):
        flagged.read_parquet(str(tmp_path / "missing.parquet"))
    bad = tmp_path / "bad.parquet"
    bad.write_bytes(b"PAR1 not really")
    with pytest.raises(InputError, match="not a flagged list"):
        flagged.read_parquet(str(bad))
