"""SD 1.x and XL against their stock pipelines, in every precision a CPU runs, accelerated or not; and no waiting."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.published import as_checkpoint, build_pipeline
from memscan.config import GeneratorConfig, ResourcesConfig
from memscan.detection.sampled import AttentionHook
from memscan.errors import ModelError
from memscan.models.acceleration import Acceleration
from memscan.models.generator import Generator
from memscan.models.hooks import DifferenceMapHook, NoiseNormHook
from memscan.models.sampling import Condition, initial_latents, sample
from memscan.models.schedulers import SUPPORTED, make_scheduler

CAPTIONS = ["the cat on a mat", "a dog, naïve 猫", "the cat on a mat"]
SEEDS = [11, 2**62 + 5, 3]
FAST = Acceleration(share=True, fuse=True)

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of diffusers' own tensors in numpy functions
    pytest.mark.filterwarnings("ignore::FutureWarning:diffusers"),
]

Make = Callable[..., Generator]


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, torch.dtype], Any]:
    """Stock pipelines with the same random weights in each precision, large enough for captions to matter."""
    made: dict[tuple[str, torch.dtype], Any] = {}
    folder = tmp_path_factory.mktemp("tiny")

    def build(name: str, dtype: torch.dtype = torch.float32) -> Any:
        if (name, dtype) not in made:
            torch.manual_seed(0)
            pipeline = build_pipeline(name, folder)
            for parameter in pipeline.unet.parameters():
                parameter.mul_(1.5)
            made[name, dtype] = pipeline.to(dtype)
        return made[name, dtype]

    return build


def generator_of(pipeline: Any, acceleration: Acceleration | None = None, **settings: Any) -> Generator:
    config = GeneratorConfig(path="tiny", **({"steps": 4, "guidance": 5.0, "batch_size": 4} | settings))
    return Generator(as_checkpoint(pipeline), config, acceleration=acceleration)


def stock_images(pipeline: Any, generator: Generator, **more: Any) -> np.ndarray:
    """What the stock pipeline makes of the same captions and latents."""
    noise, _ = initial_latents(SEEDS, (4, 16, 16))
    images = pipeline(
        prompt=CAPTIONS,
        num_inference_steps=generator.config.steps,
        guidance_scale=generator.config.guidance,
        latents=noise.to(pipeline.unet.dtype),
        output_type="pil",
        **more,
    ).images
    return np.stack([np.asarray(image) for image in images])


def distance(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    return np.abs(one.astype(int) - other.astype(int))


@pytest.mark.parametrize("name", ["tiny", "tiny-xl"])
@pytest.mark.parametrize("acceleration", [None, FAST], ids=["plain", "fast"])
def test_same_latents_give_the_stock_images(pipelines: Any, name: str, acceleration: Acceleration | None) -> None:
    """Float32: one level off at most, in one value of a thousand at most; XL with both encoders, pooled text, sizes."""
    pipeline = pipelines(name)
    stock = stock_images(pipeline, generator_of(pipeline))
    ours = generator_of(pipeline, acceleration).generate(CAPTIONS, SEEDS)
    pipeline.unet.unfuse_qkv_projections() if acceleration else None
    off = distance(ours.images_BHWC, stock)
    assert off.max() <= 1
    assert (off > 0).mean() < 1e-3
    assert ours.images_BHWC.std() > 10  # a flat picture would agree with anything
    assert distance(stock[0], stock[1]).mean() > 2
    assert set(ours.signals) == {"noise_norm", "noise_norm_first"}


@pytest.mark.parametrize("name", ["tiny", pytest.param("tiny-xl", marks=pytest.mark.long)])
@pytest.mark.parametrize("acceleration", [None, FAST], ids=["plain", "fast"])
def test_bfloat16_stays_as_near_as_the_stock_pipeline_does(
    pipelines: Any, name: str, acceleration: Acceleration | None
) -> None:
    """On average 2 levels from the stock pipeline in bfloat16, and no farther from float32 than that is: our latents
    stay in float32 between the steps. Two steps: a CPU takes ten times as long in bfloat16."""
    low, full = pipelines(name, torch.bfloat16), pipelines(name)
    stock_low, stock = stock_images(low, generator_of(low, steps=2)), stock_images(full, generator_of(full, steps=2))
    ours = generator_of(low, acceleration, dtype="bfloat16", steps=2).generate(CAPTIONS, SEEDS).images_BHWC
    low.unet.unfuse_qkv_projections() if acceleration else None
    assert distance(ours, stock_low).mean() < 2
    assert distance(ours, stock).mean() <= distance(stock_low, stock).mean() + 0.5


def test_a_compiled_decoder_sees_one_shape(pipelines: Any) -> None:
    """Batches of 3 images of which the last is filled up and cut; the images are the plain decoder's."""
    from memscan.models.decoding import Decoder

    latents = torch.randn(7, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    decoder = Decoder(pipelines("tiny").vae, 64 * 64, most=3)
    plain, finite = decoder(latents)
    shapes: list[int] = []
    decoder.compile(lambda run: lambda part: shapes.append(len(part)) or run(part))  # type: ignore[func-returns-value]
    compiled, _ = decoder(latents)
    assert shapes == [3, 3, 3]
    assert len(plain) == 7
    assert distance(compiled, plain).max() <= 1
    assert finite.all()


def test_the_screens_step_runs_compiled_where_the_sampling_does(pipelines: Any) -> None:
    """And gives what the plain network gives; on a CPU graphs run as they are."""
    from memscan.detection.first_step import FirstStepper
    from memscan.models.unet import SplitUNet

    pipeline = pipelines("tiny")
    plain = FirstStepper(generator_of(pipeline), [1, 2])(CAPTIONS)
    fast = generator_of(pipeline, Acceleration(share=True, compile="graphs"), batch_size=3)
    assert isinstance(fast.one_step_denoiser(6), SplitUNet)
    step = FirstStepper(fast, [1, 2])(CAPTIONS)
    torch.testing.assert_close(step.outputs_PSCHW, plain.outputs_PSCHW, rtol=0, atol=1e-4)
    assert step.empty_SCHW is not None
    torch.testing.assert_close(step.empty_SCHW, plain.empty_SCHW, rtol=0, atol=1e-4)


def test_an_xl_folder_is_loaded_as_the_stock_pipeline_loads_it(pipelines: Any, tmp_path: Path) -> None:
    from diffusers import StableDiffusionXLPipeline

    pipelines("tiny-xl").save_pretrained(tmp_path / "xl", safe_serialization=True)
    generator = Generator.load(GeneratorConfig(path=str(tmp_path / "xl"), steps=3, guidance=5.0))
    stock = StableDiffusionXLPipeline.from_pretrained(str(tmp_path / "xl"), add_watermarker=False)
    stock.set_progress_bar_config(disable=True)
    off = distance(generator.generate(CAPTIONS, SEEDS).images_BHWC, stock_images(stock, generator))
    assert off.max() <= 1
    assert (off > 0).mean() < 1e-3
    assert generator.encode(CAPTIONS).shape == (3, 77, 56)
    assert Generator.load(GeneratorConfig(path=str(tmp_path / "xl"), dtype="float16")).checkpoint.vae.dtype is (
        torch.float32  # SD XL's decoder overflows in float16
    )
    before = generator.spec.sha256
    config = tmp_path / "xl" / "text_encoder_2" / "config.json"
    config.write_text(config.read_text() + "\n")
    assert Generator.load(generator.config).spec.sha256 != before
    shutil.rmtree(tmp_path / "xl" / "tokenizer_2")
    with pytest.raises(ModelError, match="has no tokenizer_2/"):
        Generator.load(generator.config)


def test_an_empty_caption_of_xl_follows_the_checkpoints_setting(pipelines: Any) -> None:
    pipeline = pipelines("tiny-xl")
    pipeline.register_to_config(force_zeros_for_empty_prompt=False)
    try:
        generator = generator_of(pipeline)
        off = distance(generator.generate(CAPTIONS, SEEDS).images_BHWC, stock_images(pipeline, generator))
        assert off.max() <= 1
    finally:
        pipeline.register_to_config(force_zeros_for_empty_prompt=True)
    zeros = generator_of(pipeline)
    assert distance(zeros.generate(CAPTIONS, SEEDS).images_BHWC, stock_images(pipeline, zeros)).max() <= 1


def test_late_steps_without_guidance_call_the_denoiser_once(pipelines: Any) -> None:
    """And what is made then is what plain sampling makes of the same conditions, step by step."""
    pipeline = pipelines("tiny")
    rows: list[int] = []
    hook = pipeline.unet.register_forward_pre_hook(lambda _module, args: rows.append(len(args[0])))
    half = generator_of(pipeline, guided_share=0.5, batch_size=3)
    made = half.generate(CAPTIONS, SEEDS)
    hook.remove()
    assert rows == [6, 6, 3, 3]
    assert half.spec.id.endswith("-guided0.5")
    full = generator_of(pipeline).generate(CAPTIONS, SEEDS)
    assert distance(made.images_BHWC, full.images_BHWC).mean() > 0.5
    np.testing.assert_allclose(made.signals["noise_norm_first"], full.signals["noise_norm_first"], rtol=1e-5)


def test_feature_caching_is_another_measurement(pipelines: Any) -> None:
    pipeline = pipelines("tiny")
    cached, plain = generator_of(pipeline, cache_interval=2), generator_of(pipeline)
    assert cached.spec.id.endswith("-cached2")
    assert plain.spec.id.endswith("-float32")
    first, second = (cached.generate(CAPTIONS, SEEDS).images_BHWC for _ in range(2))
    np.testing.assert_array_equal(first, second)
    assert 0 < distance(first, plain.generate(CAPTIONS, SEEDS).images_BHWC).mean() < 40


# Linear multistep integrates on the host, the singlestep solver looks for its order at every step; both read only
# the schedule, which is there. LCM and TCD draw noise on the host for every step and carry it over without waiting.
@pytest.mark.parametrize("scheduler", SUPPORTED)
def test_the_loop_never_reads_from_the_device(pipelines: Any, scheduler: str) -> None:
    """On the meta device tensors have no values: reading one, as `.item()`, `if tensor` or `.cpu()` do, raises."""
    from diffusers import UNet2DConditionModel

    pipeline = pipelines("tiny")
    with torch.device("meta"):  # one block each way: what is held here is the loop's, the scheduler's and the hooks'
        unet = UNet2DConditionModel(
            sample_size=16,
            block_out_channels=(32,),
            down_block_types=("CrossAttnDownBlock2D",),
            up_block_types=("CrossAttnUpBlock2D",),
            layers_per_block=1,
            cross_attention_dim=32,
        )
    text = torch.zeros(2, 7, 32, device="meta")
    made = make_scheduler(scheduler, pipeline.scheduler.config, where="tiny")
    noise, generators = initial_latents([1, 2], (4, 16, 16))
    hooks = (NoiseNormHook(), DifferenceMapHook(), AttentionHook(unet))
    condition = Condition(text, text[:1], 5.0, ends_B=torch.zeros(2, dtype=torch.int64, device="meta"))
    latents = sample(unet, made, condition, noise.to("meta"), generators, 5, hooks)
    assert latents.device.type == "meta"
    assert latents.shape == (2, 4, 16, 16)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["tiny", "tiny-xl"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("compile", ["off", "graphs", "inductor"])
def test_a_gpu_makes_the_stock_images(tmp_path: Path, name: str, dtype: str, compile: Any) -> None:
    """Every precision, within two levels on average of the stock pipeline on the same device."""
    torch.manual_seed(0)
    pipeline = build_pipeline(name, tmp_path, device="cuda", dtype=getattr(torch, dtype))
    stock = stock_images(pipeline, generator_of(pipeline))
    fast = Acceleration(share=True, fuse=True, channels_last=True, compile=compile)
    ours = generator_of(pipeline, fast, dtype=dtype).generate(CAPTIONS, SEEDS).images_BHWC
    assert distance(ours, stock).mean() < (0.5 if dtype == "float32" else 2)


@pytest.mark.gpu
def test_a_gpu_never_waits_inside_the_loop(tmp_path: Path) -> None:
    pipeline = build_pipeline("tiny", tmp_path, device="cuda", dtype=torch.bfloat16)
    generator = generator_of(pipeline, FAST, dtype="bfloat16")
    generator.hooks = (*generator.hooks, AttentionHook(generator.checkpoint.unet))
    noise, generators = initial_latents(SEEDS, (4, 16, 16))
    noise, text = noise.cuda(), generator.text_encoder(CAPTIONS)
    condition = generator.condition(text)
    for _ in range(2):  # the first time fills caches
        mode = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error" if _ else mode)
        try:
            sample(generator.denoiser, generator.scheduler, condition, noise, generators, 4, generator.hooks)
        finally:
            torch.cuda.set_sync_debug_mode(mode)


@pytest.mark.gpu
def test_a_gpu_finds_its_batch(tmp_path: Path) -> None:
    pipeline = build_pipeline("tiny", tmp_path, device="cuda", dtype=torch.bfloat16)
    resources = ResourcesConfig(probe_batch=True)
    generator = generator_of(pipeline, Acceleration.of(resources, torch.device("cuda")), dtype="bfloat16")
    assert generator.batch_size > 8
    assert generator.generate(CAPTIONS, SEEDS).finite_B.all()
