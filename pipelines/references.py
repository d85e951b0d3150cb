"""Where reference images come from: Parquet with encoded images, or a folder of image files.

A source is looked at without reading an image, and cut into chunks: what one worker reads, decodes and describes at a
time. Workers read for themselves, so images do not pass through the driver or through stages that only carry them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from memscan import storage
from memscan.errors import InputError
from pipelines.inputs import IMAGE_SUFFIXES
from pipelines.tables import read_table

CHUNK_ROWS = 64
# Ours -> theirs, in any case; the first that is there is taken.
COLUMN_NAMES = {
    "reference_id": ("reference_id", "id", "key", "image_id"),
    "image": ("image", "image_bytes", "bytes", "jpg", "jpeg", "png", "webp"),
    "caption": ("caption", "text", "prompt", "title", "alt_text"),
    "url": ("url", "image_url", "link"),
}
REFERENCE_ROWS = pa.schema(
    [
        pa.field("reference_id", pa.string(), nullable=False),
        pa.field("caption", pa.string()),
        pa.field("url", pa.string()),
        pa.field("image", pa.binary()),  # encoded, as found; null where the source has none
    ]
)
CHUNKS = pa.schema(
    [
        pa.field("files", pa.list_(pa.string()), nullable=False),  # one Parquet file, or image files
        pa.field("group", pa.int32(), nullable=False),  # row group of the Parquet file; -1 for image files
        pa.field("start", pa.int64(), nullable=False),  # rows of the row group
        pa.field("stop", pa.int64(), nullable=False),
    ]
)


@dataclass(frozen=True)
class Source:
    """References to be indexed.

    Args:
        files: Parquet files, or image files.
        root: folder of image files; their ids are their paths below it. "" for Parquet.
        rows: how many references there are.
        columns: by Parquet file, our name -> its name.
    """

    files: tuple[str, ...]
    root: str
    rows: int
    columns: Mapping[str, Mapping[str, str]]

    def chunks(self) -> pa.Table:
        """CHUNKS that together are the source."""
        rows = self._image_chunks() if self.root else self._row_chunks()
        return pa.Table.from_pylist(list(rows), schema=CHUNKS)

    def _image_chunks(self) -> Iterator[dict[str, Any]]:
        for start in range(0, len(self.files), CHUNK_ROWS):
            files = list(self.files[start : start + CHUNK_ROWS])
            yield {"files": files, "group": -1, "start": 0, "stop": len(files)}

    def _row_chunks(self) -> Iterator[dict[str, Any]]:
        for file in self.files:
            for group, rows in enumerate(_group_rows(file)):
                for start in range(0, rows, CHUNK_ROWS):
                    yield {"files": [file], "group": group, "start": start, "stop": min(rows, start + CHUNK_ROWS)}


def open_source(path: str) -> Source:
    """Look at a source of references without reading its images.

    Raises:
        InputError: it is missing, empty, lacks a column, or its ids are not distinct.
    """
    if not storage.exists(path):
        raise InputError("no such file or folder", where=path, hint="see index.source")
    folder = storage.is_dir(path)
    tables = storage.list_files(path, ".parquet") if folder else [path]
    if tables:
        return _parquet_source(path, tables)
    images = storage.list_files(path, IMAGE_SUFFIXES)
    if not images:
        raise InputError("holds neither Parquet files nor images", where=path)
    return Source(tuple(images), storage.join(path) + "/", len(images), {})


def _parquet_source(path: str, files: Sequence[str]) -> Source:
    columns = {file: _find_columns(file) for file in files}
    ids: set[str] = set()
    rows = 0
    for file in files:
        name = columns[file]["reference_id"]
        values = read_table(file, [name]).column(0).cast(pa.string())
        if values.null_count:
            raise InputError(f"{values.null_count} rows have no {name}", where=file)
        ids.update(values.to_pylist())
        rows += len(values)
    if rows == 0:
        raise InputError("is empty: it has no rows", where=path)
    if len(ids) < rows:
        raise InputError(f"{rows - len(ids)} rows repeat an id of another row", where=path, hint="ids must be distinct")
    return Source(tuple(files), "", rows, columns)


def _find_columns(file: str) -> dict[str, str]:
    filesystem, inner = storage.arrow_filesystem(file)
    try:
        with filesystem.open_input_file(inner) as opened:
            schema = pq.ParquetFile(opened).schema_arrow
    except (pa.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"not a readable Parquet file ({reason})", where=file) from error
    lower = {name.lower(): name for name in reversed(schema.names)}
    found = {}
    for ours, names in COLUMN_NAMES.items():
        match = next((lower[name] for name in names if name in lower), None)
        if match is not None:
            found[ours] = match
    for needed in ("reference_id", "image"):
        if needed not in found:
            raise InputError(f"has no {needed} column (its columns: {', '.join(schema.names)})", where=file)
    kind = schema.field(found["image"]).type
    if not (pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_struct(kind)):
        raise InputError(f"column {found['image']} is {kind}, not encoded images", where=file)
    return found


def _group_rows(file: str) -> list[int]:
    filesystem, inner = storage.arrow_filesystem(file)
    with filesystem.open_input_file(inner) as opened:
        metadata = pq.ParquetFile(opened).metadata
        return [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]


class ChunkReader:
    """Reads chunks of one source. A row group is streamed, so chunks in order cost one pass and a batch of memory."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._open: tuple[str, int] | None = None
        self._batches: Iterator[pa.RecordBatch] = iter(())
        self._left: pa.Table | None = None
        self._position = 0

    def read(self, chunk: Mapping[str, Any]) -> pa.Table:
        """REFERENCE_ROWS of a chunk."""
        if chunk["group"] < 0:
            return _read_images(chunk["files"], self._source.root)
        (file,) = chunk["files"]
        if self._open != (file, chunk["group"]) or chunk["start"] < self._position:
            self._start(file, chunk["group"])
        self._take(chunk["start"] - self._position)
        return _standard(self._take(chunk["stop"] - chunk["start"]), self._source.columns[file])

    def _start(self, file: str, group: int) -> None:
        filesystem, inner = storage.arrow_filesystem(file)
        opened = pq.ParquetFile(filesystem.open_input_file(inner))
        columns = list(self._source.columns[file].values())
        self._batches = opened.iter_batches(CHUNK_ROWS, row_groups=[group], columns=columns)
        self._open, self._left, self._position = (file, group), None, 0

    def _take(self, rows: int) -> pa.Table:
        """The next so many rows of the open row group."""
        tables = [] if self._left is None else [self._left]
        while sum(table.num_rows for table in tables) < rows:
            tables.append(pa.Table.from_batches([next(self._batches)]))
        joined = pa.concat_tables(tables) if tables else pa.table({})
        self._left = joined.slice(rows) if joined.num_rows > rows else None
        self._position += rows
        return joined.slice(0, rows)


