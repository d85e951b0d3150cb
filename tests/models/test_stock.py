"""Checkpoints that our own loop does not know, by the stock pipeline: images, signals that apply, and refusals."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from memscan.config import GeneratorConfig
from memscan.errors import ConfigError, MemscanError, ModelError
from memscan.models.adapters import NOISE_NORMS, adapter_of
from memscan.models.generator import Generator
from memscan.models.sanity import check_generator
from memscan.models.stock import StockGenerator
from tests.support.stock_models import SIDE, save_flux, save_lcm, save_pixart, save_sd3

CAPTIONS = ["the cat on a mat", "a dog", "the cat"]
SEEDS = [11, 2**62 + 5, 7]
KINDS = ("pixart", "flux", "lcm")

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tiny checkpoints by kind. Not to be changed."""
    root = tmp_path_factory.mktemp("stock")
    return {kind: save(root / kind) for kind, save in zip(KINDS, (save_pixart, save_flux, save_lcm), strict=True)}


@pytest.fixture
def pixart(folders: dict[str, Path], tmp_path: Path) -> Path:
    """A copy to break."""
    return Path(shutil.copytree(folders["pixart"], tmp_path / "broken"))


def configured(folder: Path, **settings: Any) -> GeneratorConfig:
    return GeneratorConfig.model_validate(
        {"path": str(folder), "steps": 2, "guidance": 5.0, "height": SIDE, "width": SIDE, "batch_size": 3, **settings}
    )


def refusal(folder: Path, **settings: Any) -> str:
    with pytest.raises(MemscanError) as caught:
        StockGenerator.load(configured(folder, **settings))
    line = str(caught.value)
    assert "\n" not in line
    return line


