"""Prompt files as people have them: dialects, compression, documents, folders; nothing vanishes and nothing changes."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from memscan.config import PromptsConfig
from memscan.errors import InputError
from memscan.prompts import separated
from memscan.prompts.captions import normalise
from memscan.prompts.dialect import Dialect, RecordReader
from memscan.prompts.rows import Columns
from memscan.prompts.table import PromptTable, read_prompts

CASES = Path(__file__).resolve().parents[3] / "shared" / "cases" / "prompts"
QUIET = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def read(*paths: Path | str, **options: Any) -> PromptTable:
    found = read_prompts(PromptsConfig(paths=[str(path) for path in paths], **options))
    assert sum(found.table["count"].to_pylist()) == found.rows_read == sum(source.rows for source in found.sources)
    return found


def captions(found: PromptTable) -> list[str]:
    return [row["caption"] for row in found.table.to_pylist() if row["status"] == "done"]


def rejects(found: PromptTable) -> list[tuple[int, str, str]]:
    rows = [row for row in found.table.to_pylist() if row["status"] == "rejected"]
    return [(row["row"], row["reason"], row["message"]) for row in rows]


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def zstd(data: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as out:
        out.write(data)
    return sink.getvalue().to_pybytes()


# --- the cases that failed --------------------------------------------------------------------------------------------

CC3M = ["a bus", '"welcome home said the sign', "a dog", "sunset", 'the "best" coffee in town', "a boat"]
SPARK = 'caption,url\n"he said \\"hi\\" twice",u1\n"\\"quoted\\" start",u2\nplain,u3\n'


def test_quotes_that_mean_nothing_are_kept(tmp_path: Path) -> None:
    lines = [f"{caption}\thttp://x.test/{at}" for at, caption in enumerate(CC3M)]
    found = read(write(tmp_path / "a.tsv", "caption\turl\n" + "\n".join(lines) + "\n"))
    assert captions(found) == CC3M
    assert found.table["url"].to_pylist() == [f"http://x.test/{at}" for at in range(6)]
    assert (found.sources[0].separator, found.sources[0].quoting) == ("\t", "none")


def test_spark_quotes(tmp_path: Path) -> None:
    found = read(write(tmp_path / "a.csv", SPARK))
    assert captions(found) == ['he said "hi" twice', '"quoted" start', "plain"]
    assert found.sources[0].quoting == "backslash"


def test_a_caption_that_breaks_its_line_is_told(tmp_path: Path) -> None:
    found = read(write(tmp_path / "a.csv", "caption,url\na photo of\na cat,http://x.test/1\n"))
    assert captions(found) == ["a cat"]
    assert rejects(found)[0][2].startswith("line 2: 1 fields, the header has 2")


def test_odd_quotes_in_a_long_file_cost_nothing_else(tmp_path: Path) -> None:
    """Before: 56 odd quotes in 100,000 rows, of which 92,365 were read."""
    lines = [f"caption {at} of some words\thttp://x.test/{at}" for at in range(20_000)]
    for at in range(50, 20_000, 357):
        lines[at] = f'"caption {at} begins\thttp://x.test/{at}'
        lines[at + 3] = f'caption {at + 3} of 32"\thttp://x.test/{at + 3}'
    found = read(write(tmp_path / "a.tsv", "caption\turl\n" + "\n".join(lines)))
    assert (found.rows_read, found.distinct, rejects(found)) == (20_000, 20_000, [])
    quoted = [line.replace("\t", ",") if '"' in line else '"' + line.replace("\t", ',x",') for line in lines]
    found = read(write(tmp_path / "b.csv", "caption,url\n" + "\n".join(quoted)))
    assert found.rows_read == 20_000
    assert {reason for _, reason, _ in rejects(found)} == {"row_malformed"}
    assert {row for row, _, _ in rejects(found)} == {at + 1 for at in range(50, 20_000, 357)}
    urls = zip(found.table["caption"].to_pylist(), found.table["url"].to_pylist(), strict=True)
    assert all(url.endswith(f"/{caption.split()[1].rstrip(',x')}") for caption, url in urls if caption)


def test_two_stray_quotes_do_not_join_two_rows(tmp_path: Path) -> None:
    """The record that they would make parses: what tells is that each of its lines has an address of its own."""
    rows = [f'"a, b {at}",http://x.test/{at}' for at in range(30)]
    rows[10:12] = ['"welcome home,http://x.test/10', 'a tv of 32",http://x.test/11']
    found = read(write(tmp_path / "a.csv", "caption,url\n" + "\n".join(rows)))
    assert found.rows_read == 30
    assert [row for row, _, _ in rejects(found)] == [11]
    assert 'a tv of 32"' in captions(found)


@pytest.mark.parametrize("line", ['x"y,"z', '"', '""a', '"a""', 'a,"b', '","', '"\\', 'a,"\\"'])
def test_stray_quotes_take_linear_time(tmp_path: Path, line: str) -> None:
    started = time.process_time()
    found = read(write(tmp_path / "a.csv", 'caption,url\n"o, k",u\n' + f"{line}\n" * 10_000))
    assert found.rows_read >= 5_001
    assert time.process_time() - started < 20  # cubic time would be days


def test_markup_that_is_no_number(tmp_path: Path) -> None:
    digits = "1" * 5000
    found = read(write(tmp_path / "a.txt", f"a &#{digits}; b\n&#{'0' * 5000}65;\n&#x{'f' * 5000};\n"), max_chars=9000)
    assert captions(found) == ["a \ufffd b", "A", "\ufffd"]


def test_half_a_surrogate_pair_costs_its_row(tmp_path: Path) -> None:
    found = read(write(tmp_path / "a.jsonl", '{"text": "half \\ud83d"}\n{"text": "ok", "url": "\\ud83d"}\n'))
    assert captions(found) == ["ok"]
    assert rejects(found)[0][:2] == (1, "caption_not_utf8")


# --- whole kinds ------------------------------------------------------------------------------------------------------

WORDS = st.lists(st.sampled_from(["a", "b c", '"', '""', "\\", ",", ";", "'", " ", "é", '32"', '"x"']), max_size=5)
CAPTION = WORDS.map("".join).filter(lambda text: normalise(text) != "")


@QUIET
@given(st.lists(CAPTION, min_size=1, max_size=12))
def test_a_tsv_without_quoting_is_read_as_it_stands(tmp_path: Path, texts: list[str]) -> None:
    """Any quotes, whole, odd or none, unless the file looks quoted all through, which is then its dialect."""
    lines = [f"{text}\thttp://x.test/{at}" for at, text in enumerate(texts)]
    found = read(write(tmp_path / "a.tsv", "caption\turl\nplain\thttp://x.test/\n" + "\n".join(lines)))
    expected = dict.fromkeys(["plain", *map(normalise, texts)])
    if found.sources[0].quoting == "none" or not any('"' in text for text in texts):
        assert captions(found) == list(expected)
    assert found.rows_read == len(texts) + 1
    for row in found.table.to_pylist():  # no caption under another one's address
        at = (row["url"] or "").rpartition("/")[2]
        if at and row["status"] == "done" and row["count"] == 1 and found.sources[0].quoting == "none":
            assert row["caption"] == normalise(texts[int(at)])


@QUIET
@given(
    rows=st.lists(st.tuples(CAPTION, st.sampled_from(["u", "", 'v"', "w,x"])), min_size=1, max_size=12),
    quoting=st.sampled_from([csv.QUOTE_ALL, csv.QUOTE_MINIMAL]),
    doubled=st.booleans(),
    crlf=st.booleans(),
)
def test_what_a_writer_wrote_comes_back(
    tmp_path: Path, rows: list[tuple[str, str]], quoting: Any, doubled: bool, crlf: bool
) -> None:
    """Python's writer, with doubled quotes or with backslashes as Spark's; every caption is the one that went in."""
    if not doubled:
        rows = [(caption.replace("\\", "/"), url) for caption, url in rows]
    out = io.StringIO()
    style: dict[str, Any] = {} if doubled else {"doublequote": False, "escapechar": "\\"}
    writer = csv.writer(out, quoting=quoting, lineterminator="\r\n" if crlf else "\n", **style)
    # With quotes that are needed in other rows, as any long file has them.
    needed = [('he said "a, b"', "u"), ('"a", he said', "u")]
    writer.writerows([("caption", "url"), *needed, *rows])
    text = out.getvalue()
    if not doubled and quoting == csv.QUOTE_MINIMAL:
        return  # Python's writer leaves such fields unquoted: no dialect that others write
    found = read(write(tmp_path / "a.csv", text))
    assert found.rows_read == len(rows) + 2
    expected = dict.fromkeys(normalise(caption) for caption, _ in [*needed, *rows])
    assert captions(found) == list(expected)
    assert rejects(found) == []


@QUIET
@given(st.lists(st.sampled_from(['"', '""', ",", "\n", "\r\n", "a", "\\", "b,c", "\r", '"x"', "é"]), max_size=40))
def test_pyarrow_is_used_only_where_it_agrees_with_the_strict_reader(tmp_path: Path, pieces: list[str]) -> None:
    data = "caption,url\n" + '"o, k",u\n' + "".join(pieces) + "\n"
    path = str(write(tmp_path / "a.csv", data))
    quick = list(separated.open_separated(path, Columns()).rows)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(separated, "_is_plain", lambda block, dialect: False)
        assert list(separated.open_separated(path, Columns()).rows) == quick


@QUIET
@given(st.lists(st.sampled_from([b'"', b'""', b",", b"a", b"\\", b'"x"', b'\\"']), max_size=30), st.data())
def test_every_line_is_in_one_record(pieces: list[bytes], data: Any) -> None:
    lines = b"".join(pieces + [b"\n"] * 3).split(b"\n")
    quoting = data.draw(st.sampled_from(["doubled", "backslash", "none"]))
    at = 1
    for record in RecordReader(Dialect(b",", quoting), width=2).read(list(lines), 1):
        while not lines[at - 1]:
            at += 1
        assert record.line == at
        at += record.lines
    assert not any(lines[at - 1 :])


PACKERS = {"": bytes, ".gz": gzip.compress, ".zst": zstd, ".bz2": bz2.compress}


@pytest.mark.parametrize("packed", PACKERS)
@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "ndjson", "json", "txt", "parquet"])
def test_every_format_in_every_packing(tmp_path: Path, kind: str, packed: str) -> None:
    records = [{"caption": f"caption {at}", "url": f"http://x.test/{at}"} for at in range(5)]
    separator = "\t" if kind == "tsv" else ","
    contents = {
        "jsonl": "".join(json.dumps(record) + "\n" for record in records),
        "json": json.dumps(records),
        "txt": "".join(record["caption"] + "\n" for record in records),
        "csv": "\n".join(separator.join(row) for row in [("caption", "url"), *(r.values() for r in records)]),
    }
    contents |= {"ndjson": contents["jsonl"], "tsv": contents["csv"]}
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(records), tmp_path / "x.parquet")
        data = (tmp_path / "x.parquet").read_bytes()
    else:
        data = contents[kind].encode()
    found = read(write(tmp_path / f"a.{kind}{packed}", PACKERS[packed](data)))
    assert captions(found) == [f"caption {at}" for at in range(5)]
    if packed and kind != "parquet":
        whole = (tmp_path / f"a.{kind}{packed}").read_bytes()
        with pytest.raises(InputError, match="breaks off or is damaged"):
            read(write(tmp_path / f"b.{kind}{packed}", whole[: len(whole) * 2 // 3]))
        assert len(captions(read(write(tmp_path / f"c.{kind}{packed}", data)))) == 5  # not packed, whatever its name


DOCUMENTS: dict[str, tuple[Any, list[str]]] = {
    "array": ([{"prompt": "a"}, {"prompt": "b"}], ["a", "b"]),
    "strings": (["a", "b"], ["a", "b"]),
    "COCO": (
        {
            "images": [{"id": 1, "coco_url": "http://x.test/1"}],
            "annotations": [{"image_id": 1, "caption": "a"}, {"image_id": 1, "caption": "b"}],
        },
        ["a", "b"],
    ),
    "Karpathy": ({"dataset": "coco", "images": [{"sentences": [{"raw": "a"}, {"raw": "b"}]}]}, ["a", "b"]),
    "DiffusionDB": ({"1.png": {"p": "a", "se": 1}, "2.png": {"p": "b", "se": 2}}, ["a", "b"]),
    "columns": ({"caption": {"0": "a", "1": "b"}, "url": {"0": "u", "1": "v"}}, ["a", "b"]),
    "objects": ({"1": {"text": "a"}, "2": {"text": "b", "n": 1}}, ["a", "b"]),
    "names": ({"1.jpg": "a", "2.jpg": "b"}, ["a", "b"]),
    "lists": ({"1.jpg": ["a", "b"], "2.jpg": ["c", "d"]}, ["a", "b", "c", "d"]),
    "below": ({"data": [{"caption": "a"}, {"caption": "b"}]}, ["a", "b"]),
    "several": ([{"captions": ["a", "b"]}, {"captions": ["c"]}, {"captions": []}], ["a", "b", "c"]),
}


@pytest.mark.parametrize("name", DOCUMENTS)
def test_json_documents(tmp_path: Path, name: str) -> None:
    document, expected = DOCUMENTS[name]
    assert captions(read(write(tmp_path / "a.json", json.dumps(document)))) == expected


def test_documents_without_captions_are_named(tmp_path: Path) -> None:
    write(tmp_path / "config.json", '{"width": 3, "name": "x"}')
    with pytest.raises(InputError, match="without captions in a known form"):
        read(tmp_path / "config.json")
    write(tmp_path / "b.json", '{"caption": "a"}\n{"caption": "b"}\n')
    found = read(tmp_path)
    assert captions(found) == ["a", "b"]
    assert [(Path(n.path).name, n.why[:13]) for n in found.not_taken] == [("config.json", "a JSON object")]
    with pytest.raises(InputError, match="is not JSON"):
        read(write(tmp_path / "broken.json", '[{"caption": "a"'))


def test_files_that_are_not_taken_are_named(tmp_path: Path) -> None:
    for name in ("README.md", "LICENSE.txt", "._a.csv", "x.tar", "requirements.txt", "dataset_infos.json"):
        write(tmp_path / name, "{}")
    write(tmp_path / "a.txt.gz", gzip.compress(b"one\n"))
    found = read(tmp_path)
    assert captions(found) == ["one"]
    assert sorted(Path(entry.path).name for entry in found.not_taken) == sorted(
        ["README.md", "LICENSE.txt", "._a.csv", "x.tar", "requirements.txt", "dataset_infos.json"]
    )
    assert all(entry.why for entry in found.not_taken)


def test_patterns(tmp_path: Path) -> None:
    for at in range(12):
        write(tmp_path / f"part-{at:03d}.txt", f"caption {at}\n")
    assert len(captions(read(tmp_path / "part-{000..011}.txt"))) == 12
    assert captions(read(tmp_path / "part-{009..007}.txt")) == ["caption 9", "caption 8", "caption 7"]
    assert captions(read(tmp_path / "part-00[12].txt", tmp_path / "*-01{0,1}.txt", tmp_path / "part-001.txt")) == [
        f"caption {at}" for at in (1, 2, 10, 11)
    ]
    with pytest.raises(InputError, match=r"part-012\.txt: no such file"):
        read(tmp_path / "part-{010..012}.txt")
    with pytest.raises(InputError, match="no file or folder has such a name"):
        read(tmp_path / "*.csv")
    assert captions(read(write(tmp_path / "odd[1].txt", "odd\n"))) == ["odd"]


def test_files_without_a_header(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tsv", "http://x.test/1\ta man\nhttp://x.test/2\tsecond\n")
    with pytest.raises(InputError, match=r"prompts\.header: false"):
        read(path)
    with pytest.raises(InputError, match=r"2 columns and no header.*number"):
        read(path, header=False)
    with pytest.raises(InputError, match="column 1 holds addresses"):
        read(path, header=False, caption_column=1)
    found = read(path, header=False, caption_column=2, url_column=1)
    assert captions(found) == ["a man", "second"]
    assert found.table["url"].to_pylist() == ["http://x.test/1", "http://x.test/2"]
    with pytest.raises(InputError, match="no column 3, of 2"):
        read(path, header=False, caption_column=3)
    assert captions(read(write(tmp_path / "b.csv", "one\ntwo\n"), header=False)) == ["one", "two"]


# --- Parquet ----------------------------------------------------------------------------------------------------------


def test_odd_parquet_columns(tmp_path: Path) -> None:
    struct = pa.array([{"en": "a", "n": 1}, {"en": "b", "n": 2}])
    pq.write_table(pa.table({"caption": struct}), tmp_path / "s.parquet")
    with pytest.raises(InputError, match=r"struct.*caption\.en"):
        read(tmp_path / "s.parquet")
    assert captions(read(tmp_path / "s.parquet", caption_column="caption.en")) == ["a", "b"]
    lists = pa.array([["a", None, "b"], [], None], pa.list_(pa.string()))
    pq.write_table(pa.table({"caption": lists, "url": ["u", "v", "w"]}), tmp_path / "l.parquet")
    found = read(tmp_path / "l.parquet")
    assert captions(found) == ["a", "b"]
    assert [reason for _, reason, _ in rejects(found)] == ["caption_empty"] * 3
    twice = pa.Table.from_arrays([pa.array(["x"]), pa.array(["y"])], names=["text", "text"])
    pq.write_table(twice, tmp_path / "t.parquet")
    with pytest.raises(InputError, match=r"2 columns are called 'text'.*number"):
        read(tmp_path / "t.parquet")
    assert captions(read(tmp_path / "t.parquet", caption_column=2)) == ["y"]
    (tmp_path / "shards").mkdir()
    pq.write_table(pa.table({"caption": ["a"]}), tmp_path / "shards" / "0.parquet")
    pq.write_table(pa.table({"caption": pa.nulls(2)}), tmp_path / "shards" / "1.parquet")
    found = read(tmp_path / "shards")
    assert (captions(found), len(rejects(found))) == (["a"], 2)


@pytest.mark.skipif(not CASES.is_dir(), reason=f"{CASES} is not here")
@pytest.mark.parametrize(
    ("name", "options", "expected", "rejected"),
    [
        ("cc3m_header.tsv", {}, 6, 0),
        ("spark.csv", {}, 3, 0),
        ("escaped.csv", {}, 2, 0),
        ("newline.csv", {}, 2, 1),
        ("a.jsonl.gz", {}, 3, 0),
        ("laion.csv.gz", {}, 3, 3),
        ("mixed_gz", {}, 10, 0),
        ("gz_and_license", {}, 1, 0),
        ("captions_val2017.json", {}, 2, 0),
        ("cc12m.tsv", {"header": False, "caption_column": 2}, 2, 0),
        ("cc12m.tsv", {}, "no column with a usual name", 0),
        ("nullshard", {}, 2, 2),
        ("dupcols.parquet", {}, "2 columns are called", 0),
        ("type_list.parquet", {}, 3, 0),
    ],
)
def test_the_cases(name: str, options: dict[str, Any], expected: int | str, rejected: int) -> None:
    if isinstance(expected, str):
        with pytest.raises(InputError, match=expected):
            read(CASES / name, **options)
        return
    found = read(CASES / name, **options)
    assert (found.distinct, len(rejects(found))) == (expected, rejected)
    if name in ("spark.csv", "escaped.csv"):
        assert captions(found)[0].startswith('he said "hi"')
    if name == "gz_and_license":
        assert [Path(entry.path).name for entry in found.not_taken] == ["LICENSE.txt", "README.md"]
