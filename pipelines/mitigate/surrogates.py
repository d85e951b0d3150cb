"""This module makes surrogate images, which a flagged prompt may show instead of the copy.

They have its subject and are no copies.

A pruned model generates images of the prompt (Kowalczuk et al. 2025). The census's own classifier examines each of
them, and a copy is refused. If pruning does not remove the copy, other ways follow, each further from the prompt than
the one before:

    own       the prompt, under its own units or in the pruned checkpoint, as published
    cluster   the prompt with the units of its whole cluster off
    mixed     its embedding mixed with an ordinary prompt's, by a quarter, a half, three quarters
    ordinary  the image of an ordinary prompt, only if every other way gave a copy
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import Any

from memscan.errors import MemscanError
from memscan.mitigation.switches import GuardedGenerator, group_for
from memscan.mitigation.targets import Target
from memscan.mitigation.units import UnitSet, switched_off, union
from memscan.records import sample_seed

DRAWS = 6  # of each way
MIXED = (0.25, 0.5, 0.75)


class Surrogates:
    """This is the pruned model with the classifier that refuses copies."""

    def __init__(self, job: Any) -> None:
        from memscan.worker.generation import GenerationWorker
        from pipelines.ray.stage import StageSetup
        from pipelines.scan.stages import open_classifier

        self._job = job
        update = {"path": job.pruned, "switches": job.switches or None}
        census = job.census.model_copy(update={"generator": job.census.generator.model_copy(update=update)})
        self._sampler = GenerationWorker(census, job.device, job.threads)
        setup = StageSetup(census, job.device, job.threads, job.index, job.version)
        self._classifier = open_classifier(setup, self._sampler.encoder)

    def of(self, target: Target) -> tuple[list[Any], list[str]]:
        """Return up to `surrogates` images (H, W, 3) of a target, and the way in which each was made.

        Raises:
            MemscanError: every image that was drawn is a copy, or cannot be judged.
        """
        wanted = self._job.settings.surrogates
        images: list[Any] = []
        ways: list[str] = []
        for way, units, text_BTD in self._ways(target):
            if len(images) == wanted or (way == "ordinary" and images):
                break
            clean = self._clean(target, f"{way}{len(ways)}", units, text_BTD)[: wanted - len(images)]
            images += clean
            ways += [way] * len(clean)
        if not images:
            raise MemscanError(
                "every surrogate image is a copy", where=target.caption, hint="prune more strongly first"
            )
        return images, ways

    def _ways(self, target: Target) -> Iterator[tuple[str, UnitSet, Any]]:
        """Ways to draw, nearest to the prompt first: the units that are off, and an embedding a draw."""
        own, cluster = self._units(target)
        ordinary = self._job.ordinary
        start = sample_seed(target.prompt_id, 0, self._job.settings.seed) % len(ordinary)
        others = [ordinary[(start + at) % len(ordinary)] for at in range(DRAWS)]
        encoded = self._sampler.own.encode([target.caption, *others])
        text, other_BTD = encoded[:1].expand(DRAWS, -1, -1), encoded[1:]
        yield "own", own, text
        if cluster.units - own.units:
            yield "cluster", cluster, text
        for share in MIXED:
            yield "mixed", cluster, text * (1 - share) + other_BTD * share
        yield "ordinary", cluster, other_BTD

    def _units(self, target: Target) -> tuple[UnitSet, UnitSet]:
        """Units of the prompt's own group, and of all groups of its cluster."""
        generator = self._sampler.own
        if not isinstance(generator, GuardedGenerator):
            return UnitSet(), UnitSet()
        members = [one.prompt_id for one in self._job.targets if one.cluster == target.cluster]
        names = {one: group_for(generator.prompts, one) for one in members}
        groups = {one: generator.groups[name] for one, name in names.items() if name is not None}
        return groups.get(target.prompt_id, UnitSet()), union(groups.values())

    def _clean(self, target: Target, name: str, units: UnitSet, text_BTD: Any) -> list[Any]:
        """Return images of these embeddings that copy no training image, by the classifier."""
        from memscan.models.text import Text
        from memscan.worker.generated import Generated

        generator = self._sampler.own
        seeds = [
            sample_seed(f"surrogate/{name}/{target.prompt_id}", at, self._job.settings.seed) for at in range(DRAWS)
        ]
        off: Any = nullcontext()
        if isinstance(generator, GuardedGenerator) and len(units):
            off = switched_off(generator.checkpoint.unet, generator.layout, units)
        with off:
            made = generator.generate_from(Text(text_BTD), seeds)
        rows = [Generated(at, seeds[at], made.images_BHWC[at], {}) for at in range(DRAWS) if made.finite_B[at]]
        described = self._sampler.describe([rows]) if rows else []
        for drawn, judged in zip(described, self._classifier(described), strict=True):
            if not isinstance(drawn, list) or not isinstance(judged, list):
                raise MemscanError(f"cannot judge a surrogate ({judged})", where=target.prompt_id)
            return [one.image_HWC for one, record in zip(drawn, judged, strict=True) if record["label"] == "NM"]
        return []


def counted(ways: Sequence[str]) -> dict[str, int]:
    """Count how many surrogates were made in each way."""
    return dict(sorted(Counter(ways).items()))
