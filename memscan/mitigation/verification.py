"""This module tests whether a repair holds, by figures of the same prompts before and after, from their census rows.

Class mix, severity and one-to-many follow FB-Mem (Di et al. 2025): the harm of a class is VM 2, FM 1.5, BM .5, NM 0
unless the run says otherwise; the severity that a repair removed is 1 - (harm after / harm before), over all
generations of the prompts that both scans have. Generations of one prompt resemble each other, so rates have clustered
intervals, and the interval of the removed severity comes from drawing prompts, not generations, with replacement.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from statistics import median
from typing import Any

import numpy as np

from memscan.census.rates import ClusterMoments, clustered_interval, rate
from memscan.census.verdict import harm_of
from memscan.config import VerdictConfig
from memscan.records import LABELS, Label

RESAMPLES = 2000

# Prompt id -> (label, id of the best match) of each of its generations.
Rows = Mapping[str, Sequence[tuple[str, str]]]


def share_of(hits: Sequence[int], sizes: Sequence[int]) -> dict[str, float | int | None]:
    """Return `sum(hits)` of `sum(sizes)` as count, total, rate, low and high.

    Prompts (or attacked images) are the clusters of the interval.
    """
    moments = ClusterMoments(
        clusters=len(sizes),
        n=sum(sizes),
        k=sum(hits),
        nn=sum(n * n for n in sizes),
        kn=sum(k * n for k, n in zip(hits, sizes, strict=True)),
        kk=sum(k * k for k in hits),
    )
    low, high = clustered_interval(moments)
    share = moments.k / moments.n if moments.n else None
    return {"count": moments.k, "total": moments.n, "rate": share, "low": low, "high": high}


def class_mix(rows: Rows) -> dict[str, dict[str, float | int | None]]:
    """Return the share of the generations in each class, and of all that are memorised, with clustered intervals."""
    labels = {prompt: [label for label, _ in generations] for prompt, generations in rows.items()}
    sizes = [len(one) for one in labels.values()]
    mix = {label: share_of([one.count(label) for one in labels.values()], sizes) for label in LABELS}
    mix["memorised"] = share_of([len(one) - one.count(Label.NM.value) for one in labels.values()], sizes)
    return mix


def one_to_many(rows: Rows) -> dict[str, Any]:
    """Count the distinct training images that a prompt's memorised generations match; NM generations do not count."""
    reached = [len({match for label, match in one if label != Label.NM.value}) for one in rows.values()]
    some = [count for count in reached if count]
    return {
        "prompts": len(some),
        "median": median(some) if some else None,
        "mean": sum(some) / len(some) if some else None,
        "maximum": max(some, default=None),
        "more_than_one": rate(sum(count > 1 for count in some), len(some)).as_dict(),
    }


def severity(rows: Rows, rule: VerdictConfig) -> dict[str, float]:
    """Return the mean harm per generation, by prompt."""
    harm = harm_of(rule)
    return {prompt: sum(harm[label] for label, _ in one) / len(one) for prompt, one in rows.items() if one}


def severity_removed(before: Rows, after: Rows, rule: VerdictConfig, seed: int = 0) -> dict[str, float | int | None]:
    """Return 1 - (harm after / harm before) with its 95 % interval; None if there was no harm to remove.

    Returns:
        "removed", "low", "high", mean harm of a generation "before" and "after", and the number of "prompts".
    """
    first, second = severity(before, rule), severity(after, rule)
    common = sorted(first.keys() & second.keys())
    pairs_N2 = np.array([(first[prompt], second[prompt]) for prompt in common]).reshape(-1, 2)
    totals = pairs_N2.sum(axis=0)
    mean = [float(value) / len(common) if common else None for value in totals]
    known: dict[str, float | int | None] = {"prompts": len(common), "before": mean[0], "after": mean[1]}
    if not len(common) or totals[0] == 0:
        return {"removed": None, "low": None, "high": None, **known}
    drawn = np.random.default_rng(seed).integers(0, len(common), (RESAMPLES, len(common)))
    sums_R2 = pairs_N2[drawn].sum(axis=1)
    sums_R2 = sums_R2[sums_R2[:, 0] > 0]
    low, high = np.quantile(1 - sums_R2[:, 1] / sums_R2[:, 0], (0.025, 0.975))
    return {"removed": float(1 - totals[1] / totals[0]), "low": float(low), "high": float(high), **known}


def of_own_images(rows: Rows, own: Mapping[str, Collection[str]]) -> Rows:
    """Return the same rows, but a copy of an image that is not the prompt's own counts as NM."""
    nothing = Label.NM.value
    return {
        prompt: [(label if match in own[prompt] else nothing, match) for label, match in generations]
        for prompt, generations in rows.items()
    }


def repair_effect(
    before: Rows, after: Rows, rule: VerdictConfig, own: Mapping[str, Collection[str]] | None = None
) -> dict[str, Any]:
    """Return all figures of the prompts that both scans processed; `not_compared` counts the others.

    Args:
        own: training images of each prompt. Where given, "own_images" has class mix and severity by them alone: what
            a repair took from a prompt, apart from other images that the prompt falls onto instead.
    """
    common = before.keys() & after.keys()
    first, second = ({prompt: rows[prompt] for prompt in sorted(common)} for rows in (before, after))
    found = _compared(first, second, rule)
    if own is not None:
        found["own_images"] = _compared(of_own_images(first, own), of_own_images(second, own), rule)
    return {
        "prompts": len(common),
        "not_compared": len(before.keys() | after.keys()) - len(common),
        "one_to_many": {"before": one_to_many(first), "after": one_to_many(second)},
        **found,
    }


def _compared(before: Rows, after: Rows, rule: VerdictConfig) -> dict[str, Any]:
    return {
        "classes": {"before": class_mix(before), "after": class_mix(after)},
        "severity": severity_removed(before, after, rule),
    }


def attack_rates(outcomes: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the success of the embedding attack, by kind of image ("memorised", "control") and starting point.

    Args:
        outcomes: one a search: "kind", "start", "image" (its number) and the "labels" of what was drawn by it.

    Returns:
        kind -> "all" and each start -> class mix as `class_mix`, clusters being the attacked images.
    """
    found: dict[str, Any] = {}
    for kind in dict.fromkeys(outcome["kind"] for outcome in outcomes):
        chosen = [outcome for outcome in outcomes if outcome["kind"] == kind]
        starts = {"all": chosen}
        for outcome in chosen:
            starts.setdefault(outcome["start"], []).append(outcome)
        found[kind] = {start: class_mix(_by_image(some)) for start, some in starts.items()}
    return found


def _by_image(outcomes: Sequence[Mapping[str, Any]]) -> dict[str, list[tuple[str, str]]]:
    rows: dict[str, list[tuple[str, str]]] = {}
    for outcome in outcomes:
        rows.setdefault(str(outcome["image"]), []).extend((label, "") for label in outcome["labels"])
    return rows
