"""Parts in waves: which parts together, a file a part, commits as parts become whole."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from memscan.errors import RunError
from memscan.records import CENSUS, PROMPTS
from pipelines.scan.waves import (
    PART,
    WRITTEN,
    Packed,
    Parts,
    Target,
    blocks_of,
    follow,
    sizes,
    unpacked,
    waves,
    write_rows,
)


@given(st.lists(st.integers(0, 5000), max_size=30), st.integers(1, 64), st.integers(1, 200))
def test_waves_keep_every_part_once_and_in_order(rows: list[int], block: int, most: int) -> None:
    found = waves(dict(enumerate(rows)), block, most)
    assert [part for wave in found for part in wave] == list(range(len(rows)))
    for wave in found:
        assert len(wave) == 1 or sum(-(-rows[part] // block) for part in wave) <= most


def test_a_wave_is_as_full_as_it_can_be() -> None:
    assert waves({4: 30, 5: 30, 6: 31}, block=10, most=6) == [[4, 5], [6]]


def prompts(names: list[str]) -> pa.Table:
    rows = [
        {"prompt_id": name, "caption": name, "count": 1, "source": "s", "row": 1, "status": "done"} for name in names
    ]
    return pa.Table.from_pylist(rows, schema=PROMPTS)


def test_every_row_has_its_part() -> None:
    parts = Parts.of({3: prompts(list("abcde")), 5: prompts([]), 7: prompts(list("fg"))})
    blocks = list(blocks_of(parts, block=2))
    assert [(block[PART].to_pylist(), "".join(block["prompt_id"].to_pylist())) for block in blocks] == [
        ([3, 3], "ab"),
        ([3, 3], "cd"),
        ([3, 7], "ef"),
        ([7], "g"),
    ]
    packed = Packed(lambda: iter(blocks))
    again = [unpacked(table) for table in packed]
    assert [table.num_rows for table in packed] == [1] * 4
    assert [table.to_pylist() for table in again] == [block.to_pylist() for block in blocks]
    assert unpacked(blocks[0]) is blocks[0]


def test_parts_are_read_one_at_a_time_as_their_blocks_are_made() -> None:
    tables, asked = {number: prompts([f"{number}-{row}" for row in range(4)]) for number in range(3)}, list[int]()

    def read(number: int) -> pa.Table:
        asked.append(number)
        return tables[number]

    blocks = blocks_of(Parts({0: 4, 1: 4, 2: 4}, read), block=2)
    seen = [(next(blocks).num_rows, list(asked)) for _ in range(3)]
    assert seen == [(2, [0]), (2, [0]), (2, [0, 1])]
    with pytest.raises(RunError, match="part 1: 4 rows are left, where 5 were"):
        list(blocks_of(Parts({0: 4, 1: 5}, read), block=2))


@given(st.integers(0, 20_000), st.integers(1, 40), st.integers(1, 32), st.integers(1, 64))
def test_blocks_become_shorter_towards_the_end(rows: int, steps: int, step: int, workers: int) -> None:
    found = list(sizes(rows, steps * step, step, workers))
    assert sum(found) == rows
    assert found == sorted(found, reverse=True)
    assert all(size % step == 0 and size <= steps * step for size in found[:-1])
    left = rows
    for size in found:  # no block is so long that the others could not be busy meanwhile
        assert size <= max(step, left / (2 * workers))
        left -= size


def longest(lengths: list[int], workers: int) -> int:
    """When the last of some workers ends, who take the blocks in order, each as soon as it is free."""
    free = [0] * workers
    for length in lengths:
        free[free.index(min(free))] += length
    return max(free)


@given(st.integers(1, 64), st.integers(100, 2000))
def test_workers_end_together(workers: int, rows: int) -> None:
    """Within two of the shortest blocks of the least time there is; equal blocks of 80 rows may miss it by 79."""
    total = rows * workers
    assert longest(list(sizes(total, 80, 10, workers)), workers) <= rows + 2 * 10


def census(marks: dict[str, int]) -> pa.Table:
    rows = [{**row, "generations": []} for row in prompts(list(marks)).to_pylist()]
    table = pa.Table.from_pylist(rows, schema=CENSUS)
    return table.append_column(WRITTEN.field(PART), pa.array(list(marks.values()), pa.int32()))


def test_a_batch_across_parts_is_a_file_a_part_and_again_the_same_file(tmp_path: Path) -> None:
    table = census({"a": 1, "b": 2, "c": 2})
    for _ in range(2):  # Ray does a task again whose machine was lost
        assert write_rows(table, Target(str(tmp_path))).to_pylist() == [{"part": 1, "rows": 1}, {"part": 2, "rows": 2}]
    files = sorted(tmp_path.rglob("*.parquet"))
    assert [file.parent.name for file in files] == ["part-00001", "part-00002"]
    second = pq.ParquetFile(files[1]).read()
    assert second.schema == CENSUS
    assert second["prompt_id"].to_pylist() == ["b", "c"]


class Written:
    """What a wave executes, in place of Ray's data set."""

    def __init__(self, *counts: tuple[int, int]) -> None:
        self.counts, self.closed = counts, False

    def __call__(self) -> Written:
        return self

    def iter_batches(self, **_: Any) -> Iterator[pa.Table]:
        try:
            for part, rows in self.counts:
                yield pa.Table.from_pylist([{"part": part, "rows": rows}], schema=WRITTEN)
        finally:
            self.closed = True


