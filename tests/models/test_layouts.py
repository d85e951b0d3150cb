"""Checkpoints as people hand them over: each row of the table in docs/models.md, scanned or refused in one line.

The builders begin with the shipped planted checkpoint. `loaded` is what a worker does; `named` is what a scan and
`memscan doctor` do before anything starts, and must refuse whatever cannot be loaded.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPTokenizer

from memscan.config import GeneratorConfig
from memscan.errors import MemscanError
from memscan.models.adapters import adapter_of
from memscan.models.generator import Generator
from memscan.planted.world import shipped_world
from pipelines.run_folder.inputs import generator_id

UNET = "unet/diffusion_pytorch_model.safetensors"
Build = Callable[[Path], Any]


def edit(file: Path, **changes: Any) -> None:
    """Change keys of a JSON file; `...` removes one."""
    data = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in data.items() if value is not ...}))


def replaced(file: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    """Rewrite a weights file, which here is a link to the shipped one."""
    tensors = change(load_file(file))
    file.unlink()
    save_file(tensors, file, metadata={"format": "pt"})


def fp16_variant(folder: Path) -> None:
    for part, stem in (
        ("unet", "diffusion_pytorch_model"),
        ("vae", "diffusion_pytorch_model"),
        ("text_encoder", "model"),
    ):
        (folder / part / f"{stem}.safetensors").rename(folder / part / f"{stem}.fp16.safetensors")


def shards(folder: Path, variant: str = "") -> Path:
    tensors = load_file(folder / UNET)
    (folder / UNET).unlink()
    names = sorted(tensors)
    weight_map = {}
    for number, half in enumerate((names[::2], names[1::2]), 1):
        file = f"diffusion_pytorch_model-0000{number}-of-00002{variant}.safetensors"
        save_file({name: tensors[name] for name in half}, folder / "unet" / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(half, file)
    index = folder / "unet" / f"diffusion_pytorch_model.safetensors.index{variant}.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder / "unet" / "diffusion_pytorch_model-00002-of-00002.safetensors"


def sharded_fp16(folder: Path) -> None:
    shards(folder, ".fp16")


def shard_missing(folder: Path) -> None:
    shards(folder).unlink()


def hub_cache(folder: Path) -> Path:
    """As `hf download` leaves it: every file of a snapshot is a link to a blob that is named by its hash."""
    repository = folder.parent / "models--acme--tiny"
    (repository / "snapshots").mkdir(parents=True)
    (repository / "blobs").mkdir()
    for number, file in enumerate(sorted(one for one in folder.rglob("*") if one.is_file())):
        blob = repository / "blobs" / f"{number:064x}"
        file.rename(blob)
        file.symlink_to(blob)
    folder.rename(repository / "snapshots" / "aaa")
    return repository


def hub_cache_snapshot(folder: Path) -> Path:
    return hub_cache(folder) / "snapshots" / "aaa"


def hub_cache_of_two(folder: Path) -> Path:
    repository = hub_cache(folder)
    (repository / "snapshots" / "bbb").mkdir()
    return repository


def symlinked_parts(folder: Path) -> None:
    (folder / "unet").rename(folder.parent / "elsewhere")
    (folder / "unet").symlink_to(folder.parent / "elsewhere")


def no_safety_checker(folder: Path) -> None:
    edit(folder / "model_index.json", safety_checker=["stable_diffusion", "StableDiffusionSafetyChecker"])


def trained_below(folder: Path) -> None:
    shutil.copytree(folder / "unet", folder / "checkpoint-500" / "unet")


def bfloat16(folder: Path) -> None:
    replaced(folder / UNET, lambda tensors: {name: one.to(torch.bfloat16) for name, one in tensors.items()})


def float8(folder: Path) -> None:
    replaced(folder / UNET, lambda tensors: {name: one.to(torch.float8_e4m3fn) for name, one in tensors.items()})


def learned_word(folder: Path) -> None:
    """A textual inversion that was saved inside: one word more in the tokenizer, one row more in the text encoder."""
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    tokenizer.add_tokens(["<gold>"])
    tokenizer.save_pretrained(folder / "tokenizer")
    words = "embeddings.token_embedding.weight"
    file = folder / "text_encoder" / "model.safetensors"
    replaced(file, lambda one: {key: longer(value) if key.endswith(words) else value for key, value in one.items()})
    edit(folder / "text_encoder" / "config.json", vocab_size=len(tokenizer))


def longer(table: torch.Tensor) -> torch.Tensor:
    return torch.cat([table, table[-1:]])


def word_without_a_row(folder: Path) -> None:
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    tokenizer.add_tokens(["<gold>"])
    tokenizer.save_pretrained(folder / "tokenizer")


def controlnet_folder(folder: Path) -> Path:
    (folder.parent / "controlnet").mkdir()
    (folder.parent / "controlnet" / "config.json").write_text('{"_class_name": "ControlNetModel"}')
    return folder.parent / "controlnet"


def one_file_beside(folder: Path) -> None:
    save_file({"model.diffusion_model.x": torch.zeros(1)}, folder / "v1-5-pruned.safetensors")


def weights_twice(folder: Path) -> None:
    whole = load_file(folder / UNET)
    shards(folder)
    save_file(whole, folder / UNET)


def empty_folder(folder: Path) -> Path:
    (folder.parent / "empty").mkdir()
    return folder.parent / "empty"


def no_tokenizer(folder: Path) -> None:
    shutil.rmtree(folder / "tokenizer")


def uppercase(folder: Path) -> None:
    (folder / UNET).rename((folder / UNET).with_suffix(".SAFETENSORS"))


def file_in_a_folder(folder: Path) -> Path:
    file = one_file(folder)
    (folder.parent / "civitai").mkdir()
    file.rename(folder.parent / "civitai" / file.name)
    return folder.parent / "civitai"


def one_file(folder: Path) -> Path:
    names = ("model.diffusion_model.input_blocks.0.0.weight", "cond_stage_model.transformer.x")
    save_file({name: torch.zeros(1) for name in names}, folder.parent / "dreamshaper_8.safetensors")
    return folder.parent / "dreamshaper_8.safetensors"


def one_file_xl(folder: Path) -> Path:
    names = ("model.diffusion_model.x", "conditioner.embedders.1.model.x")
    save_file({name: torch.zeros(1) for name in names}, folder.parent / "xl.safetensors")
    return folder.parent / "xl.safetensors"


def pickled_file(folder: Path) -> Path:
    (folder.parent / "model.ckpt").write_bytes(b"PK")
    return folder.parent / "model.ckpt"


def lora_file(folder: Path) -> Path:
    save_file({"lora_unet_x.lora_down.weight": torch.zeros(1)}, folder.parent / "style.safetensors")
    return folder.parent / "style.safetensors"


def lora_folder(folder: Path) -> Path:
    (folder.parent / "lora").mkdir()
    save_file({"unet.x.lora_A.weight": torch.zeros(1)}, folder.parent / "lora" / "pytorch_lora_weights.safetensors")
    return folder.parent / "lora"


def training_output(folder: Path) -> Path:
    trained = folder.parent / "checkpoint-500"
    shutil.copytree(folder / "unet", trained / "unet")
    return trained


def part_alone(folder: Path) -> Path:
    return folder / "unet"


def pickles_only(folder: Path) -> None:
    (folder / UNET).unlink()
    (folder / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"PK")


def gguf(folder: Path) -> None:
    (folder / UNET).unlink()
    (folder / "unet" / "model-Q4.gguf").write_bytes(b"GGUF")


def gguf_file(folder: Path) -> Path:
    (folder.parent / "flux1-Q4.gguf").write_bytes(b"GGUF")
    return folder.parent / "flux1-Q4.gguf"


def other_variant(name: str) -> Build:
    def build(folder: Path) -> None:
        (folder / UNET).rename(folder / f"unet/diffusion_pytorch_model.{name}.safetensors")

    return build


def lfs_pointer(folder: Path) -> None:
    (folder / UNET).unlink()
    (folder / UNET).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")


def cut_off(folder: Path) -> None:
    data = (folder / UNET).read_bytes()
    (folder / UNET).unlink()
    (folder / UNET).write_bytes(data[: len(data) // 2])


def prefixed(prefix: str) -> Build:
    def build(folder: Path) -> None:
        replaced(folder / UNET, lambda tensors: {prefix + name: one for name, one in tensors.items()})

    return build


def lora_wrapped(folder: Path) -> None:
    replaced(folder / UNET, lambda tensors: tensors | {"mid_block.to_q.lora_A.default.weight": torch.zeros(1)})


def quantised(method: str) -> Build:
    def build(folder: Path) -> None:
        edit(folder / "unet" / "config.json", quantization_config={"quant_method": method})

    return build


def config_of(part: str, **changes: Any) -> Build:
    def build(folder: Path) -> None:
        edit(folder / part / "config.json", **changes)

    return build


def inpainting(folder: Path) -> None:
    """The nine channels of such a UNet, as far as its first layer goes."""
    edit(folder / "unet" / "config.json", in_channels=9)
    replaced(folder / UNET, lambda tensors: tensors | {"conv_in.weight": tensors["conv_in.weight"][:, :9].contiguous()})


def component_with_code(folder: Path) -> None:
    edit(folder / "model_index.json", unet=["my_unet", "MyUNet"])
    (folder / "unet" / "my_unet.py").write_text("")


def index_with(**changes: Any) -> Build:
    def build(folder: Path) -> None:
        edit(folder / "model_index.json", **changes)

    return build


def whole(folder: Path) -> None:
    pass


SCANNED: dict[str, Build] = {
    "whole": whole,
    "fp16 variant": fp16_variant,
    "fp32 variant": other_variant("fp32"),
    "sharded": lambda folder: shards(folder) and None,
    "sharded fp16 variant": sharded_fp16,
    "hub cache repository": hub_cache,
    "hub cache snapshot": hub_cache_snapshot,
    "symlinked parts": symlinked_parts,
    "safety checker missing": no_safety_checker,
    "checkpoints below": trained_below,
    "bfloat16 weights": bfloat16,
    "fp8 weights": float8,
    "textual inversion inside": learned_word,
    "single file beside": one_file_beside,
}
REFUSED: dict[str, tuple[Build, str]] = {
    "single file, SD": (one_file, r"single file of Stable Diffusion 1\.x.*from_single_file"),
    "single file, XL": (one_file_xl, r"single file of Stable Diffusion XL.*from_single_file"),
    "ckpt": (pickled_file, r"is a pickle \(\.ckpt\).*never loaded.*save_pretrained"),
    "LoRA file": (lora_file, r"is a LoRA.*generator\.loras"),
    "LoRA folder": (lora_folder, r"is a LoRA.*generator\.loras"),
    "training output": (training_output, r"is a training checkpoint: it has unet/.*generator\.base"),
    "one part": (part_alone, r"is one part of a checkpoint \(UNet2DCond.*generator\.base"),
    "ControlNet alone": (controlnet_folder, r"is one part of a checkpoint \(ControlNetModel\)"),
    "hub cache, two snapshots": (hub_cache_of_two, r"2 snapshots \(aaa, bbb\)"),
    "shard missing": (shard_missing, r"has no weights file diffusion_pytorch_model-00002-of-00002"),
    "bin only": (pickles_only, r"only safetensors weights are loaded.*save_pretrained"),
    "untrained average": (other_variant("non_ema"), r"has no weights file diffusion_pytorch_model\.safetensors"),
    "GGUF file": (gguf_file, r"is a GGUF file, which is quantised"),
    "GGUF": (gguf, r"GGUF"),
    "git-lfs pointer": (lfs_pointer, r"pointer of git-lfs.*git lfs pull"),
    "cut off": (cut_off, r"not a whole safetensors file"),
    "torch.compile": (prefixed("_orig_mod."), r"saved inside torch\.compile.*_orig_mod"),
    "DDP": (prefixed("module."), r"saved inside DistributedDataParallel"),
    "FSDP": (prefixed("_fsdp_wrapped_module."), r"saved inside FullyShardedDataParallel"),
    "PEFT": (prefixed("base_model.model."), r"saved inside PEFT"),
    "LoRA-wrapped": (lora_wrapped, r"LoRA layers inside.*merge"),
    "bitsandbytes": (quantised("bitsandbytes"), r"quantised by bitsandbytes.*pip install bitsandbytes"),
    "torchao": (quantised("torchao"), r"quantised by torchao.*pip install torchao"),
    "whole and in shards": (weights_twice, r"has its weights twice.*keep one"),
    "empty folder": (empty_folder, r"is an empty folder"),
    "no tokenizer": (no_tokenizer, r"has no tokenizer/"),
    "extension in capitals": (uppercase, r"has no weights file diffusion_pytorch_model\.safetensors"),
    "single file in a folder": (file_in_a_folder, r"holds a single file \(dreamshaper_8.*generator\.base"),
    "ControlNet pipeline": (
        index_with(_class_name="StableDiffusionControlNetPipeline", controlnet=["diffusers", "ControlNetModel"]),
        r"needs an input image",
    ),
    "component with code": (component_with_code, r"unet has code of its own \(my_unet\.MyUNet\)"),
}
# What only the networks themselves show: refused when they are loaded, which doctor and a scan's first look do.
REFUSED_LOADED: dict[str, tuple[Build, str]] = {
    "unet without a size": (config_of("unet", sample_size=None), r"no sample_size.*generator\.height"),
    "IP-adapter": (
        config_of("unet", encoder_hid_dim_type="text_proj", encoder_hid_dim=96),
        r"other than text and time|weights do not fit",
    ),
    "class conditions": (config_of("unet", num_class_embeds=4), r"other than text and time|weights do not fit"),
    "inpainting": (inpainting, r"unet takes 9 latent channels, vae makes 16"),
    "a token without an embedding": (word_without_a_row, r"tokenizer has 1515 tokens, text_encoder 1514"),
}


@pytest.fixture
def planted(tmp_path: Path) -> Path:
    """A copy of the shipped checkpoint whose weights are links: to be replaced, not written to."""

    def copy(source: str, target: str) -> None:
        if source.endswith(".safetensors"):
            os.symlink(source, target)
        else:
            shutil.copyfile(source, target)

    shutil.copytree(shipped_world() / "checkpoint", tmp_path / "here" / "planted", copy_function=copy)
    return tmp_path / "here" / "planted"


def config(path: Path) -> GeneratorConfig:
    return GeneratorConfig(path=str(path), steps=1)


def load(path: Path) -> Generator:
    """As a worker does."""
    adapter_of(config(path))
    return Generator.load(config(path))


@pytest.mark.parametrize("layout", SCANNED)
def test_scanned(planted: Path, layout: str) -> None:
    path = SCANNED[layout](planted) or planted
    name = generator_id(config(path))
    made = load(path)
    assert made.checkpoint.sha256[:12] in name
    weights = load_file(shipped_world() / "checkpoint" / UNET)
    for key in ("conv_in.weight", "mid_block.attentions.0.proj_in.weight"):
        loaded = made.checkpoint.unet.state_dict()[key]
        eighth = layout == "fp8 weights"  # four bits of mantissa
        torch.testing.assert_close(loaded, weights[key].float(), atol=0.01, rtol=0.07 if eighth else 0.01)


@pytest.mark.parametrize("layout", REFUSED)
def test_refused(planted: Path, layout: str) -> None:
    build, line = REFUSED[layout]
    path = build(planted) or planted
    with pytest.raises(MemscanError, match=line) as before:
        generator_id(config(path))
    assert "\n" not in str(before.value)
    with pytest.raises(MemscanError, match=line):
        load(path)


@pytest.mark.parametrize("layout", REFUSED_LOADED)
def test_refused_when_loaded(planted: Path, layout: str) -> None:
    build, line = REFUSED_LOADED[layout]
    path = build(planted) or planted
    with pytest.raises(MemscanError, match=line):
        load(path)


def test_a_unet_without_a_size_is_scanned_at_the_configured_one(planted: Path) -> None:
    edit(planted / "unet" / "config.json", sample_size=None)
    rule = config(planted).model_copy(update={"height": 64, "width": 128})
    assert Generator.load(rule).generate(["a red cup"], [1]).images_BHWC.shape == (1, 64, 128, 3)
