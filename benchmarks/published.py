"""Networks of published sizes with random weights: what speed is measured on where no weights are at hand.

Arithmetic does not depend on the weights' values, so a census of these costs what a census of the published checkpoints
costs. Sizes are those of their published configurations: Stable Diffusion 1.5, 2.1 (768 pixels), XL 1.0; a segmenter of
BiRefNet's size (a Swin-L backbone at two resolutions and a convolutional decoder, Zheng et al. 2024, arXiv 2401.03407)
and a ResNet-50 with generalised-mean pooling to 512 numbers (SSCD, Pizzi et al. 2022). `tiny` and `tiny-xl` have the
same parts, small enough for a CPU.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from memscan.models.checkpoint import Checkpoint

_CROSS_DOWN, _DOWN = "CrossAttnDownBlock2D", "DownBlock2D"
_CROSS_UP, _UP = "CrossAttnUpBlock2D", "UpBlock2D"
_SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False}


@dataclass(frozen=True)
class Architecture:
    """A text-to-image model by its configurations.

    Args:
        unet, vae: of diffusers' classes.
        text: of each text encoder, in transformers' names.
        prediction: "epsilon" or "v_prediction".
        tera: TFLOP (2 per multiply-add) of one denoiser row and of decoding one image, at the native size; measured on
            the published configurations, None where not published.
    """

    unet: dict[str, Any]
    vae: dict[str, Any]
    text: tuple[dict[str, Any], ...]
    prediction: str = "epsilon"
    tera: tuple[float, float] | None = None

    @property
    def double(self) -> bool:
        """Whether it has two text encoders, as SD XL has."""
        return len(self.text) == 2


def _unet(size: int, width: int, **other: Any) -> dict[str, Any]:
    return {"sample_size": size, "cross_attention_dim": width, "layers_per_block": 2, **other}


def _vae(
    size: int, scaling: float, channels: tuple[int, ...] = (128, 256, 512, 512), groups: int = 32
) -> dict[str, Any]:
    return {
        "sample_size": size,
        "block_out_channels": channels,
        "down_block_types": ("DownEncoderBlock2D",) * len(channels),
        "up_block_types": ("UpDecoderBlock2D",) * len(channels),
        "layers_per_block": 2 if groups == 32 else 1,
        "latent_channels": 4,
        "norm_num_groups": groups,
        "scaling_factor": scaling,
    }


def _text(width: int, layers: int, heads: int, **other: Any) -> dict[str, Any]:
    sizes = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": layers}
    return {**sizes, "num_attention_heads": heads, "vocab_size": 49408, "max_position_embeddings": 77, **other}


_SD_BLOCKS = {
    "block_out_channels": (320, 640, 1280, 1280),
    "down_block_types": (_CROSS_DOWN,) * 3 + (_DOWN,),
    "up_block_types": (_UP,) + (_CROSS_UP,) * 3,
}
_XL_BLOCKS = {
    "block_out_channels": (320, 640, 1280),
    "down_block_types": (_DOWN, _CROSS_DOWN, _CROSS_DOWN),
    "up_block_types": (_CROSS_UP, _CROSS_UP, _UP),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
_TINY = {"norm_num_groups": 8, "layers_per_block": 1, "block_out_channels": (32, 64), "attention_head_dim": 4}
_TINY_BLOCKS = {**_TINY, "down_block_types": (_CROSS_DOWN, _DOWN), "up_block_types": (_UP, _CROSS_UP)}
_TINY_XL_BLOCKS = {
    **_TINY,
    "down_block_types": (_DOWN, _CROSS_DOWN),
    "up_block_types": (_CROSS_UP, _UP),
    "transformer_layers_per_block": (1, 2),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 6 * 8 + 24,
}
_SMALL_VAE = _vae(128, 0.18215, (16, 32, 32, 32), groups=8)

ARCHITECTURES = {
    "sd1": Architecture(
        unet=_unet(64, 768, attention_head_dim=8, **_SD_BLOCKS),
        vae=_vae(512, 0.18215),
        text=(_text(768, 12, 12, hidden_act="quick_gelu"),),
        tera=(0.803, 2.51),
    ),
    "sd2": Architecture(
        unet=_unet(96, 1024, attention_head_dim=(5, 10, 20, 20), use_linear_projection=True, **_SD_BLOCKS),
        vae=_vae(768, 0.18215),
        text=(_text(1024, 23, 16, hidden_act="gelu"),),
        prediction="v_prediction",
        tera=(2.149, 5.75),
    ),
    "xl": Architecture(
        unet=_unet(128, 2048, **_XL_BLOCKS),
        vae=_vae(1024, 0.13025),
        text=(
            _text(768, 12, 12, hidden_act="quick_gelu", projection_dim=768),
            _text(1280, 32, 20, hidden_act="gelu", projection_dim=1280),
        ),
        tera=(6.76, 10.47),
    ),
    "tiny": Architecture(
        unet=_unet(16, 32, **_TINY_BLOCKS),
        vae=_SMALL_VAE,
        text=(_text(32, 2, 2, hidden_act="quick_gelu", vocab_size=600, initializer_factor=8.0),),
    ),
    "tiny-xl": Architecture(
        unet=_unet(16, 56, **_TINY_XL_BLOCKS),
        vae=_SMALL_VAE,
        text=(
            _text(32, 2, 2, hidden_act="quick_gelu", projection_dim=32, vocab_size=600, initializer_factor=2.0),
            _text(24, 2, 2, hidden_act="gelu", projection_dim=24, vocab_size=600, initializer_factor=2.0),
        ),
    ),
}


def narrowed(made: Architecture) -> Architecture:
    """The same blocks, layers and kernels, so narrow and small that a CPU spends its time on launching them."""
    levels = len(made.unet["block_out_channels"])
    unet = {**made.unet, "block_out_channels": (32,) * levels, "norm_num_groups": 8, "attention_head_dim": 4}
    return replace(made, unet={**unet, "sample_size": 16}, vae=_SMALL_VAE, tera=None)


def build_pipeline(
    name: str | Architecture, folder: Path, *, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> Any:
    """The stock pipeline of an architecture with random weights.

    Args:
        name: of `ARCHITECTURES`, or an architecture.
        folder: where the tokenizer's files go.
        device, dtype: of the networks; they are made on the device.
    """
    import diffusers
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    made = ARCHITECTURES[name] if isinstance(name, str) else name
    tokenizer = byte_tokenizer(folder / "byte_tokenizer")
    with torch.device(device):
        unet = diffusers.UNet2DConditionModel(**made.unet)
        vae = diffusers.AutoencoderKL(**made.vae)
        ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
        kinds = (CLIPTextModel, CLIPTextModelWithProjection)
        encoders = [kind(CLIPTextConfig(**text, **ids)) for kind, text in zip(kinds, made.text, strict=False)]
    networks = [part.to(dtype).eval().requires_grad_(False) for part in (unet, vae, *encoders)]
    scheduler = diffusers.DDIMScheduler(**_SCHEDULE, steps_offset=1, prediction_type=made.prediction)
    parts = {"unet": networks[0], "vae": networks[1], "text_encoder": networks[2], "scheduler": scheduler}
    if made.double:
        double = {"text_encoder_2": networks[3], "tokenizer_2": tokenizer, "add_watermarker": False}
        pipeline = diffusers.StableDiffusionXLPipeline(tokenizer=tokenizer, **parts, **double)
    else:
        pipeline = diffusers.StableDiffusionPipeline(
            tokenizer=tokenizer, **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
        )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


FLOWS: dict[str, dict[str, Any]] = {
    # Stable Diffusion 3 medium (Esser et al. 2024, arXiv 2403.03206): 24 joint blocks, 2.03 billion parameters.
    "sd3": {
        "transformer": {
            "sample_size": 128,
            "num_layers": 24,
            "num_attention_heads": 24,
            "joint_attention_dim": 4096,
            "caption_projection_dim": 1536,
            "pooled_projection_dim": 2048,
            "pos_embed_max_size": 192,
        },
        "vae": _vae(1024, 1.5305),
        "text": (
            _text(768, 12, 12, hidden_act="quick_gelu", projection_dim=768),
            _text(1280, 32, 20, hidden_act="gelu", projection_dim=1280),
        ),
    },
    "tiny-flow": {
        "transformer": {
            "sample_size": 16,
            "num_layers": 2,
            "attention_head_dim": 8,
            "num_attention_heads": 4,
            "joint_attention_dim": 56,
            "caption_projection_dim": 32,
            "pooled_projection_dim": 56,
            "pos_embed_max_size": 32,
        },
        "vae": _vae(128, 1.5305, (16, 32, 32, 32), groups=8),
        "text": (
            _text(32, 2, 2, hidden_act="quick_gelu", projection_dim=32, vocab_size=600),
            _text(24, 2, 2, hidden_act="gelu", projection_dim=24, vocab_size=600),
        ),
    },
}


def build_flow_pipeline(name: str, folder: Path, *, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Any:
    """Make the stock pipeline of a flow transformer with random weights, without its optional T5 encoder.

    Args:
        name: of `FLOWS`.
        folder: where the tokenizer's files go.
        device, dtype: of the networks; they are made on the device.
    """
    import diffusers
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    made = FLOWS[name]
    tokenizer = byte_tokenizer(folder / "byte_tokenizer")
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    vae = {**made["vae"], "latent_channels": 16, "shift_factor": 0.0609}
    vae |= {"use_quant_conv": False, "use_post_quant_conv": False}
    with torch.device(device):
        transformer = diffusers.SD3Transformer2DModel(in_channels=16, out_channels=16, **made["transformer"])
        decoder = diffusers.AutoencoderKL(**vae)
        encoders = [CLIPTextModelWithProjection(CLIPTextConfig(**text, **ids)) for text in made["text"]]
    networks = [part.to(dtype).eval().requires_grad_(False) for part in (transformer, decoder, *encoders)]
    pipeline = diffusers.StableDiffusion3Pipeline(
        transformer=networks[0],
        vae=networks[1],
        text_encoder=networks[2],
        text_encoder_2=networks[3],
        text_encoder_3=None,
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        tokenizer_3=None,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def as_checkpoint(pipeline: Any, name: str = "random") -> Checkpoint:
    """The components of a stock pipeline in memory as a checkpoint; they are shared, and have no hash."""
    double = hasattr(pipeline, "text_encoder_2")
    return Checkpoint(
        tokenizer=pipeline.tokenizer,
        text_encoder=pipeline.text_encoder,
        unet=pipeline.unet,
        vae=pipeline.vae,
        scheduler_config=dict(pipeline.scheduler.config),
        max_tokens=pipeline.tokenizer.model_max_length,
        vae_scale=2 ** (len(pipeline.vae.config.block_out_channels) - 1),
        where=name,
        name=name,
        sha256="0" * 64,
        tokenizer_2=pipeline.tokenizer_2 if double else None,
        text_encoder_2=pipeline.text_encoder_2 if double else None,
        zero_empty=double and bool(pipeline.config.get("force_zeros_for_empty_prompt", True)),
    )


def byte_tokenizer(folder: Path, length: int = 77) -> Any:
    """A CLIP tokenizer whose vocabulary is bytes."""
    from transformers import CLIPTokenizer

    folder.mkdir(parents=True, exist_ok=True)
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = [chr(byte) for byte in printable] + [chr(256 + at) for at in range(256 - len(printable))]
    end = "<|endoftext|>"
    vocabulary = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", end]
    (folder / "vocab.json").write_text(json.dumps({token: row for row, token in enumerate(vocabulary)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    names = {"bos_token": "<|startoftext|>", "eos_token": end, "unk_token": end, "pad_token": end}
    (folder / "tokenizer_config.json").write_text(json.dumps({**names, "model_max_length": length}))
    return CLIPTokenizer.from_pretrained(str(folder))


class SegmenterSized(nn.Module):
    """A network of BiRefNet's size: normalised images (N, 3, S, S) to logits (N, 1, S, S).

    Args:
        small: a few thousand parameters instead, for a CPU.
    """

    def __init__(self, *, small: bool = False) -> None:
        from transformers import SwinBackbone, SwinConfig

        super().__init__()
        sizes: dict[str, Any] = {"embed_dim": 192, "depths": [2, 2, 18, 2], "num_heads": [6, 12, 24, 48]}
        if small:
            sizes = {"embed_dim": 12, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 2, 2]}
        shape: dict[str, Any] = {**sizes, "window_size": 4 if small else 12}
        shape["out_features"] = ["stage1", "stage2", "stage3", "stage4"]
        self.backbone = SwinBackbone(SwinConfig(**shape))
        widths = [2 * sizes["embed_dim"] * 2**stage for stage in range(4)]
        inner = [8, 8, 8, 8] if small else [192, 256, 512, 512]
        above = [0 if stage == 3 else inner[stage + 1] for stage in range(4)]
        self.decoder = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(width + more, channels, 3, padding=1),
                nn.ReLU(),
                nn.Conv2d(channels, channels, 3, padding=1),
                nn.ReLU(),
            )
            for width, more, channels in zip(widths, above, inner, strict=True)
        )
        self.head = nn.Conv2d(inner[0], 1, 1)

    def forward(self, images_NCHW: Tensor) -> Tensor:
        """Logits (N, 1, S, S): the backbone sees the image and its half, as BiRefNet's does."""
        half = nn.functional.interpolate(images_NCHW, scale_factor=0.5, mode="bilinear")
        large, small = (self.backbone(image).feature_maps for image in (images_NCHW, half))
        x: Tensor | None = None
        for stage in reversed(range(4)):
            size = large[stage].shape[-2:]
            parts = [large[stage], _resized(small[stage], size)]
            parts += [] if x is None else [_resized(x, size)]
            x = self.decoder[stage](torch.cat(parts, dim=1))
        out: Tensor = _resized(self.head(x), images_NCHW.shape[-2:])
        return out


class EmbedderSized(nn.Module):
    """ResNet-50, generalised-mean pooling and a linear layer to 512 numbers: (N, 3, H, W) to (N, 512)."""

    def __init__(self, *, small: bool = False) -> None:
        from transformers import ResNetConfig, ResNetModel

        super().__init__()
        sizes: dict[str, Any] = {"embedding_size": 8, "hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1]}
        self.network = ResNetModel(ResNetConfig(**(sizes if small else {})))
        width = 16 if small else 2048
        self.linear = nn.Linear(width, 512)

    def forward(self, images_NCHW: Tensor) -> Tensor:
        """Vectors, not normalised."""
        features = self.network(images_NCHW).last_hidden_state
        pooled = features.clamp(min=1e-6).pow(3).mean((-2, -1)).pow(1 / 3)
        out: Tensor = self.linear(pooled)
        return out


def _resized(x_NCHW: Tensor, size: Any) -> Tensor:
    return nn.functional.interpolate(x_NCHW, size=tuple(size), mode="bilinear")