def _standard(table: pa.Table, columns: Mapping[str, str]) -> pa.Table:
    """Our names and types; Hugging Face's {bytes, path} images are flattened."""
    image = table[columns["image"]]
    if pa.types.is_struct(image.type):
        image = pc.struct_field(image, "bytes")
    nulls = pa.nulls(table.num_rows, pa.string())
    texts = [
        table[columns[field.name]].cast(pa.string()) if field.name in columns else nulls
        for field in REFERENCE_ROWS
        if field.name != "image"
    ]
    return pa.Table.from_arrays([*texts, image.cast(pa.binary())], schema=REFERENCE_ROWS)


def _read_images(files: Sequence[str], root: str) -> pa.Table:
    """Image files; a text file of the same name beside one is its caption, as fine-tuning tools keep them."""
    rows = [
        {
            "reference_id": file.removeprefix(root),
            "caption": _caption_beside(file),
            "url": None,
            "image": _bytes_or_none(file),
        }
        for file in files
    ]
    return pa.Table.from_pylist(rows, schema=REFERENCE_ROWS)


def _bytes_or_none(file: str) -> bytes | None:
    try:
        return storage.read_bytes(file)
    except InputError:
        return None  # vanished or forbidden: a reject of its own, not the end of the build


def _caption_beside(file: str) -> str | None:
    if storage.is_remote(file):
        return None  # a look at every text file that might be there would cost a request each
    text = str(PurePosixPath(file).with_suffix(".txt"))
    if not storage.exists(text):
        return None
    return " ".join(storage.read_bytes(text).decode("utf-8", "replace").split())
