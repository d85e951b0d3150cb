"""This module holds rows of the prompt table as columns, and turns them into `records.PROMPTS`.

The order of a row is one number: the place of its file, and below it the place of the row in that file.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import pyarrow as pa

from memscan.errors import Reason
from memscan.prompts.judging import KEY, Int64s, Keys
from memscan.records import PROMPTS, Status, prompt_id

ROW_BITS = 40  # of the place of a row in its file: a million million rows, and eight million files
PIECE = 1 << 15  # prompts of a table whose captions, 4,096 characters at most, fit into 32-bit offsets many times
Reject: TypeAlias = tuple[int, str | None, Reason, str]  # order, url, reason, message


@dataclass(frozen=True)
class Rows:
    """These are rows with a caption, in order.

    Attributes:
        keys: the bytes of their ids.
        order: file and row, from 0 on.
        counts: of the input rows that each stands for.
        captions, urls: large_string; a URL may be null.
        is_distinct: whether no key is there twice.
    """

    keys: Keys
    order: Int64s
    counts: Int64s
    captions: pa.ChunkedArray
    urls: pa.ChunkedArray
    is_distinct: bool = False

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def nbytes(self) -> int:
        """This is the memory that they take, in bytes."""
        return 32 * len(self.keys) + int(self.captions.nbytes) + int(self.urls.nbytes)

    def slice(self, start: int, rows: int) -> Rows:
        """Return some of the rows, without a copy."""
        inside = slice(start, start + rows)
        captions, urls = self.captions.slice(start, rows), self.urls.slice(start, rows)
        return Rows(self.keys[inside], self.order[inside], self.counts[inside], captions, urls, self.is_distinct)

    @classmethod
    def empty(cls) -> Rows:
        """Return no rows."""
        none, texts = np.empty(0, np.int64), pa.chunked_array([], pa.large_string())
        return cls(np.empty(0, KEY), none, none, texts, texts, True)


def tables_of(rows: Rows, rejects: Sequence[Reject], sources: Sequence[str]) -> Iterator[pa.Table]:
    """Yield rows and rejects in their order, as tables of `records.PROMPTS`.

    Args:
        rejects: in order.
        sources: names of the files.
    """
    orders = np.array([reject[0] for reject in rejects], np.int64)
    at = 0
    for start in range(0, max(1, len(rows)), PIECE):
        good = rows.slice(start, PIECE)
        # A piece takes the rejects before its last row; the last piece those behind it too.
        last = start + PIECE >= len(rows)
        end = len(rejects) if last else int(np.searchsorted(orders, good.order[-1]))
        if len(good) or end > at:
            yield _table(good, rejects[at:end], sources)
        at = end


def _table(rows: Rows, rejects: Sequence[Reject], sources: Sequence[str]) -> pa.Table:
    tables = [_good(rows, sources)] if len(rows) else []
    if rejects:
        tables.append(_bad(rejects, sources))
    table = pa.concat_tables(tables).combine_chunks()
    if len(tables) < 2:
        return table
    order = np.concatenate([rows.order, np.array([reject[0] for reject in rejects], np.int64)])
    return table.take(pa.array(np.argsort(order, kind="stable")))


def _good(rows: Rows, sources: Sequence[str]) -> pa.Table:
    ids = rows.keys.tobytes().hex()
    columns = {
        "prompt_id": _fixed_text(ids, 32),
        "caption": rows.captions,
        "count": pa.array(rows.counts),
        "source": _sources(rows.order, sources),
        "row": pa.array((rows.order & _ROW_MASK) + 1),
        "url": rows.urls,
        "status": pa.repeat(pa.scalar(Status.DONE.value), len(rows)),
        "reason": pa.nulls(len(rows), pa.string()),
        "message": pa.nulls(len(rows), pa.string()),
    }
    return pa.table([columns[field.name].cast(field.type) for field in PROMPTS], schema=PROMPTS)


def _sources(order: Int64s, sources: Sequence[str]) -> pa.Array:
    """Return the names of the files of rows, of which most tables need one."""
    places, codes = np.unique(order >> ROW_BITS, return_inverse=True)
    return pa.array([sources[place] for place in places.tolist()], pa.string()).take(pa.array(codes))


def _bad(rejects: Sequence[Reject], sources: Sequence[str]) -> pa.Table:
    orders, urls, reasons, messages = zip(*rejects, strict=True)
    files = [sources[order >> ROW_BITS] for order in orders]
    rows = [(order & _ROW_MASK) + 1 for order in orders]
    columns = {
        "prompt_id": [_reject_id(file, row) for file, row in zip(files, rows, strict=True)],
        "caption": [""] * len(files),
        "count": [1] * len(files),
        "source": files,
        "row": rows,
        "url": list(urls),
        "status": [Status.REJECTED.value] * len(files),
        "reason": [reason.value for reason in reasons],
        "message": list(messages),
    }
    return pa.table(columns, schema=PROMPTS)


def _reject_id(source: str, row: int) -> str:
    # A normalised caption never has line feeds, so no prompt has this id.
    return prompt_id(f"rejected\n{source}\n{row}")


def _fixed_text(joined: str, width: int) -> pa.Array:
    """Texts of one width, out of all of them in a row."""
    offsets = np.arange(0, len(joined) + 1, width, dtype=np.int64)
    return pa.LargeStringArray.from_buffers(len(offsets) - 1, pa.py_buffer(offsets), pa.py_buffer(joined.encode()))


_ROW_MASK = (1 << ROW_BITS) - 1
