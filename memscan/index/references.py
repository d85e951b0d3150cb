"""This module reads references by row: images, masks, captions and URLs of a shard's references.parquet.

They are not held in memory.

The file has small row groups without statistics or dictionaries, so that reading one row means reading one row group.
Images and masks are stored as they are, because they are compressed already. The ids are also in a separate file, which
is memory-mapped: every answer needs them, and a copy of all of them would take gigabytes in every process.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from memscan.errors import IndexLoadError, InputError, Reason, RowReject
from memscan.io import images, storage
from memscan.records import REFERENCES

ROW_GROUP = 64
CACHED_GROUPS = 64


@dataclass(frozen=True)
class Reference:
    """This is a reference image: image_HWC uint8 RGB and mask_HW float32 in [0, 1], of the same height and width.

    `mask_HW` is None if the index has none; whoever compares makes it.
    """

    reference_id: str
    caption: str | None
    url: str | None
    image_HWC: npt.NDArray[np.uint8]
    mask_HW: npt.NDArray[np.float32] | None


def write_references(path: str, tables: Iterable[pa.Table]) -> pa.ChunkedArray:
    """Write tables of records.REFERENCES to a local file, the same bytes for the same tables and pyarrow version.

    Returns:
        The ids.

    Raises:
        InputError: another schema.
    """
    text = {field.name: "none" if field.name in ("image", "mask") else "zstd" for field in REFERENCES}
    ids: list[pa.Array] = []
    with pq.ParquetWriter(path, REFERENCES, compression=text, use_dictionary=False, write_statistics=False) as writer:
        waiting = REFERENCES.empty_table()
        for table in tables:
            table = _as_references(table, path)
            ids.extend(table["reference_id"].chunks)
            rows = pa.concat_tables([waiting, table])
            whole = rows.num_rows // ROW_GROUP * ROW_GROUP
            if whole:
                writer.write_table(rows.slice(0, whole).combine_chunks(), row_group_size=ROW_GROUP)
            waiting = rows.slice(whole)
        if waiting.num_rows:
            writer.write_table(waiting.combine_chunks(), row_group_size=ROW_GROUP)
    return pa.chunked_array(ids, pa.string())


def write_ids(path: str, ids: pa.ChunkedArray) -> None:
    """Write a shard's ids to a local Arrow file, as one batch."""
    batch = pa.record_batch([ids.cast(pa.large_string()).combine_chunks()], names=["reference_id"])
    with pa.OSFile(path, "wb") as file, pa.ipc.new_file(file, batch.schema) as writer:
        writer.write_batch(batch)


def map_ids(path: str) -> pa.Array:
    """Return a shard's ids, mapped from a verified local file. Raises IndexLoadError if it is no such file."""
    try:
        with pa.memory_map(path) as file:
            return pa.ipc.open_file(file).get_batch(0).column("reference_id")
    except (pa.ArrowInvalid, KeyError) as error:
        raise IndexLoadError(f"not a file of ids: {error}", where=path) from error


def _as_references(table: pa.Table, path: str) -> pa.Table:
    if "path" not in table.column_names:
        table = table.append_column("path", pa.nulls(table.num_rows, pa.string()))
    try:
        return table.select(REFERENCES.names).cast(REFERENCES)
    except (KeyError, ValueError, pa.ArrowInvalid) as error:
        raise InputError(f"references do not fit the schema: {error}", where=path) from error


def check_ids(ids: pa.ChunkedArray, path: str) -> None:
    """Raise InputError if there are no ids, or if some are empty or not unique."""
    if len(ids) == 0:
        raise InputError("no reference images", where=path)
    counts = pc.value_counts(ids)
    for entry, count in zip(counts.field("values").to_pylist(), counts.field("counts").to_pylist(), strict=True):
        if not entry or count > 1:
            what = f"reference_id {entry!r} occurs {count} times" if entry else "a reference_id is empty"
            raise InputError(what, where=path, hint="ids must be unique")


