"""Folding beyond memory gives what folding in memory gives, row for row; and what is judged by bytes is canonical."""

from __future__ import annotations

import gc
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from memscan.config import PromptsConfig
from memscan.errors import InputError
from memscan.prompts import folding, prompt_rows, spilling
from memscan.prompts.judging import KEY, PLAIN_LEADS, judge, order_of
from memscan.prompts.rows import Builder, RawBatch
from memscan.prompts.table import PromptTable, normalise, read_prompts
from memscan.records import PROMPTS, prompt_digests

CAPTIONS = st.sampled_from(["a", "b", "c", " a", "d &amp; e", "d & e", "é", "e\u0301", "", "x" * 30, "y" * 51])
ROW = st.tuples(CAPTIONS, st.sampled_from(["", "u", "v", " w "]))
FILES = st.lists(st.lists(ROW, max_size=30), min_size=1, max_size=4)


def read(folder: Path, **options: Any) -> PromptTable:
    return read_prompts(PromptsConfig(paths=[str(folder)], max_chars=50, **options), str(folder.parent))


def write(folder: Path, files: list[list[tuple[str, str]]]) -> None:
    folder.mkdir()
    for number, rows in enumerate(files):
        lines = "".join(f'"{caption}","{url}"\n' for caption, url in rows)
        (folder / f"{number}.csv").write_text(f"caption,url\n{lines}", encoding="utf-8")


def small_windows(patch: pytest.MonkeyPatch, window: int, piece: int, keys: int) -> None:
    patch.setattr(folding, "WAITING_ROWS", 2)
    patch.setattr(folding, "WINDOW_ROWS", window)
    patch.setattr(folding, "WINDOW_REJECTS", 2)
    patch.setattr(spilling, "RANGE_ROWS", keys)
    patch.setattr(spilling, "PIECE", piece)
    patch.setattr(prompt_rows, "PIECE", piece)
    patch.setattr("memscan.prompts.rows.BATCH_ROWS", 3)
    patch.setattr("memscan.prompts.separated._BLOCK", 40)


@given(
    files=FILES,
    window=st.integers(1, 6),
    piece=st.integers(1, 4),
    keys=st.integers(1, 20),
    part=st.integers(1, 7),
    limit=st.none() | st.integers(1, 8),
)
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_windows_on_disk_change_nothing(
    tmp_path_factory: pytest.TempPathFactory,
    files: list[list[tuple[str, str]]],
    window: int,
    piece: int,
    keys: int,
    part: int,
    limit: int | None,
) -> None:
    folder = tmp_path_factory.mktemp("fold") / "in"
    write(folder, files)
    if not any(files):
        return
    wanted = read(folder, limit=limit)
    with pytest.MonkeyPatch.context() as patch:
        small_windows(patch, window, piece, keys)
        found = read(folder, limit=limit)
        tables = list(found.parts(part))
    assert found.table.schema == PROMPTS
    assert found.table.to_pylist() == wanted.table.to_pylist()
    assert pa.concat_tables(tables).equals(wanted.table)
    assert [table.num_rows for table in tables[:-1]] == [part] * (len(tables) - 1)
    assert (found.num_rows, found.distinct, found.rows_read) == (wanted.num_rows, wanted.distinct, wanted.rows_read)
    assert found.reasons == wanted.reasons
    assert found.sources == wanted.sources
    assert sum(found.table["count"].to_pylist()) == found.rows_read


