"""This module makes a label and a margin from two scores, without torch.

Source: Algorithm 1 of Di et al. 2025 (arXiv 2508.12148).
"""

from __future__ import annotations

from collections.abc import Collection

from memscan.config import MetricConfig
from memscan.records import Label

# The labels stand most severe first in `Label`: 3 VM, 2 FM, 1 BM, 0 NM.
SEVERITY = {label: rank for rank, label in enumerate(reversed(Label))}


def label_of(foreground: float, background: float, metric: MetricConfig, missing: Collection[str] = ()) -> Label:
    """Return the label of a pair, in the order VM, BM, FM, NM; a score that equals its threshold fires.

    Without a foreground nothing says that an object was copied, so the label is BM or NM. Without a background the
    foreground is all there is: it decides alone, by its own threshold, between VM and NM.

    Args:
        foreground, background: scores of the regions, in [0, 1].
        missing: regions that the pair does not have, see `RegionScores.missing`.
    """
    over = _over(foreground, background, metric, missing)
    fires = over[0] >= 0, over[1] >= 0
    if all(fires):
        return Label.VM
    if fires[1]:
        return Label.BM
    return Label.FM if fires[0] else Label.NM


def margin_of(
    label: Label, foreground: float, background: float, metric: MetricConfig, missing: Collection[str] = ()
) -> float:
    """Return how far the deciding score lies above its threshold, in score units.

    VM needs both scores, so the lesser distance decides; FM is decided by the foreground, BM by the background. For NM,
    where no score fired, it is the greater distance, and so below 0. A region that is missing decides nothing.
    """
    over_foreground, over_background = _over(foreground, background, metric, missing)
    if label is Label.VM:
        return min(over_foreground, over_background)
    if label is Label.NM:
        return max(over_foreground, over_background)
    return over_foreground if label is Label.FM else over_background


def _over(foreground: float, background: float, metric: MetricConfig, missing: Collection[str]) -> tuple[float, float]:
    """Return how far each region lies above its threshold: the foreground never where it is missing."""
    over_foreground = foreground - metric.foreground_threshold
    over_background = background - metric.background_threshold
    if not missing:
        return over_foreground, over_background
    if "foreground" in missing:
        return -1.0, over_background
    return over_foreground, over_foreground
