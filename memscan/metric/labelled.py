"""This module computes figures of a metric on labelled pairs.

They are by pair, and by generation over all its candidates as in a census.

A generation has the most severe label of its pairs, in truth and as judged (`FbMem.match`). Intervals of shares are
those of Clopper and Pearson, two-sided at 95 %.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from sklearn.metrics import f1_score, roc_auc_score

from memscan.intervals import clopper_pearson
from memscan.metric.decision import SEVERITY
from memscan.records import LABELS, Label


@dataclass(frozen=True)
class Judged:
    """This is one pair whose label is known.

    Attributes:
        generated: names the generation, so that its pairs are found together.
        truth, label: the true label, and the label of the metric.
        foreground, background: scores in [0, 1].
    """

    generated: str
    truth: Label
    label: Label
    foreground: float
    background: float


def figures(judged: Sequence[Judged]) -> dict[str, Any]:
    """Return for JSON how correct the labels are; `by_generation` has the same for generations, without AUC.

    Raises:
        ValueError: no pairs.
    """
    if not judged:
        raise ValueError("no labelled pairs")
    generations: dict[str, tuple[Label, Label]] = {}
    for pair in judged:
        truth, label = generations.get(pair.generated, (Label.NM, Label.NM))
        generations[pair.generated] = _severer(truth, pair.truth), _severer(label, pair.label)
    truth_N = [pair.truth for pair in judged]
    return {
        **_counted(truth_N, [pair.label for pair in judged]),
        "auc": {
            "foreground": _auc([t in (Label.VM, Label.FM) for t in truth_N], [p.foreground for p in judged]),
            "background": _auc([t in (Label.VM, Label.BM) for t in truth_N], [p.background for p in judged]),
        },
        "by_generation": _counted(*(list(column) for column in zip(*generations.values(), strict=True))),
    }


def share(count: int, total: int) -> dict[str, Any]:
    """Return `count` of `total` with its interval; there is no rate if there was nothing to count."""
    if not total:
        return {"count": 0, "total": 0, "rate": None, "low": 0.0, "high": 1.0}
    low, high = clopper_pearson(count, total)
    return {"count": count, "total": total, "rate": count / total, "low": low, "high": high}


def _counted(truth: Sequence[Label], labels: Sequence[Label]) -> dict[str, Any]:
    both = list(zip(truth, labels, strict=True))
    occurring = [name for name in LABELS if any(t.value == name for t in truth)]
    f1 = f1_score([str(t) for t in truth], [str(p) for p in labels], average=None, labels=LABELS, zero_division=0)
    by_class = {name: float(value) for name, value in zip(LABELS, f1, strict=True) if name in occurring}
    ordinary = [label for t, label in both if t is Label.NM]
    copied = [label for t, label in both if t is not Label.NM]
    return {
        "total": len(both),
        "confusion": {t: {p.value: sum(pair == (Label(t), p) for pair in both) for p in Label} for t in occurring},
        "f1": by_class,
        "macro_f1": float(np.mean(list(by_class.values()))),
        "false_positives": share(sum(label is not Label.NM for label in ordinary), len(ordinary)),
        "memorised_found": share(sum(label is not Label.NM for label in copied), len(copied)),
        "right": share(sum(t is p for t, p in both), len(both)),
    }


def _severer(one: Label, other: Label) -> Label:
    return max(one, other, key=lambda label: SEVERITY[label])


def _auc(copied: Sequence[bool], scores: Sequence[float]) -> float | None:
    """Area under the ROC curve; None if all pairs are of one kind."""
    return float(roc_auc_score(copied, scores)) if len(set(copied)) == 2 else None
