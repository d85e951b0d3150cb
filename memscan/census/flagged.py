"""This module writes the flagged list as Parquet (for programs), CSV (for spreadsheets) and JSON Lines (for scripts).

All three forms hold one table, `records.FLAGGED`, with the same columns in the same order; docs/flagged-list.md
describes them. Captions, ids and URLs are hostile text. A spreadsheet takes a cell that begins with = + - @ for a
formula and may run it. Therefore the CSV has an apostrophe before such a cell, and before one that begins with an
apostrophe. If one leading apostrophe is removed, as `read_csv` does, the result is exactly the original.
"""

from __future__ import annotations

import csv
import io
import itertools
import json
import unicodedata
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from memscan.errors import InputError
from memscan.io import storage
from memscan.records import FLAGGED, SCHEMA_VERSION

NAMES = ("flagged.parquet", "flagged.csv", "flagged.jsonl")
# Spreadsheets also take the full-width forms for operators, and some skip what is not seen before they look.
_FORMULA_STARTS = frozenset("=+-@\uff1d\uff0b\uff0d\uff20")
_LINE_STARTS = frozenset("\t\r\n\v\f\0")
# Legal inside a JSON string, but line ends to str.splitlines() and to JavaScript before 2019.
_LINE_ENDS = {0x85: "\\u0085", 0x2028: "\\u2028", 0x2029: "\\u2029"}


def write_flagged(folder: str, table: pa.Table, metadata: Mapping[str, str]) -> list[str]:
    """Write the three files into `folder` (local or s3://), each completely or not at all.

    Args:
        table: rows of `records.FLAGGED`, in the order in which they are to stand.
        metadata: what a reader must know to trust the list (fingerprint, version), kept in the Parquet file's schema.

    Returns:
        Their paths, in the order of `NAMES`.
    """
    return write_list(folder, "flagged", table.select(FLAGGED.names).cast(FLAGGED), metadata)


def write_list(folder: str, stem: str, table: pa.Table, metadata: Mapping[str, str]) -> list[str]:
    """Write any list of rows in the same three forms, as `stem`.parquet, .csv and .jsonl."""
    storage.make_dirs(folder)
    paths = [storage.join(folder, f"{stem}{suffix}") for suffix in (".parquet", ".csv", ".jsonl")]
    for path, data in zip(paths, (to_parquet(table, metadata), to_csv(table), to_jsonl(table)), strict=True):
        storage.write_atomic(path, data)
    return paths


def to_parquet(table: pa.Table, metadata: Mapping[str, str]) -> bytes:
    """Return the list as a Parquet file, with `memscan.`-prefixed metadata in its schema."""
    notes = {f"memscan.{key}": value for key, value in {**metadata, "schema_version": str(SCHEMA_VERSION)}.items()}
    sink = pa.BufferOutputStream()
    pq.write_table(table.replace_schema_metadata(notes), sink, compression="zstd")
    return bytes(sink.getvalue().to_pybytes())


def to_csv(table: pa.Table) -> bytes:
    """Return the list as CSV: commas, quoted text, CRLF, UTF-8 with a byte order mark (for Excel), lists as JSON."""
    text = io.StringIO(newline="")
    writer = csv.writer(text, quoting=csv.QUOTE_NONNUMERIC, lineterminator="\r\n")
    writer.writerow(table.column_names)
    for row in _rows(table):
        writer.writerow([_cell(value) for value in row.values()])
    return text.getvalue().encode("utf-8-sig")


def to_jsonl(table: pa.Table) -> bytes:
    """Return the list as JSON Lines: UTF-8, one object per line, every value unchanged."""
    lines = (json.dumps(row, ensure_ascii=False, allow_nan=False).translate(_LINE_ENDS) for row in _rows(table))
    return "".join(f"{line}\n" for line in lines).encode()


def read_parquet(path: str) -> pa.Table:
    """Read `flagged.parquet`.

    Raises:
        InputError: the file is missing, unreadable or of another schema.
    """
    if not storage.exists(path):
        raise InputError("no flagged list", where=path, hint="run memscan reduce first")
    try:
        table = pq.read_table(pa.BufferReader(storage.read_bytes(path)))
        for field in FLAGGED:
            if field.nullable and field.name not in table.column_names:  # written by an older version
                table = table.append_column(field, pa.nulls(table.num_rows, field.type))
        return table.select(FLAGGED.names).cast(FLAGGED)
    except (pa.ArrowException, KeyError) as error:
        raise InputError(f"not a flagged list ({error})", where=path) from error


def read_csv(data: bytes, schema: pa.Schema = FLAGGED) -> pa.Table:
    """Read what `to_csv` wrote of a table of `schema`, with the apostrophes taken off again."""
    reader = csv.reader(io.StringIO(data.decode("utf-8-sig"), newline=""))
    names = next(reader)
    rows = [{name: _parse(cell, schema.field(name)) for name, cell in zip(names, row, strict=True)} for row in reader]
    return pa.Table.from_pylist(rows, schema=schema)


def neutralise(text: str) -> str:
    """Return `text` as a cell of a spreadsheet, with a leading apostrophe if it could be read as a formula."""
    unseen = itertools.takewhile(_is_unseen, text)
    start = next(itertools.dropwhile(_is_unseen, text), "")
    risky = start in _FORMULA_STARTS or not _LINE_STARTS.isdisjoint(unseen) or text[:1] == "'"
    return f"'{text}" if risky else text


def _is_unseen(character: str) -> bool:
    """White space of any kind, control and format characters, unassigned ones."""
    return character.isspace() or unicodedata.category(character)[0] in "CZ"


def _rows(table: pa.Table) -> Iterator[dict[str, Any]]:
    maps = {field.name for field in table.schema if pa.types.is_map(field.type)}
    single = {field.name for field in table.schema if field.type == pa.float32()} | maps
    for batch in table.to_batches(max_chunksize=4096):
        for row in batch.to_pylist():
            yield {name: _plain(value) if name in single else value for name, value in row.items()}


def _plain(value: Any) -> Any:
    """Return a float32, or a map of them as an object, as JSON writes them."""
    return {name: _shortest(one) for name, one in value} if isinstance(value, list) else _shortest(value)


def _shortest(value: float | None) -> float | None:
    """Return the shortest decimal for this float32 (0.9, not 0.8999999761581421); None if JSON has no number for it."""
    if value is None or not np.isfinite(value):
        return None
    return float(str(np.float32(value)))


def _cell(value: Any) -> Any:
    if value is None:
        return ""
    if isinstance(value, list | dict):
        return json.dumps(value, ensure_ascii=False)
    return neutralise(value) if isinstance(value, str) else value


def _parse(cell: str, field: pa.Field) -> Any:
    if pa.types.is_list(field.type):
        return json.loads(cell) if cell else None
    if pa.types.is_map(field.type):
        return list(json.loads(cell).items())
    if pa.types.is_string(field.type):
        text = cell[1:] if cell.startswith("'") else cell
        return text if text or not field.nullable else None
    return None if cell == "" else float(cell) if pa.types.is_floating(field.type) else int(cell)
