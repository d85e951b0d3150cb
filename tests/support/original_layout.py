"""Diffusers folders as single files of the original code: the inverse of what diffusers' converters rename.

Stable Diffusion 1.x, 2.x and XL by the names of CompVis' and Stability's repositories, OpenCLIP's text encoder, Stable
Diffusion 3's and Flux's transformers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file

Tensors = dict[str, torch.Tensor]

_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_ENDS = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}


def part_of(folder: Path, part: str) -> Tensors:
    """A part's tensors, whatever their file is called."""
    return load_file(next((folder / part).glob("*.safetensors")))


def original(folder: Path) -> Tensors:
    """A Stable Diffusion 1.x folder as one file's tensors."""
    made = {f"model.diffusion_model.{name}": one for name, one in unet(part_of(folder, "unet")).items()}
    made |= {f"first_stage_model.{name}": one for name, one in vae(part_of(folder, "vae")).items()}
    made |= {f"cond_stage_model.transformer.{name}": one for name, one in clip(part_of(folder, "text_encoder")).items()}
    return made | {"alphas_cumprod": torch.ones(1000), "betas": torch.ones(1000)}


def original_xl(folder: Path) -> Tensors:
    """A Stable Diffusion XL folder as one file's tensors."""
    made = {f"model.diffusion_model.{name}": one for name, one in unet(part_of(folder, "unet")).items()}
    made |= {f"first_stage_model.{name}": one for name, one in vae(part_of(folder, "vae")).items()}
    first, second = (part_of(folder, part) for part in ("text_encoder", "text_encoder_2"))
    made |= {f"conditioner.embedders.0.transformer.{name}": one for name, one in clip(first).items()}
    return made | {f"conditioner.embedders.1.model.{name}": one for name, one in open_clip(second).items()}


def unet(tensors: Mapping[str, torch.Tensor]) -> Tensors:
    """Names of the UNet of latent diffusion."""
    layers = 1 + max(int(match[1]) for name in tensors if (match := re.match(r"down_blocks\.0\.resnets\.(\d+)", name)))

    def renamed(name: str) -> str:
        for start, other in _ENDS.items():
            if name.startswith(f"{start}."):
                return other + name.removeprefix(start)
        if match := re.fullmatch(r"(down|up)_blocks\.(\d+)\.(resnets|attentions)\.(\d+)\.(.*)", name):
            way, block, kind, layer, rest = match[1], int(match[2]), match[3], int(match[4]), match[5]
            at = 1 + block * (layers + 1) + layer if way == "down" else block * (layers + 1) + layer
            where = f"{'input' if way == 'down' else 'output'}_blocks.{at}"
            return f"{where}.0.{_resnet(rest)}" if kind == "resnets" else f"{where}.1.{rest}"
        if match := re.fullmatch(r"down_blocks\.(\d+)\.downsamplers\.0\.conv\.(.*)", name):
            return f"input_blocks.{(int(match[1]) + 1) * (layers + 1)}.0.op.{match[2]}"
        if match := re.fullmatch(r"up_blocks\.(\d+)\.upsamplers\.0\.(.*)", name):
            at = int(match[1]) * (layers + 1) + layers
            attended = any(key.startswith(f"up_blocks.{match[1]}.attentions.") for key in tensors)
            return f"output_blocks.{at}.{2 if attended else 1}.{match[2]}"
        if match := re.fullmatch(r"mid_block\.(resnets|attentions)\.(\d+)\.(.*)", name):
            if match[1] == "attentions":
                return f"middle_block.1.{match[3]}"
            return f"middle_block.{2 * int(match[2])}.{_resnet(match[3])}"
        raise AssertionError(name)

    return {renamed(name): one for name, one in tensors.items()}


def _resnet(rest: str) -> str:
    start, _, end = rest.rpartition(".")
    return f"{_RESNET[start]}.{end}"


def vae(tensors: Mapping[str, torch.Tensor]) -> Tensors:
    """Names of the autoencoder of latent diffusion; its attention has convolutions for linear layers."""
    blocks = 1 + max(int(match[1]) for name in tensors if (match := re.match(r"decoder\.up_blocks\.(\d+)", name)))
    attention = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
    made = {}
    for name, one in tensors.items():
        new = name.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
        new = re.sub(r"down_blocks\.(\d+)\.resnets\.", r"down.\1.block.", new)
        new = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0\.", r"down.\1.downsample.", new)
        new = re.sub(r"up_blocks\.(\d+)\.resnets\.", lambda found: f"up.{blocks - 1 - int(found[1])}.block.", new)
        new = re.sub(
            r"up_blocks\.(\d+)\.upsamplers\.0\.", lambda found: f"up.{blocks - 1 - int(found[1])}.upsample.", new
        )
        new = re.sub(r"mid_block\.resnets\.(\d)\.", lambda found: f"mid.block_{int(found[1]) + 1}.", new)
        if match := re.fullmatch(r"(.*)mid_block\.attentions\.0\.(.*)\.(weight|bias)", new):
            new = f"{match[1]}mid.attn_1.{attention[match[2]]}.{match[3]}"
            one = one[:, :, None, None] if one.ndim == 2 else one
        made[new] = one
    return made


