"""How much harm a label stands for, and how much of it a mitigation removes (Di et al. 2025).

A generation that copies everything harms most (2), then the subject (1.5), then the setting (0.5), then nothing (0).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

from memscan.records import Label

HARM: Mapping[Label, float] = MappingProxyType({Label.VM: 2.0, Label.FM: 1.5, Label.BM: 0.5, Label.NM: 0.0})


def harm(label: Label | str, table: Mapping[Label, float] = HARM) -> float:
    """Harm of one label. Raises ValueError for a label that does not exist."""
    return table[Label(label)]


def mean_harm(labels: Sequence[Label | str], table: Mapping[Label, float] = HARM) -> float:
    """Mean harm of a prompt's generations, in [0, 2]. Raises ValueError for no labels."""
    if not labels:
        raise ValueError("no labels to average")
    return sum(harm(label, table) for label in labels) / len(labels)


def mitigation_score(
    before: Sequence[Label | str],
    after: Sequence[Label | str],
    *,
    normalise: bool = False,
    table: Mapping[Label, float] = HARM,
) -> float:
    """Sum over generations of (harm before - harm after); the same prompts and seeds in the same order.

    Args:
        before, after: labels of the generations without and with the mitigation.
        normalise: divide by the harm before, so that 1 means that all harm is gone and below 0 that it grew.

    Raises:
        ValueError: different lengths, or nothing to normalise by (no harm before).
    """
    if len(before) != len(after):
        raise ValueError(f"{len(before)} labels before and {len(after)} after: generations must correspond")
    total = sum(harm(label, table) for label in before)
    removed = total - sum(harm(label, table) for label in after)
    if not normalise:
        return removed
    if total == 0:
        raise ValueError("no harm before the mitigation: a normalised score is not defined")
    return removed / total
