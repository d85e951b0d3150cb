"""This module keeps windows of folded prompts on disk, and finds what repeats between them.

    window 0  rows in order | keys, sorted ─┐  a share of the keys   ┌─ rows to leave out   ─▶ window 0, streamed
    window 1  rows in order | keys, sorted ─┼─ of all windows at a ──┼─ counts of those kept ─▶ window 1, streamed
    window 2  ...                          ─┘  time                  └─ URLs they lack       ─▶ ...

Windows follow each other in the order of the input, and so do the rows of each, so that nothing is ever sorted by
order: only the keys, 16 bytes per prompt, meet those of other windows, one range at a time. Texts are written once,
and read once when the windows are streamed. What is held is one window, or one range of keys.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from memscan.errors import InputError, Reason
from memscan.prompts.judging import KEY, Int64s, Keys, order_of
from memscan.prompts.prompt_rows import PIECE, Reject, Rows, tables_of

RANGE_ROWS = 1 << 21  # keys that are compared at a time: some 250 MiB
_ROWS = pa.schema(
    [
        ("key", pa.binary(16)),
        ("order", pa.int64()),
        ("count", pa.int64()),
        ("caption", pa.large_string()),
        ("url", pa.large_string()),
    ]
)
_REJECTS = pa.schema([("order", pa.int64()), ("url", pa.string()), ("reason", pa.string()), ("message", pa.string())])
_URLS = pa.schema([("order", pa.int64()), ("url", pa.large_string())])
_WRITE = pa.ipc.IpcWriteOptions(compression="lz4")
_KEYS = np.dtype([("key", KEY), ("order", np.int64), ("count", np.int64), ("has_url", np.bool_)])
_COUNTS = np.dtype([("order", np.int64), ("count", np.int64)])
_DONORS = np.dtype([("from", np.int64), ("to", np.int64)])  # orders of rows


class Spill:
    """These are windows on disk, in a folder of their own that is deleted with this object.

    Args:
        scratch: where the folder is made; default the system's place for temporary files.

    Raises:
        InputError: the disk is full, or the folder cannot be made.
    """

    def __init__(self, scratch: str | None = None) -> None:
        try:
            self._folder = tempfile.TemporaryDirectory(
                prefix="memscan-prompts-", dir=scratch, ignore_cleanup_errors=True
            )
        except OSError as error:
            raise InputError(f"cannot be written ({error})", where=scratch or tempfile.gettempdir()) from error
        self._path = Path(self._folder.name)
        self._first: list[int] = []  # order of the first row or reject of each window
        self._rows: list[int] = []
        self._rejects = 0
        self.distinct = 0

    @property
    def num_rows(self) -> int:
        """This is the number of prompts and rejects; it is known after `resolve` has been called."""
        return self.distinct + self._rejects

    def write(self, rows: Rows, rejects: Sequence[Reject]) -> None:
        """Write the next window: distinct rows and rejects, both in order and behind those of the window before."""
        number = len(self._rows)
        starts = [int(rows.order[0])] if len(rows) else []
        self._first.append(min([*starts, *(reject[0] for reject in rejects[:1])]))
        self._rows.append(len(rows))
        self._rejects += len(rejects)
        try:
            self._write(number, rows, rejects)
        except OSError as error:
            what = f"prompts that do not fit into memory cannot be written ({error})"
            raise InputError(
                what, where=str(self._path), hint="some 150 bytes for each; TMPDIR names a place"
            ) from error

    def _write(self, number: int, rows: Rows, rejects: Sequence[Reject]) -> None:
        with pa.ipc.new_file(self._file(number, "rows"), _ROWS, options=_WRITE) as file:
            for start in range(0, len(rows), PIECE):
                piece = rows.slice(start, PIECE)
                keys = pa.Array.from_buffers(pa.binary(16), len(piece), [None, pa.py_buffer(piece.keys.tobytes())])
                numbers = [keys, pa.array(piece.order), pa.array(piece.counts)]
                both = [values.combine_chunks() for values in (piece.captions, piece.urls)]
                file.write_batch(pa.record_batch([*numbers, *both], schema=_ROWS))
        if rejects:
            orders, urls, reasons, messages = zip(*rejects, strict=True)
            # A message may quote half a surrogate pair out of a file.
            texts = [[None if text is None else _clean(text) for text in column] for column in (urls, messages)]
            columns = [list(orders), texts[0], [reason.value for reason in reasons], texts[1]]
            with pa.ipc.new_file(self._file(number, "rejects"), _REJECTS, options=_WRITE) as file:
                file.write_table(pa.table(columns, schema=_REJECTS))
        by_key = order_of(rows.keys)
        keys = np.empty(len(rows), _KEYS)
        keys["key"], keys["order"], keys["count"] = rows.keys[by_key], rows.order[by_key], rows.counts[by_key]
        keys["has_url"] = np.concatenate([np.zeros(0, bool), *map(_valid, rows.urls.chunks)])[by_key]
        np.save(self._file(number, "keys.npy"), keys)

    def keys(self) -> Iterator[Keys]:
        """Yield the keys of each window."""
        for number in range(len(self._rows)):
            yield np.array(self._window_keys(number)["key"])

    # --- what repeats -------------------------------------------------------------------------------------------------

    def resolve(self) -> None:
        """Find the rows whose key is in an earlier window, and add their counts, and the URLs they have, there."""
        self.distinct = sum(self._rows)
        ranges = -(-self.distinct // RANGE_ROWS)
        lows = np.array([((number << 128) // ranges).to_bytes(16, "big") for number in range(ranges)], KEY)
        windows = [self._window_keys(number) for number in range(len(self._rows))]
        bounds = [[*np.searchsorted(keys["key"], lows), len(keys)] for keys in windows]
        given = False
        for number in range(ranges):
            parts = [keys[at[number] : at[number + 1]] for keys, at in zip(windows, bounds, strict=True)]
            given = self._resolve_range(np.concatenate(parts)) or given
        if given:
            self._give_urls()

    def _resolve_range(self, rows: np.ndarray) -> bool:
        """Resolve rows that hold all those of their keys, window by window; whether a row gets another one's URL."""
        rows = rows[order_of(rows["key"])]
        new = np.ones(len(rows), bool)
        np.not_equal(rows["key"][1:], rows["key"][:-1], out=new[1:])
        if new.all():
            return False
        starts = np.flatnonzero(new)
        self.distinct -= len(rows) - len(starts)
        self._append("dropped", rows["order"][~new], rows["order"][~new])
        totals = np.add.reduceat(rows["count"], starts)
        more = totals != rows["count"][starts]
        changed = np.empty(int(more.sum()), _COUNTS)
        changed["order"], changed["count"] = rows["order"][starts][more], totals[more]
        self._append("counts", changed["order"], changed)
        group = np.cumsum(new) - 1
        having = np.flatnonzero(rows["has_url"])
        owners, places = np.unique(group[having], return_index=True)
        best = having[places]
        lent = best != starts[owners]  # the first row has none, a later one has
        donors = np.empty(int(lent.sum()), _DONORS)
        donors["from"], donors["to"] = rows["order"][best[lent]], rows["order"][starts[owners[lent]]]
        self._append("donors", donors["from"], donors)
        return bool(len(donors))

    def _give_urls(self) -> None:
        """By window, take out the URLs that rows of earlier windows get."""
        for number in range(len(self._rows)):
            donors = self._appended(number, "donors", _DONORS)
            if not len(donors):
                continue
            donors.sort(order="from")
            orders, urls = [], []
            for batch in self._batches(number):
                rows = batch.column("order").to_numpy()
                start, end = np.searchsorted(donors["from"], [rows[0], rows[-1] + 1])
                orders.append(donors["to"][start:end])
                urls.append(batch.column("url").take(pa.array(np.searchsorted(rows, donors["from"][start:end]))))
            to = np.concatenate(orders)
            by_order = np.argsort(to)
            table = pa.table([pa.array(to[by_order]), pa.chunked_array(urls).take(pa.array(by_order))], schema=_URLS)
            with pa.ipc.new_file(self._file(number, "urls"), _URLS) as file:
                file.write_table(table.combine_chunks())

    def _append(self, name: str, orders: Int64s, values: np.ndarray) -> None:
        """Add values to the files of the windows in which rows with these orders are."""
        if not len(orders):
            return
        owner = np.searchsorted(np.array(self._first, np.int64), orders, side="right") - 1
        by_owner = np.argsort(owner, kind="stable")
        values, owner = values[by_owner], owner[by_owner]
        found, starts = np.unique(owner, return_index=True)
        for window, part in zip(found.tolist(), np.split(values, starts[1:]), strict=True):
            with open(self._file(window, name), "ab") as file:
                part.tofile(file)

    def _appended(self, number: int, name: str, kind: np.dtype) -> np.ndarray:
        path = self._path / self._file(number, name)
        return np.fromfile(path, kind) if path.exists() else np.empty(0, kind)

    # --- streaming ----------------------------------------------------------------------------------------------------

    def tables(self, sources: Sequence[str]) -> Iterator[pa.Table]:
        """Yield prompts and rejects in order, as `prompt_rows.tables_of` does; call `resolve` first."""
        for number in range(len(self._rows)):
            rejects, at = self._rejects_of(number), 0
            batches = [self._rows_left(number, *self._changes(number)), iter([Rows.empty()])]
            for rows in (rows for part in batches for rows in part):
                end = at
                while end < len(rejects) and (not len(rows) or rejects[end][0] < rows.order[-1]):
                    end += 1
                yield from tables_of(rows, rejects[at:end], sources)
                at = end

    def _changes(self, number: int) -> tuple[Int64s, np.ndarray, list[pa.Table]]:
        dropped = np.sort(self._appended(number, "dropped", np.dtype(np.int64)))
        counts = self._appended(number, "counts", _COUNTS)
        counts.sort(order="order")
        urls = []
        for later in range(number + 1, len(self._rows)):
            if (self._path / f"{later:06d}.urls").exists():
                with pa.memory_map(self._file(later, "urls")) as file:
                    table = pa.ipc.open_file(file).read_all()
                    orders = table["order"].to_numpy()
                    bounds = [*self._first, np.iinfo(np.int64).max][number : number + 2]
                    start, end = np.searchsorted(orders, bounds)
                    urls.append(table.slice(start, end - start))
        return dropped, counts, urls

    def _rows_left(self, number: int, dropped: Int64s, counts: np.ndarray, urls: list[pa.Table]) -> Iterator[Rows]:
        given = pa.concat_tables([_URLS.empty_table(), *urls]).sort_by("order").combine_chunks()
        given_orders = given["order"].to_numpy()
        for batch in self._batches(number):
            key, order, count, caption, url = batch.columns
            orders, totals = order.to_numpy(), count.to_numpy().copy()
            start, end = np.searchsorted(counts["order"], [orders[0], orders[-1] + 1])
            totals[np.searchsorted(orders, counts["order"][start:end])] = counts["count"][start:end]
            start, end = np.searchsorted(given_orders, [orders[0], orders[-1] + 1])
            if end > start:
                mask = np.zeros(len(orders), bool)
                mask[np.searchsorted(orders, given_orders[start:end])] = True
                url = pc.replace_with_mask(url, pa.array(mask), given["url"].slice(start, end - start).combine_chunks())
            start, end = np.searchsorted(dropped, [orders[0], orders[-1] + 1])
            kept = np.ones(len(orders), bool)
            kept[np.searchsorted(orders, dropped[start:end])] = False
            captions, urls_left = (pa.chunked_array([values.filter(pa.array(kept))]) for values in (caption, url))
            if kept.any():
                keys = np.frombuffer(key.buffers()[1], KEY)[key.offset : key.offset + len(key)]
                yield Rows(keys[kept], orders[kept], totals[kept], captions, urls_left, True)

    def _rejects_of(self, number: int) -> list[Reject]:
        if not (self._path / f"{number:06d}.rejects").exists():
            return []
        with pa.memory_map(self._file(number, "rejects")) as file:
            columns = pa.ipc.open_file(file).read_all().to_pydict()
        rows = zip(columns["order"], columns["url"], columns["reason"], columns["message"], strict=True)
        return [(order, url, Reason(reason), message) for order, url, reason, message in rows]

    def _batches(self, number: int) -> Iterator[pa.RecordBatch]:
        with pa.memory_map(self._file(number, "rows")) as file:
            reader = pa.ipc.open_file(file)
            for at in range(reader.num_record_batches):
                yield reader.get_batch(at)

    def _window_keys(self, number: int) -> np.ndarray:
        keys: np.ndarray = np.load(self._file(number, "keys.npy"), mmap_mode="r" if self._rows[number] else None)
        return keys

    def _file(self, number: int, name: str) -> str:
        return str(self._path / f"{number:06d}.{name}")


def _valid(urls: pa.Array) -> np.ndarray:
    found: np.ndarray = np.array(pc.is_valid(urls))
    return found


def _clean(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode("utf-8")
