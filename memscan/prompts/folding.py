"""This module folds captions of batches to distinct prompts with counts.

Its memory does not grow with the input.

Rows are held as columns, told apart by the 16 bytes of their prompts' ids, and kept in their order, which is file and
row. A *window* is what is held at a time: about a million distinct prompts. Most inputs are one window and never leave
memory; of larger ones each full window is written to disk, and what repeats between them is found at the end
(`spilling.py`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from memscan.prompts.judging import Int64s, Judged, Keys, judge, order_of
from memscan.prompts.prompt_rows import ROW_BITS, Reject, Rows, tables_of
from memscan.prompts.rows import RawBatch
from memscan.prompts.spilling import Spill

WAITING_ROWS = 1 << 20  # that wait to be folded with the others; with half as many a million take .1 s more
WAITING_BYTES = 1 << 27
WINDOW_ROWS = 1 << 20  # distinct prompts of a window
WINDOW_BYTES = 1 << 28
WINDOW_REJECTS = 1 << 17
_REPEATED = 0.8  # of the rows of a batch: with fewer captions it pays to look for equal ones first
_LOOK_EVERY = 16  # batches


@dataclass(frozen=True)
class Folded:
    """These are distinct prompts and rejects, in order.

    They belong to the last window, and to those before it, which are on disk.
    """

    sources: Sequence[str]
    rows: Rows
    rejects: Sequence[Reject]
    spill: Spill | None

    @property
    def num_rows(self) -> int:
        """This is the number of prompts and rejects."""
        return (self.spill.num_rows if self.spill else 0) + len(self.rows) + len(self.rejects)

    @property
    def distinct(self) -> int:
        """This is the number of prompts."""
        return (self.spill.distinct if self.spill else 0) + len(self.rows)

    def tables(self) -> Iterator[pa.Table]:
        """Yield all of them as `records.PROMPTS`, some ten thousand per table."""
        if self.spill:
            yield from self.spill.tables(self.sources)
        yield from tables_of(self.rows, self.rejects, self.sources)


class Fold:
    """This takes batches and gives distinct prompts.

    Args:
        max_chars: longer captions are rejected.
        limit: of distinct prompts; the row that brings the last one is the last that is taken. Their ids are in
            memory then, 16 bytes each.
        scratch: folder for what does not fit into memory, which is removed with what `finish` gave; default the
            system's.
    """

    def __init__(self, max_chars: int, limit: int | None, scratch: str | None = None) -> None:
        self.rows_read = 0
        self.full = False
        self.reasons: dict[str, int] = {}
        self._max_chars, self._limit, self._scratch = max_chars, limit, scratch
        self._sources: list[str] = []
        self._folded, self._waiting = Rows.empty(), list[Rows]()
        self._waiting_rows = self._waiting_bytes = 0
        self._rejects: list[Reject] = []
        self._spill: Spill | None = None
        self._batches, self._repeated = 0, True
        self._at_most = 0  # distinct prompts so far
        self._known: Keys | None = None  # their keys, once the limit is near

    def add(self, source: str, batches: Iterable[RawBatch]) -> tuple[int, int]:
        """Take batches until there are none or the limit is reached; gives how many rows were taken and rejected."""
        self._sources.append(source.encode("utf-8", "backslashreplace").decode("utf-8"))
        rows = rejected = 0
        for batch in batches:
            if not len(batch):
                continue
            taken, bad = self._take(batch, rows)
            rows, rejected = rows + taken, rejected + bad
            if self.full:
                break
        self.rows_read += rows
        return rows, rejected

    def finish(self) -> Folded:
        """Return what there is now; no batch may follow."""
        self._fold()
        if self._spill is None:
            return Folded(self._sources, self._folded, self._rejects, None)
        if len(self._folded) or self._rejects:
            self._write_window()
        self._spill.resolve()
        return Folded(self._sources, Rows.empty(), (), self._spill)

    # --- one batch ----------------------------------------------------------------------------------------------------

    def _take(self, batch: RawBatch, before: int) -> tuple[int, int]:
        """Take a batch of the last source, whose rows begin after `before` others; rows taken and rejected."""
        look = self._repeated or self._batches % _LOOK_EVERY == 0
        self._batches += 1
        judged = judge(batch, self._max_chars, look)
        self._repeated = look and len(judged.captions) < _REPEATED * len(batch)
        good = np.flatnonzero(judged.codes >= 0)
        count = len(batch) if self._limit is None else self._within_limit(judged, good, len(batch))
        start = (len(self._sources) - 1 << ROW_BITS) + before
        rejected = 0
        for at, why in sorted(judged.bad.items()):
            if at < count:
                url = None if judged.urls is None else judged.urls[at].as_py()
                self._rejects.append((start + at, url, why.reason, why.message))
                self.reasons[why.reason.value] = self.reasons.get(why.reason.value, 0) + 1
                rejected += 1
        good = good[good < count]
        if len(good):
            rows = Rows(
                judged.keys[judged.codes[good]],
                start + good,
                np.ones(len(good), np.int64),
                pa.chunked_array([_taken(judged.captions, judged.codes[good])]),
                _urls(judged, good),
            )
            self._hold(fold([rows]) if self._repeated else rows)
        if len(self._rejects) > WINDOW_REJECTS:
            self._write_window()
        return count, rejected

    def _hold(self, rows: Rows) -> None:
        self._waiting.append(rows)
        self._at_most += len(rows)
        self._waiting_rows += len(rows)
        self._waiting_bytes += rows.nbytes
        if self._waiting_rows > WAITING_ROWS or self._waiting_bytes > WAITING_BYTES:
            self._fold()
        if len(self._folded) >= WINDOW_ROWS or self._folded.nbytes > WINDOW_BYTES:
            self._write_window()

    def _fold(self) -> None:
        if self._waiting:
            self._folded = fold([self._folded, *self._waiting])
            self._waiting, self._waiting_rows, self._waiting_bytes = [], 0, 0

    def _write_window(self) -> None:
        self._fold()
        self._spill = self._spill or Spill(self._scratch)
        self._spill.write(self._folded, self._rejects)
        self._folded, self._rejects = Rows.empty(), []

    def _within_limit(self, judged: Judged, good: Int64s, rows: int) -> int:
        """How many rows of a batch are taken: up to the one that brings the last prompt that the limit allows."""
        assert self._limit is not None
        if self._known is None:
            if self._at_most + len(good) < self._limit:
                return rows
            self._fold()
            parts = [self._folded.keys, *(self._spill.keys() if self._spill else ())]
            self._known = np.unique(np.concatenate(parts))
        keys, first = np.unique(judged.keys[judged.codes[good]], return_index=True)
        new = ~_among(keys, self._known)
        room = self._limit - len(self._known)
        if new.sum() < room:
            if new.any():
                self._known = np.insert(self._known, np.searchsorted(self._known, keys[new]), keys[new])
            return rows
        self.full = True
        return int(good[np.sort(first[new])[room - 1]]) + 1


def fold(parts: Sequence[Rows]) -> Rows:
    """Return rows with one row per key: the first, with the count of all, and the first URL that one of them has.

    Args:
        parts: rows whose order rises, also from one to the next.
    """
    parts = [part for part in parts if len(part)]
    if len(parts) < 2 and (not parts or parts[0].is_distinct):
        return parts[0] if parts else Rows.empty()
    keys = np.concatenate([part.keys for part in parts])
    counts = np.concatenate([part.counts for part in parts])
    order = np.concatenate([part.order for part in parts])
    captions = pa.chunked_array([chunk for part in parts for chunk in part.captions.chunks], pa.large_string())
    urls = pa.chunked_array([chunk for part in parts for chunk in part.urls.chunks], pa.large_string())
    by_key = order_of(keys)
    new = np.ones(len(keys), bool)
    np.not_equal(keys[by_key[1:]], keys[by_key[:-1]], out=new[1:])
    if new.all():
        return Rows(keys, order, counts, captions, urls, True)
    starts = np.flatnonzero(new)
    first = by_key[starts]
    by_row = np.argsort(first)
    kept = np.zeros(len(keys), bool)
    kept[first] = True
    totals = np.add.reduceat(counts[by_key], starts)[by_row]
    if 0 < urls.null_count < len(urls):
        group = np.cumsum(new) - 1
        together = urls.combine_chunks()  # or taking would look for the chunk of each
        having = np.flatnonzero(np.array(pc.is_valid(together))[by_key])
        owners, places = np.unique(group[having], return_index=True)
        best = np.full(len(first), -1, np.int64)
        best[owners] = by_key[having[places]]
        best = best[by_row]
        urls = pa.chunked_array([together.take(pa.array(best, mask=best < 0))])
    else:
        urls = urls.filter(pa.array(kept))
    return Rows(keys[kept], order[kept], totals, captions.filter(pa.array(kept)), urls, True)


def _urls(judged: Judged, rows: Int64s) -> pa.ChunkedArray:
    if judged.urls is None:
        return pa.chunked_array([pa.nulls(len(rows), pa.large_string())])
    return pa.chunked_array([_taken(judged.urls, rows)])


def _taken(values: pa.Array, places: Int64s) -> pa.Array:
    """Return values at places; it is the same array if these are all places in order."""
    if len(places) == len(values) and np.array_equal(places, np.arange(len(values))):
        return values
    return values.take(pa.array(places))


def _among(keys: Keys, known: Keys) -> npt.NDArray[np.bool_]:
    """By key, whether it is among the known ones, which are sorted."""
    if not len(known):
        return np.zeros(len(keys), bool)
    at = np.minimum(np.searchsorted(known, keys), len(known) - 1)
    found: npt.NDArray[np.bool_] = known[at] == keys
    return found
