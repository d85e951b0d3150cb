"""This module keeps a bad row from spoiling its neighbours: if a batch fails, its rows are processed one by one.

Items go through a chain of steps as values or, after a failure, as the `RowReject` that says what went wrong. A
`MemscanError` is about the job and not about a row, and is not caught.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from memscan.errors import MemscanError, Reason, RowReject, RunError

T = TypeVar("T")
U = TypeVar("U")

# Rows in a row that may fail for reasons of their own before the worker itself is held to be broken (a lost GPU, a full
# disk): better a run that stops than a million rows rejected overnight.
MAX_FAILURES = 100
# Reasons that lie in the instruments and not in the row: so many rows of them are a job that can give no verdict.
FOREIGN = frozenset({Reason.REFERENCE_MISSING})


class Isolation:
    """This applies steps to items, and counts failures in a row.

    Args:
        max_failures: this number of rows that fail in succession stops the job.
    """

    def __init__(self, max_failures: int = MAX_FAILURES) -> None:
        self._max, self._failures = max_failures, 0

    def batch(
        self,
        items: Sequence[T | RowReject],
        step: Callable[[list[T]], Sequence[U | RowReject]],
        reason: Reason,
    ) -> list[U | RowReject]:
        """Apply `step` to all items that are not rejects, at once; where that raises, to one after another.

        Args:
            items: values and earlier rejects, which keep their places.
            step: gives one result per value, in order; a result may be a reject.
            reason: code of what `step` raises, unless it raises a `RowReject` with its own.

        Raises:
            MemscanError: from `step`, or because too many rows failed one after another.
        """
        places = [place for place, item in enumerate(items) if not isinstance(item, RowReject)]
        values = [items[place] for place in places]
        out: list[U | RowReject] = [item if isinstance(item, RowReject) else RowReject(reason, "") for item in items]
        for place, result in zip(places, self._results(values, step, reason), strict=True):  # type: ignore[arg-type]
            out[place] = result
        return out

    def each(self, items: Sequence[T | RowReject], step: Callable[[T], U], reason: Reason) -> list[U | RowReject]:
        """Apply `step` to every item on its own; see `batch`."""
        return [
            item if isinstance(item, RowReject) else self._one(lambda values: [step(values[0])], item, reason)
            for item in items
        ]

    def _results(
        self, values: list[T], step: Callable[[list[T]], Sequence[U | RowReject]], reason: Reason
    ) -> Sequence[U | RowReject]:
        if len(values) > 1:
            try:
                results = step(values)
            except MemscanError:
                raise
            except Exception:  # of any kind: the rows are tried on their own next, and each gets its own reason
                return [self._one(step, value, reason) for value in values]
            if len(results) == len(values):
                return [self._counted(result) for result in results]
        return [self._one(step, value, reason) for value in values]

    def _one(self, step: Callable[[list[T]], Sequence[U | RowReject]], value: T, reason: Reason) -> U | RowReject:
        try:
            (result,) = step([value])
        except MemscanError:
            raise
        except RowReject as reject:
            return self._counted(reject)
        except Exception as error:  # recorded as the row's outcome
            return self._failed(RowReject(reason, f"{type(error).__name__}: {error}"))
        return self._counted(result)

    def _counted(self, result: U | RowReject) -> U | RowReject:
        """A result ends a row of failures; a reject adds to it where not the row but what it meets is at fault."""
        if isinstance(result, RowReject) and result.reason in FOREIGN:
            return self._failed(result)
        if not isinstance(result, RowReject):
            self._failures = 0
        return result

    def _failed(self, reject: RowReject) -> RowReject:
        self._failures += 1
        if self._failures >= self._max:
            raise RunError(
                f"{self._failures} rows failed one after another, the last with {reject}",
                hint="correct the cause and run the same command to resume; the rows before it are kept",
            )
        return reject
