"""This module compares one generated image with one reference.

It gives label, scores, the distance from the threshold, and a figure.

`memscan compare` prints this. The census does the same for every generation and its candidates.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from memscan.errors import InputError, RowReject
from memscan.io import images
from memscan.metric.calibration import Calibration
from memscan.metric.fbmem import FbMem, RegionScores
from memscan.metric.regions import compose_background, compose_foreground
from memscan.records import REGIONS, Label

# Between these probabilities a region is near its threshold: one pair in twenty like it lies on the other side.
NEAR = (0.05, 0.95)
_ASPECT_TOLERANCE = 0.01


@dataclass(frozen=True)
class Picture:
    """This is a picture: image_HWC uint8 RGB and mask_HW float32 in [0, 1] of the same size.

    It names the file that they come from.

    `mask_HW` is None for a generated picture that is compared under the reference's mask.
    """

    name: str
    image_HWC: NDArray[np.uint8]
    mask_HW: NDArray[np.float32] | None

    @property
    def foreground_area(self) -> float | None:
        """This is the mean of the mask, in [0, 1]; None without a mask."""
        return None if self.mask_HW is None else float(self.mask_HW.mean())


@dataclass(frozen=True)
class Comparison:
    """This is a verdict on one pair.

    Attributes:
        label, scores, margin: see `memscan.metric.FbMem`.
        maps: similarity maps by title, HW float32 in [-1, 1], of the variant's own resolution.
        probability: that a region is copied, by region; None if the thresholds have no calibration.
    """

    generated: Picture
    reference: Picture
    label: Label
    scores: RegionScores
    margin: float
    metric: FbMem[Any]
    maps: dict[str, NDArray[np.float32]]
    probability: dict[str, float] | None

    @property
    def near_threshold(self) -> bool | None:
        """Return whether another verdict is also plausible; None if there is no calibration."""
        if self.probability is None:
            return None
        return any(NEAR[0] < value < NEAR[1] for value in self.probability.values())

    def to_json(self) -> dict[str, Any]:
        """Return the verdict for JSON; areas and scores are in [0, 1], the margin is in score units."""
        config, scores = self.metric.config, self.scores
        return {
            "generated": self.generated.name,
            "reference": self.reference.name,
            "label": self.label.value,
            "scores": {
                "foreground": scores.foreground,
                "background": scores.background,
                "whole": scores.whole,
            },
            "areas": {
                "foreground": scores.foreground_area,
                "background": scores.background_area,
                "generated_foreground": self.generated.foreground_area,
                "reference_foreground": self.reference.foreground_area,
            },
            "copied": list(scores.copied),
            "terms": dict(scores.terms),
            "threshold": {"foreground": config.foreground_threshold, "background": config.background_threshold},
            "threshold_source": config.threshold_source,
            "margin": self.margin,
            "probability": self.probability,
            "near_threshold": self.near_threshold,
            "variant": config.variant,
            "canvas": config.canvas,
            "masks": config.masks,
        }


class EmbedsImages(Protocol):
    """This is what a copy-detection embedder does; see `memscan.models.embedder`."""

    def embed(self, images: Sequence[NDArray[np.uint8]]) -> NDArray[np.float32]:
        """Return unit vectors (N, D) of images."""


def _similarities(embedder: EmbedsImages, generated: Picture, reference: Picture) -> dict[str, float]:
    """Return the cosine of both pictures' vectors by region; a generation without a mask is cut by the reference's."""
    assert reference.mask_HW is not None
    own = generated.mask_HW
    if own is None:
        height, width = generated.image_HWC.shape[:2]
        resized = Image.fromarray(reference.mask_HW).resize((width, height), Image.Resampling.BILINEAR)
        own = np.clip(np.asarray(resized, np.float32), 0, 1)
    views = [
        view
        for image, mask in ((generated.image_HWC, own), (reference.image_HWC, reference.mask_HW))
        for view in (image, compose_foreground(image, mask), compose_background(image, mask))
    ]
    vectors_ND = embedder.embed(views)
    return dict(zip(REGIONS, (vectors_ND[:3] * vectors_ND[3:]).sum(axis=1).tolist(), strict=True))


def prepare_picture(metric: FbMem[Any], picture: Picture) -> Any:
    """Return what `FbMem.prepare` gives for a picture. Raises RowReject for a mask that is not finite."""
    return metric.prepare(picture.image_HWC, picture.mask_HW)


class Preparations:
    """This prepares pictures for a metric, and remembers the last ones: a reference often belongs to several pairs.

    Args:
        kept: how many are remembered; each takes 6 MiB on a canvas of 128.
    """

    def __init__(self, metric: FbMem[Any], kept: int = 48) -> None:
        self._metric, self._kept = metric, kept
        self._known: OrderedDict[bytes, Any] = OrderedDict()

    def __call__(self, picture: Picture) -> Any:
        """Return what `FbMem.prepare` gives. Raises RowReject for a mask that is not finite."""
        digest = hashlib.blake2b(repr(picture.image_HWC.shape).encode())
        digest.update(np.ascontiguousarray(picture.image_HWC).data)
        if picture.mask_HW is not None:
            digest.update(np.ascontiguousarray(picture.mask_HW).data)
        key = digest.digest()
        if key not in self._known:
            self._known[key] = prepare_picture(self._metric, picture)
        self._known.move_to_end(key)
        while len(self._known) > self._kept:
            self._known.popitem(last=False)
        return self._known[key]


def compare_pictures(
    metric: FbMem[Any],
    generated: Picture,
    reference: Picture,
    calibration: Calibration | None = None,
    embedder: EmbedsImages | None = None,
    *,
    maps: bool = True,
    prepare: Callable[[Picture], Any] | None = None,
) -> Comparison:
    """Compare one pair of pictures, and return the verdict on it.

    Args:
        calibration: where the metric's thresholds come from, for probabilities.
        embedder: gives the similarities by region that a variant takes beside its own scores; None leaves them out.
        maps: False leaves out the similarity maps, which only a figure needs.
        prepare: does what `metric.prepare` does for a picture, and may remember it (`Preparations`).

    Raises:
        RowReject: a mask is not finite.
    """
    prepare = prepare or partial(prepare_picture, metric)
    own, other = prepare(generated), prepare(reference)
    known = {} if embedder is None else _similarities(embedder, generated, reference)
    scores = metric.score_found(own, [other], [known])[0]
    probability = None
    if calibration is not None:
        probability = {
            "foreground": calibration.probability("foreground", scores.foreground),
            "background": calibration.probability("background", scores.background),
        }
    return Comparison(
        generated=generated,
        reference=reference,
        label=metric.classify(scores),
        scores=scores,
        margin=metric.margin(scores),
        metric=metric,
        maps={title: map_HW.cpu().numpy() for title, map_HW in metric.maps(own, other).items()} if maps else {},
        probability=probability,
    )


def read_image(path: str | Path) -> NDArray[np.uint8]:
    """Return an image file as `images.decode` reads it. Raises InputError if it is missing or damaged."""
    try:
        return images.decode(Path(path).read_bytes())
    except OSError as error:
        raise InputError(f"cannot be read ({error.strerror or error})", where=str(path)) from error
    except RowReject as reject:
        raise InputError(f"is not an image: {reject.message}", where=str(path)) from reject


def read_mask(path: str | Path, image_HWC: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Return a mask file (white is foreground) at its image's size.

    Another resolution is resampled, and another aspect is refused.

    Raises:
        InputError: no such file, not an image, or of another aspect ratio than its image.
    """
    try:
        mask_HW = images.decode_mask(Path(path).read_bytes())
    except OSError as error:
        raise InputError(f"cannot be read ({error.strerror or error})", where=str(path)) from error
    except RowReject as reject:
        raise InputError(f"is not a mask: {reject.message}", where=str(path)) from reject
    (height, width), (mask_height, mask_width) = image_HWC.shape[:2], mask_HW.shape
    if (height, width) == mask_HW.shape:
        return mask_HW
    if abs(mask_width / mask_height * height / width - 1) > _ASPECT_TOLERANCE:
        raise InputError(
            f"is {mask_width} x {mask_height} and its image {width} x {height}",
            where=str(path),
            hint="give the mask in its image's orientation and aspect ratio",
        )
    resized = Image.fromarray(mask_HW).resize((width, height), Image.Resampling.BILINEAR)
    return np.clip(np.asarray(resized, np.float32), 0, 1)


