"""This package groups flagged prompts by their text, by the training images that they reach, and by both.

* `density`: HDBSCAN on vectors, exactly or on a FAISS neighbour graph; no number of clusters to guess, and outliers
  stay outliers (Campello, Moulavi & Sander 2013; McInnes, Healy & Astels 2017).
* `vectors`: a prompt as its text, drawn towards the text of prompts that reach the same training images; words alone,
  where there is no text encoder.
* `naming`: a cluster's most telling words.
* `grouping`: all of it for a flagged list, with the published variant (KMeans-12 on flattened hidden states, Di et al.
  2025) beside it.

Nothing depends on the order of rows: prompts are sorted by id before anything is computed.
"""

from memscan.census.clusters.density import density_clusters
from memscan.census.clusters.grouping import Grouping, TextVectors, group_prompts, kmeans_clusters, with_clusters
from memscan.census.clusters.vectors import word_vectors

__all__ = [
    "Grouping",
    "TextVectors",
    "density_clusters",
    "group_prompts",
    "kmeans_clusters",
    "with_clusters",
    "word_vectors",
]
