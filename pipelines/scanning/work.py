"""What one worker does with a few prompts, without Ray and without tables.

`Sampler`: captions -> generations with masks and vectors. `Referee`: generations -> candidates -> FB-Mem -> records.
Each keeps rows apart (`isolate.py`): a result is a value or a `RowReject`. Methods give lists parallel to their input.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from memscan.config import CensusConfig, GeneratorConfig, ResourcesConfig
from memscan.detection.cards import COPY, SEMANTIC, TILED_L2
from memscan.detection.sampled import AttentionTap, tiled_similarity
from memscan.errors import ModelError, Reason, RowReject
from memscan.images import encode_mask, encode_png
from memscan.index.search import Hit, nearest_whole
from memscan.index.store import ReferenceIndex
from memscan.localization.maps import foreground_share
from memscan.metric.fbmem import Prepared, RegionScores
from memscan.metric.variants import load_metric
from memscan.models.adapters import adapter_of
from memscan.models.embedder import load_embedder
from memscan.models.generator import Generator
from memscan.models.stock import StockGenerator
from memscan.records import REGIONS, Label, sample_seed
from pipelines.engine.isolate import Isolation
from pipelines.scanning.describer import Describer
from pipelines.scanning.meaning import Meaning
from pipelines.scanning.prompt import Prompt
from pipelines.screen import Screen

_SEVERITY = {label: rank for rank, label in enumerate(Label)}


@dataclass(frozen=True)
class Generated:
    """One generation on its way to the referee.

    Args:
        image_HWC: RGB, uint8.
        mask_HW: foreground in [0, 1], float32.
        vectors_RD: unit vectors in the order of `records.REGIONS`, float32.
        signals: detector scores by name.
        map_HW: localisation map in [0, 1] in steps of 1 / 255, float32; None where the model gives none.
    """

    sample: int
    seed: int
    image_HWC: npt.NDArray[np.uint8]
    signals: dict[str, float]
    mask_HW: npt.NDArray[np.float32] | None = None
    vectors_RD: npt.NDArray[np.float32] | None = None
    map_HW: npt.NDArray[np.float32] | None = None


def load_generator(config: GeneratorConfig, device: str, resources: ResourcesConfig) -> Generator:
    """The configured generator of our own loop, with units switched off by prompt where it names a switch file."""
    if config.switches is None:
        return Generator.load(config, device, resources=resources)
    from memscan.mitigation.guard import GuardedGenerator

    # Units are switched off in modules of their own, which fused or compiled projections do not call.
    plain = ResourcesConfig(fast="off")
    return GuardedGenerator.guard(Generator.load(config, device, resources=plain), config.switches)


def load_adapter(config: CensusConfig, device: str) -> Generator | StockGenerator:
    """The configured generator by the adapter that knows it, with the taps of the signals that apply."""
    if adapter_of(config.generator).kind == "stock":
        return StockGenerator.load(config.generator, device)
    generator = load_generator(config.generator, device, config.resources)
    # Between the full steps of feature caching there is no attention to look at.
    if config.signals.attention and config.generator.cache_interval == 1:
        generator.taps = (*generator.taps, AttentionTap(generator.checkpoint.unet))
    return generator


class Sampler:
    """Generator, segmenter and embedder on one device.

    Args:
        generator, describer: ready ones; loaded as configured when not given.
    """

    def __init__(
        self,
        config: CensusConfig,
        device: str,
        threads: int,
        generator: Generator | StockGenerator | None = None,
        describer: Describer | None = None,
    ) -> None:
        self.config = config
        self.generator = generator or load_adapter(config, device)
        self.describer = describer or Describer(config, device, threads)
        self._screen = Screen(config.screen, self.own) if config.screen else None
        self._drafting, self._describing = Isolation(), Isolation()

    @property
    def own(self) -> Generator:
        """The generator where it is our own loop's. Raises ModelError where the stock pipeline samples."""
        if isinstance(self.generator, StockGenerator):
            pipeline = self.generator.adapter.pipeline
            raise ModelError(
                f"is sampled by the stock {pipeline}: only its generations are at hand",
                where=self.config.generator.path,
            )
        return self.generator

    def __call__(self, prompts: Sequence[Prompt | RowReject]) -> list[list[Generated] | RowReject]:
        return self.describe(self.draft(prompts))

    def screen(self, prompts: Sequence[Prompt | RowReject]) -> list[Prompt | RowReject]:
        """The prompts with the screen's decisions; as they are without a screen."""
        return list(prompts) if self._screen is None else self._screen(prompts)

    @property
    def spans(self) -> list[range]:
        """Samples that every scanned prompt gets, and those that only suspicious ones get."""
        samples = self.config.generator.samples
        first = (self.config.screen and self.config.screen.first_samples) or samples
        return [range(first), range(first, samples)] if first < samples else [range(samples)]

    @property
    def chunk(self) -> int:
        """Prompts whose generations fill denoiser batches."""
        return self.generator.batch_size // math.gcd(self.generator.batch_size, self.config.generator.samples)

    def draft(
        self, prompts: Sequence[Prompt | RowReject], samples: range | None = None
    ) -> list[list[Generated] | RowReject]:
        """Images and signals, without masks and vectors. May run in one thread while `describe` runs in another.

        Args:
            samples: which of a prompt's samples; all by default.
        """
        span = range(self.config.generator.samples) if samples is None else samples
        return self._drafting.batch(prompts, lambda some: self._generate(some, span), Reason.GENERATION_FAILED)

    def describe(self, drafts: Sequence[list[Generated] | RowReject]) -> list[list[Generated] | RowReject]:
        """Drafts with their masks and vectors."""
        masked = self._describing.batch(drafts, self._segment, Reason.SEGMENTATION_FAILED)
        return self._describing.batch(masked, self._embed, Reason.EMBEDDING_FAILED)

    def _generate(self, prompts: list[Prompt], span: range) -> list[list[Generated] | RowReject]:
        reused = self._screen.reused if self._screen is not None else 0
        known, fresh = [at for at in span if at < reused], [at for at in span if at >= reused]
        parts = [self._sample(prompts, samples) for samples in (known, fresh) if samples]
        rows: list[list[Generated] | RowReject] = []
        for row in zip(*parts, strict=True):
            made = [item for part in row for item in part]
            finite = all(item is not None for item in made)
            reject = RowReject(Reason.GENERATION_NOT_FINITE, "the decoder's output is not finite")
            rows.append(_compared([item for item in made if item is not None]) if finite else reject)
        return rows

    def _sample(self, prompts: list[Prompt], samples: list[int]) -> list[list[Generated | None]]:
        """Generations of these samples, a list a prompt; None where one is not finite."""
        seeds = [self._seed(prompt, sample) for prompt in prompts for sample in samples]
        firsts = [prompt.first for prompt in prompts]
        taken_up = samples[0] < len(firsts[0][0]) if all(first is not None for first in firsts) else False
        first = torch.cat([one[:, samples] for one in firsts], dim=1) if taken_up else None
        made = self.generator.generate([prompt.caption for prompt in prompts for _ in samples], seeds, first)
        items = [
            Generated(
                samples[at % len(samples)],
                seeds[at],
                made.images_BHWC[at],
                {name: float(values[at]) for name, values in made.signals.items()},
                map_HW=None if made.maps_Bhw is None else _in_steps(made.maps_Bhw[at]),
            )
            if made.finite_B[at]
            else None
            for at in range(len(seeds))
        ]
        return [items[at : at + len(samples)] for at in range(0, len(items), len(samples))]

    def _seed(self, prompt: Prompt, sample: int) -> int:
        """Of the screen's bank where the sampling takes up its step, else the prompt's own."""
        if self._screen is not None and sample < self._screen.reused:
            return self._screen.seeds[sample]
        return sample_seed(prompt.prompt_id, sample, self.config.generator.base_seed)

    def _segment(self, rows: list[list[Generated]]) -> list[list[Generated] | RowReject]:
        masks = iter(self.describer.masks([item.image_HWC for row in rows for item in row]))
        return [[replace(item, mask_HW=next(masks)) for item in row] for row in rows]

    def _embed(self, rows: list[list[Generated]]) -> list[list[Generated] | RowReject]:
        flat = [item for row in rows for item in row]
        vectors = iter(self.describer.vectors([item.image_HWC for item in flat], [_mask(item) for item in flat]))
        return [[replace(item, vectors_RD=next(vectors)) for item in row] for row in rows]


