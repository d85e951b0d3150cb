"""This module reads tables of references.

They are Parquet files and the Arrow files of `save_to_disk`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from memscan.errors import InputError
from memscan.io import storage

# Ours -> theirs, in any case; the first that is there is taken.
COLUMN_NAMES = {
    "reference_id": ("reference_id", "id", "key", "image_id", "sample_id", "uid", "uuid", "img_id"),
    "image": ("image", "image_bytes", "bytes", "jpg", "jpeg", "png", "webp", "img", "image_data", "picture"),
    "caption": ("caption", "text", "prompt", "title", "alt_text", "top_caption", "description"),
    "url": ("url", "image_url", "link", "img_url", "uri"),
    "path": ("image_path", "path", "file", "file_name", "filename"),
}


def read_schema(file: str) -> pa.Schema:
    """Return the columns of a Parquet or Arrow file. Raises InputError if it is none."""
    try:
        if file.lower().endswith(".arrow"):
            with _open_arrow(file) as (reader, _):
                return reader.schema
        filesystem, inner = storage.arrow_filesystem(file)
        with filesystem.open_input_file(inner) as opened:
            return pq.ParquetFile(opened).schema_arrow
    except (pa.ArrowException, OSError, ValueError) as error:  # ValueError: a column's name that is no text
        raise unreadable(error, file) from error


def has_images(file: str) -> bool:
    """Return whether a column with a usual name of images may hold some.

    It may if it has bytes or structs, and not if it has text.
    """
    try:
        schema = read_schema(file)
    except InputError:
        return True  # what is wrong with it is told where it is opened
    fields = [field for field in schema if field.name.lower() in COLUMN_NAMES["image"]]
    return any(_is_bytes(field.type) or pa.types.is_nested(field.type) for field in fields)


def find_columns(file: str, needed: Sequence[str], wanted: Mapping[str, str]) -> dict[str, str]:
    """Return, by memscan's name, the name of each column that a file has.

    Args:
        wanted: our name -> the name that the user gave.

    Raises:
        InputError: a column is missing that is needed or wanted, two have one name, or one is of a wrong type.
    """
    schema = read_schema(file)
    lower = {name.lower(): name for name in reversed(schema.names)}
    shown = ", ".join(schema.names[:20])
    found = {}
    for ours, names in COLUMN_NAMES.items():
        given = wanted.get(ours)
        if given is not None and given not in schema.names and given.lower() not in lower:
            raise InputError(f"has no column {given!r} (its columns: {shown})", where=file, hint=_setting(ours))
        choices = names if given is None else (given.lower(),)
        match = given if given in schema.names else next((lower[name] for name in choices if name in lower), None)
        if match is not None:
            found[ours] = match
    for name in needed:
        if name not in found:
            raise InputError(f"has no {name} column (its columns: {shown})", where=file, hint=_setting(name))
    _check(schema, found, file, wanted)
    return found


def _setting(ours: str) -> str:
    return f"set index.{'id' if ours == 'reference_id' else ours}_column"


def _check(schema: pa.Schema, found: dict[str, str], file: str, wanted: Mapping[str, str]) -> None:
    for ours, name in list(found.items()):
        if schema.names.count(name) > 1:
            raise InputError(f"{schema.names.count(name)} columns are called {name!r}", where=file, hint=_setting(ours))
        kind = schema.field(name).type
        if ours == "image":
            if not _can_be_images(kind):
                what = f"column {name} is {_short(kind)}, not encoded images"
                raise InputError(
                    what, where=file, hint=f"{_setting(ours)}; images are bytes, or a struct with bytes or path"
                )
        elif ours == "url" and ours not in wanted and not _can_be_text(kind):
            del found[ours]
        elif not _can_be_text(kind):
            raise InputError(f"column {name} is {_short(kind)}, not text", where=file, hint=_setting(ours))


def _can_be_images(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        fields = {field.name: field.type for field in kind}
        return _is_bytes(fields.get("bytes", pa.int8())) or _is_string(fields.get("path", pa.int8()))
    return _is_bytes(kind)


def _is_bytes(kind: pa.DataType) -> bool:
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_null(kind))


def _is_string(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_null(kind))


def _can_be_text(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return not pa.types.is_nested(kind)


def _short(kind: pa.DataType) -> str:
    text = str(kind)
    return text if len(text) <= 120 else f"{text[:117]}..."


def count_rows(file: str) -> tuple[int, ...]:
    """Count rows by row group of a Parquet file, or of a whole Arrow file. Raises InputError if it is none."""
    if file.lower().endswith(".arrow"):
        try:
            with _open_arrow(file) as (_, batches):
                return (sum(batch.num_rows for batch in batches),)
        except (pa.ArrowException, OSError) as error:
            raise unreadable(error, file) from error
    filesystem, inner = storage.arrow_filesystem(file)
    with filesystem.open_input_file(inner) as opened:
        metadata = pq.ParquetFile(opened).metadata
        return tuple(metadata.row_group(group).num_rows for group in range(metadata.num_row_groups))


def iterate(file: str, group: int, columns: list[str], rows: int) -> Iterator[pa.RecordBatch]:
    """Yield batches of at most `rows` rows, of a row group (-1: of the file)."""
    if file.lower().endswith(".arrow"):
        with _open_arrow(file) as (_, batches):
            for batch in batches:
                for start in range(0, batch.num_rows, rows):
                    yield batch.select(columns).slice(start, rows)
        return
    filesystem, inner = storage.arrow_filesystem(file)
    opened = pq.ParquetFile(filesystem.open_input_file(inner))
    yield from opened.iter_batches(rows, row_groups=None if group < 0 else [group], columns=columns)


class _open_arrow:
    """This is an Arrow file of either kind, stream or file, mapped into memory where it is local."""

    def __init__(self, file: str) -> None:
        filesystem, inner = storage.arrow_filesystem(file)
        self._source = filesystem.open_input_file(inner) if storage.is_remote(file) else pa.memory_map(inner)

    def __enter__(self) -> tuple[pa.ipc.RecordBatchReader, Iterator[pa.RecordBatch]]:
        magic = self._source.read(6)
        self._source.seek(0)
        if magic == b"ARROW1":
            opened = pa.ipc.open_file(self._source)
            return opened, (opened.get_batch(at) for at in range(opened.num_record_batches))
        stream = pa.ipc.open_stream(self._source)
        return stream, iter(stream)

    def __exit__(self, *_: object) -> None:
        self._source.close()


def unreadable(error: Exception, file: str) -> InputError:
    """Return one line for what pyarrow says of a file."""
    reason = " ".join(str(error).split())[:200] or type(error).__name__
    kind = "Arrow" if file.lower().endswith(".arrow") else "Parquet"
    return InputError(f"not a readable {kind} file ({reason})", where=file, hint="fetch it again, or take it out")


def as_text(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Return a column as text.

    Parquet does not check what it calls text, so bytes that are no text become replacement signs.
    """
    data = column.cast(pa.string()).cast(pa.binary())
    try:
        return data.cast(pa.string())
    except pa.ArrowInvalid:
        values = [value if value is None else value.decode("utf-8", "replace") for value in data.to_pylist()]
        return pa.chunked_array([pa.array(values, pa.string())])


def image_bytes(column: pa.ChunkedArray) -> tuple[pa.ChunkedArray, pa.ChunkedArray | None]:
    """Return encoded images of a column, and the paths beside them, as in Hugging Face's struct {bytes, path}."""
    if not pa.types.is_struct(column.type):
        return column.cast(pa.binary()), None
    names = [field.name for field in column.type]
    nothing = pa.chunked_array([pa.nulls(len(column), pa.binary())])
    data = pc.struct_field(column, "bytes").cast(pa.binary()) if "bytes" in names else nothing
    return data, as_text(pc.struct_field(column, "path")) if "path" in names else None
