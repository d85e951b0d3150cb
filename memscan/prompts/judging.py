"""This module checks a batch of raw captions column by column.

For each caption it gives the canonical form and the id, or the reason why there is none.

If captions repeat, the batch is first reduced to its distinct ones. Only captions that may not yet be in canonical form
are normalised one by one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from memscan.errors import Reason
from memscan.prompts.captions import normalise
from memscan.prompts.rows import Bad, RawBatch, decoded, not_utf8
from memscan.records import prompt_digests

Int64s = npt.NDArray[np.int64]
KEY = np.dtype("S16")  # bytes compare and sort as their hexadecimal digits do
Keys = npt.NDArray[np.bytes_]
_EXCERPT = 80


@dataclass(frozen=True)
class Judged:
    """This is what the rows of a batch are.

    Attributes:
        captions: large_string, canonical.
        keys: the bytes of their ids.
        codes: by row, the place of its caption, or -1.
        bad: rows that have none.
        urls: large_string by row, null if there is none; None if no row has one.
    """

    captions: pa.Array
    keys: Keys
    codes: Int64s
    bad: Mapping[int, Bad]
    urls: pa.Array | None


def judge(batch: RawBatch, max_chars: int, repeated: bool) -> Judged:
    """Judge a batch.

    Args:
        max_chars: longer captions are bad.
        repeated: whether to look for captions that are there several times first; it saves work where many are.
    """
    bad = dict(batch.bad)
    raw, codes = _encoded(batch.captions, repeated)
    wrong: dict[int, Bad] = {-1: Bad(Reason.CAPTION_EMPTY, "no visible character")}
    changed: dict[int, bytes] = {}
    plain_N, lengths_N = _plain(raw)
    for at in np.flatnonzero(plain_N & (lengths_N > max_chars)).tolist():
        text = raw[at].as_py().decode()
        if len(text) > max_chars:
            wrong[at] = _too_long(text, max_chars)
    strange = np.flatnonzero(~plain_N)
    for at, data in zip(strange.tolist(), raw.take(pa.array(strange)).to_pylist(), strict=True):
        outcome = _normalised(data, max_chars)
        if isinstance(outcome, Bad):
            wrong[at] = outcome
        elif outcome != data:
            changed[at] = outcome
    texts = raw
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
    return Judged(texts.cast(pa.large_string()), _keys(texts), codes, bad, _texts(batch.urls))


def _encoded(captions: pa.Array, repeated: bool) -> tuple[pa.Array, Int64s]:
    """Captions, and by row the place of its caption or -1."""
    if repeated:
        encoded = captions.dictionary_encode()
        return encoded.dictionary, np.array(encoded.indices.fill_null(-1), np.int64)
    codes = np.arange(len(captions), dtype=np.int64)
    if captions.null_count:
        codes[np.array(pc.is_null(captions))] = -1
        captions = captions.fill_null(b"")
    return captions, codes


def _normalised(data: bytes, max_chars: int) -> bytes | Bad:
    text = decoded(data)
    if text is None:
        return Bad(Reason.CAPTION_NOT_UTF8, not_utf8(data))
    # An escaped character takes up to a dozen; what is longer by far is not worth the work of normalising it.
    caption = normalise(text) if len(text) <= 12 * max_chars else text
    if not caption:
        return Bad(Reason.CAPTION_EMPTY, "no visible character")
    if len(caption) > max_chars:
        return _too_long(caption, max_chars)
    return data if caption == text else caption.encode()


def _too_long(caption: str, max_chars: int) -> Bad:
    start = normalise(caption[:_EXCERPT])
    return Bad(Reason.CAPTION_TOO_LONG, f"{len(caption)} characters, at most {max_chars}: {start!r}...")


def _plain(texts: pa.Array) -> tuple[npt.NDArray[np.bool_], Int64s]:
    """By text, whether it is its own canonical form for sure; length in bytes. Empty texts are not.

    Of valid UTF-8 the first byte of a character says in which blocks it lies: all those of `PLAIN_LEADS` hold printable
    characters only, none of which composes with another.
    """
    offsets = np.frombuffer(texts.buffers()[1], np.int64)[texts.offset : texts.offset + len(texts) + 1]
    lengths = np.diff(offsets)
    plain = lengths > 0
    if len(texts) and offsets[-1] > offsets[0]:
        data = np.frombuffer(texts.buffers()[2], np.uint8)[offsets[0] : offsets[-1]]
        starts = offsets[:-1] - offsets[0]
        spaces = data == 0x20
        odd = (_ODD if _is_utf8(texts) else _ODD_OR_HIGH)[data]
        odd[1:] |= spaces[1:] & spaces[:-1]
        ends = starts + lengths - 1
        plain &= ~(spaces[np.where(plain, starts, 0)] | spaces[np.where(plain, ends, 0)])
        # The text that a byte lies in: the last that begins at or before it, among those that are not empty.
        plain[np.searchsorted(starts, np.flatnonzero(odd), side="right") - 1] = False
    return plain, lengths


def _is_utf8(texts: pa.Array) -> bool:
    try:
        texts.cast(pa.large_string())
    except pa.ArrowInvalid:
        return False
    return True


# U+00C0 to U+02FF (Latin), U+0400 to U+047F (Cyrillic), U+4000 to U+9FFF (Chinese characters).
PLAIN_LEADS = (*range(0xC3, 0xCC), 0xD0, 0xD1, *range(0xE4, 0xEA))
_ODD_OR_HIGH = np.ones(256, bool)
_ODD_OR_HIGH[0x20:0x7F] = False
_ODD_OR_HIGH[ord("&")] = True
_ODD = _ODD_OR_HIGH.copy()
_ODD[0x80:0xC0] = False  # bytes that go on with a character
_ODD[list(PLAIN_LEADS)] = False


def order_of(keys: Keys) -> Int64s:
    """Return the stable order of keys: by their first halves, and by all of them where these do not tell."""
    halves_N2 = np.ascontiguousarray(keys).view(np.uint64).reshape(-1, 2)
    order = np.argsort(halves_N2[:, 0].byteswap(), kind="stable")  # in half the time of bytes
    first, second = halves_N2[order].T
    if ((first[1:] == first[:-1]) & (second[1:] != second[:-1])).any():
        return np.argsort(keys, kind="stable")
    return order


def _keys(captions: pa.Array) -> Keys:
    """Return the bytes of the ids of captions (`records.prompt_id` gives them in hexadecimal)."""
    return np.frombuffer(prompt_digests(captions.to_pylist()), KEY)


def _texts(urls: pa.Array | None) -> pa.Array | None:
    """URLs as text without white space around; empty ones are null, and bytes that are no UTF-8 stand as escapes."""
    if urls is None:
        return None
    try:
        texts = urls.cast(pa.large_string())
    except pa.ArrowInvalid:
        values = [None if url is None else url.decode("utf-8", "backslashreplace") for url in urls.to_pylist()]
        texts = pa.array(values, pa.large_string())
    if texts.null_count == 0 and _is_trimmed(texts):
        return texts
    texts = pc.utf8_trim_whitespace(texts)
    return pc.if_else(pc.equal(texts, ""), pa.scalar(None, pa.large_string()), texts)


def _is_trimmed(texts: pa.Array) -> bool:
    """Return whether no text is empty, and each begins and ends with a visible character of ASCII."""
    offsets = np.frombuffer(texts.buffers()[1], np.int64)[texts.offset : texts.offset + len(texts) + 1]
    if not len(texts) or (np.diff(offsets) == 0).any():
        return False
    data = np.frombuffer(texts.buffers()[2], np.uint8)
    edges = np.concatenate([data[offsets[:-1]], data[offsets[1:] - 1]])
    return bool(((edges > 0x20) & (edges < 0x7F)).all())
