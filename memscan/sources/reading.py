"""Reference images of a source, in chunks: what one worker reads, decodes and describes at a time.

Workers read for themselves, so images do not pass through the driver or through stages that only carry them. A chunk is
some rows of a Parquet file or of vectors, some image files, or a whole tar, whose rows nobody knows before it is read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from memscan.errors import InputError, Reason, RowReject
from memscan.io import storage
from memscan.io.images import read_image
from memscan.sources.layouts import Layout, find_layout
from memscan.sources.npy import read_header, read_rows
from memscan.sources.webdataset import MAX_TEXT, read_tar

BATCH_ROWS = 64
CHUNK_ROWS = (64, 2048)
# Ours -> theirs, in any case; the first that is there is taken.
COLUMN_NAMES = {
    "reference_id": ("reference_id", "id", "key", "image_id", "sample_id"),
    "image": ("image", "image_bytes", "bytes", "jpg", "jpeg", "png", "webp"),
    "caption": ("caption", "text", "prompt", "title", "alt_text"),
    "url": ("url", "image_url", "link"),
    "path": ("image_path", "path", "file", "file_name", "filename"),
}
REFERENCE_ROWS = pa.schema(
    [
        pa.field("reference_id", pa.string(), nullable=False),
        pa.field("caption", pa.string()),
        pa.field("url", pa.string()),
        pa.field("image", pa.binary()),  # encoded, as found; null where the source has none
        pa.field("path", pa.string()),  # of the image file, where it is one
        pa.field("vector", pa.list_(pa.float32())),  # of the whole image, where the source has it
        pa.field("reason", pa.string()),  # why the row cannot be read
        pa.field("message", pa.string()),
    ]
)
CHUNKS = pa.schema(
    [
        pa.field("number", pa.int64(), nullable=False),
        pa.field("files", pa.list_(pa.int64()), nullable=False),  # places in the layout's files
        pa.field("group", pa.int32(), nullable=False),  # row group of a Parquet file; -1 for all else
        pa.field("start", pa.int64(), nullable=False),  # rows of the row group, or of the .npy file
        pa.field("stop", pa.int64(), nullable=False),  # -1 where nobody knows yet
    ]
)


@dataclass(frozen=True)
class Source:
    """References to be indexed.

    Args:
        layout: its files.
        rows: how many references there are; None for tars.
        columns: by Parquet file, our name -> its name.
        counts: of Parquet files, rows by row group; of .npy files, rows.
        copies: whether images are to be copied into the index, not only their paths.
        image_root: folder that the paths in the metadata of ready embeddings must lie in.
    """

    layout: Layout
    rows: int | None
    columns: Mapping[str, Mapping[str, str]]
    counts: tuple[tuple[int, ...], ...] = ()
    copies: bool = True
    image_root: str = ""

    @cached_property
    def chunk_rows(self) -> int:
        """Rows of a chunk: few in a small source, so that all workers have some; it depends on the source alone."""
        least, most = CHUNK_ROWS
        return max(least, min(most, 1 << ((self.rows or 0) // 1024).bit_length()))

    def chunks(self) -> pa.Table:
        """CHUNKS that together are the source."""
        rows = [{"number": number, **chunk} for number, chunk in enumerate(self._chunks())]
        return pa.Table.from_pylist(rows, schema=CHUNKS)

    def _chunks(self) -> Iterator[dict[str, Any]]:
        step = self.chunk_rows
        if self.layout.kind == "webdataset":
            for at in range(len(self.layout.files)):
                yield {"files": [at], "group": -1, "start": 0, "stop": -1}
        elif self.layout.kind == "images":
            for start in range(0, len(self.layout.files), step):
                stop = min(len(self.layout.files), start + step)
                yield {"files": list(range(start, stop)), "group": -1, "start": 0, "stop": stop - start}
        else:
            for at, groups in enumerate(self.counts):
                for group, rows in enumerate(groups):
                    for start in range(0, rows, step):
                        stop = min(rows, start + step)
                        yield {"files": [at], "group": group, "start": start, "stop": stop}


def open_source(path: str, *, copies: bool = True, image_root: str | None = None) -> Source:
    """Look at a source of references without reading its images.

    Args:
        copies: False to store only the paths of images that are files.
        image_root: folder of the images that the metadata of ready embeddings name; default the source's own.

    Raises:
        InputError: it is missing, empty, lacks a column, or vectors and metadata do not fit each other.
    """
    layout = find_layout(path)
    if layout.kind == "images":
        return Source(layout, len(layout.files), {}, copies=copies)
    if layout.kind == "webdataset":
        return Source(layout, None, {}, copies=copies)
    if layout.kind == "embeddings":
        return _open_embeddings(layout, copies, image_root)
    columns = {file: _find_columns(file, ("reference_id", "image")) for file in layout.files}
    counts = tuple(_group_rows(file) for file in layout.files)
    return _counted(Source(layout, sum(map(sum, counts)), columns, counts, copies), path)


def _open_embeddings(layout: Layout, copies: bool, image_root: str | None) -> Source:
    columns = {file: _find_columns(file, ()) for file in layout.beside}
    counts, widths = [], set()
    for vectors, table in zip(layout.files, layout.beside, strict=True):
        rows, width = read_header(vectors).shape
        if rows != (held := sum(_group_rows(table))):
            raise InputError(f"holds {rows} vectors, {layout.name(table)} {held} rows", where=vectors)
        counts.append((rows,))
        widths.add(width)
    if len(widths) > 1:
        raise InputError(f"vectors of lengths {sorted(widths)}", where=layout.root)
    root = image_root or layout.root
    return _counted(Source(layout, sum(map(sum, counts)), columns, tuple(counts), copies, root), layout.root)


def _counted(source: Source, path: str) -> Source:
    if not source.rows:
        raise InputError("is empty: it has no rows", where=path)
    return source


def _find_columns(file: str, needed: tuple[str, ...]) -> dict[str, str]:
    filesystem, inner = storage.arrow_filesystem(file)
    try:
        with filesystem.open_input_file(inner) as opened:
            schema = pq.ParquetFile(opened).schema_arrow
    except (pa.ArrowException, OSError, ValueError) as error:  # ValueError: a column's name that is no text
        raise _unreadable(error, file) from error
    lower = {name.lower(): name for name in reversed(schema.names)}
    found = {}
    for ours, names in COLUMN_NAMES.items():
        match = next((lower[name] for name in names if name in lower), None)
        if match is not None:
            found[ours] = match
    for name in needed:
        if name not in found:
            raise InputError(f"has no {name} column (its columns: {', '.join(schema.names)})", where=file)
    kind = schema.field(found["image"]).type if "image" in found else pa.binary()
    if not (pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_struct(kind)):
        raise InputError(f"column {found['image']} is {kind}, not encoded images", where=file)
    return found


def _group_rows(file: str) -> tuple[int, ...]:
    filesystem, inner = storage.arrow_filesystem(file)
    with filesystem.open_input_file(inner) as opened:
        metadata = pq.ParquetFile(opened).metadata
        return tuple(metadata.row_group(group).num_rows for group in range(metadata.num_row_groups))


class ChunkReader:
    """Reads chunks of one source. A row group is streamed, so chunks in order cost one pass and a batch of memory."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._open: tuple[str, int] | None = None
        self._batches: Iterator[pa.RecordBatch] = iter(())
        self._left: pa.Table | None = None
        self._position = 0

    def batches(self, chunk: Mapping[str, Any]) -> Iterator[pa.Table]:
        """REFERENCE_ROWS of a chunk, some 64 at a time."""
        layout = self._source.layout
        if layout.kind == "images":
            for start in range(0, len(chunk["files"]), BATCH_ROWS):
                files = [layout.files[at] for at in chunk["files"][start : start + BATCH_ROWS]]
                yield _table([self._image_row(file) for file in files])
        elif layout.kind == "webdataset":
            (at,) = chunk["files"]
            yield from map(_table, read_tar(layout.files[at], layout.name(layout.files[at]), BATCH_ROWS))
        elif layout.kind == "embeddings":
            for start in range(chunk["start"], chunk["stop"], BATCH_ROWS):
                yield self._with_vectors(chunk["files"][0], start, min(chunk["stop"], start + BATCH_ROWS))
        else:
            file = layout.files[chunk["files"][0]]
            for start in range(chunk["start"], chunk["stop"], BATCH_ROWS):
                rows = self._rows(file, chunk["group"], start, min(chunk["stop"], start + BATCH_ROWS))
                yield _standard(rows, self._source.columns[file], f"{layout.name(file)}, row group {chunk['group']}")

    def read(self, chunk: Mapping[str, Any]) -> pa.Table:
        """All REFERENCE_ROWS of a chunk."""
        return pa.concat_tables([REFERENCE_ROWS.empty_table(), *self.batches(chunk)])

    def _image_row(self, file: str) -> dict[str, Any]:
        """An image file; a text file of the same name beside one is its caption, as fine-tuning tools keep them."""
        row: dict[str, Any] = {"reference_id": self._source.layout.name(file), "caption": _caption_beside(file)}
        try:
            image = _bytes_or_none(file)
        except RowReject as reject:
            return {**row, "reason": reject.reason.value, "message": reject.message}
        row["image"] = image
        return row if self._source.copies or image is None else {**row, "path": file}

    def _with_vectors(self, at: int, start: int, stop: int) -> pa.Table:
        layout = self._source.layout
        file, table = layout.files[at], layout.beside[at]
        columns = self._source.columns[table]
        rows = self._rows(table, -1, start, stop)
        if "reference_id" not in columns:
            names = [f"{PurePosixPath(file).stem}/{row}" for row in range(start, stop)]
            rows = rows.append_column("reference_id", pa.array(names))
            columns = {**columns, "reference_id": "reference_id"}
        standard = _placed(_standard(rows, columns, layout.name(table)), self._source.image_root)
        vectors = pa.array(list(read_rows(file, start, stop)), pa.list_(pa.float32()))
        return standard.set_column(standard.schema.get_field_index("vector"), REFERENCE_ROWS.field("vector"), vectors)

    def _rows(self, file: str, group: int, start: int, stop: int) -> pa.Table:
        """Rows of a row group (-1: of the file)."""
        if self._open != (file, group) or start < self._position:
            filesystem, inner = storage.arrow_filesystem(file)
            opened = pq.ParquetFile(filesystem.open_input_file(inner))
            columns = list(self._source.columns[file].values())
            groups = None if group < 0 else [group]
            self._batches = opened.iter_batches(BATCH_ROWS, row_groups=groups, columns=columns)
            self._open, self._left, self._position = (file, group), None, 0
        self._take(start - self._position)
        return self._take(stop - start)

    def _next(self) -> pa.RecordBatch:
        """The next rows of what is open. Raises InputError where the file ends before that, or is damaged."""
        try:
            return next(self._batches)
        except (StopIteration, pa.ArrowException, OSError, ValueError) as error:
            raise _unreadable(error, self._open[0] if self._open else "") from error

    def _take(self, rows: int) -> pa.Table:
        """The next so many rows of what is open; of many rows that are only passed over, the last."""
        while self._left is None or self._left.num_rows < rows:
            if self._left is not None and self._left.num_rows and rows > BATCH_ROWS:
                rows, self._position = rows - self._left.num_rows, self._position + self._left.num_rows
                self._left = None
            batch = pa.Table.from_batches([self._next()])
            self._left = batch if self._left is None else pa.concat_tables([self._left, batch])
        taken, self._left = self._left.slice(0, rows), self._left.slice(rows)
        self._position += rows
        return taken


