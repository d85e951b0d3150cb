"""This module is the stage that encodes references: it makes one Parquet file of DESCRIBED rows from each chunk.

The stage writes this file itself, and does not leave it to Ray Data. The file is named by its chunk and written
completely or not at all, so a build that was stopped continues with the chunks that have none. Counts are in the name,
so a listing is enough to know what is done. Ray Data passes only the chunks, and one row of counts for each.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from memscan.errors import Reason, RowReject, RunError
from memscan.io import storage
from memscan.io.listing import shown
from memscan.records import REGIONS
from memscan.sources.reading import ChunkReader, Source, as_unit
from pipelines.ray.stage import Stage, StageSetup, silent

if TYPE_CHECKING:  # comes with torch
    from memscan.worker.encoder import RegionEncoder

DESCRIBED = pa.schema(
    [
        pa.field("reference_id", pa.string(), nullable=False),
        pa.field("caption", pa.string()),
        pa.field("url", pa.string()),
        pa.field("image", pa.binary()),
        pa.field("path", pa.string()),
        pa.field("mask", pa.binary()),  # null where rejected, or where the source has vectors of its own
        *(pa.field(region, pa.list_(pa.float32())) for region in REGIONS),  # unit vectors
        pa.field("reason", pa.string()),
        pa.field("message", pa.string()),
    ]
)
DONE = pa.schema(
    [
        pa.field("number", pa.int64(), nullable=False),  # of the chunk
        pa.field("rows", pa.int64(), nullable=False),
        pa.field("good", pa.int64(), nullable=False),
    ]
)
MODELS_FILE = "models.json"
NOTES_ENDING = ".notes.json"  # of what was noted while a chunk was read
_NAME = re.compile(r"(\d+)-(\d+)-(\d+)\.parquet$")


def chunk_file(number: int, rows: int, good: int) -> str:
    """Return the name of an encoded chunk's file."""
    return f"{number:08d}-{rows}-{good}.parquet"


def parse_name(path: str) -> tuple[int, int, int] | None:
    """Return number, rows and good rows of an encoded chunk; None for another file."""
    match = _NAME.search(path)
    return (int(match[1]), int(match[2]), int(match[3])) if match else None


class Describe(Stage["RegionEncoder"]):
    """This stage turns CHUNKS into DONE, with a file of DESCRIBED for each chunk.

    Args:
        folder: where the files go.
    """

    worker = "describe"

    def __init__(self, setup: StageSetup, source: Source, folder: str, report: Callable[..., None] = silent) -> None:
        super().__init__(setup, lambda: self._load(setup), report, "index")
        self._source, self._folder = source, folder
        self._reader = ChunkReader(source)
        self._journal = setup.open_journal()
        self._agreed, self._device = False, setup.device

    @staticmethod
    def _load(setup: StageSetup) -> RegionEncoder:
        from memscan.worker.encoder import RegionEncoder

        setup.begin("segmenter", "embedder")
        return RegionEncoder(setup.config, setup.device, setup.threads)

    def __call__(self, chunks: pa.Table) -> pa.Table:
        with self._block():
            return pa.Table.from_pylist([self._chunk(chunk) for chunk in chunks.to_pylist()], schema=DONE)

    def rows(self, batch: pa.Table) -> pa.Table:
        """Return DESCRIBED of a few rows of REFERENCE_ROWS."""
        rows = batch.to_pylist()
        vectors = self._given(rows)
        results = self._journal.run(
            "describe",
            [row["reference_id"] for row in rows],
            lambda places: self._results([rows[at] for at in places], [vectors[at] for at in places]),
            exact=True,
        )
        return pa.Table.from_pylist(
            [_described(row, result) for row, result in zip(rows, results, strict=True)], schema=DESCRIBED
        )

    def _chunk(self, chunk: Mapping[str, Any]) -> dict[str, Any]:
        if not self._agreed:
            self._agree()
        count = good = 0
        with tempfile.TemporaryDirectory(prefix="memscan-chunk-") as scratch:
            file = Path(scratch) / "described.parquet"
            with pq.ParquetWriter(file, DESCRIBED, compression="zstd", compression_level=1) as writer:
                for batch in self._reader.batches(chunk):
                    with self._meters.busy("index", self._device):
                        table = self.rows(batch)
                    writer.write_table(table)
                    bad = Counter(reason for reason in table["reason"].to_pylist() if reason)
                    count, good = count + table.num_rows, good + table.num_rows - bad.total()
                    self._meters.rows("index", table.num_rows, bad)
                    if self._source.rows is not None:
                        self._report("index", table.num_rows, bad)
            self._note(chunk["number"])
            if self._source.rows is None:
                self._report("index", 1, {"images": count})
            storage.move_in(file, storage.join(self._folder, chunk_file(chunk["number"], count, good)))
        return {"number": chunk["number"], "rows": count, "good": good}

    def _note(self, number: int) -> None:
        """Keep what the reader noted of a chunk, before the chunk counts as done."""
        left, cleaned = self._reader.not_taken, self._reader.cleaned
        if left or cleaned:
            storage.write_json(
                storage.join(self._folder, f"{number:08d}{NOTES_ENDING}"),
                {"not_taken": shown(left), "cleaned": cleaned},
            )
        self._reader.not_taken, self._reader.cleaned = [], 0

    def _agree(self) -> None:
        """On every node, and in every call, the models are the same, or vectors could not be compared."""
        specs = json.dumps([asdict(self.work.embedder.spec), asdict(self.work.segmenter.spec)])
        record = storage.join(self._folder, MODELS_FILE)
        if not storage.create_new(record, specs.encode()) and storage.read_bytes(record).decode() != specs:
            raise RunError("workers found different model files", where=self._folder)
        self._agreed = True

    def _given(self, rows: list[dict[str, Any]]) -> list[Any]:
        """Unit vectors of rows that came with one; a reject where it cannot be one; None if there is none."""
        if self._source.layout.kind != "embeddings":
            return [None] * len(rows)
        bad = RowReject(Reason.EMBEDDING_FAILED, "its vector is zero or not finite")
        return [bad if vector is None else vector for vector in as_unit([row["vector"] for row in rows])]

    def _results(self, rows: list[dict[str, Any]], vectors: list[Any]) -> list[Any]:
        """By row (mask, vectors by region) or a reject."""
        if self._source.layout.kind == "embeddings":
            return [
                _earlier(row) or (vector if isinstance(vector, RowReject) else (None, {"whole": vector}))
                for row, vector in zip(rows, vectors, strict=True)
            ]
        missing = RowReject(Reason.IMAGE_MISSING, "there is no image at its place")
        encoded = [_earlier(row) or (missing if row["image"] is None else row["image"]) for row in rows]
        return [
            result
            if isinstance(result, RowReject)
            else (result[0], {region: result[1][at] for at, region in enumerate(REGIONS)})
            for result in self.work(encoded)
        ]


def _earlier(row: Mapping[str, Any]) -> RowReject | None:
    """Return what the reading rejected."""
    return RowReject(Reason(row["reason"]), row["message"] or "") if row["reason"] else None


def _described(row: Mapping[str, Any], result: Any) -> dict[str, Any]:
    kept = {name: row[name] for name in ("reference_id", "caption", "url", "path")}
    if isinstance(result, RowReject):
        return {**kept, "reason": result.reason.value, "message": result.message}
    mask, vectors = result
    return {**kept, "image": None if row["path"] else row["image"], "mask": mask, **vectors}
