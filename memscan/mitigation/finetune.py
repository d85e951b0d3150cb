"""This module trains the whole UNet further, with an adversary inside the training or as a plain control.

Adversarial fine-tuning (Kowalczuk et al. 2025, "Finding DoRI"): each epoch first runs the embedding attack for every
memorised image; the training then minimises

    L = E ‖target - f_θ(x_t, t, y)‖²                over ordinary pairs of image and caption
      + weight · E ‖target - f_θ(x̃_t, t, y_adv)‖²   over the attack's embeddings, x̃ a surrogate image

where a surrogate is the image of an already pruned model for the memorised prompt. It has the prompt's subject, but is
no copy. Here a prompt has several surrogates, so that no single new image takes the place of the old one, and searches
continue over several epochs (`adversary.py`). The captions of the memorised prompts are used in addition to the
attack's embeddings, so that the plain prompt is unlearned too. The control has only the first term, over a training set
that contains every image once (de-duplicated).

Learning rate and batch size are not published: 1e-5 with an effective batch of 16 is where Stable Diffusion is
usually started. All draws of an epoch come from one generator seeded by the epoch and belong to the whole batch,
which the workers cut into equal slices: any number of workers sees the same batches.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from memscan.models.denoiser import Denoiser


@dataclass(frozen=True)
class FinetuneSettings:
    """These settings say what the training does.

    Args:
        batch: pairs of one step over all workers, of the ordinary and of the adversarial term each.
        micro_batch: pairs of one backward pass of one worker; gradients add up until the batch is done.
        weight: of the adversarial term; 0 is the control.
        early: emphasis of the noisy timesteps in the adversarial term: the density rises with t to the power of
            early - 1; 1 is uniform, as published. What decides the image is decided there.
        caption_dropout: share of ordinary captions replaced by the empty one, as classifier-free guidance is trained.
        warmup: steps over which the rate rises.
    """

    epochs: int = 5
    steps_per_epoch: int = 100
    batch: int = 16
    micro_batch: int = 16
    rate: float = 1e-5
    weight: float = 1.0
    ema: float = 0.99
    early: float = 1.0
    caption_dropout: float = 0.1
    warmup: int = 10
    clip: float = 1.0
    seed: int = 0


@dataclass(frozen=True)
class Pairs:
    """These are images and embeddings to train on: latents (N, C, h, w), text (M, T, D), and the text of each image.

    `text_N` may repeat an embedding for several images; `image_P` and `text_P` are the pairs.
    """

    latents_NCHW: Tensor
    text_MTD: Tensor
    image_P: Tensor
    text_P: Tensor

    def __len__(self) -> int:
        return len(self.image_P)


@dataclass(frozen=True)
class Draw:
    """This is one step's batch of pairs with its noise, from which every worker cuts its slice."""

    pair_B: Tensor
    noise_BCHW: Tensor
    time_B: Tensor
    drop_B: Tensor

    def part(self, rows: slice) -> Draw:
        return Draw(self.pair_B[rows], self.noise_BCHW[rows], self.time_B[rows], self.drop_B[rows])


def draws(pairs: Pairs, settings: FinetuneSettings, timesteps: int, epoch: int, stream: int) -> Iterator[Draw]:
    """Yield the batches of an epoch without end: pairs in shuffled passes, each complete before the next begins.

    Args:
        stream: 0 for ordinary, 1 for adversarial pairs.
    """
    generator = torch.Generator().manual_seed(settings.seed * 1_000_003 + epoch * 2 + stream)
    shape = (settings.batch, *pairs.latents_NCHW.shape[1:])
    power = 1 / settings.early if stream == 1 else 1.0
    waiting = torch.empty(0, dtype=torch.long)
    while True:
        while len(waiting) < settings.batch:
            waiting = torch.cat([waiting, torch.randperm(len(pairs), generator=generator)])
        chosen, waiting = waiting[: settings.batch], waiting[settings.batch :]
        yield Draw(
            chosen,
            torch.randn(shape, generator=generator),
            (torch.rand(settings.batch, generator=generator) ** power * timesteps).long().clamp_(max=timesteps - 1),
            torch.rand(settings.batch, generator=generator) < settings.caption_dropout,
        )


