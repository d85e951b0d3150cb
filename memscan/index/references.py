"""References by row: images, masks, captions and urls out of references.parquet without holding it in memory.

The file is written in small row groups without statistics or dictionaries, images and masks as they are (they are
compressed already), so that one row costs the reading of one row group. Only the ids are held in memory.
"""

from __future__ import annotations

import io
from collections import OrderedDict
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from memscan import images, storage
from memscan.errors import IndexLoadError, InputError, Reason, RowReject
from memscan.records import REFERENCES

ROW_GROUP = 64
CACHED_GROUPS = 64


@dataclass(frozen=True)
class Reference:
    """A reference image: image_HWC uint8 RGB, mask_HW float32 in [0, 1], of the same height and width."""

    reference_id: str
    caption: str | None
    url: str | None
    image_HWC: npt.NDArray[np.uint8]
    mask_HW: npt.NDArray[np.float32]


def write_references(path: str, references: pa.Table) -> None:
    """Write a table of records.REFERENCES, the same bytes for the same table and pyarrow version.

    Raises:
        InputError: another schema, no rows, or ids that are empty or not unique.
    """
    try:
        table = references.select(REFERENCES.names).cast(REFERENCES).combine_chunks()
    except (KeyError, ValueError, pa.ArrowInvalid) as error:
        raise InputError(f"references do not fit the schema: {error}", where=path) from error
    _check_ids(table["reference_id"], path)
    text = {"reference_id": "zstd", "caption": "zstd", "url": "zstd", "image": "none", "mask": "none"}
    buffer = io.BytesIO()
    pq.write_table(
        table, buffer, row_group_size=ROW_GROUP, compression=text, use_dictionary=False, write_statistics=False
    )
    storage.write_atomic(path, buffer.getvalue())


def _check_ids(ids: pa.ChunkedArray, path: str) -> None:
    if len(ids) == 0:
        raise InputError("no reference images", where=path)
    counts = pc.value_counts(ids)
    for entry, count in zip(counts.field("values").to_pylist(), counts.field("counts").to_pylist(), strict=True):
        if not entry or count > 1:
            what = f"reference_id {entry!r} occurs {count} times" if entry else "a reference_id is empty"
            raise InputError(what, where=path, hint="ids must be unique")


class ReferenceStore:
    """Random access to the rows of a references.parquet that has been verified.

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
            self._ids = self._file.read(columns=["reference_id"])["reference_id"].combine_chunks()
        except (pa.ArrowInvalid, KeyError) as error:
            raise IndexLoadError(f"not a table of references: {error}", where=path) from error
        missing = set(REFERENCES.names) - set(self._file.schema_arrow.names)
        if missing:
            raise IndexLoadError(f"not a table of references: no column {', '.join(sorted(missing))}", where=path)
        sizes = [self._file.metadata.row_group(i).num_rows for i in range(self._file.num_row_groups)]
        self._starts = np.cumsum([0, *sizes])
        self._groups: OrderedDict[int, pa.Table] = OrderedDict()
        self._cached_groups = cached_groups

    def __len__(self) -> int:
        return len(self._ids)

    def id_of(self, row: int) -> str:
        """The id of a row. Raises IndexError outside [0, len)."""
        self._check(row)
        return str(self._ids[row].as_py())

    def row_of(self, reference_id: str) -> int:
        """The row of an id. Raises RowReject (`reference_missing`) where the index has none."""
        row = int(pc.index(self._ids, reference_id).as_py())
        if row < 0:
            raise RowReject(Reason.REFERENCE_MISSING, f"no reference {reference_id!r} in {self.path}")
        return row

    def encoded(self, row: int) -> dict[str, str | bytes | None]:
        """A row as it is stored: image and mask still encoded. Raises IndexError outside [0, len)."""
        self._check(row)
        group = int(np.searchsorted(self._starts, row, side="right")) - 1
        return dict(self._group(group).slice(row - int(self._starts[group]), 1).to_pylist()[0])

    def fetch(self, row: int) -> Reference:
        """A row with its image and mask decoded.

        Raises:
            RowReject: the image or the mask is missing, cannot be decoded, or the mask is of another size
                (`reference_missing`): what cannot be compared must not count as different.
            IndexError: outside [0, len).
        """
        stored = self.encoded(row)
        name, image, mask = stored["reference_id"], stored["image"], stored["mask"]
        if not isinstance(image, bytes) or not isinstance(mask, bytes) or not image or not mask:
            raise RowReject(Reason.REFERENCE_MISSING, f"reference {name!r} has no image or no mask")
        try:
            image_HWC, mask_HW = images.decode(image), images.decode_mask(mask)
        except RowReject as error:
            raise RowReject(Reason.REFERENCE_MISSING, f"reference {name!r}: {error.message}") from error
        if mask_HW.shape != image_HWC.shape[:2]:
            raise RowReject(
                Reason.REFERENCE_MISSING, f"reference {name!r}: mask {mask_HW.shape} for image {image_HWC.shape}"
            )
        return Reference(str(name), _text(stored["caption"]), _text(stored["url"]), image_HWC, mask_HW)

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