@given(files=FILES, window=st.integers(1, 6), limit=st.none() | st.integers(1, 8))
@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_captions_whose_ids_share_64_bits_are_not_one_prompt(
    tmp_path_factory: pytest.TempPathFactory, files: list[list[tuple[str, str]]], window: int, limit: int | None
) -> None:
    """As in a census of some 10**9 captions: all first halves are equal here, in memory and on disk."""
    folder = tmp_path_factory.mktemp("fold") / "in"
    write(folder, files)
    if not any(files):
        return
    wanted = [row | {"prompt_id": 0} for row in read(folder, limit=limit).table.to_pylist()]

    def digests(captions: list[bytes]) -> bytes:
        whole = prompt_digests(captions)
        return b"".join(b"\0" * 8 + whole[at + 8 : at + 16] for at in range(0, len(whole), 16))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("memscan.prompts.judging.prompt_digests", digests)
        assert [row | {"prompt_id": 0} for row in read(folder, limit=limit).table.to_pylist()] == wanted
        small_windows(patch, window, 3, 5)
        assert [row | {"prompt_id": 0} for row in read(folder, limit=limit).table.to_pylist()] == wanted


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), max_size=12))
def test_keys_are_ordered_as_their_hexadecimal_digits_are(halves: list[tuple[int, int]]) -> None:
    digits = [f"{(first << 61) + 256:016x}{(second << 60) + 1:016x}" for first, second in halves]
    keys = np.frombuffer(bytes.fromhex("".join(digits)), KEY)
    assert order_of(keys).tolist() == sorted(range(len(digits)), key=digits.__getitem__)


def test_what_lies_on_disk_goes_with_the_table(tmp_path: Path) -> None:
    write(tmp_path / "in", [[(f"caption {number}", "u") for number in range(40)]])
    with pytest.MonkeyPatch.context() as patch:
        small_windows(patch, 5, 4, 8)
        found = read(tmp_path / "in")
        assert len(list(tmp_path.glob("memscan-prompts-*"))) == 1
        assert found.num_rows == 40
        del found
        gc.collect()
        assert not list(tmp_path.glob("memscan-prompts-*"))
        with pytest.raises(InputError, match=r"nowhere.*cannot be written"):
            read_prompts(PromptsConfig(paths=[str(tmp_path / "in")]), str(tmp_path / "nowhere"))


def test_memory_holds_a_window_and_not_the_prompts(tmp_path: Path) -> None:
    write(tmp_path / "in", [[(f"caption {number % 700}", "u") for number in range(2000)]])
    held: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        small_windows(patch, 50, 16, 64)
        kept = folding.Fold._hold

        def hold(self: folding.Fold, rows: prompt_rows.Rows) -> None:
            kept(self, rows)
            held.append(len(self._folded) + self._waiting_rows)

        patch.setattr(folding.Fold, "_hold", hold)
        found = read(tmp_path / "in")
        largest = max(table.num_rows for table in found.content.tables())
    assert (found.distinct, found.rows_read) == (700, 2000)
    assert max(held) <= 150  # a window, and as much again that waits
    assert largest <= 16


@pytest.mark.parametrize("lead", PLAIN_LEADS)
def test_blocks_that_are_taken_as_they_are_hold_printable_characters_that_compose_with_none(lead: int) -> None:
    first = (lead & 0x1F) << 6 if lead < 0xE0 else (lead & 0x0F) << 12
    for code in range(first, first + (1 << 6 if lead < 0xE0 else 1 << 12)):
        character = chr(code)
        assert character.encode()[0] == lead
        assert character.isprintable()
        assert not character.isspace()
        assert normalise(f"a{character}a{character}") == f"a{character}a{character}"
        assert unicodedata.normalize("NFC", character) == character


@given(st.lists(st.text(st.characters(codec="utf-8"), max_size=6) | CAPTIONS, min_size=1, max_size=20), st.booleans())
def test_batches_are_judged_as_their_captions_are_normalised(texts: list[str], repeated: bool) -> None:
    builder = Builder()
    for text in texts:
        builder.add(text)
    judged = judge(builder.take(), 40, repeated)
    for at, text in enumerate(texts):
        wanted = normalise(text)
        assert (judged.codes[at] < 0) == (at in judged.bad) == (not wanted or len(wanted) > 40)
        if judged.codes[at] >= 0:
            assert judged.captions[judged.codes[at]].as_py() == wanted


def test_bytes_that_are_not_utf8_are_told_beside_others_that_are() -> None:
    raw = pa.array(["München".encode(), b"M\xfcnchen", None, b"x"], pa.large_binary())
    for repeated in (False, True):
        judged = judge(RawBatch(raw), 40, repeated)
        assert {at: bad.reason.value for at, bad in judged.bad.items()} == {1: "caption_not_utf8", 2: "caption_empty"}
        assert judged.captions[judged.codes[0]].as_py() == "München"
