"""The models of a census: the generator under census, the segmenter and the embedder."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from memscan.config.base import Section


class LoraConfig(Section):
    """A LoRA that is fused into the generator's networks before anything is sampled."""

    path: str = Field(
        description="The LoRA's safetensors file, or its folder: in the format of kohya, diffusers or PEFT."
    )
    scale: float = Field(1.0, description="What the LoRA's change is multiplied by; at 1 it is as it was trained.")


class InversionConfig(Section):
    """A textual inversion: a word of its own that is added to the text encoder."""

    path: str = Field(description="The safetensors file of the textual inversion, or its folder.")
    token: str | None = Field(
        None,
        min_length=1,
        description="The word that stands for it in captions. When it is not given, it is the one that the file has, "
        "or the file's name.",
    )


# What people set elsewhere, and what is to be done here: never a key that is passed over.
_UNSUPPORTED = {
    "prompt_weighting": "weighted captions are not supported: brackets and numbers are read as text",
    "long_prompts": "captions beyond the model's tokens are cut off, as by the stock pipeline, and counted",
    "vae": "another VAE goes into the checkpoint's folder, as its vae/",
    "refiner": "a refiner is not supported: scan the base alone",
    "controlnet": "a ControlNet needs an input image, and is not supported",
    "ip_adapter": "an IP-Adapter needs an input image, and is not supported",
    "hypernetwork": "hypernetworks are not supported: merge it into the checkpoint",
    "lora": "it is `loras`: [{path: FILE, scale: 1.0}]",
    "textual_inversion": "it is `textual_inversions`: [{path: FILE}]",
    "embeddings": "it is `textual_inversions`: [{path: FILE}]",
}


class GeneratorConfig(Section):
    """The checkpoint under census, and how it is sampled."""

    path: str = Field(
        description="The checkpoint: a folder in diffusers' format (with model_index.json), or the id of a model on "
        "the Hugging Face hub."
    )
    revision: str | None = Field(
        None, description="The commit of a hub id, which is required for one; a local folder has none."
    )
    base: str | None = Field(
        None,
        description="The folder of the checkpoint whose other parts are taken, where `path` holds only what a training "
        "wrote: a folder with unet/ or transformer/, or one of these itself.",
    )
    loras: list[LoraConfig] = Field(
        [], description="The LoRAs that are fused into the checkpoint, in this order; their hashes are part of its id."
    )
    textual_inversions: list[InversionConfig] = Field(
        [], description="The textual inversions whose words captions may use; their hashes are part of the model's id."
    )
    scheduler: str = Field(
        "auto",
        description='The class name of any diffusers scheduler. With "auto" it is DDIMScheduler, or the checkpoint\'s '
        "own scheduler where the stock pipeline samples.",
    )
    adapter: Literal["auto", "stock"] = Field(
        "auto",
        description='What samples the images. With "auto" it is memscan\'s own loop where that knows the model (Stable '
        'Diffusion 1.x, 2.x and XL), and otherwise the stock pipeline of diffusers; "stock" always takes the latter.',
    )
    steps: int = Field(50, ge=1, description="The number of denoising steps per image.")
    guidance: float = Field(
        7.0, ge=0, description="The scale of classifier-free guidance; a value of 1 or less switches guidance off."
    )
    negative_prompt: str | None = Field(
        None,
        min_length=1,
        description="The caption that guidance leads away from. When it is not given, it is the empty caption.",
    )
    clip_skip: int | None = Field(
        None,
        ge=1,
        description="The number of the text encoder's last layers that are skipped for captions, as diffusers counts: "
        "1 takes the last layer but one (A1111's clip skip 2). When it is not given, none is skipped.",
    )
    samples: int = Field(4, ge=1, description="The number of images that are generated per prompt.")
    base_seed: int = Field(
        0,
        ge=0,
        description="The number that the seed of every image derives from, together with the prompt's id and the "
        "number of the sample.",
    )
    height: int | None = Field(
        None,
        ge=8,
        description="The height of a generated image, in pixels. When it is not given, it is the checkpoint's own.",
    )
    width: int | None = Field(
        None,
        ge=8,
        description="The width of a generated image, in pixels. When it is not given, it is the checkpoint's own.",
    )
    batch_size: int = Field(
        8,
        ge=1,
        description="The number of images in one batch of the denoiser; with guidance the denoiser sees twice as many "
        "rows.",
    )
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        "float32", description="The floating-point type that the generator computes in."
    )
    switches: str | None = Field(
        None,
        description="A file switches.json, as `memscan mitigate` writes it, whose units are switched off for the "
        "prompts that it names. When it is not given, nothing is switched off.",
    )
    guided_share: float = Field(
        1.0,
        gt=0,
        le=1,
        description="The share of the steps, from the first one on, that are sampled with guidance. A value below 1 "
        "changes images and is described in docs/speed.md.",
    )
    cache_interval: int = Field(
        1,
        ge=1,
        description="The number of steps after which deep features are computed anew (DeepCache). A value above 1 "
        "changes images and is described in docs/speed.md.",
    )

    sanity: Literal["auto", "off"] = Field(
        "auto",
        description='Whether the checkpoint is looked at before a census: with "auto" one that makes no images as it '
        'is configured is refused (docs/models.md); with "off" it is scanned whatever it makes.',
    )

    @model_validator(mode="before")
    @classmethod
    def _unsupported_by_name(cls, data: Any) -> Any:
        for key in data if isinstance(data, dict) else ():
            if key in _UNSUPPORTED:
                raise ValueError(f"generator.{key} is no key: {_UNSUPPORTED[key]}")
        return data

    @model_validator(mode="after")
    def _negative_needs_guidance(self) -> GeneratorConfig:
        if self.negative_prompt is not None and self.guidance <= 1:
            raise ValueError("generator.negative_prompt has no effect without guidance: set generator.guidance above 1")
        return self

    @property
    def own_scheduler(self) -> str:
        """The scheduler of our own sampling loop."""
        return "DDIMScheduler" if self.scheduler == "auto" else self.scheduler


