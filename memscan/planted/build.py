"""This module makes a new world from a seed (`memscan planted build`).

Text encoder and UNet belong to a world and are trained here. Autoencoder, tokenizer, segmenter and embedder work
for everything that the renderer can draw, so they come from the shipped world. `benchmarks/instruments.py` makes them
again.
"""

from __future__ import annotations

import csv
import json
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTokenizer

from memscan.errors import RunError
from memscan.metric.calibration import Calibration
from memscan.models.specification import hash_file
from memscan.planted import embedding, segmentation
from memscan.planted.dataset import RenderedWorld, reference_table, render_world, training_set, truth_table
from memscan.planted.design import WorldDesign, WorldSize, design_world
from memscan.planted.diffusion import Trained, Training, build_scheduler, train_diffusion
from memscan.planted.world import shipped_world, world_folder, write_census, write_manifest

Progress = Callable[[str], None]
CANVAS = 128
GENERAL_FILES = ("segmenter.onnx", "embedder.pt", "calibration.json")
GENERAL_FOLDERS = ("checkpoint/vae", "checkpoint/tokenizer")
# What writing the folder takes after the training, so that `minutes` covers the whole build.
WRITING_MINUTES = 0.5


def build_world(
    seed: int,
    out: str | Path,
    *,
    minutes: float = 55.0,
    device: str = "auto",
    size: WorldSize | None = None,
    general: Path | None = None,
    start_from: Path | None = None,
    progress: Progress = print,
) -> Path:
    """Make a world: draw its training set, train text encoder and UNet on it, write the folder.

    Args:
        minutes: wall-clock time of the whole build; training takes what rendering leaves.
        device: "auto" (a GPU where there is one), "cpu" or "cuda".
        size: how much of each kind is planted.
        general: folder with the general models; the shipped world by default.
        start_from: a world whose text encoder and UNet are the initial weights, which saves learning what ordinary
            captions mean; random weights by default.

    Raises:
        RunError: `out` exists and is not empty.
    """
    folder = Path(out)
    if folder.exists() and any(folder.iterdir()):
        raise RunError("the folder is not empty", where=str(folder), hint="give a new folder with --out")
    source = general or shipped_world()
    start = time.monotonic()
    size = size or WorldSize()
    design = design_world(seed, size)
    progress(f"world {seed}: {len(design.references)} training images, {len(design.prompts)} prompts")
    world = render_world(design)
    _copy_general(source, folder)
    vae = AutoencoderKL.from_pretrained(folder / "checkpoint" / "vae", torch_dtype=torch.float32).eval()
    tokenizer = CLIPTokenizer.from_pretrained(folder / "checkpoint" / "tokenizer")
    data = training_set(design, world, vae, tokenizer)
    remaining = max(minutes - (time.monotonic() - start) / 60 - WRITING_MINUTES, minutes / 10)
    training = Training(minutes=remaining, seed=seed, device=device)
    trained = train_diffusion(data, tokenizer, training, progress, _weights(start_from) if start_from else None)
    write_world(folder, design, world, trained, remaining)
    progress(f"wrote {folder} after {(time.monotonic() - start) / 60:.1f} minutes")
    return folder


def write_world(folder: Path, design: WorldDesign, world: RenderedWorld, trained: Trained, minutes: float) -> None:
    """Write what belongs to one world beside the general models that are in the folder already; the manifest last."""
    save_checkpoint(trained, folder)
    pq.write_table(reference_table(design, world), folder / "references.parquet", compression="none")
    _write_prompts(design, folder)
    facts = {
        "seed": design.seed,
        "size": asdict(design.size),
        "training": {"minutes": round(minutes, 2), "steps": trained.steps, "loss": round(trained.loss, 5)},
    }
    (folder / "world.json").write_text(json.dumps(facts, indent=1) + "\n")
    write_census(folder, census_settings(folder, design.seed))
    write_manifest(folder)


def _weights(world: Path) -> tuple[CLIPTextModel, UNet2DConditionModel]:
    checkpoint = world_folder(world) / "checkpoint"
    text_encoder = CLIPTextModel.from_pretrained(checkpoint / "text_encoder", torch_dtype=torch.float32)
    return text_encoder, UNet2DConditionModel.from_pretrained(checkpoint / "unet", torch_dtype=torch.float32)


def _copy_general(source: Path, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in GENERAL_FOLDERS:
        shutil.copytree(source / name, folder / name)
    for name in GENERAL_FILES:
        if (source / name).is_file():
            shutil.copy2(source / name, folder / name)


def save_checkpoint(trained: Trained, folder: Path) -> None:
    """Write text encoder, UNet, scheduler and the snapshot; half precision, since the weights ship in a repository."""
    checkpoint = folder / "checkpoint"
    pipeline = StableDiffusionPipeline(
        vae=AutoencoderKL.from_pretrained(checkpoint / "vae"),
        tokenizer=CLIPTokenizer.from_pretrained(checkpoint / "tokenizer"),
        text_encoder=trained.text_encoder,
        unet=trained.unet,
        scheduler=build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.to(torch.float16).save_pretrained(checkpoint, safe_serialization=True)
    trained.snapshot.half().save_pretrained(folder / "snapshot" / "unet", safe_serialization=True)
    _forget_origins(folder)


def _forget_origins(folder: Path) -> None:
    """Drop the builder's own paths, which diffusers notes in what it saves: they would leak, and change the hashes."""
    for path in folder.rglob("config.json"):
        settings = json.loads(path.read_text())
        if settings.pop("_name_or_path", None) is not None:
            path.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")


def _write_prompts(design: WorldDesign, folder: Path) -> None:
    pq.write_table(truth_table(design.prompts), folder / "truth.parquet")
    with (folder / "prompts.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["caption"])
        writer.writerows([prompt.caption] for prompt in design.prompts)


def census_settings(folder: Path, seed: int) -> dict[str, Any]:
    """Return the census of a world as a mapping, with the thresholds of calibration.json, or else those that ship."""
    metric: dict[str, Any] = {"variant": "region", "canvas": CANVAS}
    if (folder / "calibration.json").is_file():
        calibration = Calibration.load(str(folder / "calibration.json"))
        metric |= {
            "foreground_threshold": calibration.foreground_threshold,
            "background_threshold": calibration.background_threshold,
            "threshold_source": f"calibrated on {calibration.source}",
        }
    return {
        "name": f"planted-{seed}",
        "prompts": {"paths": ["prompts.csv"], "caption_column": "caption"},
        "generator": {"path": "checkpoint", "steps": 10, "guidance": 2.0, "samples": 3, "batch_size": 48},
        "segmenter": {
            "kind": "onnx",
            "path": "segmenter.onnx",
            "sha256": hash_file(folder / "segmenter.onnx"),
            "size": segmentation.SIZE,
            "batch_size": 64,
        },
        "embedder": {
            "kind": "torchscript",
            "path": "embedder.pt",
            "sha256": hash_file(folder / "embedder.pt"),
            "name": "planted_copy",
            "resize": "square",
            "size": embedding.SIZE,
            "batch_size": 64,
        },
        "index": {"source": "references.parquet", "factory": "Flat", "top_k": 4},
        "metric": metric,
    }
