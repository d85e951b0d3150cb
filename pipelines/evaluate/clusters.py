"""This module evaluates clusters.

It measures the stability of the clusters of a prompt list, or compares a run's clusters with the planted groups.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from memscan.census.clusters import TextVectors, word_vectors
from memscan.config import ClustersConfig
from memscan.errors import ConfigError, InputError, RunError
from memscan.evaluation.clusters import evaluate_stability, planted_agreement
from memscan.io import storage
from memscan.planted.world import read_truth
from memscan.prompts.files import Columns, open_prompt_file
from memscan.prompts.table import normalise
from memscan.records import prompt_id
from pipelines.run_folder.runs import Run
from pipelines.run_folder.tables import read_table


def agreement_of_run(run_dir: str, world: Path | None) -> dict[str, float | None]:
    """Compare a reduced run's groupings with the groups planted in its world.

    Raises:
        RunError: it has not been reduced.
    """
    path = storage.join(Run.load(run_dir).folder.path, "clusters", "assignments.parquet")
    if not storage.exists(path):
        raise RunError("the run has not been reduced (no clusters)", where=run_dir, hint="run memscan reduce first")
    groups = {prompt_id(normalise(row["caption"])): row["group"] for row in read_truth(world).to_pylist()}
    return planted_agreement(read_table(path), groups)


def stability_of_prompts(
    file: str, encoder: str, path: str | None, revision: str | None, labels: str | None, subsamples: int
) -> dict[str, Any]:
    """Cluster a prompt file's distinct captions again and again.

    Raises:
        ConfigError: an encoder without a path, or words with one.
        InputError: fewer captions than the published clusters, or a row without a label.
    """
    if (encoder == "words") != (path is None):
        raise ConfigError("--path belongs to --encoder model and sentence, and is needed there", where="--path")
    found: dict[str, str | None] = {}
    for row in open_prompt_file(file, Columns(url=labels)).rows:  # a label stands in a second column, as a URL may
        if row.caption is not None and normalise(row.caption):
            found.setdefault(normalise(row.caption), row.url)
    config = ClustersConfig()
    if len(found) < 2 * config.kmeans:
        raise InputError(f"{len(found)} distinct captions are too few to be clustered", where=file)
    published = [label for label in found.values() if label is not None] if labels else None
    if published is not None and len(published) < len(found):
        raise InputError(f"{len(found) - len(published)} captions have no label", where=file)
    texts = _encoded(list(found), encoder, path, revision)
    return {"file": file, **evaluate_stability(texts, config, published, subsamples=subsamples)}


def _encoded(captions: list[str], encoder: str, path: str | None, revision: str | None) -> TextVectors:
    if path is None:
        return TextVectors(word_vectors(captions), "words (TF-IDF)")
    from memscan.models.sentences import load_text_encoder

    loaded = load_text_encoder("sentence" if encoder == "sentence" else "model", path, revision, "cpu")
    vectors, states = loaded.encode(captions, hidden=True)
    return TextVectors(vectors, loaded.spec.id, states)
