from __future__ import annotations

import csv
import html
import html.entities
import io
import json
import unicodedata
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from memscan.config import PromptsConfig
from memscan.errors import InputError, Reason
from memscan.prompts import folding, rows
from memscan.prompts.table import PromptTable, normalise, read_prompts
from memscan.records import PROMPTS, prompt_id

ENTITY_PIECES = ["&", "amp", "AMP", "#38", "#x26", "lt", "nbsp", ";", "=", "a", " ", "\u037e", "\u0301", "\x00"]
ENTITY_SOUP = st.lists(st.sampled_from(ENTITY_PIECES), max_size=30).map("".join)


def read(*paths: Path, **options: Any) -> PromptTable:
    result = read_prompts(PromptsConfig(paths=[str(path) for path in paths], **options))
    assert result.table.schema == PROMPTS
    result.table.validate(full=True)
    assert sum(result.table["count"].to_pylist()) == result.rows_read == sum(source.rows for source in result.sources)
    ids = result.table["prompt_id"].to_pylist()
    assert len(set(ids)) == len(ids)
    for row in result.table.to_pylist():
        assert (row["status"] == "rejected") == (row["reason"] is not None) == (row["message"] is not None)
        if row["status"] == "done":
            assert row["prompt_id"] == prompt_id(row["caption"])
            assert normalise(row["caption"]) == row["caption"] != ""
    return result


def captions(result: PromptTable) -> list[str]:
    return [row["caption"] for row in result.table.to_pylist() if row["status"] == "done"]


def reasons(result: PromptTable) -> dict[int, str]:
    return {row["row"]: row["reason"] for row in result.table.to_pylist() if row["status"] == "rejected"}


def messages(result: PromptTable) -> dict[int, str]:
    return {row["row"]: row["message"] for row in result.table.to_pylist() if row["status"] == "rejected"}


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
    return path


# --- normalising ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        ("  a \t red\r\n cat ", "a red cat"),
        ("caf\u0065\u0301", "caf\u00e9"),
        ("salt &amp; pepper", "salt & pepper"),
        ("&amp;amp;lt;b&amp;gt;", "<b>"),
        ("Citrus Fruits&quot  by Alley", 'Citrus Fruits" by Alley'),
        ("&#34;Li&#x22;", '"Li"'),
        ("a\u00a0b&nbsp;c\u2003d", "a b c d"),
        ("a\x00b\x1fc\x85d\ufeff", "a b c d"),
        ("Netflix AT&T H&M R&Bands x=1&copy=2 ?a&times", "Netflix AT&T H&M R&Bands x=1&copy=2 ?a×"),
        ("&notanentity; &bogus; &", "&notanentity; &bogus; &"),
        ("&#0;&#1114112;", "\ufffd\ufffd"),
        ("<i>The Interview</i>", "<i>The Interview</i>"),
        ("\u200d\U0001f468\u200d\U0001f469", "\u200d\U0001f468\u200d\U0001f469"),
        ("", ""),
        (" \x00\t", ""),
    ],
)
def test_normalise(raw: str, expected: str) -> None:
    assert normalise(raw) == expected


@given(st.one_of(st.text(), ENTITY_SOUP))
def test_normalise_is_idempotent_and_canonical(text: str) -> None:
    once = normalise(text)
    assert normalise(once) == once
    assert unicodedata.is_normalized("NFC", once)
    assert once == once.strip()
    assert "  " not in once
    assert not any(unicodedata.category(character) == "Cc" for character in once)


@given(st.text(alphabet=st.characters(exclude_categories=["Cs", "Cc"])), st.integers(0, 6))
def test_escaping_is_undone_however_often(text: str, times: int) -> None:
    escaped = plain = text.replace("&", " ")
    for _ in range(times):
        escaped = html.escape(escaped)
    assert normalise(escaped) == normalise(plain)


def test_every_named_entity_agrees_with_the_standard_library() -> None:
    for name in html.entities.html5:
        if name.endswith(";"):
            assert normalise(f"a &{name} b") == normalise(html.unescape(f"a &{name} b")), name


def test_nested_ampersands_take_linear_time() -> None:
    assert normalise("&" + "amp;#38;#x26;" * 20_000 + "lt;") == "<"