def test_a_part_is_committed_when_its_last_row_is_written() -> None:
    seen: list[Any] = []

    class Watched(Written):
        def iter_batches(self, **arguments: Any) -> Iterator[pa.Table]:
            for batch in super().iter_batches(**arguments):
                seen.append(tuple(batch.to_pylist()[0].values()))
                yield batch

    follow(Watched((0, 2), (1, 3), (0, 2), (1, 1)), {0: 4, 1: 4, 2: 0}, seen.append)
    assert seen == [2, (0, 2), (1, 3), (0, 2), 0, (1, 1), 1]


def test_a_part_that_stays_short_is_left_to_the_commits_own_check() -> None:
    seen: list[int] = []
    follow(Written((0, 2)), {0: 4}, seen.append)
    assert seen == [0]


def test_nothing_left_to_do_executes_nothing() -> None:
    seen: list[int] = []

    def never() -> Any:
        raise AssertionError("executed")

    follow(never, {0: 0, 1: 0}, seen.append)
    assert seen == [0, 1]


def test_a_commit_that_is_refused_ends_the_execution() -> None:
    written = Written((0, 1), (1, 1))

    def refuse(part: int) -> None:
        raise RunError("another driver has taken this run over")

    with pytest.raises(RunError, match="taken this run over"):
        follow(written, {0: 1, 1: 1}, refuse)
    assert written.closed


def test_an_execution_that_stands_still_is_given_up_in_one_line() -> None:
    """As Ray's does when a message was lost: the run can be resumed, and is not found hanging the morning after."""
    released = threading.Event()

    class Still(Written):
        def iter_batches(self, **arguments: Any) -> Iterator[pa.Table]:
            yield from super().iter_batches(**arguments)
            released.wait(60)

    seen: list[int] = []
    with pytest.raises(RunError, match=r"no row was finished for 0 s.*give the same command again"):
        follow(Still((0, 2)), {0: 2, 1: 1}, seen.append, seconds=0.3)
    assert seen == [0]
    released.set()


def test_what_an_execution_raises_is_raised_to_its_reader() -> None:
    class Broken(Written):
        def iter_batches(self, **arguments: Any) -> Iterator[pa.Table]:
            yield from super().iter_batches(**arguments)
            raise RunError("a worker said so")

    with pytest.raises(RunError, match="a worker said so"):
        follow(Broken((0, 1)), {0: 2}, lambda part: None, seconds=30)
