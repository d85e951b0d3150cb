"""This module runs many parts of a scan in one execution.

Models are loaded once for all of them, and no actor waits at the end of a part.

    part 0 ─┐                                            ┌─ part 0 whole: commit
    part 1 ─┼─▶ blocks of prompts ─▶ actors ─▶ write ──▶ ┼─ part 1 whole: commit       while the actors go on
    part 2 ─┘                        (CENSUS)  (a file)  └─ part 2 ...

A part is the unit of a commit, and a wave is one execution by Ray. Every row has the number of its part, and the writer
puts each part's rows into separate files and returns their number to the driver. A wave has to end because Ray Data
keeps figures of every block in the driver while an execution lasts. Towards its end, blocks become shorter, so that all
actors end together; with equal blocks, all but one would wait for the last block.
"""

from __future__ import annotations

import math
import queue
import threading
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc

from memscan.errors import RunError
from memscan.io import storage
from memscan.records import CENSUS
from pipelines.ray.metrics import Meters
from pipelines.run_folder.parts import write_census

if TYPE_CHECKING:
    import ray.data

# Rows of PROMPTS and CENSUS carry the number of their part under this name, until they are written.
PART = "part"
PACKED = "block"
WRITTEN = pa.schema([pa.field(PART, pa.int32(), nullable=False), pa.field("rows", pa.int64(), nullable=False)])
# A block is at most so small a share of what is left for each worker: 1 / TAPER. Workers have two blocks at a time.
TAPER = 3
# Ray Data keeps figures of every block in the driver: 2 to 4 KB each (docs/benchmarks.md), so some 100 MB. A new wave
# has new workers, which load their models: on 64 GPUs with blocks of 32 prompts at 2 prompts/s, every two hours.
WAVE_BLOCKS = 30_000
# For models to load, and to be compiled, before the first row comes out.
LOAD_SECONDS = 900.0


