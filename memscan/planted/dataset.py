"""This module renders a planned world: the training images with their near-duplicates, and the tables that ship."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import pyarrow as pa
import torch
from diffusers import AutoencoderKL
from numpy.typing import NDArray
from PIL import Image
from transformers import CLIPTokenizer

from memscan import records
from memscan.planted.autoencoder import encode
from memscan.planted.design import PlantedPrompt, Reference, WorldDesign
from memscan.planted.diffusion import TrainingSet
from memscan.planted.renderer import render

QUALITY = 90
Scalar = TypeVar("Scalar", bound=np.generic)


@dataclass(frozen=True)
class RenderedWorld:
    """This is a rendered world.

    `encoded` has one WebP per reference, images_NHWC (uint8) are the decoded files, and masks_NHW (float32) are exact.
    """

    encoded: tuple[bytes, ...]
    images_NHWC: NDArray[np.uint8]
    masks_NHW: NDArray[np.float32]


def render_world(design: WorldDesign) -> RenderedWorld:
    """Draw every reference and pass it through WebP, so that the model is trained on exactly the pixels that ship."""
    encoded, images, masks = [], [], []
    for reference in design.references:
        image, mask = _draw(reference)
        data = _webp(image)
        encoded.append(data)
        images.append(np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))
        masks.append(mask)
    return RenderedWorld(tuple(encoded), np.stack(images), np.stack(masks))


def _draw(reference: Reference) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    image, mask = render(reference.scene)
    variation = reference.variation
    image = np.clip(image.astype(np.float32) * variation.brightness, 0, 255).astype(np.uint8)
    return _shifted(image, variation.shift), _shifted(mask, variation.shift)


def _shifted(array: NDArray[Scalar], shift: tuple[int, int]) -> NDArray[Scalar]:
    """Moved by whole pixels; the border is repeated."""
    height, width = array.shape[:2]
    rows = np.clip(np.arange(height) - shift[0], 0, height - 1)
    columns = np.clip(np.arange(width) - shift[1], 0, width - 1)
    return array[rows][:, columns]


def _webp(image: NDArray[np.uint8]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "WEBP", quality=QUALITY, method=6)
    return buffer.getvalue()


def training_set(
    design: WorldDesign, world: RenderedWorld, vae: AutoencoderKL, tokenizer: CLIPTokenizer
) -> TrainingSet:
    """Return latents, tokens and copies of the design's rows.

    Only ordinary rows are mirrored, because planted places are exact.
    """
    tokens = tokenizer([row.caption for row in design.rows], padding="max_length", truncation=True, return_tensors="pt")
    copies = torch.tensor([row.copies for row in design.rows])

    def repeated(values: torch.Tensor) -> torch.Tensor:
        return values.repeat_interleave(copies, dim=0)

    return TrainingSet(
        latents_NCHW=encode(vae, world.images_NHWC),
        mirrored_NCHW=encode(vae, np.ascontiguousarray(world.images_NHWC[:, :, ::-1])),
        image_R=repeated(torch.tensor([row.reference for row in design.rows])),
        tokens_RL=repeated(tokens.input_ids),
        mirror_R=repeated(torch.tensor([not row.planted for row in design.rows])),
    )


def reference_table(design: WorldDesign, world: RenderedWorld) -> pa.Table:
    """Return the columns reference_id, caption, url, image (WebP) and mask.

    The mask is exact and for evaluation only; a scan segments the images itself.
    """
    masks = [_mask_png(mask) for mask in world.masks_NHW]
    return pa.table(
        {
            "reference_id": [reference.reference_id for reference in design.references],
            "caption": [reference.caption for reference in design.references],
            "url": [f"planted://{design.seed}/{reference.reference_id}.webp" for reference in design.references],
            "image": pa.array(world.encoded, pa.binary()),
            "mask": pa.array(masks, pa.binary()),
            "path": pa.nulls(len(masks), pa.string()),
        },
        schema=records.REFERENCES,
    )


def _mask_png(mask: NDArray[np.float32]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.asarray(np.rint(mask * 255), np.uint8)).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def truth_table(prompts: tuple[PlantedPrompt, ...]) -> pa.Table:
    """Return the ground truth as `records.TRUTH` says."""
    rows = [
        {
            "prompt_id": records.prompt_id(prompt.caption),
            "caption": prompt.caption,
            "label": prompt.label.value,
            "group": prompt.group,
            "seen": prompt.seen,
            "one_to_many": prompt.one_to_many,
            "reference_ids": list(prompt.reference_ids),
        }
        for prompt in prompts
    ]
    return pa.Table.from_pylist(rows, schema=records.TRUTH)
