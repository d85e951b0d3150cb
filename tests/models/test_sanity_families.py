"""Twenty right and twenty wrong models of three families: the sanity check tells them apart without a miss.

Families: trained weights that predict v, the same told as noise, and flow matching in Stable Diffusion 3's pipeline.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from memscan.errors import ModelError
from memscan.models.checkpoint import Checkpoint
from memscan.models.sanity import Sanity, check_generator
from tests.support.exact import (
    CAPTIONS,
    Told,
    World,
    diverged,
    flow_generator,
    load_world,
    overflowing,
    shuffled,
    zeroed,
)

Check = Callable[[World], Sanity]
PARTS = ("unet", "vae", "text_encoder")


@pytest.fixture(scope="module")
def world() -> World:
    return load_world()


def v(references: bool = True, **settings: Any) -> Check:
    return lambda world: world.checked(world.checkpoint, references, **settings)


def told(world: World, **schedule: Any) -> Checkpoint:
    """The trained weights as a network that predicts noise."""
    facts = world.checkpoint.scheduler_config | {"prediction_type": "epsilon"}
    return replace(world.checkpoint, unet=Told(world.checkpoint.unet, facts), scheduler_config=facts | schedule)


def noise(references: bool = True, **settings: Any) -> Check:
    return lambda world: world.checked(told(world), references, **settings)


def flow(says: str = "velocity", **settings: Any) -> Check:
    return lambda world: check_generator(flow_generator(world, says, **settings), CAPTIONS)


def flow_with(name: str, **facts: Any) -> Check:
    def check(world: World) -> Sanity:
        import diffusers

        return check_generator(flow_generator(world, "velocity", scheduler=getattr(diffusers, name)(**facts)), CAPTIONS)

    return check


RIGHT: dict[str, Check] = {
    "v": v(),
    "v, no references": v(False),
    "v, Euler, no guidance": v(scheduler="EulerDiscreteScheduler", guidance=1.0),
    "v, DPM-Solver++": v(scheduler="DPMSolverMultistepScheduler", guidance=7.0),
    "v, UniPC": v(scheduler="UniPCMultistepScheduler", steps=12),
    "v, PNDM, no references": v(False, scheduler="PNDMScheduler", steps=15),
    "v, three steps": v(False, steps=3, guidance=1.0),
    "noise": noise(),
    "noise, no references": noise(False),
    "noise, Euler": noise(scheduler="EulerDiscreteScheduler"),
    "noise, DPM-Solver++, guidance 7": noise(scheduler="DPMSolverMultistepScheduler", guidance=7.0),
    "noise, one at a time": noise(batch_size=1),
    "noise, exact": lambda world: world.checked(world.exact("epsilon"), False),
    "noise, four steps": noise(steps=4, guidance=1.0),
    "flow": flow(),
    "flow, no guidance": flow(guidance=1.0),
    "flow, one at a time": flow(batch_size=1),
    "flow, 28 steps": flow(steps=28, guidance=7.0),
    "flow, shift 3": flow_with("FlowMatchEulerDiscreteScheduler", shift=3.0),
    "flow, Heun": flow_with("FlowMatchHeunDiscreteScheduler"),
}


def broken(part: str, change: Any, family: str = "v") -> Check:
    def check(world: World) -> Sanity:
        checkpoint = world.changed(part, change)
        if family == "noise" and part == "unet":
            facts = world.checkpoint.scheduler_config | {"prediction_type": "epsilon"}
            checkpoint = replace(checkpoint, unet=Told(checkpoint.unet, facts), scheduler_config=facts)
        elif family == "noise":
            checkpoint = replace(told(world), **{part: getattr(checkpoint, part)})
        return world.checked(checkpoint, steps=6, guidance=1.0)

    return check


def flow_vae(change: Any) -> Check:
    return lambda world: check_generator(flow_generator(world, "velocity", world.changed("vae", change).vae), CAPTIONS)


WRONG: dict[str, Check] = {
    "v named noise": lambda world: world.checked(world.scheduled(prediction_type="epsilon")),
    "v named noise, no references": lambda world: world.checked(world.scheduled(prediction_type="epsilon"), False),
    "v, zeroed": broken("unet", zeroed),
    "v, shuffled": broken("unet", shuffled),
    "v, NaN": broken("unet", diverged),
    "v, overflow": broken("unet", overflowing),
    "v, VAE zeroed": broken("vae", zeroed),
    "noise named v": lambda world: world.checked(told(world, prediction_type="v_prediction")),
    "noise named v, no references": lambda world: world.checked(told(world, prediction_type="v_prediction"), False),
    "clean latents named noise": lambda world: world.checked(world.exact("sample", "epsilon")),
    "noise, shuffled": broken("unet", shuffled, "noise"),
    "noise, NaN": broken("unet", diverged, "noise"),
    "noise, text encoder zeroed": broken("text_encoder", zeroed, "noise"),
    "noise, VAE shuffled": broken("vae", shuffled, "noise"),
    "flow that predicts noise": flow("epsilon"),
    "flow that predicts clean latents": flow("sample"),
    "flow backwards": flow("backwards"),
    "flow, zeroed": flow("nothing"),
    "flow, shuffled": flow("shuffled"),
    "flow, overflow of float16": flow("overflow"),
}


def test_there_are_twenty_of_each() -> None:
    assert (len(RIGHT), len(WRONG)) == (20, 20)


@pytest.mark.parametrize("name", RIGHT)
def test_right(world: World, name: str) -> None:
    found = RIGHT[name](world)
    assert not found.unmeasured
    assert found.prediction == {"v": "v_prediction", "noise": "epsilon", "flow": "velocity"}[name.split(",")[0]]


@pytest.mark.parametrize("name", WRONG)
def test_wrong(world: World, name: str) -> None:
    with pytest.raises(ModelError):
        WRONG[name](world)


def test_the_reading_that_fits_is_named(world: World) -> None:
    with pytest.raises(ModelError, match=r"is sampled as something that it is not.*read as velocity.*as epsilon \d%"):
        flow("epsilon")(world)


def test_the_autoencoder_of_a_stock_pipeline(world: World) -> None:
    with pytest.raises(ModelError, match="of one colour"):
        flow_vae(zeroed)(world)
