"""This module turns captions into generations with masks and vectors, for a few prompts, without Ray and tables.

Rows are kept apart (`isolation.py`): a result is a value or a `RowReject`. Methods give lists parallel to their input.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import torch

from memscan.config import CensusConfig, GeneratorConfig, ResourcesConfig
from memscan.detection.sampled import AttentionHook, tiled_similarity
from memscan.detection.specifications import TILED_L2
from memscan.errors import ModelError, Reason, RowReject
from memscan.models.adapters import adapter_of
from memscan.models.generator import Generator
from memscan.models.stock import StockGenerator
from memscan.records import sample_seed
from memscan.worker.encoder import RegionEncoder
from memscan.worker.generated import Generated, mask_of
from memscan.worker.isolation import Isolation
from memscan.worker.prompt import Prompt
from memscan.worker.screen import Screen


def load_generator(
    config: GeneratorConfig, device: str = "cpu", resources: ResourcesConfig | None = None
) -> Generator | StockGenerator:
    """Load the configured generator with its adapter: memscan's own loop, or the stock pipeline of diffusers.

    Args:
        device: where it samples, for example "cpu" or "cuda".
        resources: what may be done for speed; by default the defaults of the section `resources`.

    Raises:
        ModelError: the checkpoint is incomplete, broken or no text-to-image pipeline, or the device is not there.
        ConfigError: a setting that only our own loop has, for a checkpoint that it does not sample.
    """
    if adapter_of(config).kind == "stock":
        return StockGenerator.load(config, device)
    if config.switches is None:
        return Generator.load(config, device, resources=resources)
    from memscan.mitigation.switches import GuardedGenerator

    # Units are switched off in modules of their own, which fused or compiled projections do not call.
    plain = ResourcesConfig(fast="off")
    return GuardedGenerator.guard(Generator.load(config, device, resources=plain), config.switches)


def load_adapter(config: CensusConfig, device: str) -> Generator | StockGenerator:
    """Return the generator of a census, with the hooks of the signals that apply."""
    generator = load_generator(config.generator, device, config.resources)
    # Between the full steps of feature caching there is no attention to look at.
    if isinstance(generator, Generator) and config.signals.attention and config.generator.cache_interval == 1:
        generator.hooks = (*generator.hooks, AttentionHook(generator.checkpoint.unet))
    return generator


class GenerationWorker:
    """This holds generator, segmenter and embedder on one device.

    Args:
        generator, encoder: ready ones; loaded as configured when not given.
    """

    def __init__(
        self,
        config: CensusConfig,
        device: str,
        threads: int,
        generator: Generator | StockGenerator | None = None,
        encoder: RegionEncoder | None = None,
    ) -> None:
        self.config = config
        self.generator = generator or load_adapter(config, device)
        self.encoder = encoder or RegionEncoder(config, device, threads)
        self._screen = Screen(config.screen, self.own) if config.screen else None
        self._drafting, self._describing = Isolation(), Isolation()

    @property
    def own(self) -> Generator:
        """Return the generator where it is our own loop's. Raises ModelError if the stock pipeline samples."""
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
        """Return the prompts with the screen's decisions; as they are without a screen."""
        return list(prompts) if self._screen is None else self._screen(prompts)

    @property
    def spans(self) -> list[range]:
        """Return the samples that every scanned prompt gets, and those that only suspicious prompts get."""
        samples = self.config.generator.samples
        first = (self.config.screen and self.config.screen.first_samples) or samples
        return [range(first), range(first, samples)] if first < samples else [range(samples)]

    @property
    def chunk(self) -> int:
        """Return prompts whose generations fill denoiser batches."""
        return self.generator.batch_size // math.gcd(self.generator.batch_size, self.config.generator.samples)

    def draft(
        self, prompts: Sequence[Prompt | RowReject], samples: range | None = None
    ) -> list[list[Generated] | RowReject]:
        """Return images and signals, without masks and vectors. May run in one thread while `describe` runs in another.

        Args:
            samples: which of a prompt's samples; all by default.
        """
        span = range(self.config.generator.samples) if samples is None else samples
        return self._drafting.batch(prompts, lambda some: self._generate(some, span), Reason.GENERATION_FAILED)

    def describe(self, drafts: Sequence[list[Generated] | RowReject]) -> list[list[Generated] | RowReject]:
        """Return drafts with their masks and vectors."""
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
        """Generations of these samples, a list per prompt; None if one is not finite."""
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
        """Of the screen's bank where the sampling takes up its step, otherwise the prompt's own."""
        if self._screen is not None and sample < self._screen.reused:
            return self._screen.seeds[sample]
        return sample_seed(prompt.prompt_id, sample, self.config.generator.base_seed)

    def _segment(self, rows: list[list[Generated]]) -> list[list[Generated] | RowReject]:
        masks = iter(self.encoder.masks([item.image_HWC for row in rows for item in row]))
        return [[replace(item, mask_HW=next(masks)) for item in row] for row in rows]

    def _embed(self, rows: list[list[Generated]]) -> list[list[Generated] | RowReject]:
        flat = [item for row in rows for item in row]
        vectors = iter(self.encoder.vectors([item.image_HWC for item in flat], [mask_of(item) for item in flat]))
        return [[replace(item, vectors_RD=next(vectors)) for item in row] for row in rows]


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
    """Return a map as its PNG gives it back; None for one that says nothing."""
    return np.rint(map_HW * 255).astype(np.float32) / np.float32(255) if np.isfinite(map_HW).all() else None
