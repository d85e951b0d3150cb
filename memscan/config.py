"""The census configuration: one file describes a run completely; the command line only picks and overrides.

Written as YAML, checked by pydantic (unknown keys are refused with the nearest valid key named), hashed into a
fingerprint that names the run's content. Two runs with one fingerprint are comparable; a run folder never mixes two.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from memscan.errors import ConfigError, InputError
from memscan.io import storage
from memscan.validation import explain

Section = TypeVar("Section", bound=BaseModel)

# `resources.probe_batch` finds no more. More images in a batch gain nothing on any GPU of today (full at 8 to 32) and
# make a block, the unit of retry, long.
PROBED_IMAGES = 32
# Variants of the metric that compare canvases filled outside their region, with the published thresholds.
FILLED = ("paper", "release")


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


class PromptsConfig(_Section):
    """Where the captions come from."""

    paths: list[str] = Field(
        min_length=1, description="CSV/TSV, JSONL, TXT or Parquet files, or folders of them; local or s3://"
    )
    caption_column: str | None = Field(
        None, description="column of the caption; found by its usual names when not given"
    )
    url_column: str | None = Field(None, description="column of the image URL, optional")
    max_chars: int = Field(4096, ge=1, description="longer captions are rejected as caption_too_long")
    limit: int | None = Field(None, ge=1, description="take only the first so many distinct prompts")


class GeneratorConfig(_Section):
    """The checkpoint under census: a diffusers text-to-image folder or a hub id."""

    path: str
    revision: str | None = Field(None, description="commit of a hub id; required for one")
    scheduler: str = Field(
        "auto",
        description="class name of any diffusers scheduler; auto: DDIMScheduler, or the checkpoint's own where "
        "the stock pipeline samples",
    )
    adapter: Literal["auto", "stock"] = Field(
        "auto",
        description="what samples; auto: memscan's own loop where it knows the model (Stable Diffusion 1.x, 2.x, XL), "
        "else the stock pipeline of diffusers",
    )
    steps: int = Field(50, ge=1)
    guidance: float = Field(7.0, ge=0, description="classifier-free guidance scale; 1 or less switches guidance off")
    samples: int = Field(4, ge=1, description="generations per prompt")
    base_seed: int = Field(0, ge=0)
    height: int | None = Field(None, ge=8)
    width: int | None = Field(None, ge=8)
    batch_size: int = Field(8, ge=1, description="images in one denoiser batch (twice as many rows with guidance)")
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    switches: str | None = Field(
        None, description="units to switch off by prompt, as memscan mitigate writes them (switches.json)"
    )
    guided_share: float = Field(
        1.0, gt=0, le=1, description="lossy: share of the steps, from the first, that have guidance; docs/speed.md"
    )
    cache_interval: int = Field(
        1, ge=1, description="lossy: deep features are computed every so many steps (DeepCache); docs/speed.md"
    )

    @property
    def own_scheduler(self) -> str:
        """The scheduler of our own sampling loop."""
        return "DDIMScheduler" if self.scheduler == "auto" else self.scheduler


class SegmenterConfig(_Section):
    """Foreground segmentation: `onnx` (birefnet-general's file format) or `birefnet` (transformers remote code)."""

    kind: Literal["onnx", "birefnet"] = "onnx"
    path: str
    sha256: str | None = Field(None, description="of the ONNX file; checked before it is parsed")
    revision: str | None = Field(None, description="pinned commit of the remote code (birefnet)")
    trust_remote_code: bool = False
    size: int = Field(1024, ge=16, description="square input size")
    batch_size: int = Field(8, ge=1)
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        "float32", description="of the network (birefnet); an ONNX file has its own"
    )

    @model_validator(mode="after")
    def _dtype_of_a_network(self) -> SegmenterConfig:
        if self.kind == "onnx" and self.dtype != "float32":
            raise ValueError("segmenter.dtype belongs to kind birefnet: an ONNX file has a precision of its own")
        return self


class EmbedderConfig(_Section):
    """Copy-detection embedding. The preprocessing is part of the measurement, and so of its name."""

    kind: Literal["torchscript", "transformers"] = "torchscript"
    path: str
    sha256: str | None = Field(None, description="of the TorchScript file; required, since TorchScript is executable")
    revision: str | None = None
    name: str = "sscd_disc_mixup"
    resize: Literal["small_edge", "square"] = "small_edge"
    size: int = Field(288, ge=8)
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    batch_size: int = Field(32, ge=1)


