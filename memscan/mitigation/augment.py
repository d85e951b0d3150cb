"""This module makes more samples of a cluster's captions: paraphrases by template, and text embeddings with noise.

FB-Mem's release holds paraphrased prompts and noise on text embeddings (Di et al. 2025). Templates change the text
around a caption and never its own words, so that they need no language model, and work for titles and sentences alike.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

TEMPLATES = (
    "a picture of {}",
    "{}, photo",
    "an image of {}",
    "{} - picture",
    "this is {}",
    "{}, high quality",
    "photo: {}",
    "the {}",
)


def paraphrases(caption: str, count: int, skip: int = 0) -> list[str]:
    """Return up to `count` paraphrases of a caption, which are the same every time.

    Args:
        skip: leave out this number of the caption's first templates, with which a mitigation was made.
    """
    start = hashlib.blake2b(caption.encode("utf-8", "replace"), digest_size=4).digest()
    order = sorted(range(len(TEMPLATES)), key=lambda at: hashlib.blake2b(start + bytes([at]), digest_size=4).digest())
    return [TEMPLATES[at].format(caption) for at in order[skip : skip + count]]


def noisy_embeddings(text_TD: Tensor, count: int, share: float, seed: int) -> Tensor:
    """Return embeddings with Gaussian noise, (count, T, D).

    Args:
        share: standard deviation of the noise, as a share of the embedding's own.
        seed: of the noise.
    """
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn((count, *text_TD.shape), generator=generator).to(text_TD)
    return text_TD + share * text_TD.std() * noise
