"""This module measures how good clusters are: by planted groups, and by their stability if the truth is unknown.

Stability is bootstrapped: two subsamples of 80 % of the prompts are clustered on their own, and the adjusted Rand index
compares both on the prompts that they share. A method that leaves some prompts out of every cluster is measured twice:
once with each such prompt as a cluster of its own, and once on the other prompts only. The share of prompts that it
puts into a cluster is reported too. Neither measure alone would be fair both to a method that must place every prompt
and to one that need not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from memscan.census.clusters import TextVectors, density_clusters, kmeans_clusters
from memscan.census.clusters.vectors import unit
from memscan.config import ClustersConfig
from memscan.records import alike

SUBSAMPLE = 0.8
GROUPINGS = ("cluster", "text", "component", "kmeans")
WORDS = {
    "hdbscan": "HDBSCAN on text",
    "kmeans_hidden": "KMeans on hidden states",
    "kmeans_vectors": "KMeans on pooled text",
}

Labels = npt.NDArray[np.int64]


def rand_index(first: Sequence[Any], second: Sequence[int]) -> float:
    """Return the adjusted Rand index (Hubert & Arabie 1985).

    In `second`, each item that is not above 0 is a cluster of its own.
    """
    from sklearn.metrics import adjusted_rand_score

    alone = [label if label > 0 else -1 - place for place, label in enumerate(second)]
    return float(adjusted_rand_score(list(first), alone))


def planted_agreement(assignments: pa.Table, groups: Mapping[str, str]) -> dict[str, float | None]:
    """Return the adjusted Rand index of each grouping of a run (`records.ASSIGNMENTS`) and the planted groups.

    Prompts are matched by id.

    Prompts without a planted group are left out; None for a grouping that the run does not have.
    """
    same = alike(groups, assignments["prompt_id"].to_pylist())
    groups = {same(prompt): group for prompt, group in groups.items()}
    rows = [row for row in assignments.to_pylist() if groups.get(same(row["prompt_id"]))]
    truth = [groups[same(row["prompt_id"])] for row in rows]
    return {
        name: rand_index(truth, [row[name] for row in rows]) if rows and rows[0][name] is not None else None
        for name in GROUPINGS
    }


def evaluate_stability(
    texts: TextVectors, config: ClustersConfig, published: Sequence[str] | None = None, *, subsamples: int = 20
) -> dict[str, Any]:
    """Measure the stability of every method over pairs of subsamples, and its agreement with the published labels.

    Args:
        texts: vectors of distinct captions; hidden states for the published variant where the encoder has them.
        published: one label per caption, such as the clusters of Di et al. 2025 (500 prompts, KMeans-12).
        subsamples: pairs of them.

    Returns:
        By method: clusters, share of prompts in one, mean and standard deviation of the index over the pairs.
    """
    centred_ND = unit(texts.vectors_ND, centred=True)

    def density(rows: Labels, least: int) -> Labels:
        return density_clusters(centred_ND[rows], least, config.min_samples, config.direct).labels_N + 1

    def kmeans(states_NH: npt.NDArray[np.float32]) -> Callable[[Labels, int], Labels]:
        return lambda rows, _: np.asarray(kmeans_clusters(states_NH[rows], config.kmeans), np.int64)

    methods: dict[str, Callable[[Labels, int], Labels]] = {"hdbscan": density}
    if texts.hidden_NH is not None:
        methods["kmeans_hidden"] = kmeans(texts.hidden_NH)
    methods["kmeans_vectors"] = kmeans(texts.vectors_ND)
    count = len(centred_ND)
    return {
        "prompts": count,
        "encoder": texts.encoder,
        "subsamples": subsamples,
        "kmeans": config.kmeans,
        "methods": {name: _stability(method, count, config, published, subsamples) for name, method in methods.items()},
    }


def _stability(
    method: Callable[[Labels, int], Labels],
    count: int,
    config: ClustersConfig,
    published: Sequence[str] | None,
    subsamples: int,
) -> dict[str, Any]:
    whole = method(np.arange(count), config.min_cluster_size)
    least = max(2, int(config.min_cluster_size * SUBSAMPLE))
    rng = np.random.default_rng(0)
    everywhere, inside = [], []
    for _ in range(subsamples):
        halves = [np.sort(rng.permutation(count)[: int(count * SUBSAMPLE)]) for _ in range(2)]
        labels = [np.full(count, -1) for _ in halves]
        for rows, found in zip(halves, labels, strict=True):
            found[rows] = method(rows, least)
        shared = (labels[0] >= 0) & (labels[1] >= 0)
        one, other = (found[shared] for found in labels)
        everywhere.append(_both_alone(one, other))
        placed = (one > 0) & (other > 0)
        inside.append(rand_index(one[placed].tolist(), other[placed].tolist()) if placed.any() else 0.0)
    return {
        "clusters": len(np.unique(whole[whole > 0])),
        "placed": float((whole > 0).mean()),
        "stability": float(np.mean(everywhere)),
        "stability_deviation": float(np.std(everywhere)),
        "stability_placed": float(np.mean(inside)),
        "published": None if published is None else rand_index(published, whole.tolist()),
    }


def _both_alone(one: Labels, other: Labels) -> float:
    """Return the index with what is in no cluster as clusters of their own, on both sides."""
    return rand_index([label if label > 0 else -1 - place for place, label in enumerate(one.tolist())], other.tolist())


def stability_table(document: Mapping[str, Any]) -> str:
    """Return an `evaluate_stability` document as Markdown."""
    heading = (
        f"{document['prompts']} prompts, {document['subsamples']} pairs of subsamples of {SUBSAMPLE:.0%}, "
        f"text by {document['encoder']}."
    )
    lines = [
        "| | clusters | prompts in one | stability | stability, prompts in one | index to the published labels |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in document["methods"].items():
        title = WORDS[name] if name == "hdbscan" else WORDS[name].replace("KMeans", f"KMeans-{document['kmeans']}")
        published = "" if row["published"] is None else f"{row['published']:.2f}"
        lines.append(
            f"| {title} | {row['clusters']} | {row['placed']:.0%} | {row['stability']:.2f} "
            f"± {row['stability_deviation']:.2f} | {row['stability_placed']:.2f} | {published} |"
        )
    return "\n".join([heading, "", *lines])


def agreement_table(found: Mapping[str, float | None]) -> str:
    """Return a `planted_agreement` as Markdown."""
    cells = ["n/a" if found[name] is None else f"{found[name]:.2f}" for name in GROUPINGS]
    return f"| {' | '.join(GROUPINGS)} |\n{'|---' * len(GROUPINGS)}|\n| {' | '.join(cells)} |"
