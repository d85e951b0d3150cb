"""This module groups a flagged list: near-duplicates, components, clusters, and the images to drop.

    flagged list ──▶ look up its training images ──▶ one-to-many graph ──▶ encode captions ──▶ clusters
                     (URLs, thumbnails: in each       (driver: flagged      (here, or on Ray
                      file of references)              rows only)            where they are many)

Writes `clusters/{edges,components,assignments,clusters}.parquet` and `flagged/removal.{parquet,csv,jsonl}`.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from memscan.census import correspondence
from memscan.census import flagged as flagged_files
from memscan.census.clusters import Grouping, TextVectors, group_prompts, with_clusters, word_vectors
from memscan.census.duplicates import SIDE, group_duplicates, thumbnail
from memscan.census.tally import with_urls
from memscan.config import CensusConfig, ClustersConfig, VerdictConfig
from memscan.errors import ModelError
from memscan.io import storage
from memscan.report.evidence import iter_matches
from pipelines.run_folder.results import reference_files
from pipelines.run_folder.runs import Run
from pipelines.run_folder.tables import write_table

TABLES = ("edges", "components", "assignments", "clusters")
_ENCODE_HERE = 5000  # captions; beyond, workers share them
_LOOK_UP_HERE = 20_000  # matched training images
_CAPTIONS_A_TASK = 1024


@dataclass(frozen=True)
class Found:
    """A training image that the index still has: its URL and thumbnail (None if it cannot be decoded)."""

    url: str | None
    small: np.ndarray | None


@dataclass(frozen=True)
class Grouped:
    """This is the flagged list with all columns filled, and the figures of the groups for census.json."""

    flagged: pa.Table
    references: dict[str, Any]
    clusters: dict[str, Any]


def group_run(
    run: Run, flagged: pa.Table, rule: VerdictConfig, config: ClustersConfig, use_ray: bool, into: str
) -> Grouped:
    """Fill URLs, groups of near-duplicates, components and clusters, and write the tables.

    Args:
        use_ray: needs a running Ray.
        into: the folder in which `clusters/` and `flagged/` are written.

    Raises:
        ModelError: a sentence encoder was asked for and cannot be loaded.
    """
    files = reference_files(run)
    wanted = {match for matches in flagged["match_ids"].to_pylist() for match in matches}
    known = look_up(files, wanted, use_ray)
    urls = {match: found.url for match, found in known.items()}
    groups = group_duplicates({match: found.small for match, found in known.items()})
    flagged = correspondence.with_groups(with_urls(flagged, urls), groups)
    texts = encode(run, flagged["caption"].to_pylist(), config, use_ray)
    grouping = group_prompts(flagged, texts, config)
    flagged = with_clusters(flagged, grouping.assignments)
    _write(run, into, flagged, grouping, correspondence.removal_list(flagged, rule, urls))
    references = {
        "path": run.places.keep(run.index) if files else None,
        "matched": len(wanted),
        "missing": len(wanted) - len(known),
        "groups": len(wanted) - len(groups) + len(set(groups.values())),
    }
    return Grouped(flagged, references, grouping.summary)


def look_up(files: Sequence[str], wanted: Collection[str], use_ray: bool) -> dict[str, Found]:
    """Return URL and thumbnail of the wanted training images, by id; those that no file holds are left out."""
    if not use_ray or len(wanted) < _LOOK_UP_HERE or len(files) < 2:
        return _look_up_here(files, wanted)
    import ray
    import ray.data

    ids = ray.put(sorted(wanted))

    def look(item: dict[str, Any]) -> list[dict[str, Any]]:
        found = _look_up_here([item["file"]], ray.get(ids))
        return [
            {"id": one, "url": match.url, "small": None if match.small is None else match.small.tobytes()}
            for one, match in found.items()
        ]

    rows = ray.data.from_items([{"file": file} for file in files]).flat_map(look).iter_rows()
    return {row["id"]: Found(row["url"], _pixels(row["small"])) for row in rows}


def _look_up_here(files: Sequence[str], wanted: Collection[str]) -> dict[str, Found]:
    matches = iter_matches(files, wanted, pixels=True)
    return {match.reference_id: Found(match.url, thumbnail(match.image)) for match in matches}


def _pixels(data: bytes | None) -> np.ndarray | None:
    return None if data is None else np.frombuffer(data, np.uint8).reshape(SIDE, SIDE, 3)


def encode(run: Run, captions: Sequence[str], config: ClustersConfig, use_ray: bool) -> TextVectors:
    """Return vectors of the flagged captions by the configured encoder.

    Where the model's own text encoder is not available, as on another machine than the scan's, words are used, with a
    note that the report shows.
    """
    if config.encoder == "words" or not captions:
        return TextVectors(word_vectors(captions), "words (TF-IDF)")
    hidden = config.encoder == "model" and config.kmeans > 0 and len(captions) <= config.direct
    try:
        pieces = list(_encoded(run, captions, config, hidden, use_ray))
    except ModelError as error:
        if config.encoder == "sentence":
            raise
        note = f"The model's text encoder was not available ({error.what}): prompts were grouped by their words."
        return TextVectors(word_vectors(captions), "words (TF-IDF)", note=note)
    states = np.concatenate([piece.hidden_NH for piece in pieces]) if hidden else None
    return TextVectors(np.concatenate([piece.vectors_ND for piece in pieces]), pieces[0].encoder, states)


def _encoded(
    run: Run, captions: Sequence[str], config: ClustersConfig, hidden: bool, use_ray: bool
) -> Iterator[TextVectors]:
    encoder = functools.partial(_load, run.config(), config)
    if not use_ray or len(captions) < _ENCODE_HERE:
        yield Encode(encoder, hidden).text(captions)
        return
    encoder("cpu")  # a missing model is this machine's one line, not a worker's traceback
    import ray
    import ray.data
    from ray.data import ActorPoolStrategy

    have = ray.cluster_resources()
    gpus = 1.0 if have.get("GPU") else 0.0
    size = int(have.get("GPU") or max(1, have.get("CPU", 1) // 2))
    tasks = [
        {"at": at, "captions": json.dumps(captions[at : at + _CAPTIONS_A_TASK])}
        for at in range(0, len(captions), _CAPTIONS_A_TASK)
    ]
    work = ray.data.from_items(tasks).map(
        Encode,
        fn_constructor_args=(encoder, hidden),
        compute=ActorPoolStrategy(size=min(size, len(tasks))),
        num_gpus=gpus,
    )
    yield from (_from_row(row) for row in sorted(work.iter_rows(), key=lambda row: int(row["at"])))


class Encode:
    """This turns captions into vectors; it loads its encoder on the first call."""

    def __init__(self, load: functools.partial[Any], hidden: bool) -> None:
        self._load, self._hidden = load, hidden
        self._encoder: Any = None

    def text(self, captions: Sequence[str]) -> TextVectors:
        if self._encoder is None:
            import torch

            self._encoder = self._load("cuda" if torch.cuda.is_available() else "cpu")
        vectors, states = self._encoder.encode(captions, self._hidden)
        return TextVectors(vectors, self._encoder.spec.id, states)

    def __call__(self, row: Mapping[str, Any]) -> dict[str, Any]:
        found = self.text(json.loads(row["captions"]))
        states = found.hidden_NH
        return {
            "at": row["at"],
            "count": len(found.vectors_ND),
            "encoder": found.encoder,
            "vectors": found.vectors_ND.tobytes(),
            "hidden": b"" if states is None else states.tobytes(),
        }


def _from_row(row: Mapping[str, Any]) -> TextVectors:
    vectors = np.frombuffer(row["vectors"], np.float32).reshape(row["count"], -1)
    states = np.frombuffer(row["hidden"], np.float32).reshape(row["count"], -1) if row["hidden"] else None
    return TextVectors(vectors, row["encoder"], states)


def _load(config: CensusConfig, clusters: ClustersConfig, device: str) -> Any:
    from memscan.models.sentences import load_text_encoder

    if clusters.encoder == "sentence":
        assert clusters.path is not None
        return load_text_encoder("sentence", clusters.path, clusters.revision, device)
    whole = config.generator.base or config.generator.path  # what a training wrote has no text encoder
    return load_text_encoder("model", whole, config.generator.revision, device)


def _write(run: Run, into: str, flagged: pa.Table, grouping: Grouping, removal: pa.Table) -> None:
    tables = {
        "edges": correspondence.edge_table(flagged),
        "components": correspondence.component_table(flagged),
        "assignments": grouping.assignments,
        "clusters": grouping.clusters,
    }
    for name in TABLES:
        write_table(storage.join(into, "clusters", f"{name}.parquet"), tables[name])
    metadata = {"fingerprint": str(run.manifest["fingerprint"]), "name": str(run.manifest["name"])}
    flagged_files.write_list(storage.join(into, "flagged"), "removal", removal, metadata)
