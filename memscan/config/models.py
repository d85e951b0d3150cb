"""This module configures the models of a census: the generator under census, the segmenter and the embedder."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from memscan.config.base import Section


class LoraConfig(Section):
    """This section names a LoRA that is fused into the generator's networks before anything is sampled."""

    path: str = Field(
        description="This is the LoRA's safetensors file, or its folder, in the format of kohya, diffusers or PEFT."
    )
    scale: float = Field(
        1.0,
        description="The LoRA's change is multiplied by this number. With 1, the LoRA has the strength with which it "
        "was trained.",
    )


class InversionConfig(Section):
    """This section names a textual inversion, whose word is added to the text encoder."""

    path: str = Field(description="This is the safetensors file of the textual inversion, or its folder.")
    token: str | None = Field(
        None,
        min_length=1,
        description="This word stands for the textual inversion in captions. If it is not given, it is the word that "
        "the file has, or else the file's name.",
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
    """This section names the checkpoint under census, and says how it is sampled."""

    path: str = Field(
        description="This is the checkpoint: a folder in diffusers' format (with model_index.json), or the id of a "
        "model on the Hugging Face hub."
    )
    revision: str | None = Field(
        None, description="This is the commit of a hub id. A hub id requires it; a local folder has none."
    )
    base: str | None = Field(
        None,
        description="If `path` holds only what a training wrote (a folder with unet/ or transformer/, or one of these "
        "folders itself) or is a single safetensors file, all other parts are those of the checkpoint in this folder.",
    )
    loras: list[LoraConfig] = Field(
        [], description="These LoRAs are fused into the checkpoint, in this order. Their hashes are part of its id."
    )
    textual_inversions: list[InversionConfig] = Field(
        [], description="Captions may use the words of these textual inversions. Their hashes are part of its id."
    )
    scheduler: str = Field(
        "auto",
        description='This is the class name of any diffusers scheduler. With "auto" it is DDIMScheduler, or the '
        "checkpoint's own scheduler if the stock pipeline samples.",
    )
    adapter: Literal["auto", "stock"] = Field(
        "auto",
        description='This key says what samples the images. With "auto", memscan\'s own loop samples models that it '
        "knows (Stable Diffusion 1.x, 2.x and XL), and the stock pipeline of diffusers samples all others. With "
        '"stock", the stock pipeline samples all models.',
    )
    steps: int = Field(50, ge=1, description="An image is sampled with this number of denoising steps.")
    guidance: float = Field(
        7.0,
        ge=0,
        description="This is the scale of classifier-free guidance. A value of 1 or less switches guidance off.",
    )
    negative_prompt: str | None = Field(
        None,
        min_length=1,
        description="Guidance leads away from this caption. If it is not given, it is the empty caption.",
    )
    clip_skip: int | None = Field(
        None,
        ge=1,
        description="This number of the text encoder's last layers is skipped for captions, as diffusers counts: 1 "
        "takes the last layer but one (clip skip 2 in A1111). If it is not given, no layer is skipped.",
    )
    samples: int = Field(4, ge=1, description="This number of images is generated per prompt.")
    base_seed: int = Field(
        0,
        ge=0,
        description="The seed of every image derives from this number, the prompt's id and the number of the sample.",
    )
    height: int | None = Field(
        None,
        ge=8,
        description="A generated image has this height in pixels. If it is not given, it is the height for which the "
        "checkpoint was made.",
    )
    width: int | None = Field(
        None,
        ge=8,
        description="A generated image has this width in pixels. If it is not given, it is the width for which the "
        "checkpoint was made.",
    )
    batch_size: int = Field(
        8,
        ge=1,
        description="One batch of the denoiser has this number of images. With guidance, the denoiser gets twice as "
        "many rows.",
    )
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        "float32", description="The generator computes in this floating-point type."
    )
    switches: str | None = Field(
        None,
        description="This is a file switches.json, as `memscan mitigate` writes it. Its units are switched off for "
        "the prompts that it names. If it is not given, no unit is switched off.",
    )
    guided_share: float = Field(
        1.0,
        gt=0,
        le=1,
        description="This share of the steps, starting with the first, is sampled with guidance. A value below 1 "
        "changes images and is described in docs/speed.md.",
    )
    cache_interval: int = Field(
        1,
        ge=1,
        description="Deep features are computed once in this number of steps (DeepCache). A value above 1 changes "
        "images and is described in docs/speed.md.",
    )

    sanity: Literal["auto", "off"] = Field(
        "auto",
        description='This key says whether the checkpoint is checked before a census. With "auto", a checkpoint that '
        'makes no proper images with its configuration is refused (docs/models.md). With "off", it is scanned in any '
        "case.",
    )

    @model_validator(mode="before")
    @classmethod
    def _unsupported_by_name(cls, data: Any) -> Any:
        for key in data if isinstance(data, dict) else ():
            if key in _UNSUPPORTED:
                raise ValueError(f"generator.{key} is not a key of memscan: {_UNSUPPORTED[key]}")
        return data

    @model_validator(mode="after")
    def _negative_needs_guidance(self) -> GeneratorConfig:
        if self.negative_prompt is not None and self.guidance <= 1:
            raise ValueError("generator.negative_prompt has no effect without guidance: set generator.guidance above 1")
        return self

    @property
    def own_scheduler(self) -> str:
        """This is the class name of the scheduler of memscan's own sampling loop."""
        return "DDIMScheduler" if self.scheduler == "auto" else self.scheduler


