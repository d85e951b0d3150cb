"""This module makes the figures of `census.json` from tallies and the flagged list: rates, one-to-many, severity."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from memscan.census import screened as screened_census
from memscan.census.rates import ClusterMoments, clustered_interval, rate
from memscan.census.tally import SCORE_BINS, Tally
from memscan.census.verdict import harm_of
from memscan.config import ScreenConfig, VerdictConfig
from memscan.records import ANY, LABELS, MEMORISED


def summarise(
    tally: Tally, flagged: pa.Table, rule: VerdictConfig, screen: ScreenConfig | None = None
) -> dict[str, Any]:
    """Return the figures of `census.json`: counts, class mixes, one-to-many and severity.

    Under a screen the counts are of what was found, and rates and intervals, by prompt, input row and generation, are
    estimates for all prompts from the audit (`screened_census`); input rows of passed prompts stand apart.
    """
    document = _found(tally, flagged, rule)
    if screen is not None:
        document["screen"] = screened_census.summary(tally.screened, screen)
        for name in ("prompts", "generations"):
            screened_census.estimate_into(document[name], tally.screened, name)
        screened_census.separate_rows(document["rows"], tally.screened)
    return document


def _found(tally: Tally, flagged: pa.Table, rule: VerdictConfig) -> dict[str, Any]:
    rejected = {reason: tally.rejected[reason] for reason in sorted(tally.rejected)}
    return {
        "counts": {
            "rows_in": tally.rows,
            "distinct_prompts": tally.prompts,
            "done": tally.done,
            "rejected": sum(rejected.values()),
            "rejected_by_reason": rejected,
            "rejected_rows_by_reason": {reason: tally.rejected_rows[reason] for reason in sorted(tally.rejected_rows)},
            "generations": tally.generations,
            "flagged": flagged.num_rows,
        },
        "prompts": _mix(tally.prompt_labels, tally.done),
        "generations": _generation_mix(tally),
        "rows": {
            "total": tally.done_rows,
            "passed": 0,
            "classes": {label: _share(tally.row_labels[label], tally.done_rows) for label in LABELS},
            "memorised": _share(_any(tally.row_labels), tally.done_rows),
        },
        "one_to_many": one_to_many(flagged),
        "severity": _severity(tally, flagged, rule),
        "signals": {"generations": {name: tally.signals[name] for name in sorted(tally.signals)}},
        "scores": {"bins": SCORE_BINS, "cells": [[*cell, n] for cell, n in sorted(tally.scores.items()) if n]},
    }


def one_to_many(flagged: pa.Table) -> dict[str, Any]:
    """Count the distinct training images that a flagged prompt reaches (Di et al. 2025, section 5).

    Near-duplicates of one image count once: `reach` of the flagged list.
    """
    reach = flagged["reach"].to_numpy()
    images = pc.count_distinct(pc.list_flatten(flagged["match_ids"])).as_py()
    groups = pc.count_distinct(pc.list_flatten(flagged["match_groups"])).as_py()
    histogram = Counter(reach.tolist())
    return {
        "flagged": flagged.num_rows,
        "more_than_one": rate(int((reach > 1).sum()), flagged.num_rows).as_dict(),
        "median": float(np.median(reach)) if reach.size else None,
        "mean": float(reach.mean()) if reach.size else None,
        "maximum": int(reach.max()) if reach.size else None,
        "histogram": {str(images): histogram[images] for images in sorted(histogram)},
        "training_images_reached": images,
        "groups_reached": groups,
        "components": pc.count_distinct(flagged["component"]).as_py(),
    }


def _severity(tally: Tally, flagged: pa.Table, rule: VerdictConfig) -> dict[str, Any]:
    harm = harm_of(rule)
    total = sum(tally.generation_labels[label] * harm[label] for label in LABELS)
    return {
        "mean_generation": total / tally.generations if tally.generations else None,
        "mean_flagged_prompt": pc.mean(flagged["severity"]).as_py(),
        "total": total,
        "harm": harm,
    }


def _mix(labels: Counter[str], total: int) -> dict[str, Any]:
    return {
        "total": total,
        "classes": {label: rate(labels[label], total).as_dict() for label in LABELS},
        "memorised": rate(_any(labels), total).as_dict(),
    }


def _generation_mix(tally: Tally) -> dict[str, Any]:
    mix = _mix(tally.generation_labels, tally.generations)
    for label, entry in [*mix["classes"].items(), (ANY, mix["memorised"])]:
        sums = (tally.moments["", "nn"], tally.moments[label, "kn"], tally.moments[label, "kk"])
        low, high = clustered_interval(ClusterMoments(tally.done, tally.generations, entry["count"], *sums))
        entry.update(clustered_low=low, clustered_high=high)
    return mix


def _share(count: int, total: int) -> dict[str, Any]:
    return {"count": count, "total": total, "rate": count / total if total else None}


def _any(labels: Counter[str]) -> int:
    return sum(labels[label] for label in MEMORISED)