def edit(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


@pytest.mark.parametrize("t5", [True, False])
def test_stable_diffusion_3_with_and_without_its_t5(tmp_path: Path, t5: bool) -> None:
    folder = save_sd3(tmp_path / "sd3", t5=t5)
    if not t5:  # as the documentation of diffusers has it: the folder lists the part, and none is there
        assert json.loads((folder / "model_index.json").read_text())["text_encoder_3"] == [None, None]
    made = StockGenerator.load(configured(folder)).generate(CAPTIONS[:2], SEEDS[:2])
    assert made.finite_B.all()
    assert made.images_BHWC[0].std() > 1
    assert set(made.signals) == {"velocity_norm", "velocity_norm_first"}


def test_a_size_that_the_pipeline_cannot_take_is_refused_by_the_first_look(folders: dict[str, Path]) -> None:
    generator = StockGenerator.load(configured(folders["pixart"], height=60))
    with pytest.raises(ModelError, match=r"cannot generate an image as configured.*divisible by 8 but are 60"):
        check_generator(generator)


@pytest.mark.parametrize("kind", KINDS)
def test_an_image_depends_on_caption_and_seed_only(folders: dict[str, Path], kind: str) -> None:
    generator = StockGenerator.load(configured(folders[kind]))
    together = generator.generate(CAPTIONS, SEEDS)
    assert together.images_BHWC.shape == (3, SIDE, SIDE, 3)
    assert together.finite_B.all()
    for at, (caption, seed) in enumerate(zip(CAPTIONS, SEEDS, strict=True)):
        alone = generator.generate([caption], [seed])
        # other products of matrices round differently in another batch
        assert np.abs(together.images_BHWC[at].astype(int) - alone.images_BHWC[0]).max() <= 1
        for name, values in together.signals.items():
            assert values[at] == pytest.approx(alone.signals[name][0], rel=1e-4)
    assert len({image.tobytes() for image in together.images_BHWC}) == 3
    other = generator.generate(CAPTIONS[:1], [SEEDS[0] + 1]).images_BHWC[0]
    assert np.abs(other.astype(int) - together.images_BHWC[0]).mean() > 1


def test_images_are_the_stock_pipelines(folders: dict[str, Path]) -> None:
    from diffusers import DiffusionPipeline

    pipeline = DiffusionPipeline.from_pretrained(folders["pixart"], local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(
        prompt=CAPTIONS,
        generator=[torch.Generator().manual_seed(seed) for seed in SEEDS],
        num_inference_steps=2,
        guidance_scale=5.0,
        use_resolution_binning=False,
        clean_caption=False,
    ).images
    ours = StockGenerator.load(configured(folders["pixart"])).generate(CAPTIONS, SEEDS).images_BHWC
    assert np.abs(np.stack([np.asarray(image) for image in images]).astype(int) - ours).max() <= 1


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("guidance", [5.0, 1.0])
def test_what_our_loop_knows_comes_out_the_same(
    checkpoints: dict[str, Path], make_generator: Callable[..., Generator], prediction: str, guidance: float
) -> None:
    """One checkpoint by both adapters: images within a level, the same signals, the same ones absent."""
    config = configured(checkpoints[prediction], adapter="stock", scheduler="DDIMScheduler", guidance=guidance)
    stock = StockGenerator.load(config).generate(CAPTIONS, SEEDS)
    own = make_generator(prediction, steps=2, guidance=guidance, batch_size=3).generate(CAPTIONS, SEEDS)
    assert np.abs(stock.images_BHWC.astype(int) - own.images_BHWC).max() <= 1
    assert set(stock.signals) == set(own.signals) == (set(NOISE_NORMS) if guidance > 1 else set())
    for name, values in own.signals.items():
        np.testing.assert_allclose(stock.signals[name], values, rtol=1e-3)


def test_signals_that_do_not_apply_are_absent(folders: dict[str, Path]) -> None:
    found = {kind: StockGenerator.load(configured(folders[kind])).generate(CAPTIONS, SEEDS) for kind in KINDS}
    assert {kind: set(one.signals) for kind, one in found.items()} == {
        "pixart": set(NOISE_NORMS),
        "flux": set(),
        "lcm": set(),
    }
    assert (found["pixart"].signals["noise_norm"] > 0).all()
    adapters = {kind: adapter_of(configured(folders[kind])) for kind in KINDS}
    assert {kind: one.kind for kind, one in adapters.items()} == dict.fromkeys(KINDS, "stock")
    assert adapters["pixart"].not_applicable(5.0) == {}
    assert set(adapters["pixart"].not_applicable(1.0)) == set(NOISE_NORMS)
    for kind in ("flux", "lcm"):
        reasons = adapters[kind].not_applicable(5.0)
        assert set(reasons) == set(NOISE_NORMS)
        assert "built into the model" in reasons["noise_norm"]


def test_a_velocitys_norm_has_a_name_of_its_own(folders: dict[str, Path], tmp_path: Path) -> None:
    """The same guided denoiser under flow matching: what it predicts is no noise, and no noise norm is told."""
    from diffusers import DPMSolverMultistepScheduler

    folder = Path(shutil.copytree(folders["pixart"], tmp_path / "flow"))
    DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=1.0
    ).save_pretrained(folder / "scheduler")
    found = StockGenerator.load(configured(folder)).generate(CAPTIONS, SEEDS)
    assert set(found.signals) == {"velocity_norm", "velocity_norm_first"}
    assert "velocity_norm" in adapter_of(configured(folder)).not_applicable(5.0)["noise_norm"]


def test_captions_and_sizes_are_left_alone(folders: dict[str, Path]) -> None:
    """PixArt's own habits: cleaning captions where some package is installed, and sizes of its bins."""
    generator = StockGenerator.load(configured(folders["pixart"], height=80, width=64))
    assert generator.generate(["a  <b> CAT"], [1]).images_BHWC.shape == (1, 80, 64, 3)
    assert "80x64" in generator.spec.preprocessing
    assert generator.generate([], []).images_BHWC.shape == (0, 80, 64, 3)


def test_generations_that_are_not_finite_are_named(folders: dict[str, Path]) -> None:
    generator = StockGenerator.load(configured(folders["pixart"]))
    with torch.no_grad():
        generator.pipeline.transformer.proj_out.bias.fill_(float("nan"))
    found = generator.generate(CAPTIONS, SEEDS)
    assert not found.finite_B.any()


def test_half_precision(folders: dict[str, Path]) -> None:
    generator = StockGenerator.load(configured(folders["pixart"], dtype="bfloat16"))
    assert generator.pipeline.transformer.dtype == torch.bfloat16
    assert generator.generate(CAPTIONS, SEEDS).finite_B.all()


def test_a_flux_lora_in_kohyas_format_is_fused(folders: dict[str, Path], tmp_path: Path) -> None:
    """The original code has queries, keys and values in one matrix; alpha 8 at rank 4 doubles the change."""
    make = torch.Generator().manual_seed(0)
    down, up = (0.1 * torch.randn(*shape, generator=make) for shape in ((4, 16), (48, 4)))
    key = "lora_unet_double_blocks_0_img_attn_qkv"
    factors = {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up, f"{key}.alpha": torch.tensor(8.0)}
    save_file(factors, tmp_path / "kohya.safetensors")
    lora = {"path": str(tmp_path / "kohya.safetensors"), "scale": 0.5}
    plain, fused = (StockGenerator.load(configured(folders["flux"], loras=loras)) for loras in ([], [lora]))
    for part, layer in enumerate(("to_q", "to_k", "to_v")):
        before, after = (
            getattr(one.pipeline.transformer.transformer_blocks[0].attn, layer).weight for one in (plain, fused)
        )
        torch.testing.assert_close(
            after, before + 0.5 * 2 * up[16 * part : 16 * part + 16] @ down, atol=1e-5, rtol=1e-5
        )
    assert plain.spec.sha256 != fused.spec.sha256
    ends = (("lora_down.weight", down), ("lora_up.weight", up))
    lost = {f"lora_unet_double_blocks_0_no_layer.{end}": one.clone() for end, one in ends}
    save_file(factors | lost, tmp_path / "kohya.safetensors")
    assert "cannot be converted" in refusal(folders["flux"], loras=[lora])
    other = {"diffusion_model.double_blocks.0.img_attn.qkv.lora_A.weight": down}
    save_file(other, tmp_path / "kohya.safetensors")
    assert "names its layers as the original code does" in refusal(folders["flux"], loras=[lora])


def test_no_safety_checker_is_loaded(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(checkpoints["epsilon"], tmp_path / "safe"))
    edit(
        folder / "model_index.json",
        safety_checker=["stable_diffusion", "StableDiffusionSafetyChecker"],
        feature_extractor=["transformers", "CLIPImageProcessor"],
        requires_safety_checker=True,
    )
    generator = StockGenerator.load(configured(folder, adapter="stock"))
    assert generator.pipeline.safety_checker is None
    assert generator.generate(CAPTIONS, SEEDS).finite_B.all()


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("FluxImg2ImgPipeline", "needs an input image"),
        ("FluxControlNetPipeline", "needs an input image"),
        ("StableDiffusionUpscalePipeline", "needs an input image"),
        ("TextToVideoSDPipeline", "makes no image from a text"),
        ("StableAudioPipeline", "makes no image from a text"),
        ("MarigoldDepthPipeline", "takes no prompt"),
        ("LTXPipeline", "makes videos"),
        ("NoSuchPipeline", "diffusers has no pipeline NoSuchPipeline"),
        (["my_pipeline", "MyPipeline"], "pipelines with their own code are not loaded"),
    ],
)
def test_another_kind_of_pipeline_is_refused(pixart: Path, name: Any, words: str) -> None:
    edit(pixart / "model_index.json", _class_name=name)
    line = refusal(pixart)
    assert words in line
    assert str(pixart) in line


