"""The reference index on Ray Data: image rows -> masks and vectors of three regions -> one index folder.

    chunks            of Parquet with encoded images, or of a folder of images: N references
    Describe          read, decode, segment, embed whole, foreground and background: N rows, rejects included
    write_parquet     N rows in `<index>.parts/`
    write_index       sorted by reference id, so that the same references make the same bytes; then the parts go

References that cannot be decoded are in `<index>/rejects.parquet` with their reasons: indexed + rejected = N, checked.
The index's manifest is written last, so a build that was killed leaves no index, and is begun again.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from memscan import storage
from memscan.config import CensusConfig
from memscan.errors import ConfigError, InputError, RunError
from memscan.index.manifest import Manifest
from memscan.index.store import write_index
from memscan.models.specification import ModelSpec
from memscan.records import REFERENCES, REGIONS
from pipelines.inputs import embedder_id, segmenter_id
from pipelines.progress import Bar, Board, Reporter, board
from pipelines.references import Source, open_source
from pipelines.session import ray_session
from pipelines.shape import Shape, actors
from pipelines.stages import Describe, Plan
from pipelines.tables import read_table, write_table

REJECTS = pa.schema(
    [
        pa.field("reference_id", pa.string(), nullable=False),
        pa.field("caption", pa.string()),
        pa.field("url", pa.string()),
        pa.field("reason", pa.string(), nullable=False),
        pa.field("message", pa.string()),
    ]
)


def build_index(source: Source, folder: str, plan: Plan, shape: Shape, bars: Board, report: Reporter) -> Manifest:
    """Index all references of `source` into `folder`; needs a running Ray.

    Raises:
        RunError: rows went missing on the way.
        InputError: not one reference could be indexed.
    """
    import ray.data

    parts = folder.rstrip("/") + ".parts"
    storage.remove_tree(parts)
    with bars.show(Bar("index", "images", source.rows)):
        chunks = source.chunks()
        rows = ray.data.from_arrow([chunks.slice(at, 1) for at in range(chunks.num_rows)]).map_batches(
            Describe,
            fn_constructor_args=(plan, source, report),
            batch_size=1,
            batch_format="pyarrow",
            **actors(min(shape.samplers, chunks.num_rows), shape.gpus),
        )
        filesystem, inner = storage.arrow_filesystem(parts)
        storage.make_dirs(parts)
        rows.write_parquet(inner, filesystem=filesystem, **shape.writer)
    described = pa.concat_tables([read_table(file) for file in storage.list_files(parts, ".parquet")])
    manifest = _write(described.sort_by("reference_id"), source, folder, plan)
    storage.remove_tree(parts)
    return manifest


def build(config: CensusConfig) -> Manifest:
    """Build `config.index.source` into `config.index.path`, with a Ray of its own.

    Raises:
        RunError: there is something at the path already.
        MemscanError: see `open_source` and `build_index`.
    """
    folder, path = config.index.path, config.index.source
    if folder is None or path is None:
        raise ConfigError("give index.source and index.path")
    if storage.exists(folder):
        raise RunError("is there already", where=folder, hint="remove it, or choose another folder")
    segmenter_id(config.segmenter)
    embedder_id(config.embedder)
    source = open_source(path)
    with ray_session(Path(tempfile.mkdtemp(prefix="memscan-index-"))) as machine, board() as (bars, report):
        shape = Shape.of(config, machine, source.rows)
        return build_index(source, folder, Plan(config, shape.device, shape.threads), shape, bars, report)


def _write(described: pa.Table, source: Source, folder: str, plan: Plan) -> Manifest:
    """The index of the rows that were described, and the rejects beside it."""
    if described.num_rows != source.rows:
        raise RunError(f"{source.rows} references went in, {described.num_rows} came out", where=folder)
    good = described.filter(pc.is_null(described["reason"]))
    rejected = described.filter(pc.is_valid(described["reason"])).select(REJECTS.names)
    if good.num_rows == 0:
        first = rejected.slice(0, 1).to_pylist()[0]
        raise InputError(
            f"not one of {source.rows} references could be indexed; the first: {first['reason']}: {first['message']}",
            where=source.root or source.files[0],
        )
    vectors_NRD = np.stack(good["vectors"].to_numpy(zero_copy_only=False)).reshape(good.num_rows, len(REGIONS), -1)
    vectors = {region: np.ascontiguousarray(vectors_NRD[:, at]) for at, region in enumerate(REGIONS)}
    write_table(storage.join(folder, "rejects.parquet"), rejected.cast(REJECTS))
    return write_index(
        folder,
        good.select(REFERENCES.names).cast(REFERENCES),
        vectors,
        plan.config.index.factory,
        plan.config.index.nprobe,
        *_specs(described, folder),
    )


def _specs(described: pa.Table, folder: str) -> tuple[ModelSpec, ModelSpec]:
    """Embedder and segmenter, as the workers found them: on every node the same, or the vectors cannot be compared."""
    found = pc.unique(described["specs"]).to_pylist()
    if len(found) != 1:
        raise RunError(f"workers used {len(found)} different sets of model files", where=folder)
    embedder, segmenter = json.loads(found[0])
    return ModelSpec(**embedder), ModelSpec(**segmenter)
