"""This module makes FB-Mem's label from the scores of an image's regions, for every variant of the scores.

A variant says how an image is prepared and how a pair is scored (`paper`, `region`, `robust`); this module says what
follows from the scores: Algorithm 1 of Di et al. 2025 (arXiv 2508.12148). Two thresholds on two scores give the label:
VM verbatim, BM background, FM foreground, NM none.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from memscan.config import MetricConfig
from memscan.metric.decision import SEVERITY, label_of, margin_of
from memscan.metric.regions import Image, Mask, check_image, check_mask
from memscan.records import Label


@dataclass(frozen=True)
class RegionScores:
    """These are the scores of a pair's regions, each in [0, 1], and the share of the image that they cover.

    Attributes:
        foreground, background: similarity of the regions; they decide the label.
        whole: similarity of the uncut images; reported beside the others, decides nothing.
        foreground_area, background_area: share of the image, in [0, 1], that the score was taken over. Under
            `degenerate_area` there is no score of the region's own and it has the other's.
        copied: the regions whose score is not their own but another's: `foreground`, `background`, or both.
        missing: those of them that the pair does not have at all. Without a foreground there is no VM and no FM;
            a background that is missing fires with the foreground.
        terms: what the scores were made of, by name, where a variant combines several.
    """

    foreground: float
    background: float
    whole: float
    foreground_area: float = 1.0
    background_area: float = 1.0
    copied: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    terms: Mapping[str, float] = field(default_factory=dict)


def region_scores(
    whole: float,
    foreground: float,
    background: float,
    no_foreground: bool,
    no_background: bool,
    foreground_area: float,
    background_area: float,
) -> RegionScores:
    """Return scores under the degenerate rule.

    A region without a score takes that of the other region; if both have none, they take that of the whole image.
    """
    if no_foreground and no_background:
        foreground = background = whole
    elif no_foreground:
        foreground = background
    elif no_background:
        background = foreground
    missing = tuple(name for name, none in (("foreground", no_foreground), ("background", no_background)) if none)
    return RegionScores(foreground, background, whole, foreground_area, background_area, missing, missing)


class Prepared(Protocol):
    """This is an image that is ready to be compared.

    It holds everything that does not depend on the other image of a pair.
    """

    @property
    def foreground_area(self) -> float | None:
        """This is the mean of the image's own mask, in [0, 1]; None if it was prepared without one."""

    @property
    def nbytes(self) -> int:
        """This is the memory that is held, in bytes, for caches with a budget."""


P = TypeVar("P", bound=Prepared)


class FbMem(ABC, Generic[P]):
    """This is the metric under one configuration.

    Args:
        config: canvas, thresholds and the share under which a region is degenerate.
        device: where images are prepared and compared.
    """

    def __init__(self, config: MetricConfig, device: str | torch.device = "cpu") -> None:
        self.config = config
        self.device = torch.device(device)

    @abstractmethod
    def prepare(self, image_HWC: Image, mask_HW: Mask | None) -> P:
        """Compute what belongs to one image; do this once per image.

        Args:
            image_HWC: uint8 RGB of any size; it is resized to the canvas without keeping its aspect.
            mask_HW: foreground in [0, 1], of the image's size. None for a generated image that is compared under the
                reference's mask (`metric.masks: reference`).

        Raises:
            ValueError: shapes, dtypes or the mask's range are wrong, or a mask is needed.
            RowReject: the mask is not finite (`segmentation_failed`).
        """

    def _checked(self, image_HWC: Image, mask_HW: Mask | None) -> npt.NDArray[np.float32] | None:
        """Return the mask as `check_mask` gives it; None only where the reference's mask is enough."""
        if mask_HW is not None:
            return check_mask(image_HWC, mask_HW)
        if self.config.masks != "reference":
            raise ValueError("each image needs its own mask: metric.masks is `own`")
        check_image(image_HWC)
        return None

    @abstractmethod
    def score(self, generated: P, references: Sequence[P]) -> list[RegionScores]:
        """Return the scores of one generated image against each reference, in their order; empty for no references."""

    @property
    def embedder(self) -> str | None:
        """Return the name of the embedder whose similarities `score_found` takes; None if the variant takes none."""
        return None

    def score_found(
        self, generated: P, references: Sequence[P], similarities: Sequence[Mapping[str, float]]
    ) -> list[RegionScores]:
        """Score as `score` does, with known cosines of the copy embedding by region, one mapping per reference."""
        return self.score(generated, references)

    @abstractmethod
    def maps(self, generated: P, reference: P) -> dict[str, Tensor]:
        """Return, by title, the two similarity maps (HW, 1 = equal) of which the scores are means, for a reader."""

    def classify(self, scores: RegionScores) -> Label:
        """Return the label of a pair, tried in the order VM, BM, FM, NM; a score equal to its threshold counts."""
        return label_of(scores.foreground, scores.background, self.config, missing=scores.missing)

    def margin(self, scores: RegionScores) -> float:
        """Return the distance of the deciding score from its threshold: at least 0 for VM, BM and FM, below 0 for NM.

        VM needs both scores, so the weaker one decides; NM is as far as the better one is from firing.
        """
        label = self.classify(scores)
        return margin_of(label, scores.foreground, scores.background, self.config, missing=scores.missing)

    def match(self, scores: Sequence[RegionScores]) -> tuple[int, Label]:
        """Return the candidate that decides a generation's label.

        It has the most severe label and, among equal labels, the larger sum of both scores.

        Every candidate is classified: choosing the best average first, as the authors do, can hide a foreground-only
        match behind a candidate that resembles a little everywhere. Of equal candidates, the first one is chosen.

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