def waves(rows: Mapping[int, int], block: int, most: int = WAVE_BLOCKS) -> list[list[int]]:
    """Yield the parts in order, in waves of at most this number of blocks, but of at least one part.

    Args:
        rows: number of a part -> its rows that are left.
        block: rows of a block.
    """
    found: list[list[int]] = []
    blocks = 0
    for part, count in rows.items():
        needed = -(-count // block)
        if not found or blocks + needed > most:
            found.append([])
            blocks = 0
        found[-1].append(part)
        blocks += needed
    return found


class Parts:
    """These are the remaining rows of some parts.

    They are read one part at a time during iteration, and are not kept in memory.

    Args:
        counts: number of a part -> its rows that are left.
        read: gives them (PROMPTS).
    """

    def __init__(self, counts: Mapping[int, int], read: Callable[[int], pa.Table]) -> None:
        self.counts, self._read = counts, read

    @classmethod
    def of(cls, tables: Mapping[int, pa.Table]) -> Parts:
        """Return parts that are in memory."""
        return cls({number: table.num_rows for number, table in tables.items()}, tables.__getitem__)

    def __len__(self) -> int:
        return len(self.counts)

    @property
    def num_rows(self) -> int:
        return sum(self.counts.values())

    def __iter__(self) -> Iterator[tuple[int, pa.Table]]:
        for number, count in self.counts.items():
            if count:
                rows = self._read(number)
                if rows.num_rows != count:
                    what = f"part {number}: {rows.num_rows} rows are left, where {count} were"
                    raise RunError(what, hint="give the same command again: what is written is kept")
                yield number, rows


def blocks_of(parts: Parts, block: int, step: int | None = None, workers: int = 1) -> Iterator[pa.Table]:
    """Yield the rows of parts in blocks, each row with its part.

    A block may hold the end of one part and the start of the next.

    Args:
        block: rows of a block.
        step: rows of the shortest ones, whose multiples all are; default all blocks are equal.
        workers: that are to end together.
    """
    step = block if step is None or workers == 1 else step
    tables = iter(parts)
    waiting: pa.Table | None = None
    for size in sizes(parts.num_rows, block, step, workers):
        while waiting is None or waiting.num_rows < size:
            number, rows = next(tables)
            marked = rows.append_column(WRITTEN.field(PART), pa.repeat(pa.scalar(number, pa.int32()), rows.num_rows))
            waiting = marked if waiting is None else pa.concat_tables([waiting, marked])
        yield waiting.slice(0, size).combine_chunks()
        waiting = waiting.slice(size)


def sizes(rows: int, block: int, step: int, workers: int) -> Iterator[int]:
    """Yield the rows of each block by guided self-scheduling, at most `block` rows.

    Source: Polychronopoulos and Kuck 1987.
    """
    while rows > 0:
        fair = rows // (TAPER * workers) // step * step
        size = min(rows, max(step, min(block, fair)))
        yield size
        rows -= size


class Packed:
    """This gives each block as a table of one row that holds it.

    The tables are made again at every iteration, so that none is kept in memory.

    Of a stage on GPUs Ray Data wants to know the rows of a batch, and it joins shorter blocks until they have this
    number; so a row is a block, and a batch is one row. It goes through the blocks twice, to store and to describe
    them: a list of those of a wave, fifteen million prompts behind a screen, would take gigabytes of the driver.

    Args:
        blocks: gives them from the first on.
    """

    def __init__(self, blocks: Callable[[], Iterator[pa.Table]]) -> None:
        self._blocks = blocks

    def __iter__(self) -> Iterator[pa.Table]:
        for block in self._blocks():
            sink = pa.BufferOutputStream()
            with pa.ipc.new_stream(sink, block.schema) as stream:
                stream.write_table(block)
            yield pa.table({PACKED: pa.array([sink.getvalue().to_pybytes()], pa.binary())})


def unpacked(table: pa.Table) -> pa.Table:
    """Return the block of a table that `packed` made; return any other table unchanged."""
    if table.column_names != [PACKED]:
        return table
    (block,) = table[PACKED].to_pylist()
    return pa.ipc.open_stream(block).read_all()


@dataclass(frozen=True)
class Target:
    """This is where the rows of parts are written.

    Args:
        folder: of the parts' folders.
        epoch: of the driver, below which its workers write.
        fingerprint: of the run, which its files carry.
    """

    folder: str
    epoch: int = 0
    fingerprint: str = ""


def write_rows(table: pa.Table, target: Target, run: str = "") -> pa.Table:
    """Write CENSUS rows with their part, and return WRITTEN.

    Each part has a file of its own, named by its rows and bytes.

    Args:
        target: where they are written.
        run: name of the census, for the metrics.
    """
    counts = []
    with Meters(run).busy("write", "cpu"):
        for number in sorted(pc.unique(table[PART]).to_pylist()):
            rows = table.filter(pc.equal(table[PART], number)).select(CENSUS.names)
            folder = storage.join(target.folder, f"part-{number:05d}")
            write_census(folder, rows, target.epoch, target.fingerprint)
            counts.append({PART: number, "rows": rows.num_rows})
    Meters(run).rows("write", table.num_rows, {})
    return pa.Table.from_pylist(counts, schema=WRITTEN)


def patience(watchdog_seconds: float) -> float:
    """Return how long a wave may go without any finished row before it is given up.

    This is the time that models may take to load, and two attempts.
    """
    return LOAD_SECONDS + 2 * watchdog_seconds


def follow(
    written: Callable[[], ray.data.Dataset],
    rows: Mapping[int, int],
    whole: Callable[[int], Any],
    seconds: float = math.inf,
) -> None:
    """Execute a wave.

    Args:
        written: gives WRITTEN, lazily; not called where no row is left.
        rows: number of a part -> rows that it is to get.
        whole: called with every part when its last row is written, and for the others at the end.
        seconds: how long nothing may come out.

    Raises:
        RunError: nothing came out for so long: Ray waits for something that will not come, as after a lost message.
    """
    missing = {part: count for part, count in rows.items() if count}
    for part in rows:
        if part not in missing:
            whole(part)
    if missing:
        with closing(_counts(written(), seconds)) as counts:  # or a refused commit would leave the actors at work
            for part, count in counts:
                missing[part] -= count
                if not missing[part]:
                    del missing[part]
                    whole(part)
    for part in missing:
        whole(part)


def _counts(written: ray.data.Dataset, seconds: float) -> Generator[tuple[int, int], None, None]:
    """Part and rows of what is written. Taken out in a thread, so that waiting for it can be given up."""
    puller = _Puller(written)
    try:
        while (batch := puller.next(seconds)) is not None:
            yield from zip(batch[PART].to_pylist(), batch["rows"].to_pylist(), strict=True)
    finally:
        puller.close()


class _Puller:
    """These are the batches of an execution; each is made when it is asked for."""

    def __init__(self, written: ray.data.Dataset) -> None:
        self._found: queue.Queue[pa.Table | BaseException | None] = queue.Queue()
        self._asked, self._stopped, self._waiting = threading.Semaphore(0), False, False
        self._thread = threading.Thread(target=self._pull, args=(written,), name="wave", daemon=True)
        self._thread.start()

    def next(self, seconds: float) -> pa.Table | None:
        """Return the next batch, and None after the last.

        Raises what the execution raises, and RunError as `follow`.
        """
        self._waiting = True
        self._asked.release()
        try:
            item = self._found.get(timeout=None if seconds == math.inf else seconds)
        except queue.Empty:
            raise RunError(
                f"no row was finished for {seconds:.0f} s: Ray waits for a worker or a message that does not come",
                hint="give the same command again: what is written is kept",
            ) from None
        self._waiting = False
        if isinstance(item, BaseException):
            raise item
        return item

    def close(self) -> None:
        """End the execution, or leave it to the end of Ray where it does not answer."""
        self._stopped = True
        self._asked.release()
        if not self._waiting:
            self._thread.join()

    def _pull(self, written: ray.data.Dataset) -> None:
        batches: Any = iter(written.iter_batches(batch_size=None, batch_format="pyarrow"))
        try:
            while self._asked.acquire() and not self._stopped:
                self._found.put(next(batches, None))
        except BaseException as error:  # raised where it was asked for
            self._found.put(error)
        finally:
            batches.close()


def columns_of(table: pa.Table, names: Sequence[str]) -> list[str]:
    """Return `names`, and the part if the table has it."""
    return [*names, PART] if PART in table.column_names else list(names)
