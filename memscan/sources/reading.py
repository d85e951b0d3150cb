"""This module reads reference images of a source in chunks, which one worker reads, decodes and encodes at a time.

Workers read for themselves, so images do not pass through the driver or through stages that only carry them. A chunk is
some rows of a Parquet file or of vectors, some image files, or a whole tar, whose rows nobody knows before it is read.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from memscan.errors import InputError, Reason, RowReject
from memscan.io import storage
from memscan.io.images import read_image
from memscan.io.listing import NotTaken, printable
from memscan.sources.captions import Absent, CaptionReader, absent_images
from memscan.sources.layouts import Layout, find_layout
from memscan.sources.npy import read_header, read_rows
from memscan.sources.tables import as_text, count_rows, find_columns, image_bytes, iterate, read_schema, unreadable
from memscan.sources.webdataset import read_tar

BATCH_ROWS = 64
CHUNK_ROWS = (64, 2048)
CHECKED_IMAGES = 100
REFERENCE_ROWS = pa.schema(
    [
        pa.field("reference_id", pa.string(), nullable=False),
        pa.field("caption", pa.string()),
        pa.field("url", pa.string()),
        pa.field("image", pa.binary()),  # encoded, as found; null if the source has none
        pa.field("path", pa.string()),  # of the image file, where it is one
        pa.field("vector", pa.list_(pa.float32())),  # of the whole image, where the source has it
        pa.field("reason", pa.string()),  # why the row cannot be read
        pa.field("message", pa.string()),
    ]
)
CHUNKS = pa.schema(
    [
        pa.field("number", pa.int64(), nullable=False),
        pa.field("files", pa.list_(pa.int64()), nullable=False),  # places in the layout's files; none: absent images
        pa.field("group", pa.int32(), nullable=False),  # row group of a Parquet file; -1 for all else
        pa.field("start", pa.int64(), nullable=False),  # rows of the row group, or of the .npy file
        pa.field("stop", pa.int64(), nullable=False),  # -1 where nobody knows yet
    ]
)


@dataclass(frozen=True)
class Source:
    """These are references to be indexed.

    Args:
        layout: its files.
        rows: how many references there are; None for tars.
        columns: by Parquet file, our name -> its name.
        counts: of Parquet files, rows by row group; of .npy files, rows.
        copies: whether images are to be copied into the index, not only their paths.
        image_root: folder that the paths in the metadata of ready embeddings must lie in.
        prefix: of ids; with `derived`, only of those that are made of paths and row numbers.
        absent: images that metadata of a folder describe, and that are not there; they are rejects.
    """

    layout: Layout
    rows: int | None
    columns: Mapping[str, Mapping[str, str]]
    counts: tuple[tuple[int, ...], ...] = ()
    copies: bool = True
    image_root: str = ""
    prefix: str = ""
    derived: bool = False
    absent: tuple[Absent, ...] = ()

    def for_workers(self) -> Source:
        """The same without the names of what is not taken, which may be very many and which only the driver tells."""
        return dataclasses.replace(self, layout=dataclasses.replace(self.layout, not_taken=()))

    def prefixed(self, prefix: str) -> Source:
        """Return the same with another beginning of the ids that are made of paths and row numbers."""
        return dataclasses.replace(self, prefix=prefix, derived=True)

    @cached_property
    def chunk_rows(self) -> int:
        """The rows per chunk depend on the source alone: few in a small source, so that all workers have some."""
        least, most = CHUNK_ROWS
        return max(least, min(most, 1 << ((self.rows or 0) // 1024).bit_length()))

    def chunks(self) -> pa.Table:
        """Return the CHUNKS that together are the source."""
        rows = [{"number": number, **chunk} for number, chunk in enumerate(self._chunks())]
        return pa.Table.from_pylist(rows, schema=CHUNKS)

    def _chunks(self) -> Iterator[dict[str, Any]]:
        step, images = self.chunk_rows, list[int]()
        places = self._counts_of
        for at, kind in enumerate(self.layout.kinds):
            if kind == "image":
                images.append(at)
            if images and (len(images) == step or kind != "image"):
                yield _of_images(images)
                images = []
            if kind == "tar":
                yield {"files": [at], "group": -1, "start": 0, "stop": -1}
            for group, rows in enumerate(places.get(at, ())):
                for start in range(0, rows, step):
                    yield {"files": [at], "group": group, "start": start, "stop": min(rows, start + step)}
        if images:
            yield _of_images(images)
        for start in range(0, len(self.absent), step):
            yield {"files": [], "group": -1, "start": start, "stop": min(len(self.absent), start + step)}

    @cached_property
    def _counts_of(self) -> dict[int, tuple[int, ...]]:
        """Place of each file that `counts` has -> its counts."""
        places = [at for at, kind in enumerate(self.layout.kinds) if kind in ("table", "vectors")]
        return dict(zip(places, self.counts, strict=True))

    def first_row(self, at: int, group: int) -> int:
        """Return the number of a row group's first row in the file."""
        return sum(self._counts_of[at][:group])


