"""Evidence as files, a run's review taken up, and the table of runs: on run folders made without models."""

from __future__ import annotations

import csv
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from memscan.errors import ConfigError, InputError, MemscanError
from pipelines.cli import app
from pipelines.reduce.export import export_run
from pipelines.reduce.job import reduce_run
from pipelines.scan.listing import describe_runs, list_runs


@pytest.fixture(scope="module")
def reduced(kit: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    prompts = [
        kit.Planted("=a red fox", "VM VM VM NM", ("ref-1", "ref-2")),
        kit.Planted("a blue door", "FM FM NM NM", ("ref-3",)),
        kit.Planted("plain"),
    ]
    folder = tmp_path_factory.mktemp("export") / "run"
    reduce_run(str(kit.write_run(folder, prompts)))
    return Path(folder)


def test_pairs_are_the_stored_pixels_with_their_hashes(reduced: Path, tmp_path: Path) -> None:
    from tests.support.synthetic_run import scene

    out = tmp_path / "evidence"
    manifest = export_run(str(reduced), str(out))
    assert (manifest["prompts"], manifest["generations"], manifest["training_images"]) == (2, 5, 3)
    assert manifest["without"] == {}
    files = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    assert files == {*manifest["sha256"], "manifest.json"}
    for name, digest in manifest["sha256"].items():
        assert hashlib.sha256((out / name).read_bytes()).hexdigest() == digest
    rows = list(csv.DictReader((out / "metadata.csv").open()))
    assert {row["file_name"] for row in rows} == files - {"manifest.json", "metadata.csv", "README.md"}
    # `datasets` takes folders of such names for splits, and then reads nothing else.
    splits = {"train", "training", "test", "testing", "eval", "evaluation", "val", "valid", "validation", "dev"}
    assert not splits & {part for name in files for part in Path(name).parts[:-1]}
    first = next(row for row in rows if row["kind"] == "generation" and row["label"] == "VM")
    assert first["caption"] == "'=a red fox"  # no formula for a spreadsheet
    number = int(first["reference_id"].removeprefix("ref-"))
    assert np.array_equal(np.asarray(Image.open(out / first["training_file"])), scene(number)[0])
    assert np.array_equal(np.asarray(Image.open(out / first["file_name"])), scene(number, shift=1)[0])


def test_an_export_is_an_image_folder(reduced: Path, tmp_path: Path) -> None:
    """The layout of Hugging Face's `imagefolder`: metadata.csv with `file_name`, relative to it."""
    datasets = pytest.importorskip("datasets", reason="Hugging Face datasets is not installed")
    export_run(str(reduced), str(tmp_path / "evidence"), ["VM"])
    found = datasets.load_dataset("imagefolder", data_dir=str(tmp_path / "evidence"), split="train")
    assert found.num_rows == 5


def test_only_some_prompts(reduced: Path, tmp_path: Path) -> None:
    assert export_run(str(reduced), str(tmp_path / "fm"), ["FM"])["prompts"] == 1
    assert export_run(str(reduced), str(tmp_path / "one"), (), 1)["prompts"] == 1
    with pytest.raises(ConfigError, match="no class 'XX'"):
        export_run(str(reduced), str(tmp_path / "none"), ["XX"])
    with pytest.raises(MemscanError, match="not empty"):
        export_run(str(reduced), str(tmp_path / "fm"))


def test_a_review_stands_beside_the_machine(reduced: Path, tmp_path: Path) -> None:
    fingerprint = json.loads((reduced / "run.json").read_text())["fingerprint"]
    flagged = [json.loads(line) for line in (reduced / "flagged/flagged.jsonl").read_text().splitlines()]
    verdicts = [
        {"prompt_id": row["prompt_id"], "verdict": verdict, "note": "<b>n</b>", "when": "2026"}
        for row, verdict in zip(flagged, ("confirmed", "dismissed"), strict=True)
    ]
    document = {"format": "memscan-review/1", "run": fingerprint, "reviewer": "Ada", "verdicts": verdicts}
    (tmp_path / "review.json").write_text(json.dumps(document))
    result = CliRunner().invoke(app, ["reduce", str(reduced), "--review", str(tmp_path / "review.json")])
    assert result.exit_code == 0, result.output
    assert "reviewed      2 prompts: 1 confirmed, 1 dismissed, 0 unsure" in result.stdout
    census = json.loads((reduced / "census.json").read_text())
    assert census["review"]["precision"]["rate"] == 0.5
    page = (reduced / "report.html").read_text()
    assert "by Ada: 1 confirmed, 1 dismissed, 0 unsure" in " ".join(page.split())
    assert "50.0%" in page
    exported = export_run(str(reduced), str(tmp_path / "evidence"))
    assert exported["prompts"] == 2
    reviews = {row["review"] for row in csv.DictReader((tmp_path / "evidence/metadata.csv").open())}
    assert reviews == {"confirmed", "dismissed", ""}
    (tmp_path / "review.json").write_text(json.dumps({**document, "run": "0" * 16}))
    with pytest.raises(InputError, match="is a review of run"):
        reduce_run(str(reduced), reviews=[str(tmp_path / "review.json")])


def test_the_table_of_runs(kit: Any, reduced: Path) -> None:
    folder = reduced.parent
    kit.write_run(folder / "half", [kit.Planted("a"), kit.Planted("b")], part_size=1, committed=1, finished=False)
    (folder / "broken").mkdir()
    (folder / "broken/run.json").write_text("{")
    found = {Path(one["path"]).name: one for one in list_runs(str(folder))}
    assert set(found) == {"run", "half", "broken"}
    assert (found["run"]["state"], found["run"]["flagged"]) == ("complete", 2)
    assert found["run"]["memorised"] == pytest.approx(2 / 3)
    assert (found["half"]["state"], found["half"]["memorised"], found["half"]["prompts"]) == ("stopped", None, 2)
    assert found["broken"]["error"]
    lines = describe_runs(list(found.values())).splitlines()
    assert len(lines) == 4
    assert "66.67%" in "".join(lines)
    result = CliRunner().invoke(app, ["runs", str(folder), "--json"])
    assert len(json.loads(result.stdout)) == 3
    missing = CliRunner().invoke(app, ["runs", str(folder / "nowhere")])
    assert (missing.exit_code, len(missing.stderr.strip().splitlines())) == (2, 1)
