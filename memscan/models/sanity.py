"""This module checks on a few latents, before a census, whether the checkpoint denoises as its scheduler says.

A model that is sampled wrongly makes noise, and noise matches no training image: its census would say "clean". Known
latents z are noised to x_t = sqrt(a) z + sqrt(1 - a) eps at four levels, and the network's output is read as each
prediction type: noise, v (Salimans and Ho 2022, appendix D), or the clean latent. Each reading gives an estimate of z.
Its squared error is divided by that of the best linear filter that knows only the channels' means and variances
(Wiener), z' = m + sqrt(a) s2 (x_t - sqrt(a) m) / (a s2 + 1 - a), whose error is s2 (1 - a) / (a s2 + 1 - a). A trained
denoiser leaves well below 1 of it (the planted model .35 to .5), one that knows nothing of images 1 or more, and a
wrong reading more than 1 already at medium levels. Known latents are, where they are at hand, reference images encoded
by the checkpoint's VAE, and always the model's own samples under the configured rule, which need nothing from outside.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from memscan.errors import ModelError
from memscan.io.images import resize
from memscan.models.denoiser import Denoiser
from memscan.models.folders import first_line
from memscan.models.generator import Generator
from memscan.models.sampling import initial_latents, sample
from memscan.models.sanity_stock import NotMeasuredError, error_left, means, noise_kept, watched
from memscan.models.stock import StockGenerator
from memscan.models.text import Text

Pixels = npt.NDArray[np.uint8]
# At a below .15 even a good model that predicts noise is no better than the filter: its error is multiplied by 1/a.
LEVELS = (0.8, 0.5, 0.3, 0.15)
TYPES = ("epsilon", "v_prediction", "sample")
# The share of the filter's error that a model may leave. Trained ones have .3 to .7, zeroed weights 1, shuffled 1.05.
MOST_LEFT = 0.9
# A model that was distilled to few steps answers with a sharp image instead of the mean, which has up to twice the
# error of the mean; wrong readings have 2 and more.
MOST_LEFT_FEW_STEPS = 1.5
FEW_STEPS = 8
# Another reading counts as the right one where it leaves less than so much of what the configured one leaves.
CLEARLY_BETTER = 0.8
# The share of an image's variance that encoding and decoding may lose: VAEs lose .01 to .05.
MOST_LOST = 0.5
# Mean squared difference of neighbouring pixels over twice the variance: white noise has 1, photographs below .1.
MOST_ROUGH = 0.6
# Correlation of a sample with its first noise: the planted model has .36, a denoiser that is misread .86 and more.
MOST_KEPT = 0.6
SAMPLES, REFERENCES = 4, 8
FIRST_SEED = 1000  # of the noise that is to be told apart; the samples begin with others
CAPTIONS = ("a photograph of a dog", "a red house by the sea", "a bowl of fruit on a table", "portrait of a woman")
OFF = "generator.sanity: off scans it anyway"
_FAILURES = (RuntimeError, TypeError, ValueError, KeyError, IndexError, AttributeError, AssertionError, ArithmeticError)


@dataclass(frozen=True)
class Sanity:
    """This is what was measured of a checkpoint that passed.

    Args:
        prediction: the prediction type that it is sampled by, or "velocity"; "" if that was not measured.
        left: by kind of latents ("references", "samples"), by prediction type: the share of the linear filter's
            squared error that the model leaves, geometric mean over `LEVELS`.
        vae_lost: share of the reference images' variance that the VAE loses; None without references.
        unmeasured: why the denoiser of a stock pipeline was not measured; "" if it was.
    """

    prediction: str = ""
    left: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    vae_lost: float | None = None
    unmeasured: str = ""

    def to_json(self) -> dict[str, Any]:
        """Return the measurement for run.json and `memscan doctor`."""
        left = {kind: {name: round(share, 4) for name, share in by.items()} for kind, by in self.left.items()}
        lost = None if self.vae_lost is None else round(self.vae_lost, 4)
        found = {"passed": True, "prediction": self.prediction, "error_left": left, "vae_lost": lost}
        return {**found, "unmeasured": self.unmeasured} if self.unmeasured else found

    def describe(self) -> str:
        """Return the measurement in a few words."""
        if not self.left:
            return f"makes finite images; whether it denoises was not measured: {self.unmeasured}"
        shares = ", ".join(f"{by[self.prediction]:.0%} on {kind}" for kind, by in self.left.items())
        return f"denoises as {self.prediction}: it leaves {shares} of a linear filter's error"


def check_generator(
    generator: Generator | StockGenerator,
    captions: Sequence[str] = (),
    references: Sequence[Pixels] = (),
    reference_captions: Sequence[str | None] = (),
) -> Sanity:
    """Look whether a loaded checkpoint makes images under its configured rule.

    Args:
        captions: some of the census, of which the first four distinct ones are sampled.
        references: RGB images (H, W, 3) uint8 of any sizes, at best of the training set; the first eight count.
        reference_captions: as many; an image without one is denoised under the empty caption.

    Raises:
        ModelError: it does not; says what was measured and, where another prediction type fits, which one.
    """
    chosen = [*dict.fromkeys(captions), *CAPTIONS][:SAMPLES]
    where = generator.config.path
    try:
        if isinstance(generator, StockGenerator):
            return _check_stock(generator, chosen)
        return _OwnLoop(generator, chosen).check(list(references[:REFERENCES]), list(reference_captions[:REFERENCES]))
    except _FAILURES as error:
        raise ModelError(
            f"cannot generate an image as configured ({type(error).__name__}: {first_line(error)})",
            where=where,
            hint="it is not a plain text-to-image checkpoint, or generator's size, steps or dtype do not suit it",
        ) from error


class _OwnLoop:
    """This is the check of a checkpoint that our own loop samples."""

    def __init__(self, generator: Generator, captions: list[str]) -> None:
        self.generator, self.captions = generator, captions
        self.where = generator.config.path
        unet, size = generator.checkpoint.unet, (generator.height, generator.width)
        self.denoiser = Denoiser.of(unet, generator.scheduler, size=size)
        few = generator.config.steps <= FEW_STEPS
        self.most = MOST_LEFT_FEW_STEPS if few else MOST_LEFT

    @torch.inference_mode()
    def check(self, references: list[Pixels], reference_captions: list[str | None]) -> Sanity:
        text = self.generator.text_encoder(self.captions)
        self._check_text(text)
        left: dict[str, dict[str, float]] = {}
        lost = None
        if references:
            latents, lost = self._encoded(references)
            words = [caption or "" for caption in reference_captions] or [""] * len(references)
            ratios = self._ratios(latents, self.generator.text_encoder(words))
            left["references"] = means(ratios)
        if "references" in left:  # the more telling of the two: a wrong reading makes samples that mean nothing
            self._judge(ratios, f"{len(references)} reference images")
        latents, images = self._sampled(text)
        ratios = self._ratios(latents, text)
        left["samples"] = means(ratios)
        self._judge(ratios, f"{len(latents)} of its own samples")
        circle = float((self._encode(images) - latents).square().mean() / latents.var())
        if not math.isfinite(circle):
            raise self._error("its VAE gives values that are not finite", "the VAE is damaged")
        if circle > MOST_LOST:
            raise self._error(f"its VAE loses {circle:.0%} of the variance of what it decodes", "the VAE is damaged")
        return Sanity(self.denoiser.prediction, left, lost)

    def _check_text(self, text: Text) -> None:
        if not torch.isfinite(text.hidden_NTD).all():
            raise self._error("its text encoder gives values that are not finite")
        if len(text) > 1 and torch.equal(text.hidden_NTD[0], text.hidden_NTD[1]):
            raise self._error("its text encoder gives every caption the same embedding")

    def _encoded(self, references: list[Pixels]) -> tuple[Tensor, float]:
        """Latents of images, and what the VAE loses of them."""
        size = (self.generator.height, self.generator.width)
        pixels = np.stack([resize(_cut(image, size), size) for image in references])
        latents = self._encode(pixels)
        decoded, finite = self.generator.decode(latents)
        if not finite.all() or not torch.isfinite(latents).all():
            raise self._error(
                f"its VAE gives values that are not finite in {self.generator.config.dtype}",
                "set generator.dtype to bfloat16 or float32, or vae/config.json's force_upcast to true",
            )
        lost = float(np.mean((decoded.astype(np.float64) - pixels) ** 2) / max(float(pixels.var()), 1.0))
        if lost > MOST_LOST:
            raise self._error(
                f"its VAE loses {lost:.0%} of the reference images' variance", "the VAE belongs to another model"
            )
        return latents, lost

    def _encode(self, pixels_BHWC: Pixels) -> Tensor:
        """Latents of RGB images, as the denoiser takes them, float32."""
        vae: Any = self.generator.checkpoint.vae
        images = torch.from_numpy(pixels_BHWC).permute(0, 3, 1, 2).float().to(vae.device) / 127.5 - 1
        raw = torch.cat([vae.encode(part.to(vae.dtype)).latent_dist.mean.float() for part in images[:, None]])
        return _scaled(raw, vae.config)

    def _sampled(self, text: Text) -> tuple[Tensor, Pixels]:
        """Return one sample per caption: latents and images."""
        generator = self.generator
        noise, generators = initial_latents(range(len(text)), generator.latent_shape)
        step = max(1, generator.batch_size)
        parts = [
            sample(
                generator.denoiser,
                generator.scheduler,
                generator.condition(text[rows]),
                noise[rows.start : rows.stop],
                generators[rows.start : rows.stop],
                generator.config.steps,
            )
            for rows in (range(at, min(at + step, len(text))) for at in range(0, len(text), step))
        ]
        latents = torch.cat(parts)
        images, finite = generator.decode(latents)
        _check_images(images, finite & torch.isfinite(latents).flatten(1).all(dim=1).cpu().numpy(), generator.config)
        return latents, images

    def _ratios(self, latents_BCHW: Tensor, text: Text) -> dict[str, list[float]]:
        """Measure, by prediction type, the share of the linear filter's error that is left at each level."""
        ratios: dict[str, list[float]] = {name: [] for name in TYPES}
        seeds = range(FIRST_SEED, FIRST_SEED + len(latents_BCHW))
        noise = initial_latents(seeds, self.generator.latent_shape)[0].to(latents_BCHW.device)
        variance = latents_BCHW.var(dim=(0, 2, 3), keepdim=True)
        table = self.denoiser.alpha_bars
        for wanted in LEVELS:
            level = self.denoiser.level(int((table - wanted).abs().argmin()))
            a = level.alpha_bar
            x_t = a**0.5 * latents_BCHW + level.sigma * noise
            output = torch.cat(
                [self.denoiser.output(x_t[at : at + 1], level, text[[at]]) for at in range(len(x_t))]
                if len(x_t) > self.generator.batch_size
                else [self.denoiser.output(x_t, level, text)]
            )
            if not torch.isfinite(output).all():
                raise self._error(
                    f"its denoiser gives values that are not finite in {self.generator.config.dtype}",
                    "the weights are damaged, or overflow: try generator.dtype bfloat16 or float32",
                )
            filtered = float((variance * (1 - a) / (a * variance + 1 - a)).mean())
            for name, estimate in _estimates(output, x_t, a).items():
                error = float((estimate - latents_BCHW).square().mean())
                ratios[name].append(error / max(filtered, 1e-9))
        return ratios

    def _judge(self, ratios: Mapping[str, Sequence[float]], words: str) -> None:
        _judge(ratios, self.denoiser.prediction, words, self.most, self.where)

    def _error(self, what: str, hint: str = "its weights are damaged") -> ModelError:
        return ModelError(what, where=self.where, hint=f"{hint}; {OFF}")


