"""The generator against the stock pipeline, and against what must not matter: batch, neighbours, repeats."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from memscan.config import GeneratorConfig
from memscan.errors import ModelError
from memscan.models.generator import Generator
from memscan.models.schedulers import SUPPORTED

CAPTIONS = ["the cat on a mat", "a dog, naïve 猫"]
SEEDS = [11, 2**62 + 5]

Make = Callable[..., Generator]

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning:diffusers"),  # its tensors in numpy functions
    pytest.mark.filterwarnings("ignore::DeprecationWarning:numpy"),
    pytest.mark.filterwarnings("ignore::FutureWarning:diffusers"),  # the outdated settings that it puts right
]


def stock_pipeline(generator: Generator) -> Any:
    """The stock pipeline over the generator's own weights, with a scheduler that it puts right by itself."""
    parts = generator.checkpoint
    kind = getattr(diffusers, generator.config.own_scheduler)
    pipeline = diffusers.StableDiffusionPipeline(
        vae=parts.vae,
        text_encoder=parts.text_encoder,
        tokenizer=parts.tokenizer,
        unet=parts.unet,
        scheduler=kind.from_config(parts.scheduler_config),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def stock_images(pipeline: Any, generator: Generator, **text: Any) -> np.ndarray:
    images = pipeline(
        num_inference_steps=generator.config.steps,
        guidance_scale=generator.config.guidance,
        generator=[torch.Generator().manual_seed(seed) for seed in SEEDS],
        output_type="pil",
        **text,
    ).images
    return np.stack([np.asarray(image) for image in images])


def assert_near(one: np.ndarray, other: np.ndarray) -> None:
    """Equal but for float noise: at most one level, in at most one value of a thousand."""
    difference = np.abs(one.astype(int) - other.astype(int))
    assert difference.max(initial=0) <= 1
    assert (difference > 0).mean() < 1e-3


@pytest.mark.parametrize(
    ("scheduler", "prediction_type", "guidance"),
    [
        ("DDIMScheduler", "epsilon", 5.0),
        ("DDIMScheduler", "v_prediction", 7.0),
        ("DDIMScheduler", "epsilon", 1.0),
        ("PNDMScheduler", "epsilon", 5.0),
        ("PNDMScheduler", "v_prediction", 5.0),
        ("EulerDiscreteScheduler", "v_prediction", 5.0),
        ("EulerDiscreteScheduler", "epsilon", 0.0),
        ("DPMSolverMultistepScheduler", "epsilon", 5.0),
        ("DPMSolverMultistepScheduler", "v_prediction", 5.0),
        ("EulerAncestralDiscreteScheduler", "epsilon", 5.0),
        ("HeunDiscreteScheduler", "v_prediction", 5.0),
    ],
)
def test_equals_the_stock_pipeline_pixel_for_pixel(
    make_generator: Make, scheduler: str, prediction_type: str, guidance: float
) -> None:
    generator = make_generator(prediction_type, scheduler=scheduler, guidance=guidance)
    ours = generator.generate(CAPTIONS, SEEDS)
    stock = stock_images(
        stock_pipeline(generator),
        generator,
        prompt_embeds=generator.encode(CAPTIONS),
        negative_prompt_embeds=generator.encode([""]).expand(2, -1, -1),
    )
    np.testing.assert_array_equal(ours.images_BHWC, stock)
    assert ours.images_BHWC.dtype == np.uint8
    assert ours.images_BHWC.shape == (2, 64, 64, 3)
    assert ours.finite_B.all()
    assert ours.images_BHWC.std() > 10  # a flat picture would agree with anything


def test_equals_the_stock_pipeline_from_captions_and_files(make_generator: Make, checkpoints: dict[str, Path]) -> None:
    generator = make_generator()
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(
        str(checkpoints["epsilon"]), dtype=torch.float32, safety_checker=None
    )
    pipeline.set_progress_bar_config(disable=True)
    cond, _ = pipeline.encode_prompt(CAPTIONS, "cpu", 1, True)
    torch.testing.assert_close(generator.encode(CAPTIONS), cond, rtol=1e-5, atol=1e-5)
    assert_near(generator.generate(CAPTIONS, SEEDS).images_BHWC, stock_images(pipeline, generator, prompt=CAPTIONS))


def test_half_precision_weights_are_loaded_as_configured(make_generator: Make) -> None:
    parts = make_generator().checkpoint
    assert {module.dtype for module in (parts.unet, parts.vae, parts.text_encoder)} == {torch.float32}
    assert parts.max_tokens == 32
    assert parts.vae_scale == 8


def test_lower_precision_starts_from_the_same_noise(checkpoints: dict[str, Path], make_generator: Make) -> None:
    config = GeneratorConfig(path=str(checkpoints["epsilon"]), steps=4, guidance=5.0, dtype="bfloat16")
    low, full = Generator.load(config).generate(CAPTIONS, SEEDS), make_generator().generate(CAPTIONS, SEEDS)
    assert low.finite_B.all()
    distance = np.abs(low.images_BHWC.astype(int) - full.images_BHWC.astype(int)).mean()
    assert 0 < distance < 8
    np.testing.assert_allclose(low.signals["noise_norm"], full.signals["noise_norm"], rtol=0.1)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("scheduler", ["DDIMScheduler", "PNDMScheduler", "EulerAncestralDiscreteScheduler"])
def test_a_gpu_makes_the_same_images(make_generator: Make, scheduler: str) -> None:
    config = make_generator(scheduler=scheduler).config
    gpu, cpu = Generator.load(config, "cuda"), make_generator(scheduler=scheduler)
    distance = gpu.generate(CAPTIONS, SEEDS).images_BHWC.astype(int) - cpu.generate(CAPTIONS, SEEDS).images_BHWC
    assert np.abs(distance).mean() < 0.5


@pytest.mark.parametrize("scheduler", ["DDIMScheduler", "EulerAncestralDiscreteScheduler"])
def test_an_image_does_not_depend_on_its_batch(make_generator: Make, scheduler: str) -> None:
    captions, seeds = [*CAPTIONS, "the cat on a mat"], [1, 2, 3]
    together = make_generator(scheduler=scheduler, batch_size=3).generate(captions, seeds)
    alone = make_generator(scheduler=scheduler, batch_size=1).generate(captions[::-1], seeds[::-1])
    assert_near(together.images_BHWC, alone.images_BHWC[::-1])
    for name, values in together.signals.items():
        np.testing.assert_allclose(values, alone.signals[name][::-1], rtol=1e-4)


def test_seed_and_caption_decide_the_image(make_generator: Make) -> None:
    generator = make_generator()
    images = generator.generate(["the cat", "the cat", "a dog", "the cat"], [1, 2, 1, 1]).images_BHWC.astype(int)
    assert_near(images[0], images[3])
    for other in (1, 2):
        assert np.abs(images[0] - images[other]).mean() > 2
    np.testing.assert_array_equal(
        generator.generate(["a dog"], [1]).images_BHWC, make_generator().generate(["a dog"], [1]).images_BHWC
    )


def test_each_distinct_caption_is_encoded_once(make_generator: Make) -> None:
    generator = make_generator(steps=1, batch_size=2)
    rows: list[int] = []
    hook = generator.checkpoint.text_encoder.register_forward_pre_hook(lambda _module, args: rows.append(len(args[0])))
    generator.generate(["a", "b", "a", "a", "c", "b"], range(6))
    generator.generate(["a"], [0])
    hook.remove()
    assert sum(rows) == 3 + 1 + 1  # a, b, c; the empty caption once; a again


def test_very_long_captions_are_truncated_quickly(make_generator: Make) -> None:
    generator = make_generator(steps=1)
    started = time.process_time()
    images = generator.generate(["cat " * 25_000, "x" * 100_000], [1, 1]).images_BHWC
    assert time.process_time() - started < 5
    assert_near(images, generator.generate(["cat " * 40, "x" * 40], [1, 1]).images_BHWC)


def test_nothing_in_nothing_out(make_generator: Make) -> None:
    result = make_generator().generate([], [])
    assert result.images_BHWC.shape == (0, 64, 64, 3)
    assert result.finite_B.shape == (0,)


def test_another_image_size(make_generator: Make) -> None:
    assert make_generator(height=48, width=80, steps=1).generate(["a"], [1]).images_BHWC.shape == (1, 48, 80, 3)


def test_reports_images_that_are_not_finite(make_generator: Make) -> None:
    generator = make_generator()
    latents = torch.randn(3, 32, 8, 8)
    latents[1, 0, 0, 0] = float("nan")
    images, finite = generator.decode(latents)
    assert finite.tolist() == [True, False, True]
    assert_near(images[[0, 2]], generator.decode(latents[[0, 2]])[0])


def test_more_steps_than_the_schedule_has(make_generator: Make) -> None:
    with pytest.raises(ModelError, match="cannot take 1001 steps"):
        make_generator(steps=1001)


def test_a_seed_for_each_caption(make_generator: Make) -> None:
    with pytest.raises(ValueError, match="2 captions but 1 seeds"):
        make_generator().generate(["a", "b"], [1])


@pytest.mark.parametrize("scheduler", SUPPORTED)
def test_every_supported_scheduler_repeats_itself(make_generator: Make, scheduler: str) -> None:
    generator = make_generator(scheduler=scheduler)
    first, second = (generator.generate(["the cat"], [5]) for _ in range(2))
    np.testing.assert_array_equal(first.images_BHWC, second.images_BHWC)
    assert first.finite_B.all()
    assert first.images_BHWC.std() > 10


def test_specification_follows_the_weights_and_the_rule(make_generator: Make, tmp_path: Path) -> None:
    generator = make_generator()
    spec = generator.spec
    assert spec.id == f"generator:checkpoint@{spec.sha256[:12]}:DDIMScheduler-4-cfg5-64x64-32tokens-float32"
    copy = tmp_path / "copy"
    shutil.copytree(generator.checkpoint.where, copy)
    (copy / "README.md").write_text("a model card")
    assert Generator.load(GeneratorConfig(path=str(copy))).spec.sha256 == spec.sha256
    (copy / "unet" / "config.json").write_text((copy / "unet" / "config.json").read_text() + "\n")
    assert Generator.load(GeneratorConfig(path=str(copy))).spec.sha256 != spec.sha256
