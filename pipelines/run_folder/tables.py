"""Parquet files of a run, and the counts that must conserve: what `runs.py` stands on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from memscan.io import storage
from memscan.records import Label, Status

LABEL_COLUMN = "generations.list.element.label"
_FOOTER = b"PAR1"


@dataclass(frozen=True)
class Counts:
    """What became of rows. `inputs` are rows of the prompt files, `rows` distinct prompts: rows = done + rejected."""

    inputs: int = 0
    rows: int = 0
    done: int = 0
    rejected: int = 0
    generations: int = 0
    labels: Mapping[str, int] | None = None
    reasons: Mapping[str, int] | None = None

    def __add__(self, other: Counts) -> Counts:
        return Counts(
            self.inputs + other.inputs,
            self.rows + other.rows,
            self.done + other.done,
            self.rejected + other.rejected,
            self.generations + other.generations,
            _merge(self.labels, other.labels),
            _merge(self.reasons, other.reasons),
        )

    def to_json(self) -> dict[str, Any]:
        labels = {label.value: (self.labels or {}).get(label.value, 0) for label in Label}
        return {**self.__dict__, "labels": labels, "reasons": dict(self.reasons or {})}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Counts:
        return cls(**{key: data[key] for key in cls.__dataclass_fields__})


def _merge(one: Mapping[str, int] | None, other: Mapping[str, int] | None) -> dict[str, int]:
    return dict(sorted((Counter(one or {}) + Counter(other or {})).items()))


def count_rows(rows: pa.Table) -> Counts:
    """Counts of census rows that were read with the columns of PROMPTS and `LABEL_COLUMN`."""
    rejected = rows.filter(pc.equal(rows["status"], Status.REJECTED.value))
    labels = Counter(pc.struct_field(pc.list_flatten(rows["generations"]), "label").to_pylist())
    return Counts(
        inputs=total_inputs(rows),
        rows=rows.num_rows,
        done=rows.num_rows - rejected.num_rows,
        rejected=rejected.num_rows,
        generations=labels.total(),
        labels=dict(labels),
        reasons=dict(Counter(rejected["reason"].to_pylist())),
    )


def total_inputs(table: pa.Table) -> int:
    """Input rows that were folded into the rows of a PROMPTS table."""
    return int(pc.sum(table["count"]).as_py() or 0)


def read_table(path: str, columns: list[str] | None = None) -> pa.Table:
    """Read one Parquet file, local or s3://; `columns` may name nested leaves."""
    filesystem, inner = storage.arrow_filesystem(path)
    with filesystem.open_input_file(inner) as file:
        return pq.ParquetFile(file).read(columns=columns)


def ids_or_none(path: str) -> set[str] | None:
    """Prompt ids in a census file, or None where it lacks its footer, which is written last."""
    filesystem, inner = storage.arrow_filesystem(path)
    with filesystem.open_input_file(inner) as file:
        size = file.size()
        if size < 3 * len(_FOOTER) or file.read_at(len(_FOOTER), size - len(_FOOTER)) != _FOOTER:
            return None
        return set(pq.ParquetFile(file).read(columns=["prompt_id"])["prompt_id"].to_pylist())


def write_table(path: str, table: pa.Table) -> None:
    """Write one Parquet file whole or not at all."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    storage.make_dirs(path.rsplit("/", 1)[0])
    storage.write_atomic(path, sink.getvalue().to_pybytes())
