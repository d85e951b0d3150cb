"""Folding: captions of batches to distinct prompts with counts, column by column rather than row by row.

A batch is brought down to its distinct captions first; only those that are not plain ASCII already are normalised one
by one. Distinct prompts are told apart by the 64 bits of their id, in sorted arrays of numbers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from memscan.errors import Reason
from memscan.prompts.captions import normalise
from memscan.prompts.rows import Bad, RawBatch, decoded, not_utf8
from memscan.records import PROMPTS, Status

_WAITING_ROWS = 1 << 20  # distinct captions of batches that wait to be folded with the others
_EXCERPT = 80
_SLICE = 1 << 20  # rows of the result whose captions, 4,096 characters at most, fit into 32-bit offsets many times
Int64s = npt.NDArray[np.int64]
Keys = npt.NDArray[np.uint64]


@dataclass(frozen=True)
class _Distinct:
    """Distinct prompts in the order of their first rows. `late` is the row that gave the URL."""

    keys: Keys
    order: Int64s  # number of the first row among all rows that were read
    counts: Int64s
    source: Int64s
    row: Int64s
    captions: pa.ChunkedArray
    urls: pa.ChunkedArray


class Fold:
    """Takes batches and gives the table of prompts.

    Args:
        max_chars: longer captions are rejected.
        limit: of distinct prompts; the row that brings the last one is the last that is taken.
    """

    def __init__(self, max_chars: int, limit: int | None) -> None:
        self.rows_read = 0
        self.full = False
        self.reasons: dict[str, int] = {}
        self._max_chars, self._limit = max_chars, limit
        self._sources: list[str] = []
        self._parts: list[_Distinct] = []
        self._waiting = self._folded = 0
        self._rejects: list[tuple[int, int, int, str | None, Reason, str]] = []

    def add(self, source: str, batches: Iterable[RawBatch]) -> tuple[int, int]:
        """Take batches until there are none or the limit is reached; gives how many rows were taken and rejected."""
        self._sources.append(source.encode("utf-8", "backslashreplace").decode("utf-8"))
        before, rows = len(self._rejects), 0
        for batch in batches:
            if not len(batch):
                continue
            if self._limit is not None:
                batch = self._cut(batch)
            self._take(batch, rows)
            rows += len(batch)
            if self.full:
                break
        return rows, len(self._rejects) - before

    def distinct(self) -> int:
        """How many distinct prompts there are so far, rejects not counted."""
        self._compact()
        return len(self._parts[0].keys) if self._parts else 0

    def table(self) -> pa.Table:
        """The prompts and rejects so far, as `records.PROMPTS`, in the order of their first rows."""
        self._compact()
        good = self._parts[0] if self._parts else _nothing()
        ids = np.ascontiguousarray(good.keys, ">u8").tobytes().hex()
        names = pa.array(self._sources, pa.string())
        done = {
            "prompt_id": _fixed_text(ids, 16),
            "caption": good.captions,
            "count": pa.array(good.counts),
            "source": names.take(pa.array(good.source)),
            "row": pa.array(good.row),
            "url": good.urls,
            "status": pa.repeat(pa.scalar(Status.DONE.value), len(good.keys)),
            "reason": pa.nulls(len(good.keys), pa.string()),
            "message": pa.nulls(len(good.keys), pa.string()),
        }
        if not self._rejects:
            return _finished(done, None)
        orders, sources, rows, urls, reasons, messages = zip(*self._rejects, strict=True)
        files = [self._sources[source] for source in sources]
        bad = {
            "prompt_id": [_reject_id(file, row) for file, row in zip(files, rows, strict=True)],
            "caption": [""] * len(files),
            "count": [1] * len(files),
            "source": files,
            "row": list(rows),
            "url": list(urls),
            "status": [Status.REJECTED.value] * len(files),
            "reason": [reason.value for reason in reasons],
            "message": list(messages),
        }
        both = {
            name: pa.chunked_array([*_chunks(done[name], field.type), *_chunks(bad[name], field.type)])
            for name, field in zip(PROMPTS.names, _LARGE, strict=True)
        }
        order = np.argsort(np.concatenate([good.order, np.array(orders, np.int64)]), kind="stable")
        return _finished(both, pa.array(order))

    # --- one batch ----------------------------------------------------------------------------------------------------

    def _take(self, batch: RawBatch, before: int) -> None:
        source, start = len(self._sources) - 1, self.rows_read
        captions, codes, bad = self._judged(batch)
        urls = _texts(batch.urls)
        for at, why in sorted(bad.items()):
            url = None if urls is None else urls[at].as_py()
            self._rejects.append((start + at, source, before + at + 1, url, why.reason, why.message))
            self.reasons[why.reason.value] = self.reasons.get(why.reason.value, 0) + 1
        self.rows_read += len(batch)
        keys = _keys(captions)
        rows = np.flatnonzero(codes >= 0)
        if not len(rows):
            return
        row_keys = keys[codes[rows]]
        found, first, counts = np.unique(row_keys, return_index=True, return_counts=True)
        by_row = np.argsort(first, kind="stable")
        found, first, counts = found[by_row], rows[first[by_row]], counts[by_row]
        self._parts.append(
            _Distinct(
                found,
                start + first,
                counts.astype(np.int64),
                np.full(len(found), source, np.int64),
                before + first + 1,
                pa.chunked_array([_taken(captions, codes[first])]),
                pa.chunked_array([_first_urls(urls, rows, row_keys, found, first)]),
            )
        )
        self._waiting += len(found)
        if self._waiting > max(_WAITING_ROWS, self._folded):
            self._compact()

    def _judged(self, batch: RawBatch) -> tuple[pa.Array, npt.NDArray[np.int64], Mapping[int, Bad]]:
        """Normalised captions, by row the place of its caption or -1, and the rows that have none."""
        bad = dict(batch.bad)
        raw = batch.captions.dictionary_encode()
        texts = raw.dictionary
        codes = np.array(raw.indices.fill_null(-1), np.int64)
        wrong: dict[int, Bad] = {-1: Bad(Reason.CAPTION_EMPTY, "no visible character")}
        changed: dict[int, bytes] = {}
        plain_N, lengths_N = _plain(texts)
        for at in np.flatnonzero(plain_N & (lengths_N > self._max_chars)).tolist():
            wrong[at] = self._too_long(texts[at].as_py().decode(), int(lengths_N[at]))
        strange = np.flatnonzero(~plain_N)
        for at, data in zip(strange.tolist(), texts.take(pa.array(strange)).to_pylist(), strict=True):
            outcome = self._normalised(data)
            if isinstance(outcome, Bad):
                wrong[at] = outcome
            elif outcome != data:
                changed[at] = outcome
        if changed:
            mask = np.zeros(len(texts), bool)
            mask[list(changed)] = True
            new = pa.array([changed[at] for at in sorted(changed)], pa.large_binary())
            texts = pc.replace_with_mask(texts, pa.array(mask), new)
        fine = np.ones(len(texts) + 1, bool)  # the last is the place of -1
        fine[list(wrong)] = False
        for at in np.flatnonzero(~fine[codes]).tolist():
            bad.setdefault(at, wrong[int(codes[at])])
        if bad:
            codes[list(bad)] = -1
        texts = pc.if_else(pa.array(fine[:-1]), texts, pa.scalar(b"", pa.large_binary())) if len(wrong) > 1 else texts
        return texts.cast(pa.large_string()), codes, bad

    def _normalised(self, data: bytes) -> bytes | Bad:
        text = decoded(data)
        if text is None:
            return Bad(Reason.CAPTION_NOT_UTF8, not_utf8(data))
        # An escaped character takes up to a dozen; what is longer by far is not worth the work of normalising it.
        caption = normalise(text) if len(text) <= 12 * self._max_chars else text
        if not caption:
            return Bad(Reason.CAPTION_EMPTY, "no visible character")
        if len(caption) > self._max_chars:
            return self._too_long(caption, len(caption))
        return data if caption == text else caption.encode()

    def _too_long(self, caption: str, length: int) -> Bad:
        start = normalise(caption[:_EXCERPT])
        return Bad(Reason.CAPTION_TOO_LONG, f"{length} characters, at most {self._max_chars}: {start!r}...")

    def _cut(self, batch: RawBatch) -> RawBatch:
        """The rows of a batch up to the one that brings the last prompt that the limit allows."""
        assert self._limit is not None
        room = self._limit - self.distinct()
        known = self._parts[0].keys if self._parts else np.empty(0, np.uint64)
        captions, codes, _ = self._judged(batch)
        rows = np.flatnonzero(codes >= 0)
        keys, first = np.unique(_keys(captions)[codes[rows]], return_index=True)
        new = np.sort(rows[first[~np.isin(keys, known)]])
        if len(new) < room:
            return batch
        self.full = True
        return batch.slice(int(new[room - 1]) + 1)

    # --- all of them --------------------------------------------------------------------------------------------------

    def _compact(self) -> None:
        """Fold what waits with what was folded before."""
        if len(self._parts) < 2:
            return
        parts = self._parts
        keys = np.concatenate([part.keys for part in parts])
        found, first, inverse = np.unique(keys, return_index=True, return_inverse=True)
        counts = np.zeros(len(found), np.int64)
        np.add.at(counts, inverse, np.concatenate([part.counts for part in parts]))
        by_row = np.argsort(first, kind="stable")
        first = first[by_row]
        kept = np.zeros(len(keys), bool)
        kept[first] = True
        urls = pa.chunked_array([chunk for part in parts for chunk in part.urls.chunks], pa.large_string())
        if urls.null_count and len(found) < len(keys):
            has = np.flatnonzero(pc.is_valid(urls).to_numpy())
            owners, places = np.unique(inverse[has], return_index=True)
            best = np.full(len(found), -1, np.int64)
            best[owners] = has[places]
            urls = urls.take(pa.array(best[by_row], mask=best[by_row] < 0))
        else:
            urls = _filtered(urls, kept)
        captions = pa.chunked_array([chunk for part in parts for chunk in part.captions.chunks], pa.large_string())
        joined = {
            name: np.concatenate([getattr(part, name) for part in parts])[first] for name in ("order", "source", "row")
        }
        self._parts = [
            _Distinct(found[by_row], counts=counts[by_row], captions=_filtered(captions, kept), urls=urls, **joined)
        ]
        self._waiting, self._folded = 0, len(found)


def _taken(values: pa.Array, places: Int64s) -> pa.Array:
    """Values at places; the very array where these are all of them in their order."""
    if len(places) == len(values) and np.array_equal(places, np.arange(len(values))):
        return values
    return values.take(pa.array(places))


def _filtered(values: pa.ChunkedArray, kept: npt.NDArray[np.bool_]) -> pa.ChunkedArray:
    return values if kept.all() else values.filter(pa.array(kept))


def _plain(texts: pa.Array) -> tuple[npt.NDArray[np.bool_], Int64s]:
    """By text, whether it is its own canonical form for sure: printable ASCII without "&" and needless spaces; length
    in bytes. Empty texts are not."""
    offsets = np.frombuffer(texts.buffers()[1], np.int64)[texts.offset : texts.offset + len(texts) + 1]
    lengths = np.diff(offsets)
    plain = lengths > 0
    if len(texts) and offsets[-1] > offsets[0]:
        data = np.frombuffer(texts.buffers()[2], np.uint8)[offsets[0] : offsets[-1]]
        starts = offsets[:-1] - offsets[0]
        spaces = data == 0x20
        odd = _ODD[data]
        odd[1:] |= spaces[1:] & spaces[:-1]
        ends = starts + lengths - 1
        plain &= ~(spaces[np.where(plain, starts, 0)] | spaces[np.where(plain, ends, 0)])
        # The text that a byte lies in: the last that begins at or before it, among those that are not empty.
        plain[np.searchsorted(starts, np.flatnonzero(odd), side="right") - 1] = False
    return plain, lengths


_ODD = np.ones(256, bool)
_ODD[0x20:0x7F] = False
_ODD[ord("&")] = True


def _keys(captions: pa.Array) -> Keys:
    """The bits of the ids of captions (`records.prompt_id` gives them in hexadecimal)."""
    hashed = hashlib.blake2b
    joined = b"".join([hashed(text, digest_size=8).digest() for text in captions.cast(pa.large_binary()).to_pylist()])
    return np.frombuffer(joined, ">u8").astype(np.uint64)


def _texts(urls: pa.Array | None) -> pa.Array | None:
    """URLs as text without white space around; empty ones are null, and bytes that are no UTF-8 stand as escapes."""
    if urls is None:
        return None
    try:
        texts = urls.cast(pa.large_string())
    except pa.ArrowInvalid:
        values = [None if url is None else url.decode("utf-8", "backslashreplace") for url in urls.to_pylist()]
        texts = pa.array(values, pa.large_string())
    texts = pc.utf8_trim_whitespace(texts)
    return pc.if_else(pc.equal(texts, ""), pa.scalar(None, pa.large_string()), texts)


def _first_urls(urls: pa.Array | None, rows: Int64s, keys: Keys, found: Keys, first: Int64s) -> pa.Array:
    """By distinct prompt, the first URL that one of its rows has."""
    if urls is None:
        return pa.nulls(len(found), pa.large_string())
    valid = np.array(pc.is_valid(urls))
    if valid[first].all():
        return _taken(urls, first)
    having = rows[valid[rows]]
    owners, places = np.unique(keys[valid[rows]], return_index=True)
    at = np.minimum(np.searchsorted(owners, found), max(0, len(owners) - 1))
    known = owners[at] == found if len(owners) else np.zeros(len(found), bool)
    best = having[places[at]] if len(owners) else np.zeros(len(found), np.int64)
    return urls.take(pa.array(best, mask=~known))


def _fixed_text(joined: str, width: int) -> pa.Array:
    """Texts of one width, out of all of them in a row."""
    offsets = np.arange(0, len(joined) + 1, width, dtype=np.int64)
    buffers = [None, pa.py_buffer(offsets.tobytes()), pa.py_buffer(joined.encode())]
    return pa.LargeStringArray.from_buffers(len(offsets) - 1, *buffers[1:])


def _nothing() -> _Distinct:
    empty, texts = np.empty(0, np.int64), pa.chunked_array([], pa.large_string())
    return _Distinct(np.empty(0, np.uint64), empty, empty, empty, empty, texts, texts)


_LARGE = pa.schema([f.with_type(pa.large_string()) if pa.types.is_string(f.type) else f for f in PROMPTS])


def _chunks(values: object, kind: pa.DataType) -> list[pa.Array]:
    if isinstance(values, pa.ChunkedArray):
        return [chunk.cast(kind) for chunk in values.chunks]
    return [values.cast(kind) if isinstance(values, pa.Array) else pa.array(values, kind)]


def _finished(columns: Mapping[str, object], order: pa.Array | None) -> pa.Table:
    """The table as `records.PROMPTS`, in slices whose text fits into its 32-bit offsets."""
    table = pa.table([pa.chunked_array(_chunks(columns[f.name], f.type), f.type) for f in _LARGE], schema=_LARGE)
    if order is not None:
        table = table.combine_chunks()  # or taking rows would look for the chunk of each
    pieces = []
    for start in range(0, table.num_rows, _SLICE):
        piece = table.slice(start, _SLICE) if order is None else table.take(order.slice(start, _SLICE))
        pieces.append(piece.combine_chunks().cast(PROMPTS))
    return pa.concat_tables(pieces) if pieces else PROMPTS.empty_table()


def _reject_id(source: str, row: int) -> str:
    # Line feeds never stand in a normalised caption, so no prompt has this id.
    return hashlib.blake2b(f"rejected\n{source}\n{row}".encode(), digest_size=8).hexdigest()
