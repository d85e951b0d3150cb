"""FB-Mem's verdict: from the scores of an image's regions to a label, for every variant of the scores.

A variant says how an image is prepared and how a pair is scored (`paper`, `region`, `robust`); this module says what
follows from the scores: Algorithm 1 of Di et al. 2025 (arXiv 2508.12148). Two thresholds on two scores give the label:
VM verbatim, BM background, FM foreground, NM none.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor

from memscan.config import MetricConfig
from memscan.metric.decision import SEVERITY, label_of, margin_of
from memscan.metric.regions import Image, Mask
from memscan.records import Label


@dataclass(frozen=True)
class RegionScores:
    """What a pair's regions score, each in [0, 1], and over how much of the image.

    Attributes:
        foreground, background: similarity of the regions; they decide the label.
        whole: similarity of the uncut images; reported beside the others, decides nothing.
        foreground_area, background_area: share of the image, in [0, 1], that the score was taken over. Under
            `degenerate_area` there is no score of the region's own and it has the other's.
    """

    foreground: float
    background: float
    whole: float
    foreground_area: float = 1.0
    background_area: float = 1.0


def region_scores(
    whole: float,
    foreground: float,
    background: float,
    no_foreground: bool,
    no_background: bool,
    foreground_area: float,
    background_area: float,
) -> RegionScores:
    """Scores under the degenerate rule: a region that has none takes the other's, or both that of the whole image."""
    if no_foreground and no_background:
        foreground = background = whole
    elif no_foreground:
        foreground = background
    elif no_background:
        background = foreground
    return RegionScores(foreground, background, whole, foreground_area, background_area)


class Prepared(Protocol):
    """An image ready to be compared: all that does not depend on the other image of a pair."""

    @property
    def foreground_area(self) -> float:
        """Mean of the image's own mask, in [0, 1]."""

    @property
    def nbytes(self) -> int:
        """Memory held, in bytes; for caches with a budget."""


P = TypeVar("P", bound=Prepared)


class FbMem(ABC, Generic[P]):
    """The metric under one configuration.

    Args:
        config: canvas, thresholds and the share under which a region is degenerate.
        device: where images are prepared and compared.
    """

    def __init__(self, config: MetricConfig, device: str | torch.device = "cpu") -> None:
        self.config = config
        self.device = torch.device(device)

    @abstractmethod
    def prepare(self, image_HWC: Image, mask_HW: Mask) -> P:
        """Compute what belongs to one image; do this once per image.

        Args:
            image_HWC: uint8 RGB of any size; it is resized to the canvas without keeping its aspect.
            mask_HW: foreground in [0, 1], of the image's size.

        Raises:
            ValueError: shapes, dtypes or the mask's range are wrong.
            RowReject: the mask is not finite (`segmentation_failed`).
        """

    @abstractmethod
    def score(self, generated: P, references: Sequence[P]) -> list[RegionScores]:
        """Scores of one generated image against each reference, in their order; empty for no references."""

    @abstractmethod
    def maps(self, generated: P, reference: P) -> dict[str, Tensor]:
        """What the scores are means of, to be looked at: two similarity maps (HW, 1 = equal) by their titles."""

    def classify(self, scores: RegionScores) -> Label:
        """The label of a pair, in the order VM, BM, FM, NM; a score that equals its threshold fires."""
        return label_of(scores.foreground, scores.background, self.config)

    def margin(self, scores: RegionScores) -> float:
        """Distance of the deciding score from its threshold: at least 0 for VM, BM and FM, below 0 for NM.

        VM needs both scores, so the weaker one decides; NM is as far as the better one is from firing.
        """
        label = self.classify(scores)
        return margin_of(label, scores.foreground, scores.background, self.config)

    def match(self, scores: Sequence[RegionScores]) -> tuple[int, Label]:
        """The candidate that decides a generation's label: the most severe label, then the larger sum of both scores.

        Every candidate is classified: choosing the best average first, as the authors do, can hide a foreground-only
        match behind a candidate that resembles a little everywhere. Equal candidates: the first.

        Raises:
            ValueError: no candidates.
        """
        if not scores:
            raise ValueError("no candidates to match")
        labels = [self.classify(candidate) for candidate in scores]

        def order(index: int) -> tuple[int, float]:
            return SEVERITY[labels[index]], scores[index].foreground + scores[index].background

        best = max(range(len(scores)), key=order)
        return best, labels[best]