def _unreadable(error: Exception, file: str) -> InputError:
    reason = " ".join(str(error).split())[:200] or type(error).__name__
    return InputError(f"not a readable Parquet file ({reason})", where=file, hint="fetch it again, or take it out")


def _standard(table: pa.Table, columns: Mapping[str, str], where: str) -> pa.Table:
    """Our names and types; Hugging Face's {bytes, path} images are flattened; rows without an id are rejects."""
    found: dict[str, pa.ChunkedArray | pa.Array] = {}
    for name in ("caption", "url", "path"):
        if name in columns and not (name == "path" and "image" in columns):
            found[name] = _text(table[columns[name]])
    if "image" in columns:
        image = table[columns["image"]]
        image = pc.struct_field(image, "bytes") if pa.types.is_struct(image.type) else image
        found["image"] = image.cast(pa.binary())
    ids = _text(table[columns["reference_id"]])
    nameless = pc.or_(pc.is_null(ids), pc.equal(pc.fill_null(ids, ""), ""))
    if pc.any(nameless).as_py():
        found["reason"] = pc.if_else(nameless, Reason.ROW_MALFORMED.value, pa.scalar(None, pa.string()))
        found["message"] = pc.if_else(nameless, f"no id, in {where}", pa.scalar(None, pa.string()))
    found["reference_id"] = pc.fill_null(ids, "")
    nothing = {field.name: pa.nulls(table.num_rows, field.type) for field in REFERENCE_ROWS}
    return pa.table({**nothing, **found}).select(REFERENCE_ROWS.names).cast(REFERENCE_ROWS)