class IndexConfig(_Section):
    """The reference images. With `source`, the index is built into `path` (default: the run folder) if need be."""

    path: str | None = None
    source: str | None = Field(
        None, description="folder of images, Parquet with encoded images, WebDataset tars, or ready embeddings"
    )
    factory: str = Field("auto", description='FAISS factory string such as IVF256,Flat; "auto" chooses by size')
    nprobe: int | None = Field(None, ge=1, description="lists a search looks into; default as the index was built")
    memory: str | None = Field(None, description='what a node has for the index, for "auto"; e.g. 8GB')
    shard_rows: int = Field(524_288, ge=1, description="references in one shard, as far as whole chunks allow")
    images: Literal["copy", "path"] = Field(
        "copy", description="copy encoded images into the index, or only the paths of those that are files"
    )
    image_root: str | None = Field(
        None,
        description="folder of the images that the metadata of ready embeddings name; paths that lead out of it are "
        "not followed. Default: the source's folder",
    )
    top_k: int = Field(5, ge=1, description="candidates by each of whole, foreground and background")

    @model_validator(mode="after")
    def _one_of(self) -> IndexConfig:
        if self.path is None and self.source is None:
            raise ValueError("give path (a built index) or source (the reference images)")
        return self


class MetricConfig(_Section):
    """FB-Mem (Di et al. 2025). Thresholds hold for one variant, canvas, segmenter and generator: calibrate.

    Where none are given, `paper` has the published ones, `region` and `robust` those that ship for their canvas (from
    rendered pairs and photographs with exact masks); for another canvas both must be given.
    """

    variant: Literal["paper", "release", "region", "robust"] = Field(
        "paper",
        description="filled canvases as published or as released, region means, or aligned structure; docs/metric.md",
    )
    canvas: int = Field(
        512,
        ge=32,
        description="side of the square both images are resized to; `paper` needs 176, `robust` a multiple of 64",
    )
    masks: Literal["own", "reference"] = Field(
        "own",
        description="that cut a pair's images: each its own, or the reference's for both, which spares segmenting the "
        "generation and does not fail where two masks of one picture differ (`region`, `robust`)",
    )
    foreground_threshold: float = Field(0.8, gt=0, lt=1)
    background_threshold: float = Field(0.8, gt=0, lt=1)
    degenerate_area: float = Field(
        0.03, ge=0, lt=0.5, description="a region below this share of the image has no score of its own"
    )
    threshold_source: str = Field(
        "published", description="where the thresholds come from: provenance, printed in the report"
    )

    @model_validator(mode="before")
    @classmethod
    def _shipped_thresholds(cls, data: Any) -> Any:
        if not isinstance(data, dict) or data.get("variant", "paper") not in ("region", "robust"):
            return data
        given = [key for key in ("foreground_threshold", "background_threshold") if key in data]
        if len(given) == 2:
            return data
        file = shipped_calibration(data["variant"], data.get("canvas", 512))
        if given or not file.is_file():
            known = ", ".join(sorted(f.stem.rpartition("-")[2] for f in file.parent.glob(f"{data['variant']}-*.json")))
            raise ValueError(
                f"{data['variant']} on a canvas of {data.get('canvas', 512)} needs foreground_threshold and "
                f"background_threshold: thresholds ship for canvases {known or 'none'}; others are calibrated"
            )
        facts = json.loads(file.read_text(encoding="utf-8"))
        return {
            "threshold_source": f"shipped with memscan: {facts['source']}, exact masks",
            **data,
            **{key: facts[key] for key in ("foreground_threshold", "background_threshold")},
        }

    @model_validator(mode="after")
    def _room_for_scales(self) -> MetricConfig:
        if self.variant in FILLED and self.canvas < 176:
            raise ValueError("five MS-SSIM scales need a canvas of at least 176")
        if self.masks == "reference" and self.variant in FILLED:
            raise ValueError(
                f"filled canvases are cut by each image's own mask: metric.masks is own for {self.variant}"
            )
        if self.variant == "robust" and self.canvas % 64:
            raise ValueError("robust has a grid of 64 cells: its canvas is a multiple of 64")
        return self


class VerdictConfig(_Section):
    """How generations make a prompt's verdict."""

    min_share: float = Field(
        0.5, gt=0, le=1, description="share of generations with a label other than NM that flags a prompt"
    )
    harm: dict[Literal["VM", "FM", "BM", "NM"], float] = {"VM": 2.0, "FM": 1.5, "BM": 0.5, "NM": 0.0}