def _absent_row(image: Absent) -> dict[str, Any]:
    message = f"{image.metadata} describes it, and it is not there"
    reason = Reason.IMAGE_MISSING.value
    return {"reference_id": image.name, **image.described._asdict(), "reason": reason, "message": message}


def _of_images(places: list[int]) -> dict[str, Any]:
    return {"files": places, "group": -1, "start": 0, "stop": len(places)}


def open_source(
    path: str,
    *,
    copies: bool = True,
    image_root: str | None = None,
    columns: Mapping[str, str] | None = None,
    prefix: str = "",
) -> Source:
    """Examine a source of references without reading its images.

    Args:
        copies: False to store only the paths of images that are files.
        image_root: folder of the images that metadata name; default the source's own.
        columns: our name (`reference_id`, `image`, `caption`, `url`) -> a table's; the rest by their usual names.
        prefix: of all ids.

    Raises:
        InputError: it is missing, empty, lacks a column, or vectors and metadata do not fit each other.
    """
    layout, wanted = find_layout(path), columns or {}
    root = image_root or layout.root
    if layout.kind == "embeddings":
        source = _open_embeddings(layout, copies, root, wanted)
    else:
        tables = [file for file, kind in zip(layout.files, layout.kinds, strict=True) if kind == "table"]
        found = {file: find_columns(file, ("image",), wanted) for file in tables}
        counts = tuple(count_rows(file) for file in tables)
        images = sum(kind == "image" for kind in layout.kinds)
        absent = absent_images(layout)
        rows = None if "tar" in layout.kinds else sum(map(sum, counts)) + images + len(absent)
        source = Source(layout, rows, found, counts, copies, root, absent=absent)
    if source.rows == 0:
        raise InputError("is empty: it has no rows", where=path)
    return dataclasses.replace(source, prefix=prefix)


def _open_embeddings(layout: Layout, copies: bool, root: str, wanted: Mapping[str, str]) -> Source:
    columns = {file: find_columns(file, (), wanted) for file in layout.beside}
    counts, widths = [], set()
    for vectors, table in zip(layout.files, layout.beside, strict=True):
        rows, width = read_header(vectors).shape
        if rows != (held := sum(count_rows(table))):
            raise InputError(f"holds {rows} vectors, {layout.name(table)} {held} rows", where=vectors)
        counts.append((rows,))
        widths.add(width)
    if len(widths) > 1:
        raise InputError(f"vectors of lengths {sorted(widths)}", where=layout.root)
    return Source(layout, sum(map(sum, counts)), columns, tuple(counts), copies, root)


