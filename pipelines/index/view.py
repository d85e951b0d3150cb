"""This module has what `memscan index info|verify|recall|search` show.

It works without Ray and with one shard in memory at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np

from memscan.config import CensusConfig
from memscan.errors import InputError, Reason, RowReject
from memscan.index.change import removed_rows
from memscan.index.local_copy import passing_shard
from memscan.index.manifest import Manifest
from memscan.index.recall import QUERIES, make_queries, query_shard, recall_of
from memscan.index.shards import OpenShard
from memscan.index.store import ReferenceIndex
from memscan.io.images import decode
from memscan.records import REGIONS

_BATCH = 64


def facts(folder: str, version: int | None = None) -> dict[str, Any]:
    """Return the content of the manifest as one JSON object."""
    manifest = Manifest.load(folder, version)
    return {
        "version": manifest.version,
        "hash": manifest.hash,
        "references": manifest.count,
        "removed": manifest.removed_count,
        "rejected": manifest.rejected,
        "source_rows": manifest.source_rows,
        "sources": [dict(source) for source in manifest.sources],
        "factory": manifest.factory,
        "why": manifest.why,
        "nprobe": manifest.nprobe,
        "metric": manifest.metric,
        "dimension": manifest.dimension,
        "regions": list(manifest.regions),
        "embedder": manifest.embedder,
        "segmenter": manifest.segmenter,
        "recall": dict(manifest.recall),
        "bytes": manifest.bytes,
        "shards": [
            {
                "name": shard.name,
                "references": shard.count,
                "bytes": sum(entry.bytes for entry in shard.files.values()),
                "first_id": shard.first_id,
                "last_id": shard.last_id,
            }
            for shard in manifest.shards
        ],
    }


def verify(folder: str, version: int | None = None) -> tuple[int, int]:
    """Read every byte of a version; gives the number of its files and bytes. Raises IntegrityError."""
    manifest = Manifest.load(folder, version)
    manifest.verify(folder)
    return sum(1 for _ in manifest.files()), manifest.bytes


def measure_recall(folder: str, nprobe: int | None = None, count: int = QUERIES) -> dict[str, float]:
    """Return recall by "region@k" of near copies of references from all shards, against exact search."""
    manifest = Manifest.load(folder)
    shards = range(len(manifest.shards))
    share = -(-count // len(manifest.shards))
    queries: dict[str, list[np.ndarray]] = {region: [] for region in manifest.regions}
    for at in shards:
        with _opened(folder, manifest, at, nprobe) as shard:
            for region in manifest.regions:
                queries[region].append(make_queries(shard.vectors(region), share))
    answers = []
    for at in shards:
        with _opened(folder, manifest, at, nprobe) as shard:
            asked = {region: np.concatenate(parts)[:count] for region, parts in queries.items()}
            answers.append({region: query_shard(shard, region, vectors) for region, vectors in asked.items()})
    return recall_of(manifest, answers)


@contextmanager
def _opened(folder: str, manifest: Manifest, at: int, nprobe: int | None) -> Iterator[OpenShard]:
    shard = manifest.shards[at]
    with passing_shard(folder, shard, list(shard.files)) as local:
        lists = manifest.nprobe if nprobe is None else nprobe
        yield OpenShard(local, manifest, shard, manifest.starts()[at], lists, removed_rows(folder, manifest)[at])


def search_images(
    folder: str,
    paths: Sequence[str],
    config: CensusConfig,
    top_k: int,
    access: Literal["resident", "shard-major"] = "resident",
) -> Iterator[dict[str, Any]]:
    """Yield one object per image.

    `status` is "done" with its hits, most similar first, or "rejected" with the reason.

    Raises:
        InputError: one of the paths is neither an image nor a folder of images.
        IndexLoadError, IntegrityError: as `ReferenceIndex.open`.
    """
    from memscan.worker.encoder import RegionEncoder
    from memscan.worker.isolation import Isolation

    files = [file for path in paths for file in _files(path)]
    encoder = RegionEncoder(config, "cpu", 1)
    index = ReferenceIndex.open(folder, encoder.embedder.spec, config.index.nprobe, verify="once", access=access)
    isolation = Isolation()
    # One shard after another takes all there is to ask at once, or each would be read again for every batch.
    step = len(files) if access == "shard-major" else _BATCH
    for start in range(0, len(files), step):
        batch = files[start : start + step]
        vectors: list[Any] = []
        for at in range(0, len(batch), _BATCH):
            images = isolation.each(batch[at : at + _BATCH], _read, Reason.IMAGE_UNDECODABLE)
            vectors += isolation.batch(
                images, lambda good: list(encoder.vectors(good, encoder.masks(good))), Reason.EMBEDDING_FAILED
            )
        good = [vector for vector in vectors if not isinstance(vector, RowReject)]
        hits = iter(index.search(dict(zip(REGIONS, np.stack(good, axis=1), strict=True)), top_k) if good else [])
        for file, vector in zip(batch, vectors, strict=True):
            if isinstance(vector, RowReject):
                yield {"image": file, "status": "rejected", "reason": vector.reason.value, "message": vector.message}
            else:
                yield {"image": file, "status": "done", "hits": [_hit(index, hit) for hit in next(hits)]}


def _hit(index: ReferenceIndex, hit: Any) -> dict[str, Any]:
    try:
        reference = index.fetch(hit.row)
        text = {"caption": reference.caption, "url": reference.url}
    except RowReject as reject:
        text = {"caption": None, "url": None, "missing": reject.message}
    return {
        "reference": hit.reference_id,
        "similarity": round(hit.similarity, 6),
        "found_by": hit.found_by,
        "similarities": {region: round(value, 6) for region, value in hit.similarities.items()},
        **text,
    }


def _files(path: str) -> list[str]:
    from memscan.sources.layouts import IMAGE_SUFFIXES

    place = Path(path)
    if place.is_dir():
        found = sorted(str(file) for file in place.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES)
        if not found:
            raise InputError("holds no image files", where=path)
        return found
    if not place.is_file():
        raise InputError("no such image", where=path)
    return [path]


def _read(path: str) -> Any:
    try:
        return decode(Path(path).read_bytes())
    except OSError as error:
        raise RowReject(Reason.IMAGE_MISSING, str(error)) from error
