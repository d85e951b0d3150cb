"""This module is the variant `combined` of FB-Mem.

A model weighs the scores of `region` and `robust` under the reference's mask.

`region` is reliable if a copy is in place, and `robust` if it was moved or recoloured. If neither is reliable, the
copy embedding of the cut regions often is. Without an embedding, the coarse brightness of the surroundings
distinguishes a copied background from one that only has equally few edges (`tone`). A logistic model per region
(`combination`) weighs these terms, each of which is beside the score in records, in `memscan compare` and in the
report. Both images are cut by the reference's mask: two masks of one picture differ (intersection over union under .7
on 18 % of verbatim pairs), and the generation needs none to be scored.

A region that `region` or `robust` finds missing is missing here; a region without structure, for which `robust` has the
other's score, is marked as copied. Without the embedder's similarity, a model that was fitted without it is used.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from memscan.config import MetricConfig
from memscan.metric.combination import SIMILARITIES, shipped_weights
from memscan.metric.fbmem import FbMem, RegionScores
from memscan.metric.region import PreparedRegions, RegionFbMem
from memscan.metric.regions import Image, Mask
from memscan.metric.robust import PreparedStructure, RobustFbMem
from memscan.metric.tone import Tone, prepare_tone, tone


@dataclass(frozen=True)
class PreparedTerms:
    """This is an image that is ready for both scores."""

    regions: PreparedRegions
    structure: PreparedStructure
    tone: Tone

    @property
    def foreground_area(self) -> float | None:
        """This is the mean of the image's own mask, in [0, 1]; None if it was prepared without one."""
        return self.regions.foreground_area

    @property
    def nbytes(self) -> int:
        """This is the memory that is held, in bytes: 6 MiB on a canvas of 128."""
        return self.regions.nbytes + self.structure.nbytes


class CombinedFbMem(FbMem[PreparedTerms]):
    """This is the metric on weighed terms. Labels and matching are those of `FbMem`."""

    def __init__(self, config: MetricConfig, device: str | torch.device = "cpu") -> None:
        super().__init__(config, device)
        self._weights = shipped_weights(config.canvas)
        self._region = RegionFbMem(config, device)
        self._robust = RobustFbMem(config, device)

    @property
    def embedder(self) -> str | None:
        """Return the name of the embedder whose similarities the weights are for; another one's are no terms."""
        return self._weights.embedder

    def prepare(self, image_HWC: Image, mask_HW: Mask | None) -> PreparedTerms:
        """Prepare an image for both scores; arguments and errors as `FbMem.prepare`."""
        regions, structure = self._region.prepare(image_HWC, mask_HW), self._robust.prepare(image_HWC, mask_HW)
        return PreparedTerms(regions, structure, prepare_tone(image_HWC, mask_HW, self.device))

    def score(self, generated: PreparedTerms, references: Sequence[PreparedTerms]) -> list[RegionScores]:
        """Return the scores of one generated image against each reference, in their order.

        No similarities of an embedder are used.
        """
        return self.score_found(generated, references, [{}] * len(references))

    def score_found(
        self, generated: PreparedTerms, references: Sequence[PreparedTerms], similarities: Sequence[Mapping[str, float]]
    ) -> list[RegionScores]:
        """Return the scores of one generated image against each reference, in their order.

        Args:
            similarities: by region, the cosine of both images' copy embeddings by `embedder`; one mapping per
                reference, which may be empty.
        """
        both = zip(
            self._region.score(generated.regions, [reference.regions for reference in references]),
            self._robust.score(generated.structure, [reference.structure for reference in references]),
            [tone(generated.tone, reference.tone) for reference in references],
            similarities,
            strict=True,
        )
        return [self._combined(*entry) for entry in both]

    def _combined(
        self, region: RegionScores, robust: RegionScores, tone_background: float, known: Mapping[str, float]
    ) -> RegionScores:
        terms = {
            "region_foreground": region.foreground,
            "region_background": region.background,
            "robust_foreground": robust.foreground,
            "robust_background": robust.background,
            "tone_background": tone_background,
        }
        if "foreground" in known and "background" in known:
            terms.update({name: known[name.removeprefix("similarity_")] for name in SIMILARITIES})
        models = self._weights.models(terms)
        foreground, background = models.foreground.score(terms), models.background.score(terms)
        missing = tuple(name for name in ("foreground", "background") if name in (*region.missing, *robust.missing))
        if "foreground" in missing:
            foreground = background
        elif "background" in missing:
            background = foreground
        return RegionScores(
            foreground,
            background,
            region.whole,
            robust.foreground_area,
            robust.background_area,
            copied=tuple(n for n in ("foreground", "background") if n in (*missing, *robust.copied)),
            missing=missing,
            terms=terms,
        )

    def maps(self, generated: PreparedTerms, reference: PreparedTerms) -> dict[str, Tensor]:
        """Return the maps of `robust`: local structure of foreground and background, each at its best alignment."""
        return self._robust.maps(generated.structure, reference.structure)
