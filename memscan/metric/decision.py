"""From two scores to a label and a margin: Algorithm 1 of Di et al. 2025 (arXiv 2508.12148), without torch."""

from __future__ import annotations

from memscan.config import MetricConfig
from memscan.records import Label

# The labels stand most severe first in `Label`: 3 VM, 2 FM, 1 BM, 0 NM.
SEVERITY = {label: rank for rank, label in enumerate(reversed(Label))}


def label_of(foreground: float, background: float, metric: MetricConfig) -> Label:
    """Return the label of a pair, in the order VM, BM, FM, NM; a score that equals its threshold fires.

    Args:
        foreground, background: scores of the regions, in [0, 1].
    """
    fires = foreground >= metric.foreground_threshold, background >= metric.background_threshold
    if all(fires):
        return Label.VM
    if fires[1]:
        return Label.BM
    return Label.FM if fires[0] else Label.NM


def margin_of(label: Label, foreground: float, background: float, metric: MetricConfig) -> float:
    """Return how far the deciding score lies above its threshold, in score units.

    VM needs both scores, so the lesser distance decides; FM is decided by the foreground, BM by the background. For NM,
    where no score fired, it is the greater distance, and so below 0.
    """
    over_foreground = foreground - metric.foreground_threshold
    over_background = background - metric.background_threshold
    if label is Label.VM:
        return min(over_foreground, over_background)
    if label is Label.NM:
        return max(over_foreground, over_background)
    return over_foreground if label is Label.FM else over_background