def clip(tensors: Mapping[str, torch.Tensor]) -> Tensors:
    """Names of CLIP's text encoder, which transformers has had with and without the outer one."""
    return {f"text_model.{name.removeprefix('text_model.')}": one for name, one in tensors.items()}


def open_clip(tensors: Mapping[str, torch.Tensor]) -> Tensors:
    """Names of OpenCLIP's text encoder: queries, keys and values in one matrix."""
    plain = {name.removeprefix("text_model."): one for name, one in tensors.items()}
    made: Tensors = {}
    for name, one in plain.items():
        new = name.replace("encoder.layers.", "transformer.resblocks.").replace(
            "embeddings.token_embedding", "token_embedding"
        )
        new = new.replace("embeddings.position_embedding.weight", "positional_embedding")
        new = new.replace("final_layer_norm", "ln_final").replace("layer_norm1", "ln_1").replace("layer_norm2", "ln_2")
        new = (
            new.replace("mlp.fc1", "mlp.c_fc")
            .replace("mlp.fc2", "mlp.c_proj")
            .replace("self_attn.out_proj", "attn.out_proj")
        )
        if new == "text_projection.weight":
            new, one = "text_projection", one.T
        if match := re.fullmatch(r"(.*)self_attn\.q_proj\.(weight|bias)", new):
            parts = [plain[name.replace("q_proj", which)] for which in ("q_proj", "k_proj", "v_proj")]
            new, one = f"{match[1]}attn.in_proj_{match[2]}", torch.cat(parts)
        if "self_attn" not in new:
            made[new] = one
    return made


_SD3 = {
    "pos_embed.pos_embed": "pos_embed",
    "pos_embed.proj": "x_embedder.proj",
    "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
    "time_text_embed.text_embedder.linear_1": "y_embedder.mlp.0",
    "time_text_embed.text_embedder.linear_2": "y_embedder.mlp.2",
    "context_embedder": "context_embedder",
    "proj_out": "final_layer.linear",
    "norm_out.linear": "final_layer.adaLN_modulation.1",
}
_SD3_BLOCK = {
    "attn.to_q": "x_block.attn.qkv",
    "attn.add_q_proj": "context_block.attn.qkv",
    "attn.to_out.0": "x_block.attn.proj",
    "attn.to_add_out": "context_block.attn.proj",
    "norm1.linear": "x_block.adaLN_modulation.1",
    "norm1_context.linear": "context_block.adaLN_modulation.1",
    "ff.net.0.proj": "x_block.mlp.fc1",
    "ff.net.2": "x_block.mlp.fc2",
    "ff_context.net.0.proj": "context_block.mlp.fc1",
    "ff_context.net.2": "context_block.mlp.fc2",
}


def original_sd3(folder: Path, *, encoders: bool = True) -> Tensors:
    """A Stable Diffusion 3 folder as one file's tensors; without `encoders`, transformer and VAE alone."""
    found = {f"model.diffusion_model.{name}": one for name, one in sd3(part_of(folder, "transformer")).items()}
    found |= {f"first_stage_model.{name}": one for name, one in vae(part_of(folder, "vae")).items()}
    parts = {"text_encoder": "clip_l", "text_encoder_2": "clip_g", "text_encoder_3": "t5xxl"} if encoders else {}
    for part, name in parts.items():
        if (folder / part).is_dir():
            tensors = part_of(folder, part)
            if name == "clip_l":  # diffusers gives it the identity: the original pools without a projection
                tensors = {key: one for key, one in tensors.items() if key != "text_projection.weight"}
            found |= {f"text_encoders.{name}.transformer.{key}": one for key, one in tensors.items()}
    return found


def sd3(tensors: Mapping[str, torch.Tensor]) -> Tensors:
    """Names of Stable Diffusion 3's transformer: queries, keys and values in one matrix, shift before scale."""
    last = max(int(match[1]) for name in tensors if (match := re.match(r"transformer_blocks\.(\d+)", name)))
    made: Tensors = {}
    for name, one in tensors.items():
        start, _, end = name.rpartition(".")
        if match := re.fullmatch(r"transformer_blocks\.(\d+)\.(.*)", start):
            block, key = int(match[1]), match[2]
            if key.endswith(("to_q", "add_q_proj")):
                one = torch.cat([tensors[name.replace("_q", f"_{which}")] for which in "qkv"])
            elif key.endswith(("to_k", "to_v", "add_k_proj", "add_v_proj")):
                continue
            if key == "norm1_context.linear" and block == last:
                one = torch.cat(one.chunk(2)[::-1])
            made[f"joint_blocks.{block}.{_SD3_BLOCK[key]}.{end}"] = one
        else:
            one = torch.cat(one.chunk(2)[::-1]) if start == "norm_out.linear" else one
            made[_SD3.get(name) or f"{_SD3[start]}.{end}"] = one
    return made


