"""This module has the Parquet files of a run, and the counts that must conserve; `runs.py` uses it."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from memscan.errors import InputError, IntegrityError
from memscan.io import storage
from memscan.records import Label, Status

LABEL_COLUMN = "generations.list.element.label"
FINGERPRINT = b"memscan.fingerprint"  # of the run, in the metadata of its census files
_FOOTER = b"PAR1"


@dataclass(frozen=True)
class Counts:
    """These are counts of rows: `inputs` are rows of files, `rows` are distinct prompts = done + rejected."""

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
    """Count census rows that were read with the columns of PROMPTS and `LABEL_COLUMN`."""
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
    """Return the number of input rows that were folded into the rows of a PROMPTS table."""
    return int(pc.sum(table["count"]).as_py() or 0)


def read_table(path: str, columns: list[str] | None = None) -> pa.Table:
    """Read one Parquet file, local or s3://; `columns` may name nested leaves.

    Raises:
        IntegrityError: it is damaged: no Parquet, or a page whose checksum does not hold.
        InputError: it is not there.
    """
    filesystem, inner = storage.arrow_filesystem(path)
    with one_line_damage(path), filesystem.open_input_file(inner) as file:
        return pq.ParquetFile(file, page_checksum_verification=True).read(columns=columns)


@contextmanager
def one_line_damage(path: str) -> Iterator[None]:
    """Return what pyarrow says about bytes that are no Parquet, as one line that names the file."""
    try:
        yield
    except FileNotFoundError as error:
        raise InputError("no such file or folder", where=path) from error
    except (pa.ArrowException, ValueError, KeyError, OSError, MemoryError, OverflowError) as error:
        said = " ".join(str(error).split())[:160]
        raise IntegrityError(f"is damaged ({said})", where=path, hint="restore it, or write it again") from error


@dataclass(frozen=True)
class CensusFile:
    """This is a file of a part that was read.

    Args:
        name: below the part's folder.
        sha256: of all its bytes.
        table: the columns that were asked for.
        data: all its bytes, where no columns were asked for.
    """

    name: str
    sha256: str
    table: pa.Table
    data: bytes = b""


def census_file_or_none(
    folder: str, name: str, columns: Sequence[str], fingerprint: str, sha256: str | None
) -> CensusFile | str:
    """Read a census file, or say in a few words why it does not belong to this run.

    Args:
        fingerprint: of the run; a file that has none is of an older version and is taken as it is.
        sha256: that its bytes must have; None if nobody knows.

    Raises:
        InputError: it is not there, or its storage does not answer.
    """
    data = storage.read_bytes(storage.join(folder, name))
    found = hashlib.sha256(data).hexdigest()
    if sha256 is not None and found != sha256:
        return "is damaged (its bytes are not those that were written)"
    if not data.endswith(_FOOTER):
        return "was left half written"
    try:
        with one_line_damage(name):
            file = pq.ParquetFile(pa.BufferReader(data), page_checksum_verification=True)
            stamp = (file.schema_arrow.metadata or {}).get(FINGERPRINT, b"").decode(errors="replace")
            if stamp and fingerprint and stamp != fingerprint:
                return f"is of another run (fingerprint {stamp[:16]}, this one has {fingerprint})"
            return CensusFile(name, found, file.read(columns=list(columns)), b"" if columns else data)
    except IntegrityError as error:
        return error.what


def stamped(rows: pa.Table, fingerprint: str) -> pa.Table:
    """Return the rows with the fingerprint of their run in the schema's metadata."""
    return rows.replace_schema_metadata({**(rows.schema.metadata or {}), FINGERPRINT: fingerprint.encode()})


def to_parquet(table: pa.Table) -> bytes:
    """Return a Parquet file of a table, with checksums of its pages.

    It is the same for the same table and version of pyarrow.
    """
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd", write_page_checksum=True)
    return bytes(sink.getvalue().to_pybytes())


def write_table(path: str, table: pa.Table) -> None:
    """Write one Parquet file completely or not at all."""
    storage.make_dirs(path.rsplit("/", 1)[0])
    storage.write_atomic(path, to_parquet(table))