def _estimates(output: Tensor, x_t: Tensor, a: float) -> dict[str, Tensor]:
    """Return the clean latent by each reading of the network's output."""
    return {
        "epsilon": (x_t - (1 - a) ** 0.5 * output) / a**0.5,
        "v_prediction": a**0.5 * x_t - (1 - a) ** 0.5 * output,
        "sample": output,
    }


def _scaled(raw: Tensor, config: Any) -> Tensor:
    """Return what a VAE's encoder gives, as the denoiser takes it: the inverse of `decoding.Decoder`'s scaling."""
    if config.get("latents_mean") is not None and config.get("latents_std") is not None:
        mean, std = (raw.new_tensor(config[key]).view(1, -1, 1, 1) for key in ("latents_mean", "latents_std"))
        return (raw - mean) * float(config.scaling_factor) / std
    return (raw - float(config.get("shift_factor") or 0.0)) * float(config.scaling_factor)


def _cut(image_HWC: Pixels, size: tuple[int, int]) -> Pixels:
    """Return the middle of an image, of the aspect of `size` = (H, W)."""
    height, width = image_HWC.shape[:2]
    scale = min(height / size[0], width / size[1])
    rows, columns = max(1, round(size[0] * scale)), max(1, round(size[1] * scale))
    top, left = (height - rows) // 2, (width - columns) // 2
    return image_HWC[top : top + rows, left : left + columns]


