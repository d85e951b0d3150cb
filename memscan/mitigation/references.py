"""This module gives the training images of all shards of an index as one list, for repairs and attacks."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from memscan.errors import Reason, RowReject
from memscan.index.references import Reference, ReferenceStore, decode_reference


class TrainingImages:
    """This is one row space over several stores, in their order."""

    def __init__(self, stores: Sequence[ReferenceStore]) -> None:
        self._stores = tuple(stores)
        self._starts = np.cumsum([0, *(len(store) for store in stores)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def row_of(self, reference_id: str) -> int:
        """Return the row of an id. Raises RowReject (`reference_missing`) if no shard has it."""
        for start, store in zip(self._starts.tolist(), self._stores, strict=False):
            try:
                return int(start) + store.row_of(reference_id)
            except RowReject:
                continue
        raise RowReject(Reason.REFERENCE_MISSING, f"no reference {reference_id!r}")

    def encoded(self, row: int) -> dict[str, str | bytes | None]:
        """Return a row as it is stored. Raises IndexError outside [0, len)."""
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of {len(self)} references")
        shard = int(np.searchsorted(self._starts, row, side="right")) - 1
        return self._stores[shard].encoded(row - int(self._starts[shard]))

    def fetch(self, row: int) -> Reference:
        """Return a row decoded. Raises as `ReferenceStore.fetch` does."""
        return decode_reference(self.encoded(row))
