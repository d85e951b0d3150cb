"""This module runs NeMo-C (Di et al. 2025), which switches off the units of a cluster of prompts together.

Prompts of one cluster reach the same training images, and what NeMo finds for one of them misses part of what carries
the image for the next. The union over the cluster is switched off for all of it. `prune` is our addition: it gives back
units of the union that no prompt of the cluster needs off once the others are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Literal

from memscan.mitigation.units import Layout, UnitSet, union

Scope = Literal["prompt", "cluster", "all"]
EVERYTHING = "all"


def scoped(units: Mapping[str, UnitSet], cluster_of: Mapping[str, str], scope: Scope) -> dict[str, UnitSet]:
    """Return the units to be switched off together, by group.

    Args:
        units: of each prompt, by prompt id; those of its augmented samples included.
        cluster_of: the cluster of each prompt.
        scope: a group for each prompt (NeMo), each cluster (NeMo-C), or one for all of them.
    """
    members: dict[str, list[UnitSet]] = {}
    for prompt, found in units.items():
        members.setdefault(group_of(prompt, cluster_of, scope), []).append(found)
    return {group: union(sets) for group, sets in sorted(members.items())}


def group_of(prompt: str, cluster_of: Mapping[str, str], scope: Scope) -> str:
    """Return the group that a prompt belongs to under a scope."""
    if scope == "prompt":
        return prompt
    return cluster_of[prompt] if scope == "cluster" else EVERYTHING


def prune(
    units: UnitSet, layout: Layout, left: Sequence[Callable[[UnitSet], float]], limits: Sequence[float], step: int = 8
) -> UnitSet:
    """Give back units whose return brings no prompt's memorisation back.

    Units are tried `step` at a time, the last layer first; a group that cannot return whole is tried by halves.

    Args:
        left: for each prompt of the cluster, the score with a set of units off.
        limits: for each, the score that must not be exceeded: its threshold, or the union's own where that lies above.
    """
    kept = units
    for name in reversed(layout.names):
        rows = list(kept.in_layer(name))
        for start in range(0, len(rows), step):
            kept = _give_back(kept, rows[start : start + step], left, limits)
    return kept


def _give_back(
    kept: UnitSet,
    rows: list[tuple[str, int]],
    left: Sequence[Callable[[UnitSet], float]],
    limits: Sequence[float],
) -> UnitSet:
    without = kept - UnitSet.of(rows)
    if all(one(without) <= limit for one, limit in zip(left, limits, strict=True)):
        return without
    if len(rows) == 1:
        return kept
    half = len(rows) // 2
    return _give_back(_give_back(kept, rows[:half], left, limits), rows[half:], left, limits)


def clusters_by_images(match_ids: Mapping[str, Iterable[str]]) -> dict[str, str]:
    """Return prompts grouped by the training images that they share: connected components.

    Args:
        match_ids: the training images that each prompt reproduces.

    Returns:
        prompt -> cluster name "c0000", numbered by their smallest prompt id; a prompt without images is its own
        cluster.
    """
    parent = {prompt: prompt for prompt in match_ids}

    def root(prompt: str) -> str:
        while parent[prompt] != prompt:
            parent[prompt] = parent[parent[prompt]]
            prompt = parent[prompt]
        return prompt

    holder: dict[str, str] = {}
    for prompt in sorted(match_ids):
        for image in match_ids[prompt]:
            low, high = sorted((root(prompt), root(holder.setdefault(image, prompt))))
            parent[high] = low
    roots = {prompt: root(prompt) for prompt in match_ids}
    names = {one: f"c{number:04d}" for number, one in enumerate(sorted(set(roots.values())))}
    return {prompt: names[one] for prompt, one in roots.items()}
