"""This module fuses LoRAs into a checkpoint's networks: W + scale * alpha / rank * up @ down.

Source: Hu et al. 2021, arXiv 2106.09685.

The formats of kohya's scripts, of diffusers (old and new) and of PEFT are read. Every tensor of a file must find its
layer: one that is left over means that the file was made for another base, and nothing is fused.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from memscan.config import LoraConfig
from memscan.errors import ModelError
from memscan.models.folders import first_line
from memscan.models.lora_files import lora_file

NETWORKS = ("unet", "transformer", "text_encoder", "text_encoder_2")
_KOHYA = {
    "lora_unet_": "unet",
    "lora_transformer_": "transformer",
    "lora_te_": "text_encoder",
    "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2",
}
# (end of a tensor's name, which factor it is); the old processors of diffusers name their layers "to_q_lora".
_ENDS = tuple(
    (f"{sign}{end}.weight", which)
    for which, ends in {
        "down": ("lora_down", "lora_A", "lora_A.default", "lora.down", "lora_linear_layer.down"),
        "up": ("lora_up", "lora_B", "lora_B.default", "lora.up", "lora_linear_layer.up"),
    }.items()
    for end in ends
    for sign in "._"
)
_ALL_ENDS = (*_ENDS, (".alpha", "alpha"))
_OTHER_KINDS = {"dora_scale": "DoRA", "lora_magnitude": "DoRA", "hada_": "LoHa", "lokr_": "LoKr", "lora_mid": "LoCon"}


@dataclass
class _Factors:
    """This is what a file says about one layer."""

    tensors: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class _Scaling:
    """alpha / rank where a file does not say it layer by layer."""

    alpha: float | None = None
    root: bool = False  # rank-stabilised: alpha / sqrt(rank)

    def of(self, rank: int, alpha: float | None) -> float:
        found = alpha if alpha is not None else self.alpha
        return 1.0 if found is None else found / (rank**0.5 if self.root else rank)


@torch.no_grad()
def fuse(networks: Mapping[str, Any], loras: Sequence[LoraConfig]) -> None:
    """Fuse LoRAs into networks by part ("unet", "text_encoder", ...), in place and in order.

    Raises:
        ModelError: a file cannot be read, is of another kind (DoRA, LoHa, LoKr), or does not fit the networks.
    """
    for lora in loras:
        file = lora_file(lora.path)
        tensors, scaling = _read(file, networks)
        for module, change in _changes(tensors, scaling, networks, file):
            weight = module.weight
            weight.copy_((weight.float() + lora.scale * change.to(weight.device)).to(weight.dtype))


def _read(file: Path, networks: Mapping[str, Any]) -> tuple[dict[str, Tensor], _Scaling]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(file), framework="pt") as opened:
            tensors = {name: opened.get_tensor(name).float() for name in opened.keys()}  # noqa: SIM118
            metadata = opened.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise ModelError(f"cannot be read as a LoRA ({first_line(error)})", where=str(file)) from error
    for mark, kind in _OTHER_KINDS.items():
        if any(mark in name for name in tensors):
            raise ModelError(f"is a {kind}, not a LoRA", where=str(file), hint="merge it into its base and give that")
    if any(re.match(r"lora_unet_(input|middle|output)_blocks?_", name) for name in tensors) and "unet" in networks:
        tensors = _from_sgm(tensors, networks["unet"], file)
    elif any(re.match(r"lora_unet_(double|single)_blocks_", name) for name in tensors):
        tensors = _from_flux(tensors, file)
    elif strange := next((name for name in tensors if re.search(r"(double|single|joint)_blocks[._]\d", name)), None):
        raise ModelError(
            f"names its layers as the original code does ({strange}), which is read in kohya's format for Flux only",
            where=str(file),
            hint="convert it to diffusers' names, as diffusers' save_lora_weights writes them",
        )
    return tensors, _scaling(file, metadata)


def _from_sgm(tensors: dict[str, Tensor], unet: Any, file: Path) -> dict[str, Tensor]:
    """Names of the original code of SD XL as diffusers' names."""
    from diffusers.loaders.lora_conversion_utils import _maybe_map_sgm_blocks_to_diffusers as renamed

    try:
        found: dict[str, Tensor] = renamed(dict(tensors), unet.config)
    except Exception as error:  # its own ValueError, or a KeyError for blocks that the network has not
        raise ModelError(f"does not fit the base ({first_line(error)})", where=str(file)) from error
    return found