class ScreenConfig(_Section):
    """Which prompts are scanned in full: one denoiser call a seed decides, and an audit says what that missed.

    A threshold holds for one model, detector, timestep and number of seeds; `memscan evaluate screen RUN` chooses one.
    """

    threshold: float = Field(description="prompts at or above it are scanned in full")
    threshold_source: str = Field("configured", description="where the threshold comes from: provenance")
    detector: Literal[
        "noise_norm", "seed_similarity", "attention_entropy_first", "one_step_dcs", "anisotropy", "sharpness"
    ] = "noise_norm"
    timestep: float | None = Field(
        None,
        ge=0,
        lt=1000,
        description="what the model is told of the noise; default the sampling's first, which scanned prompts take up",
    )
    seeds: int = Field(4, ge=1, description="of a bank that all prompts share")
    audit_share: float = Field(0.02, gt=0, le=1, description="of the prompts below the threshold, scanned all the same")
    audit_seed: int = Field(0, ge=0)
    first_samples: int | None = Field(
        None,
        ge=1,
        description="generations that every scanned prompt gets; the rest of generator.samples only where one of these "
        "is memorised. Default: all at once",
    )


class SignalsConfig(_Section):
    """Detector signals that a scan takes beside the noise norms; they cost no denoiser call (docs/detection.md)."""

    attention: bool = Field(
        True, description="attention entropy and bright ending, from the last ten steps; only in memscan's own loop"
    )
    semantic: EmbedderConfig | None = Field(
        None, description="image encoder for meaning (CLIP), whose cosine to the match is taken; kinds as embedder's"
    )


class ClustersConfig(_Section):
    """How flagged prompts are grouped. Nothing here touches what was scanned: reduce again with another choice."""

    encoder: Literal["model", "sentence", "words"] = Field(
        "model", description="the model's own text encoder, pooled; a sentence encoder; or words alone (no model)"
    )
    path: str | None = Field(None, description="folder or hub id of the sentence encoder (transformers, safetensors)")
    revision: str | None = Field(None, description="commit of a hub id; required for one")
    image_weight: float = Field(
        0.75, ge=0, le=1, description="how far prompts that share training images are drawn together; 0: text alone"
    )
    min_cluster_size: int = Field(3, ge=2)
    min_samples: int = Field(1, ge=1, description="HDBSCAN's: higher leaves more prompts without a cluster")
    kmeans: int = Field(12, ge=0, description="clusters of the published variant; 0 leaves it out")
    direct: int = Field(10_000, ge=0, description="up to so many prompts exactly, beyond on a FAISS neighbour graph")

    @model_validator(mode="after")
    def _path_of_a_sentence_encoder(self) -> ClustersConfig:
        if (self.encoder == "sentence") != (self.path is not None):
            raise ValueError("clusters.path belongs to clusters.encoder: sentence, and is needed there")
        return self


