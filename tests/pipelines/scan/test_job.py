"""The scan, in this process and on Ray: conservation, what is found, resume after a kill, refusal, workers' errors."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from typer.testing import CliRunner

from memscan.errors import MemscanError, ModelError, RunError
from memscan.prompts.table import read_prompts
from memscan.records import CENSUS
from pipelines.cli import app
from pipelines.index.job import build
from pipelines.reduce.job import reduce_run
from pipelines.run_folder.runs import Run
from pipelines.run_folder.tables import Counts
from pipelines.scan.job import open_run, run_content, scan
from tests.chaos.oracle import compare_rows

ROOT = Path(__file__).resolve().parents[3]


def census_ids(out: Path) -> list[str]:
    return pq.read_table(out / "census", columns=["prompt_id"])["prompt_id"].to_pylist()


@pytest.fixture
def done(complete_run: Path) -> Path:
    assert Run.load(str(complete_run)).progress() == Counts(
        inputs=16,
        rows=15,
        done=12,
        rejected=3,
        generations=24,
        labels={"NM": 20, "VM": 4},
        reasons={"caption_empty": 1, "caption_not_utf8": 1, "caption_too_long": 1},
    )
    return complete_run


def test_every_prompt_is_there_once(done: Path) -> None:
    run = Run.load(str(done))
    assert run.state == "complete"
    assert len(run.parts) == 3
    table = pq.read_table(done / "census", schema=CENSUS)
    prompts = pq.read_table(done / "prompts")
    assert sorted(table["prompt_id"].to_pylist()) == sorted(prompts["prompt_id"].to_pylist())
    assert sum(table["count"].to_pylist()) == 16


def vectors_of(folder: Path, width: int, image: str) -> Path:
    """Ready vectors with metadata, as clip-retrieval has them."""
    (folder / "img_emb").mkdir(parents=True)
    (folder / "metadata").mkdir()
    np.save(folder / "img_emb" / "img_emb_0.npy", np.ones((4, width), np.float16))
    table = pa.table({"image_path": [image] * 4, "caption": ["a"] * 4})
    pq.write_table(table, folder / "metadata" / "metadata_0.parquet")
    return folder


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"width": 7, "image": "0.png"}, "vectors of 7 numbers; the embedder .* makes 48"),
        ({"width": 48, "image": "000000012"}, "not one of the first 4 images that the metadata name is there"),
        ({"index__factory": "IVF12,Flatt"}, "FAISS does not know the index type 'IVF12,Flatt'"),
        ({"index__memory": "8 bananas"}, "not a size: '8 bananas'"),
    ],
)
def test_references_that_no_verdict_could_come_of_are_refused_before_ray_starts(
    tiny_world: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], message: str
) -> None:
    def started(*arguments: object) -> None:
        raise AssertionError("Ray was started")

    monkeypatch.setattr("pipelines.scan.job.ray_session", started)
    monkeypatch.setattr("pipelines.index.job.ray_session", started)
    if "width" in changes:
        source = vectors_of(tmp_path / "vectors", changes["width"], changes["image"])
        changes = {"index__source": str(source)}
    with pytest.raises(MemscanError, match=message):
        scan(tiny_world.config(tmp_path / "run", **changes))
    with pytest.raises(MemscanError, match=message):
        build(tiny_world.config(tmp_path / "run", index__path=str(tmp_path / "index"), **changes))


def test_a_scan_whose_rows_all_fail_for_one_reason_stops_after_a_hundred(
    tiny_world: Any, in_process: None, tmp_path: Path
) -> None:
    """The references' images vanish after the index was built: nothing can be compared, no prompt gets a verdict."""
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(4):
        pixels = np.random.default_rng(number).integers(0, 256, (32, 32, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    (tmp_path / "prompts.txt").write_text("".join(f"caption {number}\n" for number in range(150)))
    index = str(tmp_path / "index")
    build(tiny_world.config(tmp_path / "x", index__source=str(folder), index__path=index, index__images="path"))
    shutil.rmtree(folder)
    changes = {"prompts__paths": [str(tmp_path / "prompts.txt")], "prompts__caption_column": None}
    settings = tiny_world.config(
        tmp_path / "run", index__path=index, index__source=None, generator__samples=1, **changes
    )
    with pytest.raises(RunError, match="100 rows failed one after another, the last with reference_missing"):
        scan(settings)
    assert Run.load(str(tmp_path / "run")).state == "failed"


def test_references_that_cannot_be_decoded_are_rejects(done: Path) -> None:
    rejects = pq.read_table(done / "index" / "rejects.parquet").to_pylist()
    assert [(row["reference_id"], row["reason"]) for row in rejects] == [("truncated", "image_undecodable")]
    assert Run.load(str(done)).manifest["index"]["count"] == 24
    assert not (done / "index.build").exists()


def test_on_ray_with_pools_of_their_own_and_a_scattered_index_it_is_the_same_census(
    done: Path, census_on_ray: tuple[Path, Any]
) -> None:
    """Index, sampling, judging and the index's shard in workers of Ray: what one process found is found again."""
    out, _ = census_on_ray
    assert Run.load(str(out)).progress() == Run.load(str(done)).progress()
    one, other = (
        {row["prompt_id"]: row for row in pq.read_table(folder / "census").to_pylist()} for folder in (done, out)
    )
    assert one.keys() == other.keys()
    assert not [told for name in one for told in compare_rows(one[name], other[name])]


def test_the_census_reduces(done: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(done, tmp_path / "run")
    document = reduce_run(str(copy))
    assert document["counts"]["flagged"] == 2
    flagged = pq.read_table(copy / "flagged" / "flagged.parquet").to_pylist()
    assert {row["caption"] for row in flagged} == {"a red lighthouse on a cliff", "two cats in a basket"}
    assert (copy / "report.html").stat().st_size > 1000


def test_a_complete_run_is_not_run_again(done: Path, tiny_world: Any) -> None:
    before = sorted((path, path.stat().st_mtime_ns) for path in (done / "census").rglob("*"))
    assert scan(tiny_world.config(done, part_size=6)).rows == 15
    assert sorted((path, path.stat().st_mtime_ns) for path in (done / "census").rglob("*")) == before


def test_a_changed_configuration_is_refused(done: Path, tiny_world: Any) -> None:
    with pytest.raises(RunError, match=r"generator\.guidance: 7\.0 -> 3\.0"):
        scan(tiny_world.config(done, part_size=6, generator__guidance=3.0))


def test_an_index_of_its_own_place_is_one_input_before_and_after_it_is_built(
    tiny_world: Any, done: Path, tmp_path: Path
) -> None:
    config = tiny_world.config(tmp_path / "run")
    place = config.model_copy(update={"index": config.index.model_copy(update={"path": str(tmp_path / "index")})})
    before = run_content(place)
    shutil.copytree(done / "index", tmp_path / "index")
    assert run_content(place) == before


def test_changed_prompts_are_refused(tiny_world: Any, done: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(tiny_world.folder, tmp_path / "world")
    config = tiny_world.config(tmp_path / "run", prompts__paths=[str(copy / "prompts.csv")])
    open_run(config).write_prompts(read_prompts(config.prompts), part_size=6)
    with (copy / "prompts.csv").open("a") as file:
        file.write("one more\n")
    with pytest.raises(RunError, match=r"prompts\.csv: "):
        open_run(config)


def test_lost_parts_and_rows_are_run_again(done: Path, tiny_world: Any, in_process: None, tmp_path: Path) -> None:
    """What a kill can leave: one part without record and half its rows, one with a torn file, one untouched."""
    copy = shutil.copytree(done, tmp_path / "run")
    manifest = json.loads((copy / "run.json").read_text())
    manifest.update(state="running", counts=None)
    manifest["index"]["path"] = str(copy / "index")
    (copy / "run.json").write_text(json.dumps(manifest))
    for part in (0, 1):
        (copy / "census" / f"_part-{part:05d}.json").unlink()
    first, *_ = sorted((copy / "census" / "part-00000").rglob("*.parquet"))
    first.unlink()
    torn, *_ = sorted((copy / "census" / "part-00001").rglob("*.parquet"))
    torn.write_bytes(torn.read_bytes()[:-100])
    untouched = {path: path.stat().st_mtime_ns for path in (copy / "census" / "part-00002").iterdir()}
    counts = scan(tiny_world.config(copy, part_size=6))
    assert (counts.rows, counts.done) == (15, 12)
    assert {path: path.stat().st_mtime_ns for path in untouched} == untouched
    before, after = (
        sorted(pq.read_table(out / "census", schema=CENSUS).to_pylist(), key=lambda row: row["prompt_id"])
        for out in (done, copy)
    )
    assert before == after


def test_judges_of_their_own(tiny_world: Any, done: Path, in_process: None, tmp_path: Path) -> None:
    config = tiny_world.config(tmp_path / "run", resources__judges=1, prompts__limit=3, index__path=str(done / "index"))
    counts = scan(config)
    assert (counts.done, counts.labels) == (3, {"NM": 2, "VM": 4})


def test_a_truncated_weight_file_is_refused_before_a_run_begins(
    tiny_world: Any, done: Path, in_process: None, tmp_path: Path
) -> None:
    copy = shutil.copytree(tiny_world.folder / "checkpoint", tmp_path / "checkpoint")
    weights = copy / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    out = tmp_path / "run"
    config = tiny_world.config(out, generator__path=str(copy), index__path=str(done / "index"))
    with pytest.raises(ModelError, match="not a whole safetensors file") as caught:
        scan(config)
    assert "\n" not in str(caught.value)
    assert not (out / "run.json").exists()


def test_index_build_of_a_folder_of_images(tiny_world: Any, in_process: None, tmp_path: Path) -> None:
    """Three images and one that is none, through the command."""
    (tmp_path / "images").mkdir()
    for number in range(3):
        pixels = np.random.default_rng(number).integers(0, 256, (40, 56, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / f"{number}.png")
    (tmp_path / "images" / "0.txt").write_text("noise")
    (tmp_path / "images" / "junk.jpg").write_bytes(b"no image")
    config = tiny_world.write_yaml(tmp_path / "c.yaml", tmp_path / "run")
    arguments = [str(tmp_path / "images"), str(tmp_path / "index"), "--config", str(config)]
    result = CliRunner().invoke(app, ["index", "build", *arguments])
    assert result.exit_code == 0, result.output
    assert "(3 references)" in result.stdout
    rows = pq.read_table(
        tmp_path / "index/shards/00000/references.parquet", columns=["reference_id", "caption"]
    ).to_pylist()
    assert rows == [{"reference_id": f"{n}.png", "caption": None if n else "noise"} for n in range(3)]
    (reject,) = pq.read_table(tmp_path / "index" / "rejects.parquet").to_pylist()
    assert (reject["reference_id"], reject["reason"]) == ("junk.jpg", "image_undecodable")
