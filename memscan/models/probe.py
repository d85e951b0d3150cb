"""This module tests a segmenter or embedder, before it is used, on two images for which the right answer is known.

A network may behave differently from what its file declares. For example, it may answer every image of a batch with the
result of the first one, or accept only images of one shape. So each model is asked about two different images, alone
and together. The answers alone and together must agree, the answers for the two images must differ, and a mask must
cover a plain bright object and not its surroundings.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from memscan.errors import ModelError, RowReject
from memscan.models.embedder import Embedder
from memscan.models.folders import last_line
from memscan.models.segmenter import Segmenter

Pixels = npt.NDArray[np.uint8]
SIDE = 96
# Masks have 8 bits, and a network in half precision moves edges a little; another image's mask differs by .1 and more.
MASKS_AGREE = 0.02
# Cosines of a vector with itself computed in another batch, half precision included; two images are below.
VECTORS_AGREE = 0.999


def scenes() -> tuple[list[Pixels], list[npt.NDArray[np.bool_]]]:
    """Return two images (96, 96, 3) of one bright object on a dark ground, and where the objects are, bool (96, 96)."""
    rows, columns = np.mgrid[:SIDE, :SIDE]
    disc = (rows - 40) ** 2 + (columns - 34) ** 2 < 24**2
    box = (abs(rows - 62) < 18) & (abs(columns - 60) < 26)
    images = []
    for area, colour, ground in ((disc, (250, 225, 90), (20, 34, 48)), (box, (240, 240, 250), (52, 28, 18))):
        shade = (rows / SIDE * 24)[..., None]
        image = np.where(area[..., None], np.array(colour), np.array(ground) + shade)
        images.append(image.astype(np.uint8))
    return images, [disc, box]


def probe_segmenter(segmenter: Segmenter, where: str) -> None:
    """Ask a loaded segmenter about two images.

    Raises:
        ModelError: it fails on images that are plain, its answers depend on the batch, are the same for both images, or
            leave the objects out; says which.
    """
    images, areas = scenes()
    ask = _asking(segmenter.segment, where, "segment", "segmenter")
    alone = [ask([image])[0] for image in images]
    together = ask(images)
    apart = max(float(np.abs(one - other).mean()) for one, other in zip(alone, together, strict=True))
    if apart > MASKS_AGREE:
        raise ModelError(
            f"gives different masks for two images together and for each alone (by {apart:.2f} on average)",
            where=where,
            hint="its batches are broken: set segmenter.batch_size to 1",
        )
    if float(np.abs(alone[0] - alone[1]).mean()) <= MASKS_AGREE / 2:
        raise ModelError("gives two different images the same mask", where=where, hint="it is not a segmenter")
    inside = [float(mask[area].mean()) for mask, area in zip(alone, areas, strict=True)]
    outside = [float(mask[~area].mean()) for mask, area in zip(alone, areas, strict=True)]
    if not any(one > other for one, other in zip(inside, outside, strict=True)):
        raise ModelError(
            f"leaves out a plain object and covers what is around it (mask {max(inside):.2f} on the object, "
            f"{max(outside):.2f} around it)",
            where=where,
            hint="its output is the background, or it needs another segmenter.output or segmenter.preset",
        )


def probe_embedder(embedder: Embedder, where: str, section: str = "embedder") -> None:
    """Ask a loaded embedder about two images, and one of another shape. Raises ModelError as `probe_segmenter`."""
    images, _ = scenes()
    ask = _asking(embedder.embed, where, "embed", section)
    alone = [ask([image])[0] for image in images]
    together = ask(images)
    least = min(float(one @ other) for one, other in zip(alone, together, strict=True))
    if least < VECTORS_AGREE:
        raise ModelError(
            f"gives different vectors for two images together and for each alone (cosine {least:.3f})",
            where=where,
            hint=f"its batches are broken: set {section}.batch_size to 1",
        )
    if float(alone[0] @ alone[1]) > 1 - 1e-6:
        raise ModelError(
            "gives two different images the same vector", where=where, hint="it is not an embedder of images"
        )
    _asking(embedder.embed, where, "embed", section, shape=True)([images[0][: SIDE // 2]])


def _asking(
    ask: Callable[[Sequence[Pixels]], Any], where: str, verb: str, section: str, *, shape: bool = False
) -> Callable[[Sequence[Pixels]], Any]:
    """`ask` whose failures are one line: a plain image is no row that could be bad."""

    def asked(images: Sequence[Pixels]) -> Any:
        try:
            return ask(images)
        except ModelError:
            raise
        except RowReject as error:
            raise ModelError(f"cannot {verb} a plain image ({error.message})", where=where) from error
        except Exception as error:  # onnxruntime's and TorchScript's errors share no base class
            what = f"{len(images)} images at once" if len(images) > 1 else "an image of another shape" if shape else ""
            hint = f"set {section}.batch_size to 1" if len(images) > 1 else f"set {section}.resize to square"
            raise ModelError(
                f"cannot {verb} {what or 'a plain image'} ({last_line(error)})",
                where=where,
                hint=hint if what else None,
            ) from error

    return asked