def _text(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """A column as text. Parquet does not check what it calls text: bytes that are none become replacement signs."""
    data = column.cast(pa.string()).cast(pa.binary())
    try:
        return data.cast(pa.string())
    except pa.ArrowInvalid:
        values = [value if value is None else value.decode("utf-8", "replace") for value in data.to_pylist()]
        return pa.chunked_array([pa.array(values, pa.string())])


def _placed(table: pa.Table, root: str) -> pa.Table:
    """Image paths out of metadata, made whole: below the root, or their rows are rejects."""
    if table["path"].null_count == table.num_rows:
        return table
    rows = table.to_pylist()
    for row in rows:
        if row["path"]:
            inner = row["path"].removeprefix(storage.join(root, "") + "/")
            if storage.is_inner(inner):
                row["path"] = storage.join(root, inner)
            elif row["reason"] is None:
                message = f"its image path does not lie in {root}; see index.image_root"
                row.update(path=None, reason=Reason.IMAGE_MISSING.value, message=message)
    return _table(rows)


def _table(rows: list[dict[str, Any]]) -> pa.Table:
    return pa.Table.from_pylist(rows, schema=REFERENCE_ROWS)


def _bytes_or_none(file: str) -> bytes | None:
    try:
        return read_image(file)
    except InputError:
        return None  # vanished or forbidden: a reject of its own, not the end of the build


def _caption_beside(file: str) -> str | None:
    if storage.is_remote(file):
        return None  # a look at every text file that might be there would cost a request each
    text = str(PurePosixPath(file).with_suffix(".txt"))
    if not storage.exists(text) or storage.is_dir(text):
        return None
    with storage.open_input(text) as opened:
        return " ".join(opened.read(MAX_TEXT).decode("utf-8", "replace").split())


def vector_width(source: Source) -> int | None:
    """Length of the vectors that the source has, if it has some."""
    if source.layout.kind != "embeddings":
        return None
    return int(read_header(source.layout.files[0]).shape[1])


def as_unit(vectors: list[list[float] | None]) -> list[np.ndarray | None]:
    """Vectors scaled to unit length; None for those that cannot be: zero, or not finite."""
    from memscan.vectors import unit_rows

    scaled, good = unit_rows(np.array(vectors, dtype=np.float32))
    return [vector if fine else None for vector, fine in zip(scaled, good, strict=True)]