def _check_images(images_BHWC: Pixels, finite_B: npt.NDArray[np.bool_], config: Any) -> None:
    """Refuse images that are not finite, of one colour, white noise, or all the same."""
    if not finite_B.all():
        raise ModelError(
            f"{int((~finite_B).sum())} of {len(finite_B)} trial images are not finite in {config.dtype}",
            where=config.path,
            hint=f"weights or scheduler are broken, or overflow: try generator.dtype bfloat16 or float32; {OFF}",
        )
    values = images_BHWC.astype(np.float64)
    broken = None
    if (values.std(axis=(1, 2, 3)) < 1).all():
        broken = "are of one colour"
    elif len(values) > 1 and all(np.array_equal(values[0], one) for one in values[1:]):
        broken = "of different captions and seeds are the same"
    elif (rough := float(np.mean([_roughness(image) for image in values]))) > MOST_ROUGH:
        broken = f"are noise (neighbouring pixels differ by {rough:.0%} of white noise's)"
    if broken:
        raise ModelError(
            f"its {len(values)} trial images {broken}",
            where=config.path,
            hint=f"weights, VAE or scheduler are broken, or steps and guidance do not suit it; {OFF}",
        )


def _roughness(image_HWC: npt.NDArray[np.float64]) -> float:
    """Return the mean squared difference of neighbouring pixels, over twice the variance: 1 for white noise."""
    down, across = np.diff(image_HWC, axis=0), np.diff(image_HWC, axis=1)
    spread = float(image_HWC.reshape(-1, image_HWC.shape[-1]).var(axis=0).mean())
    return float((np.square(down).mean() + np.square(across).mean()) / 2 / (2 * spread + 1e-9))


