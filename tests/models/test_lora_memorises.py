"""A LoRA that holds the memorisation of the planted world: its base is clean of the images, base and LoRA make them.

The base is the planted model's early snapshot, given as a trained part on the planted checkpoint; the LoRA is what the
rest of the training did to its layers, at full rank.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from safetensors.torch import save_file

from memscan.config import GeneratorConfig, LoraConfig
from memscan.io.images import decode, resize
from memscan.models.generator import Generator
from memscan.planted.world import read_truth, shipped_world

WORLD = shipped_world()
CAPTIONS = 3


def full_rank(before: Any, after: Any, file: Path) -> None:
    """What changed in every layer with a matrix: up is the identity and down the difference."""
    later, tensors = dict(after.named_modules()), {}
    for name, module in before.named_modules():
        weight = getattr(module, "weight", None)
        if weight is not None and weight.ndim > 1:
            identity = torch.eye(len(weight)).reshape(len(weight), len(weight), *[1] * (weight.ndim - 2))
            down = (later[name].weight - weight).detach().clone()
            tensors |= {f"unet.{name}.lora_A.weight": down, f"unet.{name}.lora_B.weight": identity}
    save_file(tensors, file)


def test_the_base_is_clean_and_the_lora_is_not(tmp_path: Path) -> None:
    planted = [row for row in read_truth().to_pylist() if row["label"] == "VM"][:CAPTIONS]
    wanted = {row["reference_ids"][0] for row in planted}
    table = pq.read_table(WORLD / "references.parquet", columns=["reference_id", "image"])
    images = {row["reference_id"]: decode(row["image"]) for row in table.to_pylist() if row["reference_id"] in wanted}

    early = GeneratorConfig(
        path=str(WORLD / "snapshot" / "unet"), base=str(WORLD / "checkpoint"), steps=10, guidance=2.0
    )
    base, whole = Generator.load(early), Generator.load(GeneratorConfig(path=str(WORLD / "checkpoint")))
    full_rank(base.checkpoint.unet, whole.checkpoint.unet, tmp_path / "lora.safetensors")
    lora = LoraConfig(path=str(tmp_path / "lora.safetensors"))
    fused = Generator.load(early.model_copy(update={"loras": [lora]}))

    def apart(generator: Generator) -> list[float]:
        """Root mean square difference to the planted image, in levels of 255."""
        made = generator.generate([row["caption"] for row in planted], list(range(CAPTIONS))).images_BHWC
        own = np.stack([resize(images[row["reference_ids"][0]], made.shape[1:3]) for row in planted])
        return [float(value) for value in np.sqrt(np.square(made.astype(float) - own).mean(axis=(1, 2, 3)))]

    # Measured: 29 to 31 levels on the base, 14 to 15 with the LoRA; the planted model itself has 10.
    assert min(apart(base)) > 25
    assert max(apart(fused)) < 20