@dataclass(frozen=True)
class Term:
    """This is one term of the loss in one micro-batch; `empty_TD` replaces captions that were drawn to be dropped."""

    pairs: Pairs
    draw: Draw
    weight: float = 1.0
    empty_TD: Tensor | None = None


def step_loss(denoiser: Denoiser, terms: Sequence[Term]) -> Tensor:
    """Return the weighted sum over the terms of the mean loss of their micro-batch, from one denoiser call."""
    device = denoiser.device
    texts = []
    for term in terms:
        text = term.pairs.text_MTD[term.pairs.text_P[term.draw.pair_B]]
        if term.empty_TD is not None:
            text = torch.where(term.draw.drop_B[:, None, None], term.empty_TD, text)
        texts.append(text)
    clean = torch.cat([term.pairs.latents_NCHW[term.pairs.image_P[term.draw.pair_B]] for term in terms])
    noise = torch.cat([term.draw.noise_BCHW for term in terms])
    time = torch.cat([term.draw.time_B for term in terms])
    losses = denoiser.losses(clean.to(device), noise.to(device), time.to(device), torch.cat(texts).to(device))
    means = [part.mean() for part in torch.split(losses, [len(term.draw.pair_B) for term in terms])]
    return torch.stack([term.weight * mean for term, mean in zip(terms, means, strict=True)]).sum()


def slices(settings: FinetuneSettings, rank: int, world: int) -> list[slice]:
    """Return the micro-batches of one worker in a step's batch. Raises ValueError if the batch cannot be cut evenly."""
    if settings.batch % world:
        raise ValueError(f"a batch of {settings.batch} cannot be shared by {world} workers")
    share = settings.batch // world
    size = min(settings.micro_batch, share)
    if share % size:
        raise ValueError(f"{share} pairs per worker are not a multiple of a micro-batch of {size}")
    start = rank * share
    return [slice(at, at + size) for at in range(start, start + share, size)]


def learning_rate(settings: FinetuneSettings, step: int) -> float:
    """Return the learning rate: a linear warm-up, then half a cosine to zero over all epochs; `step` counts from 0."""
    total = max(1, settings.epochs * settings.steps_per_epoch)
    rise = min(1.0, (step + 1) / max(1, settings.warmup))
    return settings.rate * rise * (0.5 + 0.5 * math.cos(math.pi * step / total))


class Average:
    """This is the exponential moving average of a module's parameters, in float32."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay, self.steps = decay, 0
        self.values = {name: value.detach().float().clone() for name, value in module.named_parameters()}

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        """Add one step.

        The decay rises to its value over the first steps, so that the initial weights are soon forgotten.
        """
        self.steps += 1
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        for name, value in module.named_parameters():
            self.values[name].lerp_(value.detach().float(), 1 - decay)


def owned_pairs(
    latents_NCHW: Tensor, image_owners: Sequence[int], text_MTD: Tensor, text_owners: Sequence[int]
) -> Pairs:
    """Return every image of an owner with every text of the same owner.

    Args:
        image_owners: whose surrogate each image is, by number.
        text_owners: whose embedding each text is.
    """
    images: dict[int, list[int]] = {}
    for at, owner in enumerate(image_owners):
        images.setdefault(owner, []).append(at)
    pairs = [(image, text) for text, owner in enumerate(text_owners) for image in images.get(owner, ())]
    return Pairs(
        latents_NCHW, text_MTD, torch.tensor([image for image, _ in pairs]), torch.tensor([text for _, text in pairs])
    )


def flat_state(state: dict[str, Any]) -> dict[str, Any]:
    """Return an optimiser's state as tensors by name, because safetensors holds only tensors and pickle is not read."""
    return {
        f"{at}.{key}": value.cpu().contiguous() for at, entry in state["state"].items() for key, value in entry.items()
    }


def nested_state(tensors: dict[str, Any], like: dict[str, Any]) -> dict[str, Any]:
    """Return an optimiser's state from the tensors of `flat_state`; groups as in `like`."""
    state: dict[int, dict[str, Any]] = {}
    for name, value in tensors.items():
        at, _, key = name.partition(".")
        state.setdefault(int(at), {})[key] = value
    return {"state": state, "param_groups": like["param_groups"]}
