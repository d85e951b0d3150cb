"""Single files of the original code, written from diffusers' parts by the inverse of its converters' names."""

from __future__ import annotations

import inspect
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from memscan.config import GeneratorConfig
from memscan.errors import MemscanError
from memscan.models.adapters import adapter_of
from memscan.models.composition import resolve_checkpoint
from memscan.models.generator import Generator
from memscan.models.stock import StockGenerator
from memscan.planted.world import shipped_world
from pipelines.run_folder.inputs import generator_id
from tests.support.original_layout import flux, original, original_2, original_flux, original_sd3, original_xl, part_of
from tests.support.stock_models import save_flux, save_sd3

BASE = shipped_world() / "checkpoint"
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def tensors() -> Tensors:
    """The planted model as A1111 has it."""
    return original(BASE)


@pytest.fixture(scope="module")
def sd3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_sd3(tmp_path_factory.mktemp("sd3") / "whole")


def config(file: Path, base: Path = BASE, **settings: Any) -> GeneratorConfig:
    return GeneratorConfig(path=str(file), base=str(base), steps=2, guidance=2.0, **settings)


def written(folder: Path, tensors: Tensors, name: str = "dreamshaper_8.safetensors", **metadata: str) -> Path:
    save_file({key: one.contiguous() for key, one in tensors.items()}, folder / name, metadata=metadata or None)
    return folder / name


def without_weights(base: Path, folder: Path) -> Path:
    """The configurations alone, as `hf download --include "*.json" "*.txt"` brings them."""
    return Path(shutil.copytree(base, folder, ignore=shutil.ignore_patterns("*.safetensors")))


def test_a_single_file_is_the_model_that_it_was_made_of(tmp_path: Path, tensors: Tensors) -> None:
    base = without_weights(BASE, tmp_path / "configurations")
    rule = config(written(tmp_path, tensors, "Dreamshaper 8.SAFETENSORS"), base)
    made = Generator.load(rule)
    plain = Generator.load(GeneratorConfig(path=str(BASE), steps=2, guidance=2.0))
    for part in ("unet", "vae", "text_encoder"):
        want = getattr(plain.checkpoint, part).state_dict()
        for name, one in getattr(made.checkpoint, part).state_dict().items():
            assert torch.equal(one, want[name]), (part, name)
    captions, seeds = ["a red cup", "two boats"], [1, 2]
    assert np.array_equal(made.generate(captions, seeds).images_BHWC, plain.generate(captions, seeds).images_BHWC)
    assert not adapter_of(rule).warnings
    assert made.spec.sha256[:12] in generator_id(rule)
    # Another file under the same name is another model, and another scheduler of the base as well.
    before = generator_id(rule)
    change(base / "scheduler" / "scheduler_config.json", timestep_spacing="leading")
    between = generator_id(rule)
    tensors = tensors | {"model.diffusion_model.out.2.bias": tensors["model.diffusion_model.out.2.bias"] + 1}
    written(tmp_path, tensors, "Dreamshaper 8.SAFETENSORS")
    assert len({before, between, generator_id(rule)}) == 3


def test_parts_that_the_file_lacks_are_the_bases_and_it_is_said(tmp_path: Path, tensors: Tensors) -> None:
    alone = {name: one for name, one in tensors.items() if name.startswith("model.diffusion_model.")}
    rule = config(written(tmp_path, alone))
    Generator.load(rule)
    (warning,) = adapter_of(rule).warnings
    assert "text_encoder, vae" in warning
    with pytest.raises(MemscanError, match=r"has no text_encoder, and neither has generator\.base"):
        generator_id(config(Path(rule.path), without_weights(BASE, tmp_path / "configurations")))


def test_stable_diffusion_2(tmp_path: Path) -> None:
    """Its UNet has linear projections, its text encoder is OpenCLIP's, and it predicts v."""
    from benchmarks.published import ARCHITECTURES, build_pipeline

    tiny = ARCHITECTURES["tiny"]
    second = replace(tiny, unet={**tiny.unet, "use_linear_projection": True}, prediction="v_prediction")
    torch.manual_seed(0)
    build_pipeline(second, tmp_path / "made").save_pretrained(tmp_path / "sd2", safe_serialization=True)
    file = written(tmp_path, original_2(tmp_path / "sd2"), "v2-1_768.safetensors")
    rule = config(file, without_weights(tmp_path / "sd2", tmp_path / "configurations"))
    folder = resolve_checkpoint(rule, ())
    for part in ("unet", "vae", "text_encoder"):
        want = part_of(tmp_path / "sd2", part)
        assert part_of(folder, part).keys() == want.keys()
        assert all(torch.equal(one, want[name]) for name, one in part_of(folder, part).items()), part
    plain = Generator.load(GeneratorConfig(path=str(tmp_path / "sd2"), steps=2, guidance=2.0))
    images = Generator.load(rule).generate(["a red cup"], [1]).images_BHWC
    assert np.array_equal(images, plain.generate(["a red cup"], [1]).images_BHWC)


