"""The sanity check of the generator: right checkpoints pass, wrong ones are refused, and the line says how.

Families: the shipped planted model (trained weights, v), and the exact denoiser of a mixture of a few latents, whose
formula is known, as a network that predicts noise and as one that predicts v.
"""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from memscan.config import GeneratorConfig
from memscan.errors import ModelError
from memscan.models.generator import Generator
from memscan.models.sanity import check_generator
from tests.support.exact import World, diverged, load_world, overflowing, shuffled, zeroed


@pytest.fixture(scope="module")
def world() -> World:
    return load_world()


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


def test_noise_prediction_without_any_signal_at_the_last_timestep_is_refused(world: World) -> None:
    checkpoint = world.exact("epsilon")
    schedule = checkpoint.scheduler_config | {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    with pytest.raises(ModelError, match=r"not finite|does not denoise"):
        world.checked(replace(checkpoint, scheduler_config=schedule))


def test_v_prediction_with_zero_terminal_snr_passes(world: World) -> None:
    schedule = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    assert world.checked(world.scheduled(**schedule)).prediction == "v_prediction"


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_vae_that_overflows_in_half_precision(tmp_path: Path) -> None:
    """SD XL's: it is kept in single precision by `force_upcast`; without, the model is refused before any row is."""
    from benchmarks.published import build_pipeline

    torch.manual_seed(0)
    made = build_pipeline("tiny-xl", tmp_path / "made")
    with torch.no_grad():  # the norm behind this layer takes the factor out again
        made.vae.decoder.conv_in.weight.mul_(1e5)
    made.save_pretrained(tmp_path / "xl", safe_serialization=True)
    rule = GeneratorConfig(path=str(tmp_path / "xl"), steps=2, dtype="float16")
    kept = Generator.load(rule)
    assert (kept.checkpoint.vae.dtype, kept.checkpoint.unet.dtype) == (torch.float32, torch.float16)
    assert kept.generate(["a red cup"], [1]).finite_B.all()
    file = tmp_path / "xl" / "vae" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"force_upcast": False}))
    half = Generator.load(rule)
    assert half.checkpoint.vae.dtype == torch.float16
    with pytest.raises(
        ModelError, match=r"4 of 4 trial images are not finite in float16.*try generator\.dtype bfloat16"
    ):
        check_generator(half)


@pytest.mark.parametrize("factor", [0.2, 5.0])
def test_another_scale_of_the_vae_is_refused(world: World, factor: float) -> None:
    vae = copy.deepcopy(world.checkpoint.vae)
    vae.register_to_config(scaling_factor=vae.config.scaling_factor * factor)
    with pytest.raises(ModelError, match=r"does not denoise|VAE loses|is sampled as something"):
        world.checked(replace(world.checkpoint, vae=vae))


def test_a_network_that_takes_more_than_text_is_refused_and_not_told_as_rows(world: World) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise ValueError("class_labels should be provided when num_class_embeds > 0")

    checkpoint = replace(world.checkpoint, unet=copy.copy(world.checkpoint.unet))
    checkpoint.unet.forward = fails
    with pytest.raises(ModelError, match=r"cannot generate an image as configured.*class_labels"):
        world.checked(checkpoint)
