"""Tiny checkpoints with random weights of kinds that our own loop does not know: 64-pixel images, 16 tokens.

* PixArt-Sigma: a transformer denoiser with classifier-free guidance and learned variances, which predicts noise;
* Flux: a transformer with guidance built in, flow matching and packed latents;
* a latent consistency model: a UNet that is told the guidance;
* Stable Diffusion 3: a transformer with classifier-free guidance and flow matching, with or without its T5.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    LatentConsistencyModelPipeline,
    LCMScheduler,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    UNet2DConditionModel,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

SIDE = 64


def save_pixart(folder: Path) -> Path:
    torch.manual_seed(0)
    transformer = PixArtTransformer2DModel(
        sample_size=SIDE // 8,
        num_layers=1,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=2,
        in_channels=4,
        out_channels=8,
        caption_channels=16,
        cross_attention_dim=16,
        use_additional_conditions=False,
    )
    _louder(transformer)
    PixArtSigmaPipeline(
        tokenizer=_t5_tokenizer(),
        text_encoder=_t5(),
        vae=_vae(4),
        transformer=transformer,
        scheduler=DPMSolverMultistepScheduler(),
    ).save_pretrained(folder, safe_serialization=True)
    return folder


def save_flux(folder: Path) -> Path:
    torch.manual_seed(0)
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=16,
        axes_dims_rope=(2, 2, 4),
        guidance_embeds=True,
    )
    _louder(transformer)
    tokenizer = _clip_tokenizer(folder / "tokenizer")
    FluxPipeline(
        tokenizer=tokenizer,
        text_encoder=_clip(tokenizer),
        tokenizer_2=_t5_tokenizer(),
        text_encoder_2=_t5(),
        vae=_vae(4),
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(),
    ).save_pretrained(folder, safe_serialization=True)
    return folder


def save_lcm(folder: Path) -> Path:
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=SIDE // 8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=4,
        norm_num_groups=4,
        time_cond_proj_dim=8,
    )
    _louder(unet)
    tokenizer = _clip_tokenizer(folder / "tokenizer")
    LatentConsistencyModelPipeline(
        tokenizer=tokenizer,
        text_encoder=_clip(tokenizer),
        unet=unet,
        vae=_vae(4),
        scheduler=LCMScheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder, safe_serialization=True)
    return folder


def save_sd3(folder: Path, *, t5: bool = True) -> Path:
    torch.manual_seed(0)
    transformer = SD3Transformer2DModel(
        sample_size=SIDE // 8,
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        caption_projection_dim=16,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        pos_embed_max_size=16,
    )
    _louder(transformer)
    tokenizer = _clip_tokenizer(folder / "tokenizer")
    encoders = [CLIPTextModelWithProjection(clip_config(tokenizer, layers)) for layers in (1, 2)]
    StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=_vae(4),
        text_encoder=encoders[0],
        tokenizer=tokenizer,
        text_encoder_2=encoders[1],
        tokenizer_2=tokenizer,
        text_encoder_3=_t5(32) if t5 else None,
        tokenizer_3=_t5_tokenizer() if t5 else None,
    ).save_pretrained(folder, safe_serialization=True)
    return folder


def _vae(channels: int) -> Any:
    return AutoencoderKL(
        block_out_channels=(8, 8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=channels,
        norm_num_groups=4,
        sample_size=SIDE,
        shift_factor=0.0,
    )


def _t5_tokenizer() -> Any:
    """Single characters, without files from anywhere."""
    pieces = ["<pad>", "</s>", "<unk>", "\u2581", *(chr(code) for code in range(33, 127))]
    return T5Tokenizer(vocab=[(piece, -float(at)) for at, piece in enumerate(pieces)], extra_ids=0, model_max_length=16)


def _t5(width: int = 16) -> Any:
    return T5EncoderModel(T5Config(vocab_size=128, d_model=width, d_kv=8, d_ff=32, num_layers=1, num_heads=2))


def _clip_tokenizer(folder: Path) -> Any:
    from tests.support.tiny_world import save_tokenizer

    return save_tokenizer(folder)


def _clip(tokenizer: Any) -> Any:
    return CLIPTextModel(clip_config(tokenizer))


def clip_config(tokenizer: Any, layers: int = 1) -> CLIPTextConfig:
    """Of a tiny text encoder for the tokenizer."""
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        projection_dim=16,
        num_hidden_layers=layers,
        num_attention_heads=2,
        max_position_embeddings=16,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def _louder(network: torch.nn.Module) -> None:
    """Weights that are large enough for captions to matter."""
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(3.0).add_(0.05 * torch.randn_like(parameter))
