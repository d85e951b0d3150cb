"""This module writes a first, commented configuration for `memscan config init`.

The model, prompts and images exist already.

Each of the three is checked as by a scan: what a scan would refuse is refused here, in one line. Only little is read:
headers of weights, the first prompts, and names and metadata of the images.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import yaml

from memscan.config import CensusConfig, GeneratorConfig, PromptsConfig, parse_config
from memscan.errors import ConfigError, InputError, ModelError
from memscan.io import storage
from memscan.models.adapters import JSON_PATTERNS, Adapter, adapter_in, check_components
from memscan.models.composition import resolve_checkpoint
from memscan.models.folders import check_checkpoint, read_config
from memscan.models.specification import hash_file
from memscan.prompts.table import PromptTable, read_prompts
from memscan.sources.reading import Source, open_source

# As many are read: the caption column is known after the first, and whether captions can be read after some.
LOOKED_AT = 1000
SEGMENTER = "models/birefnet-general.onnx"
EMBEDDER = "models/sscd_disc_mixup.torchscript.pt"
_KINDS = {
    "images": "a folder of images; an image's id is its path below the folder",
    "parquet": "Parquet with encoded images",
    "webdataset": "WebDataset tars",
    "embeddings": "ready embeddings with their metadata",
}


@dataclass(frozen=True)
class Found:
    """This is what was found on the disk.

    Args:
        sides: height and width of the checkpoint's images in pixels; None if its configuration does not say.
        prompts: the first prompts.
    """

    adapter: Adapter
    sides: tuple[int, int] | None
    prompts: PromptTable
    source: Source


def look(model: str, prompts: str, images: str) -> Found:
    """Examine a checkpoint's folder, prompt files and reference images.

    Raises:
        ModelError: the model is not the folder of a text-to-image pipeline, or is not complete.
        InputError: there are no readable prompts or no reference images.
    """
    given = Path(model)
    if given.is_dir() and not (given / "model_index.json").is_file():
        below = sorted(path.parent.name for path in given.glob("*/model_index.json"))
        if below:
            hint = f"there is one in {', '.join(below[:3])}"
            raise ModelError("is not a checkpoint: it holds no model_index.json", where=model, hint=hint)
    config = GeneratorConfig(path=model)
    folder = resolve_checkpoint(config, JSON_PATTERNS)
    adapter = adapter_in(folder, config)
    if adapter.kind == "own":
        check_checkpoint(folder)
    else:
        check_components(folder)
    table = read_prompts(PromptsConfig(paths=[prompts], limit=LOOKED_AT))
    if not any(status == "done" for status in table.table["status"].to_pylist()):
        raise InputError("holds no usable caption", where=prompts, hint="a prompt file has one caption per row")
    return Found(adapter, _sides(folder), table, open_source(images))


def _sides(folder: Path) -> tuple[int, int] | None:
    network = next(
        (folder / part for part in ("unet", "transformer") if (folder / part / "config.json").is_file()), None
    )
    vae = folder / "vae" / "config.json"
    if network is None or not vae.is_file():
        return None
    sample = read_config(network / "config.json").get("sample_size")
    blocks = read_config(vae).get("block_out_channels")
    if not isinstance(blocks, list) or not blocks:
        return None
    scale = 2 ** (len(blocks) - 1)
    if isinstance(sample, int):
        return sample * scale, sample * scale
    if isinstance(sample, list) and len(sample) == 2 and all(isinstance(side, int) for side in sample):
        return sample[0] * scale, sample[1] * scale
    return None


def starting_file(
    model: str,
    prompts: str,
    images: str,
    *,
    segmenter: str | None = None,
    embedder: str | None = None,
) -> str:
    """Return the text of a configuration that a scan accepts.

    Args:
        model: folder of the checkpoint.
        prompts: a prompt file, or a folder of them.
        images: a source of reference images.
        segmenter: an ONNX file; a path to be filled in when not given.
        embedder: a TorchScript file; a path to be filled in when not given.

    Raises:
        ModelError, InputError: as `look`; or the segmenter or embedder is not there.
    """
    found = look(model, prompts, images)
    name = re.sub(r"[^A-Za-z0-9_.-]+", "-", Path(model).resolve().name).lstrip("-_.") or "census"
    # Files of a folder may have their captions in columns of different names: each is found by its usual ones.
    named = None if storage.is_dir(prompts) else found.prompts.sources[0].caption_column
    column = [] if named is None else [f"  caption_column: {_text(named)}"]
    lines = [
        "# A census of memorisation, as `memscan config init` found things. docs/configuration.md has every key.",
        "#",
        "#   memscan doctor THIS_FILE    whether everything is there",
        "#   memscan scan THIS_FILE      the census; the same command resumes it",
        f"#   memscan reduce runs/{name}    verdicts, flagged prompts, report",
        "",
        f"name: {_text(name)}",
        f"out: {_text(f'runs/{name}')} # the run folder",
        "",
        "prompts:",
        f"  paths: [{_text(prompts)}]",
        *column,
        "  # limit: 100 # only the first prompts: a rehearsal of the whole job at a fraction of its price",
        "",
        "generator:",
        f"  # {found.adapter.pipeline}, sampled by {found.adapter.sampled_by}",
        f"  path: {_text(model)}",
        *_size(found.sides),
        *(f"  # {' '.join(warning.split())}" for warning in found.adapter.warnings),
        "  steps: 50 # the protocol of the published rates, as is the guidance",
        "  guidance: 7.0",
        "  samples: 4 # images per prompt; the time of a scan grows in proportion",
        "  batch_size: 8 # images in one batch; take fewer where memory is short",
        "  dtype: float32 # float16 or bfloat16 is faster on a GPU",
        "",
        "segmenter:",
        "  kind: onnx",
        *_file(segmenter, SEGMENTER, "birefnet-general as ONNX"),
        "  size: 1024 # the square input that the file was exported for",
        "",
        "embedder:",
        "  kind: torchscript",
        *_file(embedder, EMBEDDER, "SSCD as TorchScript"),
        "  resize: small_edge # SSCD's own preprocessing",
        "  size: 288",
        "",
        "index:",
        f"  source: {_text(images)} # {_KINDS[found.source.layout.kind]}{_count(found.source.rows)}",
        f"  path: {_text(f'indexes/{name}')} # built once, and used by every later run",
        "  factory: auto # the type is chosen by size",
        "",
        "metric: # its thresholds come from photographs: calibrate them for your model where you can (docs/metric.md)",
        "  variant: combined",
        "",
        "verdict:",
        "  min_share: 0.5 # the share of a prompt's images that must be copies for it to be flagged",
        "",
        "resources:",
        "  device: auto # CUDA where there is a GPU",
    ]
    text = "\n".join(lines) + "\n"
    _checked(text)
    return text


def _checked(text: str) -> CensusConfig:
    return parse_config(yaml.safe_load(text), where="the file that was made")


def _size(sides: tuple[int, int] | None) -> list[str]:
    return (
        []
        if sides is None
        else [f"  # It makes images of {sides[0]} x {sides[1]} pixels; height and width change that."]
    )


def _count(rows: int | None) -> str:
    return "" if rows is None else f", {rows:,} of them"


def _file(path: str | None, usual: str, what: str) -> list[str]:
    """Return the path and hash of a model file; for a file that is not given, a place to fill in."""
    if path is None:
        return [
            f"  path: {usual} # TO BE FILLED IN: {what}",
            f'  sha256: "{"0" * 64}" # TO BE FILLED IN: sha256sum FILE, compared with the publisher\'s',
        ]
    if storage.is_remote(path) or not Path(path).is_file():
        raise ModelError("no such model file on this machine", where=path)
    return [
        f"  path: {_text(path)}",
        f'  sha256: "{hash_file(path)}" # of the file as it is now: compare it with the publisher\'s',
    ]


def _text(value: str) -> str:
    """Return a value as YAML writes it in one line, quoted where it must be."""
    if not value.isprintable():
        raise ConfigError(f"{value!r} cannot be written into a configuration", hint="rename it")
    written: str = yaml.safe_dump([value], default_flow_style=True, width=10**6, allow_unicode=True).strip()
    return written.removeprefix("[").removesuffix("]")
