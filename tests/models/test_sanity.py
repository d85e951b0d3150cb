"""The sanity check of the generator: right checkpoints pass, wrong ones are refused, and the line says how.

Families: the shipped planted model (trained weights, v), and the exact denoiser of a mixture of a few latents, whose
formula is known, as a network that predicts noise and as one that predicts v.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from memscan.config import GeneratorConfig
from memscan.errors import ModelError
from memscan.models.checkpoint import Checkpoint
from memscan.models.generator import Generator
from memscan.models.sanity import Sanity, check_generator
from memscan.models.schedulers import make_scheduler
from memscan.planted.world import shipped_world, world_config
from memscan.sources.reading import open_source
from memscan.sources.sample import Example, examples

CAPTIONS = ["a red cup on a table", "two green boats"]


class Exact(nn.Module):
    """The posterior mean of equally likely latents given x_t, told as noise, v or the clean latent."""

    def __init__(self, like: Any, latents_KCHW: Tensor, schedule: dict[str, Any], says: str) -> None:
        super().__init__()
        self.config, self.says = like.config, says
        self.weight = nn.Parameter(torch.zeros(1), requires_grad=False)
        self.latents_KCHW = latents_KCHW
        self.table = make_scheduler("DDIMScheduler", schedule, where="here").alphas_cumprod.double()
        self.device, self.dtype = torch.device("cpu"), torch.float32

    def forward(self, x: Tensor, t: Tensor, **_: Any) -> tuple[Tensor]:
        a = float(self.table[int(t.reshape(-1)[0])])
        far = (x[:, None] - a**0.5 * self.latents_KCHW[None]).square().sum(dim=(2, 3, 4))
        share = torch.softmax(-far.double() / (2 * (1 - a)), dim=1).float()
        clean = torch.einsum("bk,kchw->bchw", share, self.latents_KCHW)
        noise = (x - a**0.5 * clean) / (1 - a) ** 0.5
        told = {"epsilon": noise, "v_prediction": a**0.5 * noise - (1 - a) ** 0.5 * clean, "sample": clean}
        return (told[self.says],)


@dataclass(frozen=True)
class World:
    checkpoint: Checkpoint
    references: list[Example]
    latents_KCHW: Tensor

    def checked(self, checkpoint: Checkpoint, references: bool = True, **settings: Any) -> Sanity:
        config = GeneratorConfig(**({"path": checkpoint.where, "steps": 10, "guidance": 2.0} | settings))
        shown = self.references if references else []
        return check_generator(
            Generator(checkpoint, config), CAPTIONS, [image for image, _ in shown], [words for _, words in shown]
        )

    def exact(self, says: str, named: str | None = None) -> Checkpoint:
        schedule = self.checkpoint.scheduler_config | {"prediction_type": named or says}
        unet = Exact(self.checkpoint.unet, self.latents_KCHW, schedule | {"prediction_type": "epsilon"}, says)
        return replace(self.checkpoint, unet=unet, scheduler_config=schedule)

    def changed(self, part: str, change: Callable[[Any], Any]) -> Checkpoint:
        network = copy.deepcopy(getattr(self.checkpoint, part))
        with torch.no_grad():
            change(network)
        return replace(self.checkpoint, **{part: network})

    def scheduled(self, **changes: Any) -> Checkpoint:
        return replace(self.checkpoint, scheduler_config=self.checkpoint.scheduler_config | changes)


@pytest.fixture(scope="module")
def world() -> World:
    generator = Generator.load(world_config().generator)
    references = examples(open_source(str(shipped_world() / "references.parquet")), 8)
    pixels = np.stack([image for image, _ in references])
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.inference_mode():
        latents = generator.checkpoint.vae.encode(images).latent_dist.mean
    return World(generator.checkpoint, references, latents.clone())


def zeroed(network: Any) -> None:
    for parameter in network.parameters():
        parameter.zero_()


def shuffled(network: Any) -> None:
    order = torch.Generator().manual_seed(0)
    for parameter in network.parameters():
        values = parameter.flatten()[torch.randperm(parameter.numel(), generator=order)]
        parameter.copy_(values.view_as(parameter))


def diverged(network: Any) -> None:
    next(network.parameters()).fill_(float("nan"))


def overflowing(network: Any) -> None:
    for parameter in network.parameters():
        parameter.mul_(1e30)


def test_the_planted_model_passes_as_what_it_is(world: World) -> None:
    found = world.checked(world.checkpoint)
    assert found.prediction == "v_prediction"
    assert 0.3 < found.left["references"]["v_prediction"] < 0.6
    assert 0.3 < found.left["samples"]["v_prediction"] < 0.6
    assert found.vae_lost is not None
    assert found.vae_lost < 0.05
    assert "49%" in found.describe() or "denoises as v_prediction" in found.describe()


@pytest.mark.parametrize(
    "settings",
    [
        {"scheduler": "EulerDiscreteScheduler", "steps": 9, "guidance": 1.0},
        {"scheduler": "DPMSolverMultistepScheduler", "guidance": 7.0, "references": False},
        {"steps": 3, "guidance": 1.0, "references": False},
    ],
)
def test_a_right_model_passes_however_it_is_sampled(world: World, settings: dict[str, Any]) -> None:
    world.checked(world.checkpoint, **settings)


@pytest.mark.parametrize("says", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("references", [True, False])
def test_exact_denoisers_pass(world: World, says: str, references: bool) -> None:
    assert world.checked(world.exact(says), references).prediction == says


@pytest.mark.parametrize(
    ("says", "named"), [("epsilon", "v_prediction"), ("v_prediction", "epsilon"), ("sample", "epsilon")]
)
def test_the_prediction_type_that_fits_is_named(world: World, says: str, named: str) -> None:
    with pytest.raises(ModelError, match=f"read as {named}.*and read as {says} .*set prediction_type to {says}"):
        world.checked(world.exact(says, named), steps=9, guidance=1.0)


@pytest.mark.parametrize("references", [True, False])
def test_a_wrong_prediction_type_of_trained_weights(world: World, references: bool) -> None:
    with pytest.raises(ModelError, match=r"read as epsilon.*it leaves \d{3}%.*generator.sanity: off"):
        world.checked(world.scheduled(prediction_type="epsilon"), references)


def test_the_exact_denoiser_misread_has_no_samples_that_it_denoises(world: World) -> None:
    for says, named in (("epsilon", "v_prediction"), ("v_prediction", "epsilon")):
        with pytest.raises(ModelError, match="its own samples"):
            world.checked(world.exact(says, named), False)


@pytest.mark.parametrize(
    ("part", "change", "line"),
    [
        ("unet", zeroed, "does not denoise"),
        ("unet", shuffled, "does not denoise"),
        ("unet", diverged, "not finite"),
        ("unet", overflowing, "not finite"),
        ("vae", zeroed, "VAE loses|one colour"),
        ("vae", shuffled, "VAE loses"),
        ("vae", diverged, "not finite"),
        ("text_encoder", zeroed, "every caption the same"),
        ("text_encoder", diverged, "not finite"),
    ],
)
@pytest.mark.parametrize("references", [True, False])
def test_broken_weights_are_refused(world: World, part: str, change: Any, line: str, references: bool) -> None:
    with pytest.raises(ModelError, match=line):
        world.checked(world.changed(part, change), references, steps=9, guidance=1.0)


def test_a_network_that_takes_more_than_text_is_refused_and_not_told_as_rows(world: World) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise ValueError("class_labels should be provided when num_class_embeds > 0")

    checkpoint = replace(world.checkpoint, unet=copy.copy(world.checkpoint.unet))
    checkpoint.unet.forward = fails
    with pytest.raises(ModelError, match=r"cannot generate an image as configured.*class_labels"):
        world.checked(checkpoint)
