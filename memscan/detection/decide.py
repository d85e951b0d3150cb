"""This module decides what a screen does with a score.

A prompt is scanned in full, passes, or is scanned although it would pass, because the audit drew it.

    score >= threshold                 census   weight 1
    below, drawn with probability q    audit    weight 1 / q
    below, not drawn                   pass     no weight: it is not scanned

The draw is a hash of the prompt's id, so that a rerun, another batch or another machine draws the same prompts.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

import numpy as np

from memscan.config import ScreenConfig
from memscan.intervals import lower_limit
from memscan.records import short_id


class Decision(str, Enum):
    """A decision says why a prompt is scanned in full, or that it is not."""

    CENSUS = "census"
    AUDIT = "audit"
    PASS = "pass"

    def __str__(self) -> str:
        return self.value


@dataclass(frozen=True)
class Decided:
    """This is a prompt's decision, with the score it rests on and its weight (None if it is not scanned)."""

    decision: Decision
    score: float
    weight: float | None

    @property
    def scanned(self) -> bool:
        return self.decision is not Decision.PASS


def decide(prompt_id: str, score: float, rule: ScreenConfig) -> Decided:
    """Return the decision on one prompt. Raises ValueError for a score that is not finite."""
    if not np.isfinite(score):
        raise ValueError(f"score {score} is not finite")
    if score >= rule.threshold:
        return Decided(Decision.CENSUS, score, 1.0)
    if drawn(prompt_id, rule.audit_share, rule.audit_seed):
        return Decided(Decision.AUDIT, score, 1 / rule.audit_share)
    return Decided(Decision.PASS, score, None)


def drawn(prompt_id: str, share: float, seed: int = 0) -> bool:
    """Return whether the audit draws a prompt: a hash of its short id, uniform in [0, 1), lies below `share`."""
    digest = hashlib.blake2b(f"audit/{seed}/{short_id(prompt_id)}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < share * 2**64


@dataclass(frozen=True)
class ScreenThreshold:
    """This is a threshold chosen on prompts whose memorisation is known.

    Args:
        threshold: prompts at or above it are scanned.
        recall: share of the memorised prompts at or above it.
        recall_low: its lower Clopper-Pearson bound.
        passed: share of the ordinary prompts below it; None without any.
        reached: whether `recall_low` is the target or more. Too few memorised prompts cannot show a high recall.
    """

    threshold: float
    recall: float
    recall_low: float
    passed: float | None
    memorised: int
    ordinary: int
    target: float
    confidence: float
    reached: bool


def choose_threshold(
    memorised: Sequence[float],
    ordinary: Sequence[float] = (),
    *,
    target: float = 0.99,
    confidence: float = 0.95,
    margin: float = 0.1,
) -> ScreenThreshold:
    """Return the highest threshold whose recall is at least `target` with one-sided `confidence`.

    If there is none, it is below all scores.

    It is below the lowest memorised score that it must catch, by the share `margin` of the distance to the highest
    ordinary score under that one, because other prompts score a little lower than the lowest one seen.

    Raises:
        ValueError: no memorised prompts, or a score that is not finite.
    """
    found_M, plain_N = np.sort(np.asarray(memorised, np.float64)), np.sort(np.asarray(ordinary, np.float64))
    if not len(found_M) or not np.isfinite(found_M).all() or not np.isfinite(plain_N).all():
        raise ValueError("a threshold needs finite scores of memorised prompts")
    count = len(found_M)
    lost = 0
    while lost + 1 < count and lower_limit(count - lost - 1, count, confidence) >= target:
        lost += 1
    lowest = float(found_M[lost])
    below = plain_N[plain_N < lowest]
    threshold = lowest - margin * (lowest - float(below[-1])) if len(below) else lowest - margin * abs(lowest)
    kept = int((found_M >= threshold).sum())
    low = lower_limit(kept, count, confidence)
    passed = float((plain_N < threshold).mean()) if len(plain_N) else None
    return ScreenThreshold(
        threshold, kept / count, low, passed, count, len(plain_N), target, confidence, bool(low >= target)
    )
