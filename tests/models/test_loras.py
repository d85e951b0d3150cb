"""LoRAs are fused as their formats say, or refused; never is the base alone sampled in silence."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from memscan.config import GeneratorConfig, LoraConfig, parse_config
from memscan.errors import MemscanError, ModelError
from memscan.models.adapters import adapter_of
from memscan.models.composition import resolve_checkpoint
from memscan.models.generator import Generator
from memscan.planted.world import shipped_world, world_config
from pipelines.run_folder.inputs import generator_id

CHECKPOINT = shipped_world() / "checkpoint"
LAYER = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k"
OUT = "mid_block.attentions.0.transformer_blocks.0.attn2.to_out.0"
WORDS = "encoder.layers.0.self_attn.q_proj"
RANK, ALPHA = 4, 8.0

Tensors = dict[str, torch.Tensor]
Factors = dict[str, tuple[torch.Tensor, torch.Tensor]]


@pytest.fixture(scope="module")
def factors() -> Factors:
    """Down (rank, in) and up (out, rank) of a layer of the UNet, its output layer and one of the text encoder."""
    make = torch.Generator().manual_seed(0)
    sizes = {LAYER: (96, 128), OUT: (128, 128), WORDS: (96, 96)}
    return {
        name: (torch.randn(RANK, into, generator=make) * 0.1, torch.randn(out, RANK, generator=make) * 0.1)
        for name, (into, out) in sizes.items()
    }


def kohya(folder: Path, factors: Factors) -> Path:
    tensors: Tensors = {}
    for name, (down, up) in factors.items():
        start = "lora_te_text_model_" if name == WORDS else "lora_unet_"
        key = start + name.replace(".", "_")
        tensors |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up, f"{key}.alpha": torch.tensor(ALPHA)}
    save_file(tensors, folder / "kohya.safetensors", metadata={"ss_network_dim": "4"})
    return folder / "kohya.safetensors"


def diffusers(folder: Path, factors: Factors) -> Path:
    tensors: Tensors = {}
    for name, (down, up) in factors.items():
        key = f"text_encoder.text_model.{name}" if name == WORDS else f"unet.{name}"
        tensors |= {f"{key}.lora_A.weight": down, f"{key}.lora_B.weight": up}
    facts = {"unet.r": RANK, "unet.lora_alpha": ALPHA, "text_encoder.lora_alpha": ALPHA}
    file = folder / "pytorch_lora_weights.safetensors"
    save_file(tensors, file, metadata={"format": "pt", "lora_adapter_metadata": json.dumps(facts)})
    return folder


def old_diffusers(folder: Path, factors: Factors) -> Path:
    """Attention processors, before PEFT; they have no alpha, so it is in the tensors here."""
    tensors: Tensors = {}
    for name, (down, up) in factors.items():
        block, _, layer = name.removesuffix(".0").rpartition(".")
        key = (
            f"text_encoder.text_model.{name}.lora_linear_layer."
            if name == WORDS
            else f"unet.{block}.processor.{layer}_lora."
        )
        tensors |= {f"{key}down.weight": down, f"{key}up.weight": up * ALPHA / RANK}
    save_file(tensors, folder / "old.safetensors")
    return folder / "old.safetensors"


def peft(folder: Path, factors: Factors) -> Path:
    tensors: Tensors = {}
    for name, (down, up) in factors.items():
        key = f"base_model.model.text_model.{name}" if name == WORDS else f"base_model.model.{name}"
        tensors |= {f"{key}.lora_A.weight": down, f"{key}.lora_B.weight": up}
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"r": RANK, "lora_alpha": ALPHA, "peft_type": "LORA"}))
    return folder


def load(loras: list[LoraConfig], path: Path = CHECKPOINT) -> Generator:
    return Generator.load(GeneratorConfig(path=str(path), steps=2, loras=loras))


def weight(generator: Generator, name: str) -> torch.Tensor:
    network = generator.checkpoint.text_encoder if name == WORDS else generator.checkpoint.unet
    modules = dict(network.named_modules())
    found = modules.get(name) or modules[f"text_model.{name}"]
    return found.weight.detach()


@pytest.fixture(scope="module")
def base() -> Generator:
    return load([])


@pytest.mark.parametrize("write", [kohya, diffusers, old_diffusers, peft])
def test_every_format_is_fused_as_it_says(
    tmp_path: Path, factors: Factors, base: Generator, write: Callable[[Path, Factors], Path]
) -> None:
    path = write(tmp_path, factors)
    made = load([LoraConfig(path=str(path), scale=0.5)])
    for name, (down, up) in factors.items():
        expected = weight(base, name) + 0.5 * ALPHA / RANK * up @ down
        torch.testing.assert_close(weight(made, name), expected, atol=1e-6, rtol=1e-6)
    other = "mid_block.attentions.0.transformer_blocks.0.attn2.to_q"
    assert torch.equal(weight(made, other), weight(base, other))


def test_a_lora_is_part_of_the_models_name(tmp_path: Path, factors: Factors, base: Generator) -> None:
    path = str(kohya(tmp_path, factors))
    ids = [
        generator_id(GeneratorConfig(path=str(CHECKPOINT), loras=loras))
        for loras in ([], [LoraConfig(path=path)], [LoraConfig(path=path, scale=0.5)])
    ]
    assert len(set(ids)) == 3
    assert ids[0] == f"checkpoint@{base.checkpoint.sha256[:12]}"
    assert load([LoraConfig(path=path)]).spec.sha256 != base.spec.sha256
    plain = world_config()
    assert "loras" not in plain.content()["generator"]
    assert "base" not in plain.content()["generator"]
    data = plain.model_dump() | {"out": "x"}
    data["generator"] |= {"loras": [{"path": path}]}
    assert parse_config(data).fingerprint() != plain.fingerprint()


def test_what_does_not_fit_is_refused_whole(tmp_path: Path, factors: Factors) -> None:
    down, up = factors[LAYER]
    wrong = {
        "lora_unet_down_blocks_9_attentions_0.lora_down.weight": down,
        "lora_unet_down_blocks_9_attentions_0.lora_up.weight": up,
    }
    lines = {
        "does not fit the base: 2 of 2 tensors belong to none": wrong,
        "one factor": {f"unet.{LAYER}.lora_A.weight": down},
        "a layer of .* is changed by": {f"unet.{LAYER}.lora_A.weight": down, f"unet.{LAYER}.lora_B.weight": up[:64]},
        "is a LoHa": {"lora_unet_x.hada_w1_a": down},
        "is a LoKr": {"lora_unet_x.lokr_w1": down},
        "is a DoRA": {f"unet.{LAYER}.lora_A.weight": down, f"unet.{LAYER}.dora_scale": up},
    }
    file = tmp_path / "lora.safetensors"
    for line, tensors in lines.items():
        save_file(tensors, file)
        with pytest.raises(ModelError, match=line):
            load([LoraConfig(path=str(file))])
    with pytest.raises(ModelError, match="no such file or folder"):
        generator_id(GeneratorConfig(path=str(CHECKPOINT), loras=[LoraConfig(path=str(tmp_path / "none"))]))


def test_a_lora_beside_its_base_is_not_passed_over(tmp_path: Path, factors: Factors) -> None:
    folder = Path(shutil.copytree(CHECKPOINT, tmp_path / "base"))
    diffusers(folder, factors)
    with pytest.raises(ModelError, match=r"has a LoRA beside its weights \(pytorch_lora_weights.safetensors\)"):
        adapter_of(GeneratorConfig(path=str(folder)))
    named = GeneratorConfig(path=str(folder), loras=[LoraConfig(path=str(folder / "pytorch_lora_weights.safetensors"))])
    assert adapter_of(named).kind == "own"


def test_a_peft_adapter_inside_a_part_is_refused(tmp_path: Path, factors: Factors) -> None:
    folder = Path(shutil.copytree(CHECKPOINT, tmp_path / "base"))
    peft(folder / "text_encoder", factors)
    with pytest.raises(ModelError, match=r"has a PEFT adapter in text_encoder/"):
        generator_id(GeneratorConfig(path=str(folder)))


def test_a_trained_unet_on_its_base(tmp_path: Path, base: Generator) -> None:
    """`checkpoint-500/unet` of train_text_to_image, and the average beside it."""
    trained = tmp_path / "checkpoint-500"
    for part, change in (("unet", 1.0), ("unet_ema", 2.0)):
        shutil.copytree(CHECKPOINT / "unet", trained / part)
        tensors = {name: tensor.detach() for name, tensor in base.checkpoint.unet.state_dict().items()}
        tensors[f"{LAYER}.weight"] = tensors[f"{LAYER}.weight"] + change
        save_file(tensors, trained / part / "diffusion_pytorch_model.safetensors")
    settings = {"base": str(CHECKPOINT), "steps": 2}
    with pytest.raises(MemscanError, match=r"has unet/ and unet_ema/"):
        adapter_of(GeneratorConfig(path=str(trained), **settings))
    with pytest.raises(MemscanError, match=r"is a training checkpoint.*generator.base"):
        adapter_of(GeneratorConfig(path=str(trained)))
    ids = set()
    for part, change in (("unet", 1.0), ("unet_ema", 2.0)):
        config = GeneratorConfig(path=str(trained / part), **settings)
        ids.add(generator_id(config))
        made = Generator.load(config)
        assert made.checkpoint.name == f"checkpoint-500-{part}"
        torch.testing.assert_close(weight(made, LAYER), weight(base, LAYER) + change)
        assert torch.equal(weight(made, WORDS), weight(base, WORDS))
    assert len(ids) == 2
    shutil.rmtree(trained / "unet_ema")
    assert adapter_of(GeneratorConfig(path=str(trained), **settings)).kind == "own"


def test_a_text_encoder_that_was_trained_with_the_unet_is_not_passed_over(tmp_path: Path, base: Generator) -> None:
    """DreamBooth with --train_text_encoder writes `checkpoint-500/unet` and `checkpoint-500/text_encoder`."""
    trained = tmp_path / "checkpoint-500"
    for part in ("unet", "text_encoder"):
        shutil.copytree(CHECKPOINT / part, trained / part)
    file = trained / "text_encoder" / "model.safetensors"
    tensors = load_file(file)
    key = next(name for name in tensors if name.endswith(f"{WORDS}.weight"))
    save_file({**tensors, key: tensors[key].float() + 1}, file, metadata={"format": "pt"})
    rule = GeneratorConfig(path=str(trained), base=str(CHECKPOINT), steps=2)
    made = Generator.load(rule)
    assert made.checkpoint.name == "checkpoint-500-text_encoder-unet"
    torch.testing.assert_close(weight(made, WORDS), weight(base, WORDS) + 1)
    alone = GeneratorConfig(path=str(trained / "text_encoder"), base=str(CHECKPOINT), steps=2)
    assert (resolve_checkpoint(alone, ()) / "text_encoder").resolve() == trained / "text_encoder"


def test_what_is_no_part_of_the_base_is_refused(tmp_path: Path) -> None:
    def refused(path: Path, line: str) -> None:
        with pytest.raises(MemscanError, match=line):
            generator_id(GeneratorConfig(path=str(path), base=str(CHECKPOINT)))

    control = tmp_path / "checkpoint-500" / "controlnet"
    control.mkdir(parents=True)
    (control / "config.json").write_text('{"_class_name": "ControlNetModel"}')
    refused(control, r"is a ControlNetModel, and the StableDiffusionPipeline of generator.base has no such part")
    refused(control.parent, r"has neither unet/ nor transformer/")
    shutil.copytree(CHECKPOINT / "unet", control.parent / "unet")
    refused(control.parent, r"is a ControlNetModel, and the StableDiffusionPipeline of generator.base has no such part")
    refused(CHECKPOINT, r"is a whole checkpoint, which needs no base")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", r"is an empty folder")


def test_a_lora_beside_what_was_trained_is_not_passed_over(tmp_path: Path, factors: Factors) -> None:
    trained = tmp_path / "checkpoint-500"
    shutil.copytree(CHECKPOINT / "unet", trained / "unet")
    diffusers(trained, factors)
    rule = GeneratorConfig(path=str(trained), base=str(CHECKPOINT))
    with pytest.raises(ModelError, match=r"has a LoRA beside what was trained \(pytorch_lora_weights.safetensors\)"):
        adapter_of(rule)
    lora = LoraConfig(path=str(trained / "pytorch_lora_weights.safetensors"))
    assert adapter_of(rule.model_copy(update={"loras": [lora]})).kind == "own"
    shutil.rmtree(trained / "unet")
    with pytest.raises(ModelError, match=r"is a LoRA.*generator\.loras"):
        adapter_of(rule)