# --- CSV --------------------------------------------------------------------------------------------------------------

FIELD = st.text(
    alphabet=st.characters(exclude_categories=["Cs", "Cc"], exclude_characters="\u2028\u2029\x85"), max_size=12
)
TRICKY = st.lists(st.sampled_from(['"', ";", ",", "\t", "|", "\n", "\r\n", "a", " ", "é"]), max_size=6).map("".join)


@pytest.mark.parametrize("separator", [",", ";", "\t", "|"])
@given(rows=st.lists(st.tuples(st.one_of(FIELD, TRICKY), FIELD, FIELD), min_size=1, max_size=12))
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_csv_agrees_with_pandas(tmp_path: Path, separator: str, rows: list[tuple[str, str, str]]) -> None:
    buffer = io.StringIO()
    writer = csv.writer(buffer, delimiter=separator, quoting=csv.QUOTE_ALL)
    writer.writerows([("", "Caption", "URL"), *rows])
    path = write(tmp_path / "p.csv", buffer.getvalue())
    frame = pd.read_csv(path, sep=separator, dtype=str, keep_default_na=False, na_values=[])
    expected: dict[str, int] = {}
    for caption in map(normalise, frame["Caption"]):
        expected[caption] = expected.get(caption, 0) + 1
    empty = expected.pop("", 0)
    result = read(path)
    assert result.sources[0].separator == separator
    assert result.rows_read == len(frame) == len(rows)
    done = [row for row in result.table.to_pylist() if row["status"] == "done"]
    assert {row["caption"]: row["count"] for row in done} == expected
    assert list(reasons(result).values()) == [Reason.CAPTION_EMPTY.value] * empty


def test_laion_columns_order_and_rows(tmp_path: Path) -> None:
    path = write(
        tmp_path / "a.csv", ";Caption;URL;Index\n0;two;http://b;1\n1;one;;2\n2;two;http://c;3\n3;one;http://d;4\n"
    )
    rows = read(path).table.to_pylist()
    assert [(r["caption"], r["count"], r["row"], r["url"]) for r in rows] == [
        ("two", 2, 1, "http://b"),
        ("one", 2, 2, "http://d"),  # the first that any of its rows had
    ]