def draw(comparison: Comparison, path: str | Path) -> None:
    """Draw both images, their masks, the similarity maps and the verdict; the suffix of `path` decides the format.

    Raises:
        InputError: the file cannot be written, or its suffix is not a figure's.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.6, 6.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, 3, squeeze=False)
    for row, (title, picture) in enumerate((("generated", comparison.generated), ("reference", comparison.reference))):
        axes[row, 0].imshow(picture.image_HWC)
        axes[row, 0].set_title(f"{title}: {Path(picture.name).name}", fontsize=9)
        area = picture.foreground_area
        if picture.mask_HW is None or area is None:
            axes[row, 1].set_title("cut by the reference's mask", fontsize=9)
        else:
            axes[row, 1].imshow(picture.mask_HW, cmap="gray", vmin=0, vmax=1)
            axes[row, 1].set_title(f"foreground, {area:.0%} of the image", fontsize=9)
    for row, (title, map_HW) in enumerate(list(comparison.maps.items())[:2]):
        shown = axes[row, 2].imshow(map_HW, cmap="viridis", vmin=0, vmax=1)
        axes[row, 2].set_title(title, fontsize=9)
        figure.colorbar(shown, ax=axes[row, 2], fraction=0.046, pad=0.02)
    for axis in axes.flat:
        axis.set_axis_off()
    figure.suptitle(headline(comparison), fontsize=11)
    try:
        figure.savefig(str(path), dpi=120)
    except (OSError, ValueError) as error:
        raise InputError(f"the figure cannot be written ({error})", where=str(path)) from error


def headline(comparison: Comparison) -> str:
    """Return the verdict in one line."""
    config, scores = comparison.metric.config, comparison.scores
    near = ", near the threshold" if comparison.near_threshold else ""
    copied = {region: ", copied" if region in scores.copied else "" for region in ("foreground", "background")}
    return (
        f"{comparison.label}   "
        f"foreground {scores.foreground:.3f} (τ {config.foreground_threshold:g}{copied['foreground']})   "
        f"background {scores.background:.3f} (τ {config.background_threshold:g}{copied['background']})   "
        f"margin {comparison.margin:+.3f}{near}   {config.variant}, canvas {config.canvas}"
    )