def test_stable_diffusion_xl(tmp_path: Path) -> None:
    from benchmarks.published import build_pipeline

    torch.manual_seed(0)
    build_pipeline("tiny-xl", tmp_path / "made").save_pretrained(tmp_path / "xl", safe_serialization=True)
    file = written(tmp_path, original_xl(tmp_path / "xl"), "xl.safetensors")
    folder = resolve_checkpoint(config(file, without_weights(tmp_path / "xl", tmp_path / "configurations")), ())
    for part in ("unet", "vae", "text_encoder", "text_encoder_2"):
        want = part_of(tmp_path / "xl", part)
        assert part_of(folder, part).keys() == want.keys()
        assert all(torch.equal(one, want[name]) for name, one in part_of(folder, part).items()), part


def test_stable_diffusion_3(tmp_path: Path, sd3: Path) -> None:
    whole = written(tmp_path, original_sd3(sd3), "sd3.safetensors")
    folder = resolve_checkpoint(config(whole, without_weights(sd3, tmp_path / "configurations")), ())
    for part in ("transformer", "vae", "text_encoder_2", "text_encoder_3"):
        want = part_of(sd3, part)
        assert part_of(folder, part).keys() == want.keys()
        assert all(torch.equal(one, want[name]) for name, one in part_of(folder, part).items()), part
    small = config(written(tmp_path, original_sd3(sd3, encoders=False), "sd3_medium.safetensors"), sd3)
    images = StockGenerator.load(small).generate(["a red cup"], [1]).images_BHWC
    plain = StockGenerator.load(GeneratorConfig(path=str(sd3), steps=2, guidance=2.0))
    assert np.array_equal(images, plain.generate(["a red cup"], [1]).images_BHWC)


@pytest.fixture
def narrow_flux(monkeypatch: pytest.MonkeyPatch) -> None:
    """diffusers' converter of Flux at the width of the tiny one: 3072 is written into its code."""
    from diffusers.loaders import single_file_model as loading
    from diffusers.loaders import single_file_utils as names

    code = inspect.getsource(names.convert_flux_transformer_checkpoint_to_diffusers)
    assert code.count("inner_dim = 3072") == 1
    made: dict[str, Any] = {}
    exec(code.replace("inner_dim = 3072", "inner_dim = 16"), vars(names), made)
    (convert,) = made.values()
    known = loading.SINGLE_FILE_LOADABLE_CLASSES["FluxTransformer2DModel"]
    monkeypatch.setitem(known, "checkpoint_mapping_fn", convert)


def test_flux(tmp_path: Path, narrow_flux: None) -> None:
    """ComfyUI's file with everything in it, and the transformer alone as Black Forest Labs has it, in fp8 too."""
    whole = save_flux(tmp_path / "flux")
    small: dict[str, Any] = {"height": 64, "width": 64}
    plain = StockGenerator.load(GeneratorConfig(path=str(whole), steps=2, guidance=2.0, **small))
    expected = plain.generate(["a red cup"], [1]).images_BHWC
    file = written(tmp_path, original_flux(whole), "flux1-dev.safetensors")
    folder = resolve_checkpoint(config(file, without_weights(whole, tmp_path / "configurations")), ())
    for part in ("transformer", "vae", "text_encoder", "text_encoder_2"):
        want = part_of(whole, part)
        assert part_of(folder, part).keys() == want.keys()
        assert all(torch.equal(one, want[name]) for name, one in part_of(folder, part).items()), part
    bare = flux(part_of(whole, "transformer"))
    images = StockGenerator.load(config(written(tmp_path, bare, "flux1.safetensors"), whole, **small))
    assert np.array_equal(images.generate(["a red cup"], [1]).images_BHWC, expected)
    eighths = {name: one.to(torch.float8_e4m3fn) for name, one in bare.items()}
    made = StockGenerator.load(config(written(tmp_path, eighths, "flux1-fp8.safetensors"), whole, **small))
    for name, one in made.pipeline.transformer.state_dict().items():
        assert torch.equal(one, part_of(whole, "transformer")[name].to(torch.float8_e4m3fn).float()), name


def test_flux_of_another_width_is_refused(tmp_path: Path) -> None:
    whole = save_flux(tmp_path / "flux")
    file = written(tmp_path, flux(part_of(whole, "transformer")), "flux1.safetensors")
    with pytest.raises(MemscanError, match="its transformer cannot be read as a FluxTransformer2DModel") as refused:
        generator_id(config(file, whole))
    assert "\n" not in str(refused.value)