class Referee:
    """The reference index and FB-Mem: which training image a generation copies, and where."""

    def __init__(self, config: CensusConfig, index: ReferenceIndex, describer: Describer, device: str = "cpu") -> None:
        self.index, self.top_k, self._describer = index, config.index.top_k, describer
        semantic = config.signals.semantic
        self._meaning = None if semantic is None else Meaning(load_embedder(semantic, device), index)
        self.metric = load_metric(config.metric, device)
        self._kept: OrderedDict[int, Prepared] = OrderedDict()
        self._kept_bytes = 0
        # One takes 4 MiB at a canvas of 176 and 35 MiB at the published 512.
        self._most_bytes = config.resources.reference_cache_mib * 2**20
        self._isolation = Isolation()

    def __call__(self, rows: Sequence[list[Generated] | RowReject]) -> list[list[dict[str, Any]] | RowReject]:
        """`records.GENERATION` records, one list a prompt."""
        found = self._isolation.batch(rows, self._search, Reason.SEARCH_FAILED)
        return self._isolation.each(found, self._classify, Reason.CLASSIFICATION_FAILED)

    def _search(self, rows: list[list[Generated]]) -> list[list[tuple[Generated, list[Hit]]] | RowReject]:
        stacked_NRD = np.stack([_vectors(item) for row in rows for item in row])
        queries = {region: np.ascontiguousarray(stacked_NRD[:, at]) for at, region in enumerate(REGIONS)}
        hits = iter(self.index.search(queries, self.top_k))
        return [[(item, next(hits)) for item in row] for row in rows]

    def _classify(self, row: list[tuple[Generated, list[Hit]]]) -> list[dict[str, Any]]:
        return [self.record(generated, hits) for generated, hits in row]

    def record(self, generated: Generated, hits: Sequence[Hit]) -> dict[str, Any]:
        """Classify one generation against its candidates.

        Raises:
            RowReject: REFERENCE_MISSING, a candidate's image is not in the index.
        """
        references = [self._reference(hit.row) for hit in hits]
        prepared = self.metric.prepare(generated.image_HWC, _mask(generated))
        scores = self.metric.score(prepared, references)
        best, label = self.metric.match(scores)
        labels = [self.metric.classify(score) for score in scores]
        signals = {**generated.signals, COPY.name: nearest_whole(hits)}
        if self._meaning is not None:
            signals[SEMANTIC.name] = self._meaning.similarity(generated.image_HWC, hits[best].row)
        map_HW = None if label is Label.NM else generated.map_HW
        order = sorted(range(len(hits)), key=lambda at: (at != best, _SEVERITY[labels[at]], -_sum(scores[at])))
        return {
            "sample": generated.sample,
            "seed": generated.seed,
            "label": label.value,
            **_scores(scores[best]),
            "match_id": hits[best].reference_id,
            "foreground_area": float(_mask(generated).mean()),
            "similarity": nearest_whole(hits),
            "noise_norm": generated.signals.get("noise_norm"),
            "noise_norm_first": generated.signals.get("noise_norm_first"),
            "signals": list(signals.items()),
            "candidates": [
                {
                    "reference_id": hits[at].reference_id,
                    "found_by": hits[at].found_by,
                    "similarity": hits[at].similarity,
                    **_scores(scores[at]),
                    "label": labels[at].value,
                }
                for at in order
            ],
            "evidence": None if label is Label.NM else _evidence(generated),
            "localization": None if map_HW is None else encode_mask(map_HW),
            "localized_foreground": None if map_HW is None else _share(map_HW, _mask(generated)),
        }

    def _reference(self, row: int) -> Prepared:
        if row in self._kept:
            self._kept.move_to_end(row)
            return self._kept[row]
        reference = self.index.fetch(row)
        mask_HW = reference.mask_HW
        if mask_HW is None:  # of an index made of ready embeddings
            mask_HW = self._describer.masks([reference.image_HWC])[0]
        prepared = self.metric.prepare(reference.image_HWC, mask_HW)
        while self._kept and self._kept_bytes + prepared.nbytes > self._most_bytes:
            self._kept_bytes -= self._kept.popitem(last=False)[1].nbytes
        self._kept[row] = prepared
        self._kept_bytes += prepared.nbytes
        return prepared


