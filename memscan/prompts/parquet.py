"""This module reads prompt files of Parquet.

The captions are a column of text, a column of lists of text (several captions per row), or a field of a struct.
"""

from __future__ import annotations

from collections.abc import Iterator

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from memscan.errors import InputError, Reason
from memscan.io import storage
from memscan.io.compressed import compression_of, read_all
from memscan.prompts.rows import BATCH_ROWS, Bad, Builder, Columns, OpenedFile, RawBatch, choose_columns


def open_parquet(path: str, columns: Columns) -> OpenedFile:
    """Open a Parquet file.

    Raises:
        InputError: it is not Parquet, lacks the caption column, has two of that name, or has one that is not text.
    """
    if storage.file_size(path) == 0:
        return OpenedFile(iter(()), "Parquet")
    file = _open(path)
    schema = file.schema_arrow
    name = columns.caption if isinstance(columns.caption, str) else None
    inner: str | None = None
    if name is not None and "." in name and name not in schema.names:
        outer, _, inner = name.partition(".")
        columns = Columns(outer, columns.url)
    chosen = choose_columns(schema.names, columns, path)
    kind = _kind(schema.field(chosen.caption), inner, path)
    several = _is_list(kind)
    if not (_is_text(kind) or pa.types.is_null(kind) or (several and _is_text(kind.value_type))):
        raise InputError(
            f"column {schema.names[chosen.caption]!r} is {kind}, not text",
            where=path,
            hint=_advice(kind, schema, chosen),
        )
    url = chosen.url if chosen.url is not None and _is_text(schema.field(chosen.url).type) else None
    shown = schema.names[chosen.caption] + (f".{inner}" if inner else "")
    batches = _batches(file, path, chosen.caption, inner, url)
    link = None if url is None else schema.names[url]
    return OpenedFile(batches, "Parquet", shown, link, chosen.kin, several=several)


def _open(path: str) -> pq.ParquetFile:
    try:
        if compression_of(path) is not None:
            return pq.ParquetFile(pa.BufferReader(read_all(path)))
        filesystem, inside = storage.arrow_filesystem(path)
        return pq.ParquetFile(filesystem.open_input_file(inside))
    except (pa.ArrowException, OSError, ValueError) as error:  # ValueError: a column's name that is no text
        raise InputError(f"is not a Parquet file ({error})", where=path) from error


def _kind(field: pa.Field, inner: str | None, path: str) -> pa.DataType:
    if inner is None:
        return field.type
    if not pa.types.is_struct(field.type) or field.type.get_field_index(inner) < 0:
        raise InputError(f"column {field.name!r} is {field.type}, without a field {inner!r}", where=path)
    return field.type.field(inner).type


def _advice(kind: pa.DataType, schema: pa.Schema, chosen: object) -> str:
    if pa.types.is_struct(kind):
        texts = [field.name for field in kind if _is_text(field.type)]
        if texts:
            return f"set prompts.caption_column to a field of it, such as {schema.names[chosen.caption]}.{texts[0]}"  # type: ignore[attr-defined]
    return "set prompts.caption_column"


def _batches(file: pq.ParquetFile, path: str, caption: int, inner: str | None, url: int | None) -> Iterator[RawBatch]:
    names = file.schema_arrow.names
    repeated = len(set(names)) < len(names)  # then pyarrow cannot say which is meant by a name
    wanted = None if repeated else [names[caption], *([] if url is None else [names[url]])]
    try:
        for batch in file.iter_batches(batch_size=BATCH_ROWS, columns=wanted):
            places = batch.schema.names
            captions = batch.column(caption if repeated else places.index(names[caption]))
            links = None
            if url is not None:
                links = _as_bytes(batch.column(url if repeated else places.index(names[url])))
            if inner is not None:
                captions = pc.struct_field(captions, inner)
            if _is_list(captions.type):
                yield from _lists(captions, links)
            else:
                yield RawBatch(_as_bytes(captions), links)
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"breaks off or is damaged ({error})", where=path) from error
    finally:
        file.close()


def _lists(captions: pa.Array, links: pa.Array | None) -> Iterator[RawBatch]:
    """Each caption of a list is a row; an empty list is a row without a caption."""
    builder = Builder()
    values = captions.cast(pa.list_(pa.large_binary())).to_pylist()
    for at, several in enumerate(values):
        link = None if links is None else links[at].as_py()
        for one in several or ():
            builder.add(one or b"", link)
        if not several:
            builder.reject(Bad(Reason.CAPTION_EMPTY, "an empty list of captions"), link)
    if builder:
        yield builder.take()


def _is_list(kind: pa.DataType) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


def _is_text(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    tests = (
        pa.types.is_string,
        pa.types.is_large_string,
        pa.types.is_binary,
        pa.types.is_large_binary,
        pa.types.is_string_view,
        pa.types.is_binary_view,
        pa.types.is_fixed_size_binary,
    )
    return any(test(kind) for test in tests)


def _as_bytes(column: pa.Array) -> pa.Array:
    """Return bytes and not text: pyarrow would refuse the whole batch for one value that is not UTF-8."""
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if pa.types.is_null(column.type):
        return pa.nulls(len(column), pa.large_binary())
    if pa.types.is_string_view(column.type) or pa.types.is_binary_view(column.type):
        column = column.cast(pa.large_string() if pa.types.is_string_view(column.type) else pa.large_binary())
    return column.cast(pa.large_binary())