def change(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def lost(name: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {key: one for key, one in tensors.items() if key != name}


def more(name: str, *shape: int) -> Callable[[Tensors], Tensors]:
    return lambda tensors: tensors | {name: torch.zeros(shape or (1,))}


REFUSED: dict[str, tuple[Callable[[Tensors], Tensors], str]] = {
    "a tensor is missing": (lost("model.diffusion_model.middle_block.1.norm.weight"), "its unet "),
    "a text tensor is missing": (
        lost("cond_stage_model.transformer.text_model.final_layer_norm.bias"),
        "its text_encoder lacks 1 weights, first .*final_layer_norm.bias",
    ),
    "a block too many": (more("model.diffusion_model.output_blocks.9.0.in_layers.0.weight", 7), "its unet .*"),
    "another VAE": (more("first_stage_model.decoder.up.9.block.0.norm1.weight", 7), "its vae .*"),
    "inpainting": (
        lambda tensors: tensors | {"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(64, 33, 3, 3)},
        "its unet cannot be read as a UNet2DConditionModel",
    ),
    "ControlNet inside": (more("control_model.input_blocks.0.0.weight"), "1 tensors that are no part of a Stable"),
    "an XL file": (more("conditioner.embedders.1.model.ln_final.weight"), "no part of a StableDiffusionPipeline"),
    "scaled fp8": (more("scaled_fp8"), "is quantised .it holds scaled_fp8"),
    "bitsandbytes": (
        more("model.diffusion_model.out.2.weight.quant_state.bitsandbytes__nf4"),
        r"is quantised .it holds model.diffusion_model.out.2.weight.quant_state",
    ),
    "two denoisers": (more("model_ema.diffusion_modeltime_embed0weight"), "two denoisers.*extract_ema"),
    "zero SNR": (more("ztsnr"), "zero terminal SNR.*rescale_betas_zero_snr"),
    "EDM": (more("edm_mean"), "is an EDM model"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_not_the_bases_kind_is_refused(tmp_path: Path, tensors: Tensors, kind: str) -> None:
    change_it, line = REFUSED[kind]
    with pytest.raises(MemscanError, match=line) as refused:
        generator_id(config(written(tmp_path, change_it(tensors))))
    assert "\n" not in str(refused.value)
    assert "dreamshaper_8.safetensors" in str(refused.value)


def test_what_a_file_says_of_its_prediction_holds(tmp_path: Path, tensors: Tensors) -> None:
    wrong = written(tmp_path, tensors, **{"modelspec.prediction_type": "epsilon"})
    with pytest.raises(MemscanError, match=r"predicts epsilon.*prediction_type v_prediction.*scheduler_config.json"):
        generator_id(config(wrong))
    generator_id(config(written(tmp_path, tensors, **{"modelspec.prediction_type": "v"})))
    base = Path(shutil.copytree(BASE, tmp_path / "base"))
    change(base / "scheduler" / "scheduler_config.json", prediction_type="epsilon")
    with pytest.raises(MemscanError, match="predicts v_prediction"):
        generator_id(config(written(tmp_path, tensors | {"v_pred": torch.zeros(1)}), base))


@pytest.mark.parametrize(
    ("names", "line"),
    [
        (["lora_unet_x.lora_down.weight"], "is a LoRA"),
        (["control_model.input_blocks.0.0.weight"], "is a file of a ControlNet alone"),
        (["decoder.conv_in.weight", "encoder.conv_in.weight"], "is a file of a VAE alone"),
        (["emb_params"], "is a file of a textual inversion alone"),
        (["text_model.final_layer_norm.weight"], "is a file of a text encoder alone"),
        (["down_blocks.0.resnets.0.conv1.weight"], "is a file of a diffusers UNet alone"),
        (["x"], "is a file, not a model folder"),
    ],
)
def test_other_files_are_named(tmp_path: Path, names: list[str], line: str) -> None:
    file = written(tmp_path, {name: torch.zeros(1) for name in names})
    for rule in (config(file), GeneratorConfig(path=str(file))):
        with pytest.raises(MemscanError, match=line):
            generator_id(rule)


def test_a_file_that_is_cut_off_or_not_there(tmp_path: Path, tensors: Tensors) -> None:
    file = written(tmp_path, tensors)
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(MemscanError, match="is not a whole safetensors file"):
        generator_id(config(file))
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(MemscanError, match="pointer of git-lfs"):
        generator_id(config(file))
    with pytest.raises(MemscanError, match="no such model folder"):
        generator_id(config(tmp_path / "none.safetensors"))
    (tmp_path / "model.CKPT").write_bytes(b"PK")
    with pytest.raises(MemscanError, match="pickle"):
        generator_id(config(tmp_path / "model.CKPT"))
