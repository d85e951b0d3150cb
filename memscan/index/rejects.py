"""This module counts references that are in no index because they could not be read, segmented or embedded, and why."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from memscan.index.manifest import REJECTS_FILE, Manifest
from memscan.io import storage


def rejects_of(folder: str, manifest: Manifest) -> dict[str, Any]:
    """Return, for run.json and census.json, how many references were indexed and rejected, and the reasons.

    The reasons are those of the files that the builds left beside the index; where one is gone or damaged, they do not
    add up to the count, which is the manifest's.
    """
    stem = REJECTS_FILE.partition(".")[0]
    reasons: Counter[str] = Counter()
    if manifest.rejected:
        for file in storage.list_files(folder, (".parquet",)):
            name = file.rsplit("/", 1)[-1]
            if name.startswith(stem) and storage.join(folder, name) == file:
                reasons.update(_reasons(file))
    return {
        "source_rows": manifest.source_rows,
        "rejected": manifest.rejected,
        "reasons": dict(sorted(reasons.items())),
    }


def _reasons(file: str) -> list[str]:
    filesystem, inner = storage.arrow_filesystem(file)
    try:
        return [
            str(one) for one in pq.read_table(inner, columns=["reason"], filesystem=filesystem)["reason"].to_pylist()
        ]
    except (OSError, pa.ArrowException, KeyError):
        return []
