"""This module makes every grouping of a flagged list, and a table of its clusters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from memscan.census.clusters.density import Density, density_clusters
from memscan.census.clusters.naming import name_of, telling_words
from memscan.census.clusters.vectors import Vectors, drawn_together, unit
from memscan.config import ClustersConfig
from memscan.records import ASSIGNMENTS, CLUSTERS, FLAGGED, MEMORISED

SUBSAMPLES = 10
_SUBSAMPLE = 0.8
_STABILITY_ROWS = 20_000  # beyond so many prompts the subsamples would cost more than the clusters


@dataclass(frozen=True)
class TextVectors:
    """These are the vectors that a text encoder gives for captions, in the order of the captions.

    Attributes:
        vectors_ND: one per caption; their lengths do not matter.
        encoder: id of the specification that made them.
        hidden_NH: flattened hidden states for the published variant, or None.
        note: what a reader must know, such as why another encoder was used than the one asked for.
    """

    vectors_ND: Vectors
    encoder: str
    hidden_NH: Vectors | None = None
    note: str | None = None


@dataclass(frozen=True)
class Grouping:
    """A grouping has `assignments` (`records.ASSIGNMENTS`), `clusters` (`records.CLUSTERS`), and figures."""

    assignments: pa.Table
    clusters: pa.Table
    summary: dict[str, Any]


def group_prompts(flagged: pa.Table, texts: TextVectors, config: ClustersConfig) -> Grouping:
    """Group the prompts of a flagged list whose `match_groups` and `component` are filled.

    Args:
        texts: row i belongs to row i of `flagged`, whatever its order.

    Returns:
        Clusters numbered from 1, most harm (summed severity) first; 0 means no cluster.
    """
    if len(texts.vectors_ND) != flagged.num_rows:
        raise ValueError(f"{len(texts.vectors_ND)} vectors for {flagged.num_rows} prompts")
    order_N = np.array(np.argsort(np.array(flagged["prompt_id"].to_pylist(), dtype=object), kind="stable"), np.int64)
    flagged = flagged.take(pa.array(order_N))
    text_ND = unit(texts.vectors_ND[order_N], centred=True)
    both_ND = drawn_together(text_ND, *_reached(flagged), config.image_weight)
    by_text, found = _clusters(text_ND, config), _clusters(both_ND, config)
    severity_N = flagged["severity"].to_numpy().astype(np.float64)
    number_N, kept = _numbered(found.labels_N, severity_N)
    states = texts.hidden_NH
    published = states is not None and 0 < config.kmeans <= len(states)
    kmeans_N = kmeans_clusters(states[order_N], config.kmeans) if states is not None and published else None
    assignments = pa.table(
        {
            "prompt_id": flagged["prompt_id"],
            "cluster": number_N,
            "strength": found.strengths_N,
            "text": _numbered(by_text.labels_N, severity_N)[0],
            "component": flagged["component"],
            "kmeans": pa.nulls(len(number_N)) if kmeans_N is None else kmeans_N,
        }
    ).cast(ASSIGNMENTS)
    clusters = _describe(flagged, number_N, kept, found, both_ND, _stability(both_ND, found, config))
    return Grouping(assignments, clusters, _summary(assignments, clusters, texts, config))


def _clusters(vectors_ND: Vectors, config: ClustersConfig, least: int | None = None) -> Density:
    return density_clusters(vectors_ND, least or config.min_cluster_size, config.min_samples, config.direct)


def _reached(flagged: pa.Table) -> tuple[list[list[str]], list[list[int]]]:
    """Training images by prompt, and their weights: matches by generations, others above a threshold as one each."""
    names = ("match_groups", "match_counts", "alike_ids")
    groups, counts, others = (flagged[name].to_pylist() for name in names)
    extra = [[one for one in row or () if one not in set(own)] for row, own in zip(others, groups, strict=True)]
    return (
        [own + more for own, more in zip(groups, extra, strict=True)],
        [own + [1] * len(more) for own, more in zip(counts, extra, strict=True)],
    )


def with_clusters(flagged: pa.Table, assignments: pa.Table) -> pa.Table:
    """Fill the column `cluster` of a flagged list."""
    known = dict(zip(assignments["prompt_id"].to_pylist(), assignments["cluster"].to_pylist(), strict=True))
    values = pa.array([known[one] for one in flagged["prompt_id"].to_pylist()], FLAGGED.field("cluster").type)
    return flagged.set_column(flagged.schema.get_field_index("cluster"), FLAGGED.field("cluster"), values)


def _numbered(labels_N: npt.NDArray[np.int64], severity_N: npt.NDArray[np.float64]) -> tuple[Any, list[int]]:
    """Numbers from 1 by summed severity, ties by first row (0 for -1), and the labels in that order."""
    present = [int(label) for label in np.unique(labels_N) if label >= 0]
    harm = {label: float(severity_N[labels_N == label].sum()) for label in present}
    first = {label: int(np.argmax(labels_N == label)) for label in present}
    order = sorted(present, key=lambda label: (-round(harm[label], 6), first[label]))
    number = {label: place for place, label in enumerate(order, 1)} | {-1: 0}
    return np.array([number[int(label)] for label in labels_N], np.int32), order


def kmeans_clusters(hidden_NH: Vectors, count: int) -> npt.NDArray[np.int32]:
    """Cluster by the published variant, which is KMeans on flattened hidden states; it needs at least `count` rows.

    Clusters are numbered from 1 by their first row.
    """
    from sklearn.cluster import KMeans
    from threadpoolctl import threadpool_limits

    # One thread: its threads wait for one another by spinning, and on a busy machine that takes minutes for seconds.
    with threadpool_limits(1):
        labels_N = KMeans(count, n_init=3, random_state=0).fit_predict(hidden_NH)
    number = {label: place for place, label in enumerate(dict.fromkeys(labels_N.tolist()), 1)}
    return np.array([number[label] for label in labels_N.tolist()], np.int32)


def _stability(vectors_ND: Vectors, found: Density, config: ClustersConfig) -> npt.NDArray[np.float64] | None:
    """How well each cluster is found again in subsamples of 80 %: the mean of its best Jaccard index (Hennig 2007).

    A subsample's clusters may be smaller by the same factor, or those of the least size could never come back.
    """
    count, clusters = len(vectors_ND), len(found.persistence_K)
    if count > _STABILITY_ROWS or clusters == 0:
        return None
    rng = np.random.default_rng(0)
    least = max(2, int(config.min_cluster_size * _SUBSAMPLE))
    scores: list[list[float]] = [[] for _ in range(clusters)]
    for _ in range(SUBSAMPLES):
        rows = np.sort(rng.permutation(count)[: max(1, int(count * _SUBSAMPLE))])
        again = _clusters(vectors_ND[rows], config, least).labels_N
        before = found.labels_N[rows]
        for cluster in range(clusters):
            inside = before == cluster
            if inside.any():
                met = np.unique(again[inside])
                scores[cluster].append(
                    max((_jaccard(inside, again == one) for one in met.tolist() if one >= 0), default=0.0)
                )
    return np.array([np.mean(row) if row else np.nan for row in scores])


def _jaccard(one: npt.NDArray[np.bool_], other: npt.NDArray[np.bool_]) -> float:
    return float((one & other).sum() / (one | other).sum())


def _describe(
    flagged: pa.Table,
    number_N: npt.NDArray[np.int32],
    kept: Sequence[int],
    found: Density,
    vectors_ND: Vectors,
    stability_K: npt.NDArray[np.float64] | None,
) -> pa.Table:
    names = ["prompt_id", "caption", "label", "severity", "match_groups"]
    prompt, caption, label, severity, groups = (flagged[name].to_pylist() for name in names)
    words = telling_words(caption, number_N.tolist())
    rows = []
    for number, source in enumerate(kept, 1):
        members = np.flatnonzero(number_N == number)
        medoid = int(members[_medoid(vectors_ND[members])])
        measured = None if stability_K is None or np.isnan(stability_K[source]) else float(stability_K[source])
        rows.append(
            {
                "cluster": number,
                "name": name_of(words[number], caption[medoid]),
                "prompts": len(members),
                **{one: sum(label[row] == one for row in members) for one in MEMORISED},
                "severity": float(sum(severity[row] for row in members)),
                "images": len({group for row in members for group in groups[row]}),
                "persistence": float(found.persistence_K[source]),
                "stability": measured,
                "medoid": prompt[medoid],
                "caption": caption[medoid],
                "words": words[number],
            }
        )
    return pa.Table.from_pylist(rows, schema=CLUSTERS)


def _medoid(vectors_MD: Vectors) -> int:
    """Return the row with the largest mean cosine to the others; ties to the first."""
    return int(np.argmax(np.round(vectors_MD @ vectors_MD.sum(axis=0), 6)))


def _summary(assignments: pa.Table, clusters: pa.Table, texts: TextVectors, config: ClustersConfig) -> dict[str, Any]:
    from sklearn.metrics import adjusted_rand_score

    columns: Mapping[str, Any] = {name: assignments[name].to_pylist() for name in ("cluster", "text", "component")}
    if assignments["kmeans"].null_count == 0 and assignments.num_rows:
        columns = {**columns, "kmeans": assignments["kmeans"].to_pylist()}
    few = assignments.num_rows < 2
    return {
        "count": clusters.num_rows,
        "prompts": assignments.num_rows,
        "in_none": sum(one == 0 for one in columns["cluster"]),
        "encoder": texts.encoder,
        "note": texts.note,
        "image_weight": config.image_weight,
        "min_cluster_size": config.min_cluster_size,
        "min_samples": config.min_samples,
        "exact": assignments.num_rows <= config.direct,
        "rand_index": {
            name: None if few else float(adjusted_rand_score(columns["cluster"], other))
            for name, other in columns.items()
            if name != "cluster"
        },
    }