def test_remote_code_is_not_run(pixart: Path) -> None:
    (pixart / "transformer" / "my_net.py").write_text("raise SystemExit")
    edit(pixart / "model_index.json", transformer=["my_net", "MyNet"])
    assert "transformer has code of its own (my_net.MyNet)" in refusal(pixart)


@pytest.mark.parametrize("part", ["transformer", "text_encoder", "vae", "tokenizer", "scheduler"])
def test_a_missing_part(pixart: Path, part: str) -> None:
    shutil.rmtree(pixart / part)
    assert refusal(pixart).startswith(f"{pixart}: has no {part}/")


def test_broken_weights(pixart: Path) -> None:
    file = pixart / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    tensors.pop(sorted(tensors)[3])
    save_file(tensors, file, metadata={"format": "pt"})
    assert "weights do not fit config.json: 1 missing" in refusal(pixart)
    file.write_bytes(file.read_bytes()[:1000])
    assert f"{file}: not a whole safetensors file" in refusal(pixart)
    file.rename(file.with_suffix(".bin"))
    assert "only safetensors weights are loaded" in refusal(pixart)


def test_schedulers(folders: dict[str, Path]) -> None:
    generator = StockGenerator.load(configured(folders["pixart"], scheduler="DDIMScheduler"))
    assert "DDIMScheduler" in generator.spec.id
    assert "FlowMatchEulerDiscreteScheduler does not fit" in refusal(
        folders["pixart"], scheduler="FlowMatchEulerDiscreteScheduler"
    )
    assert "DPMSolverMultistepScheduler" in refusal(folders["pixart"], scheduler="NoSuchScheduler")


@pytest.mark.parametrize(("key", "value"), [("guided_share", 0.5), ("cache_interval", 2), ("switches", "x.json")])
def test_settings_of_our_own_loop_are_refused(folders: dict[str, Path], key: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=rf"generator\.{key}: works only in memscan's own sampling loop"):
        adapter_of(configured(folders["pixart"], **{key: value}))


def test_identity_follows_the_weights(folders: dict[str, Path], pixart: Path) -> None:
    specs = {StockGenerator.load(configured(folder)).spec.sha256 for folder in (folders["pixart"], pixart)}
    assert len(specs) == 1
    (pixart / "README.md").write_text("a card")
    assert StockGenerator.load(configured(pixart)).spec.sha256 in specs
    file = pixart / "text_encoder" / "model.safetensors"
    tensors = load_file(file)
    first = min(tensors)
    save_file({**tensors, first: tensors[first] + 1}, file, metadata={"format": "pt"})
    assert StockGenerator.load(configured(pixart)).spec.sha256 not in specs


def test_a_checkpoint_that_our_loop_knows_is_its_own(checkpoints: dict[str, Path]) -> None:
    assert adapter_of(configured(checkpoints["epsilon"])).kind == "own"
    assert adapter_of(configured(checkpoints["epsilon"], adapter="stock")).kind == "stock"
    with pytest.raises(ModelError, match=r"is one part of a checkpoint.*generator\.base"):
        adapter_of(configured(checkpoints["epsilon"] / "unet"))
