"""This module reads a few images of a source, for checks that need examples and no statistics."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from memscan.errors import InputError, RowReject
from memscan.io import images
from memscan.sources.reading import ChunkReader, Source

Example = tuple[npt.NDArray[np.uint8], str | None]


def examples(source: Source, count: int) -> list[Example]:
    """Return up to `count` images (H, W, 3) RGB with their captions.

    They can be decoded, and come from the middle of the source on.

    At most two chunks are read, a batch at a time; a source without pixels gives none.
    """
    chunks = source.chunks().to_pylist()
    found: list[Example] = []
    middle = len(chunks) // 2
    reader = ChunkReader(source)
    for chunk in [chunks[middle], *chunks[:1]][: len(chunks)]:
        for table in reader.batches(chunk):
            rows = table.to_pylist()
            for row in rows[:: max(1, len(rows) // count)]:
                try:
                    data = row["image"] or (images.read_image(row["path"]) if row["path"] else None)
                    if data:
                        found.append((images.decode(data), row["caption"]))
                except (RowReject, InputError):
                    continue
                if len(found) == count:
                    return found
    return found
