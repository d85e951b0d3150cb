"""This module finds, names and rejects rows that kill or hang their worker, so that their neighbours are done.

An exception is caught inside the worker (`isolation.py`). But a segmentation fault, the kernel's out-of-memory killer
or an endless loop ends the worker, and Ray would give the same rows to the next worker, for ever. So a worker writes a
record of its rows before it begins, and removes it when they are done. If a record still exists when the same rows come
again, it was left by a worker that died because of them, or together with them:

    first time    all rows of a block are processed together, at full speed
    after that    one row is processed after another, each with its own record
    rejected      a row whose own record still exists was being processed in two workers that died

So a block with k such rows costs 1 + k workers. A row alone is rounded differently from one in a batch. Therefore,
where the same bytes are promised (the reference index), the rows that survived alone are done once more, together. Rows
whose worker was killed from outside then have the results that they would have had. The watchdog ends a worker whose
rows take longer than `resources.watchdog_seconds`. This is noted in the record, and so in the reason of a reject. A
lost machine looks like a row that killed its worker, but would have to strike the same row twice; `memscan retry` tries
such rows again.
"""

from __future__ import annotations

import faulthandler
import hashlib
import json
import os
import secrets
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

from memscan.errors import InputError, Reason, RowReject
from memscan.io import storage

T = TypeVar("T")

# Of a worker that the watchdog ended (sysexits' EX_TEMPFAIL).
EXIT_CODE = 75
# A worker whose interpreter is stuck cannot end itself from a Python thread; faulthandler's does, so much later.
GRACE_SECONDS = 5.0
# Workers that may die of rows together that all live alone (too much memory), or be killed meanwhile.
TOGETHER_DEATHS = 2
_DEADLY = (Reason.ROW_TIMED_OUT, Reason.WORKER_DIED)


class Journal:
    """This records what the workers of a job are working on.

    Args:
        folder: of the records, local or s3://; "" for none: nothing is recorded and nothing watched.
        seconds: how long one attempt may take.
    """

    def __init__(self, folder: str, seconds: float) -> None:
        self._folder, self._seconds = folder, seconds

    def run(
        self,
        stage: str,
        ids: Sequence[str],
        work: Callable[[Sequence[int]], Sequence[T]],
        *,
        exact: bool = False,
    ) -> list[T | RowReject]:
        """Do the work on all rows at once or, if a worker died of them before, on one after another.

        Args:
            stage: keeps the records of stages apart.
            ids: of the rows.
            work: takes places in `ids` and gives one result each.
            exact: whether the rows are done together again after that, for the results to be those of a block whose
                worker was not killed from outside, to the bit.
        """
        everything = range(len(ids))
        if not self._folder or not ids:
            return list(work(everything))
        block = f"{stage}-block-{_digest(ids)}"
        if not self._left(block):
            with self._watched(block):
                return list(work(everything))
        alone = [result for place in everything for result in self._alone(stage, ids[place], place, work)]
        return self._together(block, alone, work) if exact else alone

    def _together(
        self, block: str, alone: list[T | RowReject], work: Callable[[Sequence[int]], Sequence[T]]
    ) -> list[T | RowReject]:
        rest = [at for at, one in enumerate(alone) if not (isinstance(one, RowReject) and one.reason in _DEADLY)]
        name = f"{block}-together"
        if len(rest) < 2 or len(self._left(name)) >= TOGETHER_DEATHS:
            return alone
        results = list(alone)
        with self._watched(name):
            for at, result in zip(rest, work(rest), strict=True):
                results[at] = result
        return results

    def clear(self) -> None:
        """Remove all records: the rows they speak of are committed."""
        if storage.is_dir(self._folder):
            storage.remove_tree(self._folder)

    def _alone(
        self, stage: str, name: str, place: int, work: Callable[[Sequence[int]], Sequence[T]]
    ) -> Sequence[T | RowReject]:
        row = f"{stage}-row-{_digest([name])}"
        left = self._left(row)
        if left:
            if any(self._timed_out(record) for record in left):
                return [RowReject(Reason.ROW_TIMED_OUT, f"{stage} took longer than {self._seconds:.0f} s, alone")]
            return [RowReject(Reason.WORKER_DIED, f"{stage} ended the process that worked on it, twice")]
        with self._watched(row):
            return work([place])

    def _left(self, name: str) -> list[str]:
        """Records that a dead worker left under a name."""
        folder = storage.join(self._folder, name)
        return storage.list_files(folder, ".json") if storage.is_dir(folder) else []

    @contextmanager
    def _watched(self, name: str) -> Iterator[None]:
        """Keep a record under a name inside the block, and end the worker when its time is up."""
        record = storage.join(self._folder, name, f"{secrets.token_hex(6)}.json")
        storage.write_atomic(record, _content(timed_out=False))
        timer = threading.Timer(self._seconds, _give_up, (record,))
        timer.daemon = True
        timer.start()
        faulthandler.dump_traceback_later(self._seconds + GRACE_SECONDS, exit=True, file=sys.__stderr__ or 2)
        try:
            yield
        finally:
            # Also after an exception: that is an error of the job, which nobody died of.
            timer.cancel()
            faulthandler.cancel_dump_traceback_later()
            storage.remove_tree(record)

    @staticmethod
    def _timed_out(record: str) -> bool:
        try:
            return bool(storage.read_json(record).get("timed_out"))
        except InputError:
            return False


def _give_up(record: str) -> None:
    try:
        storage.write_atomic(record, _content(timed_out=True))
    finally:
        os._exit(EXIT_CODE)


def _content(*, timed_out: bool) -> bytes:
    return json.dumps({"pid": os.getpid(), "timed_out": timed_out}).encode()


def _digest(ids: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(ids).encode()).hexdigest()[:16]