class SegmenterConfig(Section):
    """This section names the model that separates foreground from background."""

    kind: Literal["onnx", "birefnet"] = Field(
        "onnx",
        description='"onnx" loads an ONNX file in the format of birefnet-general. "birefnet" loads a transformers '
        "model that brings its own code.",
    )
    path: str = Field(
        description="This is the ONNX file (local or s3://), or the folder or hub id of a birefnet model."
    )
    sha256: str | None = Field(
        None,
        description="This is the SHA-256 of the ONNX file, in hexadecimal. If it is given, any other file is refused "
        "before it is parsed.",
    )
    revision: str | None = Field(
        None, description="This is the commit of the code of a birefnet model. Such a model requires it."
    )
    trust_remote_code: bool = Field(
        False,
        description="This key says whether the code that a birefnet model brings may be run. `kind: birefnet` needs "
        "it to be true.",
    )
    size: int = Field(1024, ge=16, description="The network gets a square image with this side, in pixels.")
    batch_size: int = Field(8, ge=1, description="This number of images is segmented at once.")
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        "float32",
        description="A birefnet model computes in this floating-point type. An ONNX file has a type of its own.",
    )

    preset: Literal["birefnet", "isnet", "u2net", "custom"] = Field(
        "birefnet",
        description='This key names the rule by which images are prepared and masks are read, as in rembg. "birefnet" '
        'is for BiRefNet (logits), "isnet" is for IS-Net and DIS, and "u2net" is for U²-Net, silueta and RMBG. With '
        '"custom", the keys `mean`, `std`, `divide`, `activation` and `output` give the rule.',
    )
    mean: tuple[float, float, float] = Field(
        (0.485, 0.456, 0.406),
        description="This mean of red, green and blue in [0, 1] is subtracted from pixels (custom only).",
    )
    std: tuple[float, float, float] = Field(
        (0.229, 0.224, 0.225), description="Red, green and blue are then divided by these numbers (custom only)."
    )
    divide: Literal["max", "255"] = Field(
        "max", description="Pixels are first divided by this number: the image's own maximum, or 255 (custom only)."
    )
    activation: Literal["sigmoid", "none"] = Field(
        "sigmoid",
        description="This function is applied to the model's output before its values are scaled to [0, 1] (custom "
        "only).",
    )
    output: int | None = Field(
        None,
        ge=0,
        description="The output with this number, counted from 0, is the mask (custom only). If it is not given, it "
        "is the last output.",
    )

    @model_validator(mode="after")
    def _dtype_of_a_network(self) -> SegmenterConfig:
        if self.kind == "onnx" and self.dtype != "float32":
            raise ValueError("segmenter.dtype belongs to kind birefnet: an ONNX file has its own precision")
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
                    raise ValueError(
                        f"segmenter.{key} belongs to preset custom: the other presets have their own rules"
                    )
        return self


class EmbedderConfig(Section):
    """This section names the model that turns images into vectors. Its preprocessing is part of its name."""

    kind: Literal["torchscript", "transformers", "onnx"] = Field(
        "torchscript",
        description='"torchscript" loads a TorchScript file, as SSCD ships. "transformers" loads an image encoder of '
        'transformers (DINOv2, CLIP, SigLIP). "onnx" loads an ONNX file that turns images [N, 3, H, W] into vectors '
        "[N, D].",
    )
    path: str = Field(
        description="This is the TorchScript or ONNX file (local or s3://), or the folder or hub id of a transformers "
        "model."
    )
    sha256: str | None = Field(
        None,
        description="This is the SHA-256 of the TorchScript file, in hexadecimal. It is required, because TorchScript "
        "is executable code.",
    )
    revision: str | None = Field(None, description="This is the commit of a hub id. A hub id requires it.")
    name: str = Field(
        "sscd_disc_mixup", description="Specifications, indexes and reports show this name of the embedder."
    )
    resize: Literal["small_edge", "square"] = Field(
        "small_edge",
        description='This key says how an image is resized. "small_edge" makes its shorter side equal to `size` and '
        'keeps its aspect ratio. "square" makes both sides equal to `size`.',
    )
    size: int = Field(288, ge=8, description="An image is resized to this length, in pixels.")
    mean: tuple[float, float, float] = Field(
        (0.485, 0.456, 0.406),
        description="This mean of red, green and blue is subtracted from pixels in [0, 1]. The default is that of "
        "ImageNet.",
    )
    std: tuple[float, float, float] = Field(
        (0.229, 0.224, 0.225),
        description="Red, green and blue are divided by this standard deviation. The default is that of ImageNet.",
    )
    batch_size: int = Field(32, ge=1, description="This number of images is embedded at once.")