def test_bom_crlf_blank_lines_and_nul(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", '\ufeffcaption,url\r\n\r\n"a,\r\nb",u\r\n\r\nc\x00d,\r\n')
    result = read(path)
    assert captions(result) == ["a, b", "c d"]
    assert result.table["row"].to_pylist() == [1, 2]


def test_single_column_csv_keeps_its_commas(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", 'caption\nA cat, on a mat\n"A ""big"" dog, sitting"\nA; b | c\n')
    assert captions(read(path)) == ["A cat, on a mat", 'A "big" dog, sitting', "A; b | c"]


def test_separator_is_the_headers_and_not_the_captions(tmp_path: Path) -> None:
    lines = ["caption;id", *(f"a, b, c, d {i};{i}" for i in range(50))]
    result = read(write(tmp_path / "a.csv", "\n".join(lines)))
    assert result.sources[0].separator == ";"
    assert captions(result)[0] == "a, b, c, d 0"


def test_rows_of_the_wrong_width_are_rejected_and_not_guessed(tmp_path: Path) -> None:
    content = "id,caption,url\n1,a cat,u\n2,a cat, a dog,u\n3\n4,a fox,u,,\n5,an owl\n"
    result = read(write(tmp_path / "a.csv", content))
    assert captions(result) == ["a cat", "a fox"]
    assert reasons(result) == dict.fromkeys([2, 3, 5], "row_malformed")
    assert "line 6: 2 fields, the header has 3" in messages(result)[5]


def test_bytes_that_are_not_utf8_cost_their_row_only(tmp_path: Path) -> None:
    latin1 = "café".encode("latin-1")
    table = read(write(tmp_path / "a.csv", b"caption,url\nfine,u\n" + latin1 + b",u\nafter," + latin1 + b"\n"))
    assert captions(table) == ["fine", "after"]
    assert reasons(table) == {2: "caption_not_utf8"}
    assert table.table["url"].to_pylist()[2] == "caf\\xe9"
    lines = read(write(tmp_path / "a.txt", b"fine\n" + latin1 + b"\nafter"))
    assert captions(lines) == ["fine", "after"]
    assert reasons(lines) == {2: "caption_not_utf8"}
    objects = b'{"text": "fine"}\n{"text": "' + latin1 + b'"}\n{"text": "\\ud800"}\n{"text": "after"}'
    records = read(write(tmp_path / "a.jsonl", objects))
    assert captions(records) == ["fine", "after"]
    assert reasons(records) == {2: "caption_not_utf8", 3: "caption_not_utf8"}


def test_an_unclosed_quote_costs_its_line_only(tmp_path: Path) -> None:
    """Where other quotes have a meaning; a file that needs none has quotes that are characters."""
    rows = ["caption,url", '"o, ne",u', '"open,u', *(f"row {i},u" for i in range(40))]
    result = read(write(tmp_path / "a.csv", "\n".join(rows) + "\n"))
    assert result.rows_read == 42
    assert reasons(result) == {2: "row_malformed"}
    assert "line 3: a quote is opened in line 3 and never closed" in messages(result)[2]
    last = read(write(tmp_path / "b.csv", 'caption,url\n"o, ne",u\n"open,u'))
    assert reasons(last) == {2: "row_malformed"}
    assert captions(read(write(tmp_path / "c.csv", 'caption,url\none,u\n"open,u'))) == ["one", '"open']


def test_many_unclosed_quotes_in_a_long_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One for every chunk of a record's limit: neither recursion nor a row may be lost."""
    monkeypatch.setattr("memscan.prompts.dialect.MAX_RECORD", 200)
    good = [f"a caption of some length {i},u" for i in range(40)]
    lines = ["caption,url"]
    for i in range(300):
        lines += [f'"open {i},u', *(f"{line}{i}" for line in good)]
    result = read(write(tmp_path / "a.csv", "\n".join(lines) + "\n"))
    assert result.rows_read == 300 * 41
    assert list(reasons(result).values()) == ["row_malformed"] * 300


def test_long_captions(tmp_path: Path) -> None:
    long = "word " * 20_000  # 100,000 characters
    content = f'caption,url\n"{long}",u\nshort,u\n"{long}",u\n{"x" * 200_000},u\n{"y" * 4096},u\n{"z" * 4097},u\n'
    result = read(write(tmp_path / "a.csv", content))
    assert captions(result) == ["short", "y" * 4096]
    assert reasons(result) == dict.fromkeys([1, 3, 4, 6], "caption_too_long")
    assert all(len(message or "") < 300 for message in result.table["message"].to_pylist())
    lines = read(write(tmp_path / "a.txt", f"{long}\nshort\n{'&amp;' * 1000}"), max_chars=1000)
    assert captions(lines) == ["short", "&" * 1000]


# --- other formats ----------------------------------------------------------------------------------------------------


def test_text_lines(tmp_path: Path) -> None:
    result = read(write(tmp_path / "a.txt", '\ufeffone\r\n\r\n two, "three" \nlast'))
    assert captions(result) == ["one", 'two, "three"', "last"]
    assert reasons(result) == {2: "caption_empty"}
    assert result.table["row"].to_pylist() == [1, 2, 3, 4]


def test_jsonl_rows(tmp_path: Path) -> None:
    lines = [
        '{"top_caption": "a cat", "url": "u", "index": 1}',
        "{broken",
        "",
        '{"top_caption": 7}',
        '{"other": "x", "url": "v"}',
        '["a", "list"]',
        '{"top_caption": null}',
        '{"top_caption": "\\u00e9", "url": 5}',
        "[" * 100_000,
    ]
    result = read(write(tmp_path / "a.jsonl", "\n".join(lines)))
    assert captions(result) == ["a cat", "é"]
    malformed = dict.fromkeys([2, 3, 4, 5, 8], "row_malformed")
    assert reasons(result) == {**malformed, 6: "caption_empty"}
    assert result.table["url"].to_pylist()[3] == "v"


def test_oversized_lines_cost_their_row_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("memscan.prompts.rows.MAX_LINE", 64)
    result = read(write(tmp_path / "a.txt", "one\n" + "x" * 1000 + "\ntwo\n" + "y" * 64))
    assert captions(result) == ["one", "two"]
    assert reasons(result) == {2: "row_malformed", 4: "row_malformed"}
    table = read(write(tmp_path / "a.csv", "caption,url\n" + "x" * 1000 + "\nfine,u\n" + "y" * 90 + ",u\n"))
    assert captions(table) == ["fine"]
    assert reasons(table) == {1: "row_malformed", 3: "row_malformed"}


@pytest.mark.parametrize(
    "kind", [pa.string(), pa.large_string(), pa.binary(), pa.dictionary(pa.int32(), pa.string())], ids=str
)
def test_parquet(tmp_path: Path, kind: pa.DataType) -> None:
    values = pa.array(["a cat", None, "a cat", "caf&eacute;"], pa.string()).cast(kind)
    pq.write_table(pa.table({"TEXT": values, "URL": ["u", "v", None, None], "n": [1, 2, 3, 4]}), tmp_path / "a.parquet")
    result = read(tmp_path / "a.parquet")
    assert captions(result) == ["a cat", "café"]
    assert reasons(result) == {2: "caption_empty"}
    assert result.table["count"].to_pylist() == [2, 1, 1]


def test_parquet_text_that_is_not_utf8(tmp_path: Path) -> None:
    raw = pa.array([b"fine", b"caf\xe9", b"after"], pa.binary())
    broken = pa.StringArray.from_buffers(3, raw.buffers()[1], raw.buffers()[2])
    pq.write_table(pa.table({"caption": broken}), tmp_path / "a.parquet")
    result = read(tmp_path / "a.parquet")
    assert captions(result) == ["fine", "after"]
    assert reasons(result) == {2: "caption_not_utf8"}


def test_parquet_that_breaks_off(tmp_path: Path) -> None:
    pq.write_table(pa.table({"caption": ["a", "b"]}), tmp_path / "a.parquet")
    data = (tmp_path / "a.parquet").read_bytes()
    with pytest.raises(InputError, match="not a Parquet file"):
        read(write(tmp_path / "half.parquet", data[: len(data) // 2]))
    pq.write_table(pa.table({"n": [1, 2]}), tmp_path / "n.parquet")
    with pytest.raises(InputError, match=r"n.*int64, not text"):
        read(tmp_path / "n.parquet", caption_column="n")


# --- all of them ------------------------------------------------------------------------------------------------------

ROWS = st.lists(st.one_of(st.sampled_from(["a cat", " a  cat", "a &amp; b", "", " ", "x" * 60]), FIELD), max_size=20)


@given(per_format=st.tuples(ROWS, ROWS, ROWS, ROWS), chunk=st.integers(1, 8))
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_counts_conserve_and_formats_agree(
    tmp_path_factory: pytest.TempPathFactory, per_format: tuple[list[str], ...], chunk: int
) -> None:
    folder = tmp_path_factory.mktemp("mixed")
    as_csv, as_json, as_text, as_parquet = per_format
    frame = pd.DataFrame({"i": range(len(as_csv)), "caption": as_csv})
    frame.to_csv(folder / "a.csv", index=False, quoting=csv.QUOTE_ALL)
    write(folder / "b.jsonl", "".join(json.dumps({"caption": text}) + "\n" for text in as_json))
    write(folder / "c.txt", "".join(f"{text}\n" for text in as_text))
    pq.write_table(pa.table({"caption": pa.array(as_parquet, pa.string())}), folder / "d.parquet")
    total = [normalise(text) for rows in per_format for text in rows]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rows, "BATCH_ROWS", chunk)
        patch.setattr(folding, "WAITING_ROWS", 3)
        if not total:
            with pytest.raises(InputError, match="no prompts"):
                read(folder)
            return
        result = read(folder, max_chars=50)
    assert result.rows_read == len(total)
    assert captions(result) == list(dict.fromkeys(text for text in total if 0 < len(text) <= 50))
    done = {row["caption"]: row["count"] for row in result.table.to_pylist() if row["status"] == "done"}
    assert all(total.count(caption) == count for caption, count in done.items())


def test_limit_takes_the_first_distinct_prompts(tmp_path: Path) -> None:
    first = write(tmp_path / "a.txt", "one\none\n\ntwo\none\nthree\nfour\n")
    result = read(first, write(tmp_path / "b.txt", "five\n"), limit=3)
    assert captions(result) == ["one", "two", "three"]
    assert result.rows_read == 6
    assert len(result.sources) == 1


def test_a_file_named_twice_is_read_once(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", "one\n\n")
    (tmp_path / "link.txt").symlink_to(path)
    assert read(path, tmp_path, path).rows_read == 2


def test_rejects_of_two_files_do_not_collide(tmp_path: Path) -> None:
    result = read(write(tmp_path / "a.txt", "\none"), write(tmp_path / "b.txt", "\none"))
    assert len(result.table) == 3


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.jsonl", "a.ndjson", "a.txt", "a.parquet"])
def test_empty_file(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match=rf"{name}: is empty"):
        read(write(tmp_path / name, b""))


def test_header_without_rows(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is empty"):
        read(write(tmp_path / "a.csv", "caption,url\n"))


def test_empty_parts_of_a_folder_are_no_mistake(tmp_path: Path) -> None:
    write(tmp_path / "a.txt", "")
    write(tmp_path / "b.txt", "one")
    write(tmp_path / "README.md", "not a prompt")
    assert read(tmp_path).rows_read == 1


@pytest.mark.parametrize(
    ("name", "content", "options", "pattern"),
    [
        ("a.csv", "id,colour\n1,red\n", {}, r"'id', 'colour'.*caption_column"),
        ("a.csv", "id,caption\n1,red\n", {"caption_column": "kaption"}, r"no column 'kaption'.*'caption'"),
        ("a.csv", "id,caption\n1,red\n", {"url_column": "link"}, r"no column 'link'.*url_column"),
        ("a.jsonl", '{"colour": "red"}\n', {}, r"'colour'.*caption_column"),
        ("a.jsonl", "not json\nat all\n", {}, "no line is a JSON object"),
        ("a.docx", "x", {}, r"unknown kind.*\.csv"),
        ("a.parquet", "not parquet", {}, "not a Parquet file"),
        ("a.csv", "caption,url\na,b\n".encode("utf-16"), {}, "UTF-16"),
        ("a.txt", "one\n".encode("utf-16"), {}, "UTF-16"),
    ],
)
def test_what_cannot_be_read_is_one_line(
    tmp_path: Path, name: str, content: str | bytes, options: dict[str, str], pattern: str
) -> None:
    with pytest.raises(InputError, match=pattern) as caught:
        read(write(tmp_path / name, content), **options)
    assert "\n" not in str(caught.value)
    assert name in str(caught.value)


def test_missing_paths(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nowhere\.csv: no such file"):
        read(tmp_path / "nowhere.csv")
    with pytest.raises(InputError, match="no prompt files"):
        read(tmp_path)


def test_named_columns_win(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "Caption,Prompt,where\na,b,c\n")
    row = read(path, caption_column="prompt", url_column="where").table.to_pylist()[0]
    assert (row["caption"], row["url"]) == ("b", "c")


# --- real lists -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "rows", "separator"),
    [
        ("laion_ordinary_500.csv", 500, ";"),
        ("laion_ordinary_500b.jsonl", 500, None),
        ("ordinary_written_500.txt", 500, None),
        ("realistic_vision_memorized_90.txt", 90, None),
        ("sd14_memorized_500.csv", 500, ";"),
        ("sd14_memorized_500_kmeans12.csv", 500, ";"),
        ("sd2_memorized_219.txt", 219, None),
    ],
)
def test_real_lists(real_prompts: Path, name: str, rows: int, separator: str | None) -> None:
    result = read(real_prompts / name)
    assert result.rows_read == rows
    assert result.sources[0].rejected == 0
    assert result.sources[0].separator == separator
    if separator is not None:
        frame = pd.read_csv(real_prompts / name, sep=separator, keep_default_na=False)
        assert captions(result) == list(dict.fromkeys(map(normalise, frame["Caption"])))


def test_real_folder_folds_what_its_lists_share(real_prompts: Path) -> None:
    result = read(real_prompts)
    assert result.rows_read == 2809
    assert len(result.table) < 2000