def _from_flux(tensors: dict[str, Tensor], file: Path) -> dict[str, Tensor]:
    """Kohya's names of Flux's original code as diffusers' names, with alpha in the factors.

    The converter only warns of what it has no place for; but the factors "up", which it splits, keep all their values.
    """
    from diffusers import FluxPipeline

    from memscan.models.quiet import quiet_libraries

    try:
        with quiet_libraries():
            found: dict[str, Tensor] = FluxPipeline.lora_state_dict(dict(tensors))
    except Exception as error:  # its own ValueError, or a KeyError for blocks that it does not know
        raise ModelError(f"cannot be converted to diffusers' names ({first_line(error)})", where=str(file)) from error
    held, made = (
        sum(one.numel() for name, one in named.items() if name.endswith(ends))
        for named, ends in ((tensors, ".lora_up.weight"), (found, (".lora_B.weight", ".lora_up.weight")))
    )
    if held != made:
        what = f"cannot be converted to diffusers' names: {held:,} values become {made:,}"
        raise ModelError(what, where=str(file), hint="give it with diffusers' names")
    return found


def _scaling(file: Path, metadata: Mapping[str, str]) -> _Scaling:
    """From PEFT's adapter_config.json beside the file, or from what diffusers writes into its header."""
    beside = file.with_name("adapter_config.json")
    facts: dict[str, Any] = {}
    try:
        if file.name == "adapter_model.safetensors" and beside.is_file():
            facts = json.loads(beside.read_text(encoding="utf-8"))
        elif "lora_adapter_metadata" in metadata:
            packed = json.loads(metadata["lora_adapter_metadata"])
            facts = {key.split(".", 1)[-1]: value for key, value in packed.items()}
    except ValueError as error:
        raise ModelError(f"its configuration is no JSON ({first_line(error)})", where=str(file)) from error
    if facts.get("rank_pattern") or facts.get("alpha_pattern") or facts.get("use_dora"):
        raise ModelError(
            "has a different rank per layer, or is a DoRA", where=str(file), hint="merge it into its base and give that"
        )
    alpha = facts.get("lora_alpha")
    return _Scaling(float(alpha) if alpha is not None else None, bool(facts.get("use_rslora")))


def _changes(
    tensors: Mapping[str, Tensor], scaling: _Scaling, networks: Mapping[str, Any], file: Path
) -> list[tuple[Any, Tensor]]:
    layers = {part: _layers(network) for part, network in networks.items() if network is not None}
    found: dict[int, tuple[Any, _Factors]] = {}
    lost: list[str] = []
    for name, tensor in tensors.items():
        end, which = next(((end, which) for end, which in _ALL_ENDS if name.endswith(end)), ("", ""))
        module = _layer_of(name.removesuffix(end), layers) if end else None
        if module is None:
            lost.append(name)
            continue
        found.setdefault(id(module), (module, _Factors()))[1].tensors[which] = tensor
    if lost or not found:
        raise ModelError(
            f"does not fit the base: {len(lost)} of {len(tensors)} tensors belong to none of its layers"
            + (f", first {sorted(lost)[0]}" if lost else ""),
            where=str(file),
            hint="give the base that it was trained on",
        )
    return [(module, _change(module, factors, scaling, file)) for module, factors in found.values()]


def _change(module: Any, factors: _Factors, scaling: _Scaling, file: Path) -> Tensor:
    down, up = factors.tensors.get("down"), factors.tensors.get("up")
    if down is None or up is None or up.shape[1] != down.shape[0]:
        raise ModelError("has a layer with one factor, or factors of different ranks", where=str(file))
    alpha = factors.tensors.get("alpha")
    product = up.flatten(1) @ down.flatten(1)
    if product.numel() != module.weight.numel():
        raise ModelError(
            f"does not fit the base: a layer of {list(module.weight.shape)} is changed by {list(product.shape)}",
            where=str(file),
            hint="give the base that it was trained on",
        )
    factor = scaling.of(down.shape[0], None if alpha is None else float(alpha))
    return factor * product.reshape(module.weight.shape)


def _layers(network: Any) -> dict[str, Any]:
    """Layers with a matrix by all the names that formats have for them."""
    found: dict[str, Any] = {}
    for name, module in network.named_modules():
        if getattr(module, "weight", None) is None or module.weight.ndim < 2:
            continue
        # Text encoders have had their layers with and without the outer name.
        for known in {name, name.removeprefix("text_model."), f"text_model.{name.removeprefix('text_model.')}"}:
            found[known] = found[known.replace(".", "_")] = module
    return found


def _layer_of(name: str, layers: Mapping[str, Mapping[str, Any]]) -> Any | None:
    plain = name.removeprefix("base_model.model.").replace(".processor.", ".")
    for prefix, part in _KOHYA.items():
        if plain.startswith(prefix):
            return layers.get(part, {}).get(plain.removeprefix(prefix))
    for part in sorted(NETWORKS, key=len, reverse=True):
        if plain.startswith(f"{part}."):
            return _by_name(layers.get(part, {}), plain.removeprefix(f"{part}."))
    return next((found for by_name in layers.values() if (found := _by_name(by_name, plain)) is not None), None)


def _by_name(layers: Mapping[str, Any], name: str) -> Any | None:
    """The old processors' "to_out" is the first layer of that name's sequence."""
    return layers.get(name) or layers.get(f"{name}.0")
