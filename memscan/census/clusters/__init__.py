"""This package groups flagged prompts by their text, by the training images that they reach, and by both.

* `density` runs HDBSCAN on vectors, exactly or on a FAISS neighbour graph. It needs no number of clusters, and
  outliers stay outliers (Campello, Moulavi & Sander 2013; McInnes, Healy & Astels 2017).
* `vectors` makes a prompt's vector from its text, moved towards the text of prompts that reach the same training
  images. Without a text encoder it uses words alone.
* `naming` finds a cluster's characteristic words.
* `grouping` does all of this for a flagged list, and adds the published variant (KMeans-12 on flattened hidden states,
  Di et al. 2025).

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