class ChunkReader:
    """This reads chunks of one source. A row group is streamed, so chunks in order cost one pass and a batch of memory.

    Attributes:
        not_taken: members of tars that are no part of a reference, as they are met.
        cleaned: texts in which half a surrogate pair was replaced, so far.
    """

    def __init__(self, source: Source) -> None:
        self.not_taken: list[NotTaken] = []
        self.cleaned = 0
        self._source = source
        self._captions = CaptionReader(source.layout)
        self._open: tuple[str, int] | None = None
        self._batches: Iterator[pa.RecordBatch] = iter(())
        self._left: pa.Table | None = None
        self._position = 0

    def batches(self, chunk: Mapping[str, Any]) -> Iterator[pa.Table]:
        """Yield REFERENCE_ROWS of a chunk, about 64 at a time."""
        if not chunk["files"]:
            yield self._table([_absent_row(image) for image in self._source.absent[chunk["start"] : chunk["stop"]]])
            return
        layout, at = self._source.layout, chunk["files"][0]
        file, kind = layout.files[at], layout.kinds[at]
        if kind == "image":
            for start in range(0, len(chunk["files"]), BATCH_ROWS):
                places = chunk["files"][start : start + BATCH_ROWS]
                yield self._table([self._image_row(place) for place in places])
        elif kind == "tar":
            yield from map(self._table, read_tar(file, layout.name(file), BATCH_ROWS, self.not_taken))
        else:
            read = self._with_vectors if kind == "vectors" else self._of_table
            for start in range(chunk["start"], chunk["stop"], BATCH_ROWS):
                yield read(at, chunk["group"], start, min(chunk["stop"], start + BATCH_ROWS))

    def read(self, chunk: Mapping[str, Any]) -> pa.Table:
        """Return all REFERENCE_ROWS of a chunk."""
        return pa.concat_tables([REFERENCE_ROWS.empty_table(), *self.batches(chunk)])

    def _table(self, rows: list[dict[str, Any]]) -> pa.Table:
        """Rows whose ids are derived from paths, as a table; text that cannot be stored is cleaned and counted."""
        for row in rows:
            row["reference_id"] = self._source.prefix + row["reference_id"]
        self.cleaned += clean(rows)
        return pa.Table.from_pylist(rows, schema=REFERENCE_ROWS)

    def _image_row(self, at: int) -> dict[str, Any]:
        """Return an image file and what is said about it."""
        file = self._source.layout.files[at]
        row: dict[str, Any] = {"reference_id": self._source.layout.name(file)}
        try:
            image = _bytes_or_none(file)
        except RowReject as reject:
            return {**row, "reason": reject.reason.value, "message": reject.message}
        described = self._captions.of(at)
        row |= {"image": image, "caption": described.caption, "url": described.url}
        if self._source.copies or image is None:
            return row
        if printable(file) != file:
            message = "its name is not UTF-8, so that its path cannot be kept: set index.images to copy, or rename it"
            return {**row, "image": None, "reason": Reason.IMAGE_MISSING.value, "message": message}
        return {**row, "path": file}

    def _of_table(self, at: int, group: int, start: int, stop: int) -> pa.Table:
        layout = self._source.layout
        file = layout.files[at]
        columns = self._source.columns[file]
        rows = self._rows(file, group, start, stop)
        first = self._source.first_row(at, group) + start
        where = f"{layout.name(file)}, row group {group}"
        table, paths = self._standard(rows, columns, where, layout.name(file).rpartition(".")[0], first)
        return table if paths is None else self._filled(table, paths, file.rpartition("/")[0])

    def _with_vectors(self, at: int, group: int, start: int, stop: int) -> pa.Table:
        layout = self._source.layout
        file, table = layout.files[at], layout.beside[at]
        rows = self._rows(table, -1, start, stop)
        stem = PurePosixPath(file).stem
        standard, _ = self._standard(rows, self._source.columns[table], layout.name(table), stem, start)
        standard = _placed(standard, self._source.image_root)
        vectors = pa.array(list(read_rows(file, start, stop)), pa.list_(pa.float32()))
        return standard.set_column(standard.schema.get_field_index("vector"), REFERENCE_ROWS.field("vector"), vectors)

    def _standard(
        self, table: pa.Table, columns: Mapping[str, str], where: str, stem: str, first: int
    ) -> tuple[pa.Table, pa.ChunkedArray | None]:
        """Our names and types, and the paths beside the images where some are all there is of one.

        Rows without an id are rejects; where a table has no ids, they are its name and the number of the row.
        """
        found: dict[str, pa.ChunkedArray | pa.Array] = {}
        paths = None
        for name in ("caption", "url", "path"):
            if name in columns and not (name == "path" and "image" in columns):
                found[name] = as_text(table[columns[name]])
        if "image" in columns:
            found["image"], paths = image_bytes(table[columns["image"]])
        own = "reference_id" in columns
        if own:
            ids = as_text(table[columns["reference_id"]])
            nameless = pc.or_(pc.is_null(ids), pc.equal(pc.fill_null(ids, ""), ""))
            if pc.any(nameless).as_py():
                found["reason"] = pc.if_else(nameless, Reason.ROW_MALFORMED.value, pa.scalar(None, pa.string()))
                found["message"] = pc.if_else(nameless, f"no id, in {where}", pa.scalar(None, pa.string()))
        else:
            ids = pa.array([f"{printable(stem)}/{first + row}" for row in range(table.num_rows)], pa.string())
        if self._source.prefix and not (own and self._source.derived):
            ids = pc.binary_join_element_wise(self._source.prefix, ids, "")
        found["reference_id"] = pc.fill_null(ids, "")
        nothing = {field.name: pa.nulls(table.num_rows, field.type) for field in REFERENCE_ROWS}
        standard = pa.table({**nothing, **found}).select(REFERENCE_ROWS.names).cast(REFERENCE_ROWS)
        if paths is not None and not pc.any(pc.and_(pc.is_null(found["image"]), pc.is_valid(paths))).as_py():
            paths = None
        return standard, paths

    def _filled(self, table: pa.Table, paths: pa.ChunkedArray, folder: str) -> pa.Table:
        """Return images of which a table has only the path: below the table's folder, or below `image_root`."""
        rows = table.to_pylist()
        for row, path in zip(rows, paths.to_pylist(), strict=True):
            if row["image"] is None and path and row["reason"] is None:
                roots = dict.fromkeys((self._source.image_root, folder))
                inner = [storage.join(root, name) for root in roots if (name := _inner(path, root))]
                try:
                    row["image"] = next((data for file in inner if (data := _bytes_or_none(file)) is not None), None)
                except RowReject as reject:
                    row.update(reason=reject.reason.value, message=reject.message)
                    continue
                if row["image"] is None:
                    what = f"{inner[0]} is not there" if inner else f"its path {path!r} leads out of {folder}"
                    message = f"{what}; see index.image_root"
                    row.update(reason=Reason.IMAGE_MISSING.value, message=message)
        self.cleaned += clean(rows)
        return pa.Table.from_pylist(rows, schema=REFERENCE_ROWS)

    def _rows(self, file: str, group: int, start: int, stop: int) -> pa.Table:
        """Return rows of a row group (-1: of the file)."""
        if self._open != (file, group) or start < self._position:
            columns = list(dict.fromkeys(self._source.columns[file].values()))
            self._batches = iterate(file, group, columns or read_schema(file).names[:1], BATCH_ROWS)
            self._open, self._left, self._position = (file, group), None, 0
        self._take(start - self._position)
        return self._take(stop - start)

    def _next(self) -> pa.RecordBatch:
        """Return the next rows of what is open. Raises InputError if the file ends before that, or is damaged."""
        try:
            return next(self._batches)
        except (StopIteration, pa.ArrowException, OSError, ValueError) as error:
            raise unreadable(error, self._open[0] if self._open else "") from error

    def _take(self, rows: int) -> pa.Table:
        """Return the next so many rows of what is open; of many rows that are only passed over, the last."""
        while self._left is None or self._left.num_rows < rows:
            if self._left is not None and self._left.num_rows and rows > BATCH_ROWS:
                rows, self._position = rows - self._left.num_rows, self._position + self._left.num_rows
                self._left = None
            batch = pa.Table.from_batches([self._next()])
            self._left = batch if self._left is None else pa.concat_tables([self._left, batch])
        taken, self._left = self._left.slice(0, rows), self._left.slice(rows)
        self._position += rows
        return taken