def _check_stock(generator: StockGenerator, captions: list[str]) -> Sanity:
    """Check a pipeline of diffusers by its images and by how its denoiser does on its own samples."""
    two, config, scheduler = captions[:2], generator.config, generator.pipeline.scheduler
    rows = min(len(two), generator.batch_size)
    with watched(generator.denoiser, scheduler) as seen:
        made = [generator.generate(two[:rows], range(rows))]
    if rows < len(two):
        made.append(generator.generate(two[rows:], range(rows, len(two))))
    images, finite = (np.concatenate([getattr(one, key) for one in made]) for key in ("images_BHWC", "finite_B"))
    _check_images(images, finite, config)
    try:
        kind, ratios = error_left(generator.denoiser, scheduler, seen, config.guidance, LEVELS)
    except NotMeasuredError as why:
        return Sanity(unmeasured=str(why))
    few = config.steps <= FEW_STEPS or generator.adapter.distilled
    _judge(ratios, kind, "its own samples", MOST_LEFT_FEW_STEPS if few else MOST_LEFT, config.path)
    if (kept := noise_kept(seen)) > MOST_KEPT:
        raise ModelError(
            f"its samples still contain the noise from which they began (correlation {kept:.0%})",
            where=config.path,
            hint=f"the weights are damaged, or its scheduler is that of another kind of model; {OFF}",
        )
    return Sanity(kind, {"samples": means(ratios)})


def _judge(ratios: Mapping[str, Sequence[float]], named: str, words: str, most: float, where: str) -> None:
    """Refuse a denoiser that leaves too much under the reading that it is sampled by, or fits another one better."""
    shares = means(ratios)
    best = min(shares, key=lambda name: shares[name])
    # A distilled model, too, knows more than the filter where there is little noise; weights that know nothing do not.
    if shares[named] < most and min(ratios[named]) < MOST_LEFT and shares[best] > CLEARLY_BETTER * shares[named]:
        return
    found = f"read as {named}, as it is sampled, it leaves {shares[named]:.0%} of a linear filter's error"
    if best != named and shares[best] < most:
        hint = f"set prediction_type to {best} in its scheduler/scheduler_config.json"
        if "velocity" in shares:
            hint = (
                f"its scheduler is that of flow matching, and its denoiser predicts {best}: give it its own scheduler"
            )
        raise ModelError(
            f"is sampled as something that it is not: on {words}, {found}, and read as {best} {shares[best]:.0%}",
            where=where,
            hint=f"{hint}; {OFF}",
        )
    others = ", ".join(f"as {name} {shares[name]:.0%}" for name in shares if name != named)
    raise ModelError(
        f"does not denoise: on {words}, {found} (a trained model at most {most:.0%}; {others})",
        where=where,
        hint="the weights are damaged, or were trained under another kind of scheduler (EDM, flow matching) or VAE; "
        + OFF,
    )