class ReferenceStore:
    """This gives random access to the rows of a references.parquet that has been verified.

    Args:
        path: local or s3://.
        cached_groups: row groups of 64 images kept in memory.

    Raises:
        IndexLoadError: the file is not Parquet or lacks a column.
    """

    def __init__(self, path: str, cached_groups: int = CACHED_GROUPS) -> None:
        self.path = path
        try:
            self._file = _open(path)
        except (pa.ArrowInvalid, KeyError) as error:
            raise IndexLoadError(f"not a table of references: {error}", where=path) from error
        missing = set(REFERENCES.names) - set(self._file.schema_arrow.names)
        if missing:
            raise IndexLoadError(f"not a table of references: no column {', '.join(sorted(missing))}", where=path)
        self._ids: pa.Array | None = None
        sizes = [self._file.metadata.row_group(i).num_rows for i in range(self._file.num_row_groups)]
        self._starts = np.cumsum([0, *sizes])
        self._groups: OrderedDict[int, pa.Table] = OrderedDict()
        self._cached_groups = cached_groups

    def __len__(self) -> int:
        return int(self._file.metadata.num_rows)

    def row_of(self, reference_id: str) -> int:
        """Return the row of an id. Raises RowReject (`reference_missing`) if the index has none."""
        if self._ids is None:
            self._ids = self._file.read(columns=["reference_id"])["reference_id"]
        row = int(pc.index(self._ids, reference_id).as_py())
        if row < 0:
            raise RowReject(Reason.REFERENCE_MISSING, f"no reference {reference_id!r} in {self.path}")
        return row

    def encoded(self, row: int) -> dict[str, str | bytes | None]:
        """Return a row as it is stored: image and mask still encoded. Raises IndexError outside [0, len)."""
        self._check(row)
        group = int(np.searchsorted(self._starts, row, side="right")) - 1
        return dict(self._group(group).slice(row - int(self._starts[group]), 1).to_pylist()[0])

    def fetch(self, row: int) -> Reference:
        """Return a row with its image and mask decoded; the image from its `path` where it is not stored.

        Raises:
            RowReject: the image is missing, image or mask cannot be decoded, or the mask is of another size
                (`reference_missing`): what cannot be compared must not count as different.
            IndexError: outside [0, len).
        """
        return decode_reference(self.encoded(row))

    def _check(self, row: int) -> None:
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of {len(self)} references")

    def _group(self, group: int) -> pa.Table:
        if group in self._groups:
            self._groups.move_to_end(group)
            return self._groups[group]
        table = self._file.read_row_group(group, columns=REFERENCES.names, use_threads=False)
        self._groups[group] = table
        while len(self._groups) > self._cached_groups:
            self._groups.popitem(last=False)
        return table


def _open(path: str) -> pq.ParquetFile:
    if storage.is_remote(path):
        filesystem, inside = storage.arrow_filesystem(path)
        return pq.ParquetFile(inside, filesystem=filesystem, pre_buffer=False)
    # Given a file system, pyarrow would not map the file but read it.
    return pq.ParquetFile(path, memory_map=True)


def _text(value: str | bytes | None) -> str | None:
    return value if isinstance(value, str) else None


def decode_reference(stored: dict[str, str | bytes | None]) -> Reference:
    """Return a stored row with its image and mask decoded. Raises RowReject as `ReferenceStore.fetch`."""
    name, mask = stored["reference_id"], stored["mask"]
    try:
        image_HWC = images.decode(_image_bytes(stored))
        mask_HW = images.decode_mask(mask) if isinstance(mask, bytes) else None
    except RowReject as error:
        raise RowReject(Reason.REFERENCE_MISSING, f"reference {name!r}: {error.message}") from error
    if mask_HW is not None and mask_HW.shape != image_HWC.shape[:2]:
        raise RowReject(
            Reason.REFERENCE_MISSING, f"reference {name!r}: mask {mask_HW.shape} for image {image_HWC.shape}"
        )
    return Reference(str(name), _text(stored["caption"]), _text(stored["url"]), image_HWC, mask_HW)


def _image_bytes(stored: dict[str, str | bytes | None]) -> bytes:
    image, path = stored["image"], stored["path"]
    if isinstance(image, bytes) and image:
        return image
    if not isinstance(path, str):
        raise RowReject(Reason.REFERENCE_MISSING, "the index has neither its image nor a path")
    try:
        return images.read_image(path)
    except InputError as error:
        raise RowReject(Reason.REFERENCE_MISSING, str(error)) from error