def _placed(table: pa.Table, root: str) -> pa.Table:
    """Image paths out of metadata, made whole: below the root, or their rows are rejects."""
    if table["path"].null_count == table.num_rows:
        return table
    rows = table.to_pylist()
    for row in rows:
        if row["path"]:
            if inner := _inner(row["path"], root):
                row["path"] = storage.join(root, inner)
            elif row["reason"] is None:
                message = f"its image path does not lie in {root}; see index.image_root"
                row.update(path=None, reason=Reason.IMAGE_MISSING.value, message=message)
    return pa.Table.from_pylist(rows, schema=REFERENCE_ROWS)


def _inner(path: str, root: str) -> str | None:
    """Return a path out of data relative to a folder; None if it does not lie in it."""
    inner = path.removeprefix(storage.join(root, "") + "/").removeprefix("./")
    return inner if storage.is_inner(inner) else None


def clean(rows: list[dict[str, Any]]) -> int:
    """Replace what no table can hold, half surrogate pairs, in the texts of rows; gives how many texts were changed.

    In names they stand for bytes that are not UTF-8, and are written as escapes.
    """
    changed = 0
    for row in rows:
        for name in ("reference_id", "caption", "url", "message"):
            text = row.get(name)
            if isinstance(text, str) and not text.isascii() and (printed := printable(text)) != text:
                half = name in ("caption", "url")
                row[name] = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace") if half else printed
                changed += half
    return changed


