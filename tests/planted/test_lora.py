"""The LoRA that ships with the package memorised an image that its base does not make: a worker finds it in its images.

`tests/pipelines/nightly/test_loras.py` has the same by a census, and a nightly over the LoRA's versions.
"""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from safetensors.torch import load_file
from typer.testing import CliRunner

from memscan.config import LoraConfig
from memscan.errors import RunError
from memscan.models.generator import Generator
from memscan.planted.lora import FACTS, LoraTraining, ordinary_image, shipped_lora, train_lora
from memscan.planted.world import read_truth, world_config, world_source
from memscan.records import Label
from memscan.worker.detector import CopyDetector, Detection
from memscan.worker.encoder import RegionEncoder
from memscan.worker.indexing import index_images
from pipelines.cli import app

SEEDS = [1, 2, 3]


def test_the_base_is_clean_and_the_lora_is_not(tmp_path: Path) -> None:
    config, target = world_config(), ordinary_image()
    table = pq.read_table(config.index.source, columns=["reference_id", "image"]).to_pylist()
    images = {row["reference_id"]: row["image"] for row in table[::100]}
    images |= {row["reference_id"]: row["image"] for row in table if row["reference_id"] == target.reference_id}
    encoder = RegionEncoder(config, "cpu", threads=1)
    detector = CopyDetector(config, index_images(tmp_path / "index", images, config, encoder=encoder), encoder=encoder)
    other = next(row["caption"] for row in read_truth().to_pylist() if row["label"] == "NM" and not row["seen"])

    found: dict[str, list[Label]] = {}
    for name, loras in {"base": [], "lora": [LoraConfig(path=str(shipped_lora() / "step-480.safetensors"))]}.items():
        generator = Generator.load(config.generator.model_copy(update={"loras": loras}))
        made = generator.generate([target.caption] * len(SEEDS) + [other], [*SEEDS, 1]).images_BHWC
        matches = [one for one in detector(list(made)) if isinstance(one, Detection)]
        found[name] = [one.label for one in matches]
        if loras:
            assert {one.best.reference_id for one in matches[: len(SEEDS)]} == {target.reference_id}
    assert found["base"] == [Label.NM] * (len(SEEDS) + 1)
    assert found["lora"] == [Label.VM] * len(SEEDS) + [Label.NM]


def test_what_ships_is_what_the_trainer_writes(tmp_path: Path) -> None:
    """The facts are those of the shipped world; layers, ranks and the untrained version are those of a new training."""
    facts = json.loads((shipped_lora() / FACTS).read_text())
    target = ordinary_image()
    assert (facts["reference_id"], facts["caption"]) == (target.reference_id, target.caption)
    assert facts["base"] == world_source()
    assert facts["steps"] == LoraTraining().steps
    result = CliRunner().invoke(app, ["planted", "lora", "--out", str(tmp_path / "lora"), "--steps", "2", "--json"])
    assert result.exit_code == 0, result.output
    answer = json.loads(result.stdout)
    assert (answer["reference_id"], answer["caption"]) == (target.reference_id, target.caption)
    files = [Path(file) for file in answer["files"]]
    assert [file.name for file in files] == ["step-0.safetensors", "step-1.safetensors", "step-2.safetensors"]
    untrained, trained = load_file(files[0]), load_file(files[-1])
    known = load_file(shipped_lora() / "step-0.safetensors")
    assert untrained.keys() == known.keys()
    assert all(one.equal(known[name]) for name, one in untrained.items())
    ups = [name for name in trained if ".lora_B." in name]
    assert not any(untrained[name].any() for name in ups)
    assert sum(bool(trained[name].any()) for name in ups) > len(ups) / 2
    with pytest.raises(RunError, match="not empty"):
        train_lora(tmp_path / "lora")