def _compared(row: list[Generated]) -> list[Generated]:
    """Generations of a prompt that were made together, with how near the nearest other one is to each."""
    nearest_S = tiled_similarity(np.stack([item.image_HWC for item in row])) if row else None
    if nearest_S is None:
        return row
    return [
        replace(item, signals={**item.signals, TILED_L2.name: float(value)})
        for item, value in zip(row, nearest_S, strict=True)
    ]


def _in_steps(map_HW: npt.NDArray[np.float32]) -> npt.NDArray[np.float32] | None:
    """A map as its PNG gives it back; None for one that says nothing."""
    return np.rint(map_HW * 255).astype(np.float32) / np.float32(255) if np.isfinite(map_HW).all() else None


def _share(map_HW: npt.NDArray[np.float32], mask_HW: npt.NDArray[np.float32]) -> float | None:
    return foreground_share(torch.from_numpy(map_HW), torch.from_numpy(mask_HW))


def _scores(scores: RegionScores) -> dict[str, float]:
    return {"foreground": scores.foreground, "background": scores.background, "whole": scores.whole}


def _sum(scores: RegionScores) -> float:
    return scores.foreground + scores.background


def _evidence(generated: Generated) -> dict[str, bytes]:
    return {"generation": encode_png(generated.image_HWC), "generation_mask": encode_mask(_mask(generated))}


def _mask(generated: Generated) -> npt.NDArray[np.float32]:
    assert generated.mask_HW is not None
    return generated.mask_HW


def _vectors(generated: Generated) -> npt.NDArray[np.float32]:
    assert generated.vectors_RD is not None
    return generated.vectors_RD