def check_images(source: Source) -> None:
    """Look whether the images are there that metadata of ready vectors name: the first hundred.

    Raises:
        InputError: the metadata name no image, or not one of those is there: nothing could ever be compared.
    """
    if source.layout.kind != "embeddings":
        return
    tried: list[str] = []
    reader = ChunkReader(source)
    for at, table in enumerate(source.layout.beside):
        columns = source.columns[table]
        if "image" in columns:
            return
        if "path" not in columns:
            what = "names no images: an index of vectors alone finds neighbours, but can compare nothing"
            raise InputError(
                what, where=table, hint="metadata need image_path, or give the images themselves as source"
            )
        for start in range(0, min(source.counts[at][0], CHECKED_IMAGES), BATCH_ROWS):
            rows = reader._with_vectors(at, 0, start, min(source.counts[at][0], start + BATCH_ROWS)).to_pylist()
            for row in rows:
                if row["path"] and storage.exists(row["path"]) and not storage.is_dir(row["path"]):
                    return
                tried.append(row["path"] or row["message"] or "no path")
        if len(tried) >= CHECKED_IMAGES:
            break
    raise InputError(
        f"not one of the first {len(tried)} images that the metadata name is there; the first: {tried[0]}",
        where=source.layout.root,
        hint="set index.image_root to the folder that they lie in; keys of WebDataset samples are no files",
    )


def _bytes_or_none(file: str) -> bytes | None:
    try:
        return read_image(file)
    except InputError:
        return None  # vanished or forbidden: a reject of its own, not the end of the build


def vector_width(source: Source) -> int | None:
    """Return the length of the vectors that the source has, if it has some."""
    if source.layout.kind != "embeddings":
        return None
    return int(read_header(source.layout.files[0]).shape[1])


def as_unit(vectors: list[list[float] | None]) -> list[np.ndarray | None]:
    """Return vectors scaled to unit length; None for vectors that are zero or not finite."""
    from memscan.vectors import unit_rows

    scaled, good = unit_rows(np.array(vectors, dtype=np.float32))
    return [vector if fine else None for vector, fine in zip(scaled, good, strict=True)]
