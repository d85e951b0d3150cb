"""This module runs HDBSCAN, exactly or on a FAISS neighbour graph.

The time of the exact computation grows with the square of the rows (10,000 rows of 96 dimensions take 10 s, and 100,000
would take a quarter of an hour). On the graph, only the distances to the nearest neighbours are known. From them, the
minimum spanning tree of mutual reachability is made within every connected component, and the components are joined at
the largest distance that occurs. The library gets this tree as a sparse matrix of distances, and then uses the same
algorithm.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.sparse import csr_array
from scipy.sparse.csgraph import connected_components, minimum_spanning_tree

NEIGHBOURS = 32
_FLAT_ROWS = 20_000  # beyond so many, neighbours come from an index with lists
_APART = 4.0  # farther than any two unit vectors
_TINY = 1e-9  # scipy's graphs take a zero for "no edge"

Vectors = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Density:
    """This is a density clustering, which gives every row a cluster or none.

    Attributes:
        labels_N: int64, from 0; -1 for a row in no cluster.
        strengths_N: float64 in [0, 1], how far inside its cluster a row is; 0 in none.
        persistence_K: float64 in [0, 1] by cluster, HDBSCAN's measure of how long it lasts over densities.
    """

    labels_N: npt.NDArray[np.int64]
    strengths_N: npt.NDArray[np.float64]
    persistence_K: npt.NDArray[np.float64]


def density_clusters(
    vectors_ND: Vectors, min_cluster_size: int = 3, min_samples: int = 1, direct: int = 10_000
) -> Density:
    """Cluster unit vectors by HDBSCAN (excess of mass, Euclidean distance).

    Args:
        vectors_ND: of length 1 or 0; row order must be fixed by the caller, for ties follow it.
        direct: rows up to which distances are exact; beyond, on a graph of `NEIGHBOURS` nearest neighbours.
    """
    count = len(vectors_ND)
    if count < max(2 * min_cluster_size, min_samples + 2):  # the whole is never a cluster, so two must fit
        return Density(np.full(count, -1), np.zeros(count), np.zeros(0))
    if count <= direct:
        return _exact(vectors_ND, min_cluster_size, min_samples)
    return _on_graph(vectors_ND, min_cluster_size, min_samples)


def _exact(vectors_ND: Vectors, min_cluster_size: int, min_samples: int) -> Density:
    import hdbscan

    # Below some thousand rows the plain algorithm on all distances is the fastest and breaks no ties by tree shape.
    algorithm = "generic" if len(vectors_ND) <= 4000 else "boruvka_kdtree"
    model = hdbscan.HDBSCAN(
        min_cluster_size=min_cluster_size,
        min_samples=min_samples,
        algorithm=algorithm,
        approx_min_span_tree=False,
        core_dist_n_jobs=1,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # hdbscan's use of scikit-learn
        warnings.simplefilter("ignore", SyntaxWarning)
        model.fit(vectors_ND.astype(np.float64))
    return _checked(model.labels_, model.probabilities_, model.cluster_persistence_)


def _on_graph(vectors_ND: Vectors, min_cluster_size: int, min_samples: int) -> Density:
    import hdbscan

    # With one neighbour to a core, reachability over a tree's edges is their own weight: the library takes this tree.
    model = hdbscan.HDBSCAN(min_cluster_size=min_cluster_size, min_samples=1, metric="precomputed")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # hdbscan's use of scikit-learn
        warnings.simplefilter("ignore", SyntaxWarning)
        model.fit(_spanning_tree(vectors_ND, min_samples))
    return _checked(model.labels_, model.probabilities_, model.cluster_persistence_)


def _spanning_tree(vectors_ND: Vectors, min_samples: int) -> csr_array:
    """Mutual reachability along the edges of the minimum spanning tree, (N, N), sparse and symmetric."""
    count, (distances_NK, rows_NK) = len(vectors_ND), neighbours(vectors_ND, max(NEIGHBOURS, min_samples))
    core_N = distances_NK[:, min_samples - 1]
    first = np.repeat(np.arange(count), rows_NK.shape[1])
    second = rows_NK.ravel()
    keep = second >= 0
    first, second, apart = first[keep], second[keep], distances_NK.ravel()[keep]
    weight = np.maximum.reduce([apart, core_N[first], core_N[second]]) + _TINY
    # Both directions of a pair have one weight; a sparse matrix would add them up.
    pairs, at = np.unique(np.minimum(first, second) * count + np.maximum(first, second), return_index=True)
    graph = csr_array((weight[at], np.divmod(pairs, count)), shape=(count, count))
    forest = minimum_spanning_tree(graph).tocoo()
    first, second, weight = forest.row, forest.col, forest.data
    pieces, piece_N = connected_components(forest, directed=False)
    if pieces > 1:
        leaders = np.unique(piece_N, return_index=True)[1]
        first = np.concatenate([first, np.full(pieces - 1, leaders[0])])
        second = np.concatenate([second, leaders[1:]])
        weight = np.concatenate([weight, np.full(pieces - 1, _APART)])
    order = np.lexsort((second, first, weight))
    first, second, weight = first[order], second[order], weight[order]
    # Equal weights, a core distance that several edges share, are told apart by their last digits, in this order: the
    # library sorts them as it likes, and the clusters would follow.
    weight = weight + (np.arange(len(weight)) - np.searchsorted(weight, weight)) * np.spacing(weight)
    rows, columns = (np.concatenate(ends).astype(np.int32) for ends in ((first, second), (second, first)))
    return csr_array((np.tile(weight, 2), (rows, columns)), shape=(count, count))


def neighbours(vectors_ND: Vectors, count: int) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int64]]:
    """Return the `count` nearest other rows of each row: Euclidean distances and rows (N, K).

    A row is -1 if there is no neighbour.
    """
    import faiss

    dimension = vectors_ND.shape[1]
    if len(vectors_ND) <= _FLAT_ROWS:
        index: Any = faiss.IndexFlatL2(dimension)
    else:
        lists = int(4 * math.sqrt(len(vectors_ND)))
        index = faiss.index_factory(dimension, f"IVF{lists},Flat")
        index.nprobe = 32
        index.train(vectors_ND)
    index.add(vectors_ND)
    squared, rows = index.search(vectors_ND, min(count + 1, len(vectors_ND)))
    own = rows == np.arange(len(rows))[:, None]
    own[~own.any(axis=1), -1] = True  # among many equal vectors a row may not find itself
    kept = ~own
    shape = (len(rows), rows.shape[1] - 1)
    return np.sqrt(np.maximum(squared[kept], 0.0)).reshape(shape).astype(np.float64), rows[kept].reshape(shape)


def _checked(labels: npt.ArrayLike, strengths: npt.ArrayLike, persistence: npt.ArrayLike) -> Density:
    # Clusters of equal vectors have an infinite density, which the library turns into NaN.
    return Density(
        np.asarray(labels, np.int64),
        np.nan_to_num(np.asarray(strengths, np.float64), nan=1.0).clip(0, 1),
        np.nan_to_num(np.asarray(persistence, np.float64), nan=1.0, posinf=1.0).clip(0, 1),
    )