class ResourcesConfig(_Section):
    """What Ray gives each stage. Defaults fit one machine; `docs/operations.md` has shapes for clusters."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    samplers: int | None = Field(None, ge=1, description="actors that generate; default one a GPU, else one a CPU core")
    judges: int | None = Field(None, ge=1, description="actors that search and classify")
    sampler_gpus: float = Field(1.0, gt=0)
    search: Literal["resident", "scatter"] = Field(
        "resident", description="the whole index on every node, or one actor a shard, for an index larger than a disk"
    )
    prompts_per_block: int = Field(
        16, ge=1, description="rows one task handles, the unit of retry; on GPUs at least eight batches of the sampling"
    )
    fast: Literal["auto", "on", "off"] = Field(
        "auto",
        description="shared branches, fused projections, channels last; auto: on GPUs, where CPUs stay bit-equal",
    )
    compile: Literal["off", "inductor", "graphs"] = Field(
        "off", description="of the denoiser: torch.compile (minutes at the start) or CUDA graphs (small batches)"
    )
    probe_batch: bool = Field(
        False, description="on a GPU: as many images in a batch as its memory holds, not generator.batch_size"
    )
    overlap: Literal["auto", "on", "off"] = Field(
        "auto", description="judge a batch while the next one is sampled; auto: on GPUs"
    )
    reference_cache_mib: int = Field(1024, ge=1, description="prepared reference images kept by an actor")
    watchdog_seconds: float = Field(
        1800, gt=0, description="a worker at one block for longer is ended; rows that did it again alone are rejected"
    )


class CensusConfig(_Section):
    """A complete census."""

    name: str = Field("census", pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
    out: str = Field("runs/census", description="run folder, local or s3://")
    prompts: PromptsConfig
    generator: GeneratorConfig
    segmenter: SegmenterConfig
    embedder: EmbedderConfig
    index: IndexConfig
    metric: MetricConfig = MetricConfig()
    screen: ScreenConfig | None = Field(None, description="default: every prompt is scanned in full")
    signals: SignalsConfig = SignalsConfig()
    verdict: VerdictConfig = VerdictConfig()
    clusters: ClustersConfig = ClustersConfig()
    resources: ResourcesConfig = ResourcesConfig()
    part_size: int = Field(10_000, ge=1, description="prompts in one part, the unit of commit")

    @model_validator(mode="after")
    def _screen_fits(self) -> CensusConfig:
        screen = self.screen
        if screen is None:
            return self
        if screen.detector == "seed_similarity" and screen.seeds < 2:
            raise ValueError("screen.detector seed_similarity needs two seeds")
        if screen.detector in ("noise_norm", "anisotropy", "sharpness") and self.generator.guidance <= 1:
            raise ValueError(
                f"screen.detector {screen.detector} needs guidance: set generator.guidance above 1, or another detector"
            )
        if screen.first_samples is not None and screen.first_samples > self.generator.samples:
            raise ValueError("screen.first_samples is more than generator.samples")
        if screen.first_samples is not None and self.resources.judges:
            raise ValueError("screen.first_samples needs judging where the sampling is: leave out resources.judges")
        return self

    def content(self) -> dict[str, Any]:
        """All that decides the results, as JSON: not name or place, the resources, or what only the reduce reads.

        A census without a screen, sampled by our own loop, or with the usual signals, has the content that it had
        before there were others; the scheduler of a stock pipeline stands in the generator's identity.
        """
        content = self.model_dump(mode="json", exclude={"name", "out", "resources", "verdict", "clusters"})
        if content["screen"] is None:
            del content["screen"]
        if self.signals == SignalsConfig():
            del content["signals"]
        if self.metric.masks == "own":
            del content["metric"]["masks"]
        generator = content["generator"]
        generator["scheduler"] = self.generator.own_scheduler
        if generator["adapter"] == "auto":
            del generator["adapter"]
        if content["index"]["image_root"] is None:
            del content["index"]["image_root"]
        return content

    def fingerprint(self) -> str:
        """Hash of `content`."""
        content = self.content()
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def shipped_calibration(variant: str, canvas: int) -> Path:
    """Where the thresholds of a variant on a canvas would be that ship with the package; the file need not exist."""
    return Path(__file__).parent / "metric" / "shipped" / f"{variant}-{canvas}.json"


def parse_metric(data: dict[str, Any], *, where: str = "metric") -> MetricConfig:
    """Validate the `metric` section alone. Raises ConfigError as `load_config` does."""
    try:
        return MetricConfig.model_validate(data)
    except ValidationError as error:
        raise ConfigError(explain(error, MetricConfig), where=where) from error


def parse_section(model: type[Section], data: Any, *, where: str) -> Section:
    """Validate a mapping by a pydantic model. Raises ConfigError as `load_config` does."""
    if not isinstance(data, dict):
        raise ConfigError("must be a mapping of keys to values", where=where)
    try:
        return model.model_validate(data)
    except ValidationError as error:
        raise ConfigError(explain(error, model), where=where) from error


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping that a YAML file, local or s3://, holds. Raises ConfigError as `load_config` does."""
    try:
        text = storage.read_bytes(path).decode("utf-8")
    except InputError as error:
        raise ConfigError(f"cannot read the configuration ({error.what})", where=str(path)) from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"cannot read the configuration ({error})", where=str(path)) from error
    try:
        data = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: 2001-99-99 looks like a date
        raise ConfigError(f"not valid YAML: {error}", where=str(path)) from error
    if not isinstance(data, dict):
        raise ConfigError("must be a mapping of keys to values", where=str(path), hint="see examples/")
    return data


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> CensusConfig:
    """Read a YAML configuration and apply `key.sub=value` overrides (values in YAML syntax).

    Relative paths inside the file are left as written: they are relative to the working directory.

    Raises:
        ConfigError: the file is missing, is not YAML, or does not validate; names the key and the nearest valid one.
    """
    return parse_config(read_yaml(path), overrides, where=str(path))


def parse_config(data: dict[str, Any], overrides: Sequence[str] = (), *, where: str = "configuration") -> CensusConfig:
    """Validate a configuration given as a mapping. Raises ConfigError as `load_config` does."""
    merged: dict[str, Any] = copy.deepcopy(data)
    for override in overrides:
        _apply_override(merged, override)
    try:
        return CensusConfig.model_validate(merged)
    except ValidationError as error:
        raise ConfigError(explain(error, CensusConfig), where=where) from error


def _apply_override(data: dict[str, Any], override: str) -> None:
    key, sign, value = override.partition("=")
    if not sign or not key:
        raise ConfigError(
            f"override {override!r} is not key=value", where="--set", hint="for example --set generator.steps=20"
        )
    *parents, leaf = key.split(".")
    node = data
    for parent in parents:
        child = node.get(parent)
        if child is None:  # also where a section is there and says that there is none
            child = node[parent] = {}
        if not isinstance(child, dict):
            raise ConfigError(f"{key!r}: {parent!r} is a value, not a section", where="--set")
        node = child
    try:
        node[leaf] = yaml.safe_load(value)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: 2001-99-99 looks like a date
        raise ConfigError(f"{key!r}: {value!r} is not a YAML value", where="--set") from error