class SegmenterConfig(Section):
    """The model that separates foreground from background."""

    kind: Literal["onnx", "birefnet"] = Field(
        "onnx",
        description='"onnx" loads an ONNX file in the format of birefnet-general; "birefnet" loads a model of '
        "transformers with code of its own.",
    )
    path: str = Field(description="The ONNX file (local or s3://), or the folder or hub id of a birefnet model.")
    sha256: str | None = Field(
        None,
        description="The SHA-256 of the ONNX file, in hexadecimal. When it is given, another file is refused before it "
        "is parsed.",
    )
    revision: str | None = Field(
        None, description="The commit of the code of a birefnet model, which is required for one."
    )
    trust_remote_code: bool = Field(
        False,
        description="Whether the code that a birefnet model brings with it may be run; `kind: birefnet` needs it.",
    )
    size: int = Field(1024, ge=16, description="The side of the square that the network sees, in pixels.")
    batch_size: int = Field(8, ge=1, description="The number of images that are segmented at once.")
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        "float32",
        description="The floating-point type that a birefnet model computes in; an ONNX file has a type of its own.",
    )

    preset: Literal["birefnet", "isnet", "u2net", "custom"] = Field(
        "birefnet",
        description="The rule that images are prepared by and masks are read by, as rembg has it for the model: "
        '"birefnet" (BiRefNet, logits), "isnet" (IS-Net and DIS), "u2net" (U²-Net, silueta, RMBG); with "custom" it '
        "is what `mean`, `std`, `divide`, `activation` and `output` say.",
    )
    mean: tuple[float, float, float] = Field(
        (0.485, 0.456, 0.406), description="The mean of red, green and blue in [0, 1] that is subtracted (custom)."
    )
    std: tuple[float, float, float] = Field(
        (0.229, 0.224, 0.225), description="What red, green and blue are divided by after that (custom)."
    )
    divide: Literal["max", "255"] = Field(
        "max", description="What pixels are divided by first: the image's own maximum, or 255 (custom)."
    )
    activation: Literal["sigmoid", "none"] = Field(
        "sigmoid", description="What is applied to the model's output before its values are spread to [0, 1] (custom)."
    )
    output: int | None = Field(
        None,
        ge=0,
        description="The number of the output that is the mask, from 0 (custom). When it is not given, it is the last.",
    )

    @model_validator(mode="after")
    def _dtype_of_a_network(self) -> SegmenterConfig:
        if self.kind == "onnx" and self.dtype != "float32":
            raise ValueError("segmenter.dtype belongs to kind birefnet: an ONNX file has a precision of its own")
        return self

    @model_validator(mode="before")
    @classmethod
    def _size_of_a_preset(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("preset") == "u2net" and "size" not in data:
            return {**data, "size": 320}
        return data

    @model_validator(mode="after")
    def _rule_of_its_own(self) -> SegmenterConfig:
        if self.preset != "custom":
            for key in ("mean", "std", "divide", "activation", "output"):
                if key in self.model_fields_set and getattr(self, key) != type(self).model_fields[key].default:
                    raise ValueError(f"segmenter.{key} belongs to preset custom: the others have rules of their own")
        return self


class EmbedderConfig(Section):
    """The model that turns images into vectors. Its preprocessing is part of the measurement, and so of its name."""

    kind: Literal["torchscript", "transformers", "onnx"] = Field(
        "torchscript",
        description='"torchscript" loads a TorchScript file, as SSCD ships; "transformers" loads an image encoder of '
        'transformers (DINOv2, CLIP, SigLIP); "onnx" loads an ONNX file from images [N, 3, H, W] to vectors [N, D].',
    )
    path: str = Field(
        description="The TorchScript file (local or s3://), or the folder or hub id of a transformers model."
    )
    sha256: str | None = Field(
        None,
        description="The SHA-256 of the TorchScript file, in hexadecimal. It is required, because TorchScript is "
        "executable code.",
    )
    revision: str | None = Field(None, description="The commit of a hub id, which is required for one.")
    name: str = Field("sscd_disc_mixup", description="The name of the embedder in specifications, indexes and reports.")
    resize: Literal["small_edge", "square"] = Field(
        "small_edge",
        description='How an image is resized: "small_edge" brings its shorter side to `size` and keeps its aspect '
        'ratio; "square" brings both sides to `size`.',
    )
    size: int = Field(288, ge=8, description="The length that an image is resized to, in pixels.")
    mean: tuple[float, float, float] = Field(
        (0.485, 0.456, 0.406),
        description="The mean of red, green and blue that is subtracted from pixels in [0, 1]; the default is "
        "ImageNet's.",
    )
    std: tuple[float, float, float] = Field(
        (0.229, 0.224, 0.225),
        description="The standard deviation of red, green and blue that pixels are divided by; the default is "
        "ImageNet's.",
    )
    batch_size: int = Field(32, ge=1, description="The number of images that are embedded at once.")
