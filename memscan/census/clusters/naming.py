"""This module finds the words that characterise a cluster, by class-based TF-IDF (Grootendorst 2022, section 3.3).

A word's weight in a cluster is the share of the cluster's prompts that hold it, times log(1 + A / f): f is how many
prompts of the whole list hold it, A the mean number of words (each once per prompt) in a cluster.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence

from memscan.census.clusters.vectors import words_of

WORDS = 6
SHOWN = 3


def telling_words(captions: Sequence[str], labels: Sequence[int]) -> dict[int, list[str]]:
    """Return up to `WORDS` characteristic words of every cluster, the best first; ties are in alphabetical order.

    Args:
        labels: cluster of each caption; what carries 0 counts as background, and has no words.
    """
    inside: dict[int, Counter[str]] = defaultdict(Counter)
    sizes: Counter[int] = Counter()
    for caption, label in zip(captions, labels, strict=True):
        inside[label].update(set(words_of(caption)))
        sizes[label] += 1
    overall: Counter[str] = Counter()
    for counts in inside.values():
        overall.update(counts)
    mean = overall.total() / max(1, len(inside))
    return {
        label: _best({word: n / sizes[label] * math.log1p(mean / overall[word]) for word, n in counts.items()})
        for label, counts in inside.items()
        if label
    }


def name_of(words: Sequence[str], caption: str) -> str:
    """Return a cluster's name: its first words, or the beginning of its medoid's caption if it has none."""
    return ", ".join(words[:SHOWN]) or caption[:40] or "(no text)"


def _best(weights: Mapping[str, float]) -> list[str]:
    return sorted(weights, key=lambda word: (-weights[word], word))[:WORDS]