_FLUX = {
    "time_text_embed.timestep_embedder.linear_1": "time_in.in_layer",
    "time_text_embed.timestep_embedder.linear_2": "time_in.out_layer",
    "time_text_embed.text_embedder.linear_1": "vector_in.in_layer",
    "time_text_embed.text_embedder.linear_2": "vector_in.out_layer",
    "time_text_embed.guidance_embedder.linear_1": "guidance_in.in_layer",
    "time_text_embed.guidance_embedder.linear_2": "guidance_in.out_layer",
    "context_embedder": "txt_in",
    "x_embedder": "img_in",
    "proj_out": "final_layer.linear",
    "norm_out.linear": "final_layer.adaLN_modulation.1",
}
_FLUX_DOUBLE = {
    "norm1.linear": "img_mod.lin",
    "norm1_context.linear": "txt_mod.lin",
    "attn.to_q": "img_attn.qkv",
    "attn.add_q_proj": "txt_attn.qkv",
    "attn.norm_q": "img_attn.norm.query_norm",
    "attn.norm_k": "img_attn.norm.key_norm",
    "attn.norm_added_q": "txt_attn.norm.query_norm",
    "attn.norm_added_k": "txt_attn.norm.key_norm",
    "attn.to_out.0": "img_attn.proj",
    "attn.to_add_out": "txt_attn.proj",
    "ff.net.0.proj": "img_mlp.0",
    "ff.net.2": "img_mlp.2",
    "ff_context.net.0.proj": "txt_mlp.0",
    "ff_context.net.2": "txt_mlp.2",
}
_FLUX_SINGLE = {
    "norm.linear": "modulation.lin",
    "attn.to_q": "linear1",
    "attn.norm_q": "norm.query_norm",
    "attn.norm_k": "norm.key_norm",
    "proj_out": "linear2",
}
# Layers that the original has in one matrix, by the first of them.
_FLUX_JOINED = {
    "transformer_blocks": {
        "attn.to_q": ("attn.to_q", "attn.to_k", "attn.to_v"),
        "attn.add_q_proj": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    },
    "single_transformer_blocks": {"attn.to_q": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")},
}


def original_flux(folder: Path) -> Tensors:
    """A Flux folder as ComfyUI's file with everything in it."""
    found = {f"model.diffusion_model.{name}": one for name, one in flux(part_of(folder, "transformer")).items()}
    found |= {f"vae.{name}": one for name, one in vae(part_of(folder, "vae")).items()}
    found |= {
        f"text_encoders.clip_l.transformer.{name}": one for name, one in clip(part_of(folder, "text_encoder")).items()
    }
    return found | {
        f"text_encoders.t5xxl.transformer.{name}": one for name, one in part_of(folder, "text_encoder_2").items()
    }


def flux(tensors: Mapping[str, torch.Tensor]) -> Tensors:
    """Names of Flux's transformer: queries, keys and values (and the first layer of the MLP) in one matrix."""
    made: Tensors = {}
    for name, one in tensors.items():
        start, _, end = name.rpartition(".")
        match = re.fullmatch(r"((?:single_)?transformer_blocks)\.(\d+)\.(.*)", start)
        if match is None:
            made[f"{_FLUX[start]}.{end}"] = torch.cat(one.chunk(2)[::-1]) if start == "norm_out.linear" else one
            continue
        kind, block, key = match[1], match[2], match[3]
        joined = _FLUX_JOINED[kind]
        if key in joined:
            one = torch.cat([tensors[f"{kind}.{block}.{part}.{end}"] for part in joined[key]])
        elif any(key in parts for parts in joined.values()):
            continue
        single = kind.startswith("single")
        where = f"{'single' if single else 'double'}_blocks.{block}.{(_FLUX_SINGLE if single else _FLUX_DOUBLE)[key]}"
        made[f"{where}.{'scale' if '.norm_' in key else end}"] = one
    return made


def original_2(folder: Path) -> Tensors:
    """A Stable Diffusion 2.x folder as one file's tensors, with the last layer of OpenCLIP, which is never used."""
    made = {f"model.diffusion_model.{name}": one for name, one in unet(part_of(folder, "unet")).items()}
    made |= {f"first_stage_model.{name}": one for name, one in vae(part_of(folder, "vae")).items()}
    text = open_clip(part_of(folder, "text_encoder"))
    last = {
        name.replace("resblocks.0.", "resblocks.23."): torch.ones_like(one)
        for name, one in text.items()
        if name.startswith("transformer.resblocks.0.")
    }
    width = len(text["ln_final.weight"])
    unused = {"text_projection": torch.ones(width, width), "logit_scale": torch.ones(())}
    made |= {f"cond_stage_model.model.{name}": one for name, one in {**text, **last, **unused}.items()}
    return made | {"alphas_cumprod": torch.ones(1000), "betas": torch.ones(1000)}
