"""Scoring against truth, computed by hand and against scikit-learn."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sklearn.metrics import accuracy_score, f1_score

from memscan.config import CensusConfig
from memscan.errors import RunError
from memscan.planted.score import Found, calibrate_run, score_prompts, score_run
from memscan.records import TRUTH, Label


def _truth(label: str, number: int, references: tuple[str, ...] = ()) -> dict[str, Any]:
    return {"prompt_id": f"{label}{number}", "label": label, "reference_ids": list(references)}


def test_perfect_census() -> None:
    truth = [
        _truth(label, i, (f"{label}{i}",) if label != "NM" else ())
        for label in ("VM", "FM", "BM", "NM")
        for i in range(3)
    ]
    found = {row["prompt_id"]: Found(Label(row["label"]), tuple(row["reference_ids"])) for row in truth}
    result = score_prompts(truth, found)
    assert (result["accuracy"], result["macro_f1"], result["false_positive_rate"]) == (1.0, 1.0, 0.0)
    assert (result["match_precision"], result["match_recall"], result["missing"]) == (1.0, 1.0, 0)


def test_wrong_matches_and_missing_prompts_count() -> None:
    truth = [_truth("VM", 0, ("a", "b")), _truth("FM", 0, ("c",)), _truth("NM", 0), _truth("NM", 1)]
    found = {"VM0": Found(Label.VM, ("a", "x")), "NM0": Found(Label.BM, ("y",)), "NM1": Found(Label.NM, ())}
    result = score_prompts(truth, found)
    assert result["missing"] == 1
    assert result["false_positive_rate"] == 0.5
    assert result["match_precision"] == pytest.approx(1 / 3)
    assert result["match_recall"] == 0.5


def test_what_was_not_scanned_is_never_right() -> None:
    truth = [_truth("VM", 0, ("a",)), _truth("NM", 0), _truth("NM", 1), _truth("NM", 2)]
    found = {"VM0": Found(Label.VM, ("a",)), "NM0": Found(Label.NM, ())}
    result = score_prompts(truth, found)
    assert (result["prompts"], result["scored"], result["missing"]) == (4, 2, 2)
    assert result["accuracy"] == 0.5
    assert result["per_class"]["NM"]["recall"] == pytest.approx(1 / 3)
    assert result["false_positive_rate"] == 0.0
    assert score_prompts(truth, {})["accuracy"] == 0.0
    assert score_prompts(truth, {})["false_positive_rate"] is None


def test_what_a_screen_passed_was_not_scanned(tmp_path: Path) -> None:
    world = tmp_path / "world"
    _write_run(tmp_path / "run", world, CONFIG)
    file = tmp_path / "run/census/part-00000/0.parquet"
    table = pq.read_table(file)
    passed = pa.array(["census" if one == "a" else "pass" for one in table["prompt_id"].to_pylist()])
    pq.write_table(table.append_column("decision", passed), file)
    (tmp_path / "run/flagged").mkdir()
    flagged = pa.table({"prompt_id": ["a"], "label": ["BM"], "match_ids": [["r"]]})
    pq.write_table(flagged, tmp_path / "run/flagged/flagged.parquet")
    result = score_run(str(tmp_path / "run"), world)
    assert (result["scored"], result["missing"], result["accuracy"]) == (1, 1, 0.5)


def test_nothing_flagged_has_no_precision() -> None:
    assert score_prompts([_truth("NM", 0)], {})["match_precision"] is None


def test_agrees_with_scikit_learn() -> None:
    rng = np.random.default_rng(4)
    names = [label.value for label in Label]
    expected, predicted = rng.choice(names, 200), rng.choice(names, 200)
    truth = [{"prompt_id": str(i), "label": label, "reference_ids": ["r"]} for i, label in enumerate(expected)]
    found = {str(i): Found(Label(label), ("r",)) for i, label in enumerate(predicted)}
    result = score_prompts(truth, found)
    assert result["macro_f1"] == pytest.approx(f1_score(expected, predicted, average="macro"))
    assert result["accuracy"] == pytest.approx(accuracy_score(expected, predicted))


def _write_run(folder: Path, world: Path, config: CensusConfig) -> None:
    """A scanned and reduced run of two prompts, and the world they belong to."""
    common = {"seen": True, "one_to_many": False}
    truth = [
        {**common, "prompt_id": "a", "caption": "a", "label": "BM", "group": "bm0", "reference_ids": ["r"]},
        {**common, "prompt_id": "b", "caption": "b", "label": "NM", "group": "", "reference_ids": []},
    ]
    world.mkdir()
    (world / "manifest.json").write_text("{}")
    (world / "world.json").write_text('{"seed": 3}')
    pq.write_table(pa.Table.from_pylist(truth, schema=TRUTH), world / "truth.parquet")
    scores = {"a": [(0.2, 0.9), (0.3, 0.8)], "b": [(0.3, 0.4)]}
    rows = [
        {
            "prompt_id": name,
            "status": "done",
            "generations": [{"candidates": [{"foreground": f, "background": b} for f, b in pairs]}],
        }
        for name, pairs in scores.items()
    ]
    (folder / "census" / "part-00000").mkdir(parents=True)
    (folder / "census" / "part-00000.json").write_text("{}")
    pq.write_table(pa.Table.from_pylist(rows), folder / "census" / "part-00000" / "0.parquet")
    manifest = {"config": config.model_dump(mode="json"), "identity": {"models.generator": "g@1"}}
    (folder / "run.json").write_text(json.dumps(manifest))


CONFIG = CensusConfig.model_validate(
    {
        "prompts": {"paths": ["p.csv"]},
        "generator": {"path": "g"},
        "segmenter": {"path": "s"},
        "embedder": {"path": "e"},
        "index": {"path": "i"},
    }
)


def test_calibration_of_a_run_parts_what_the_truth_parts(tmp_path: Path) -> None:
    _write_run(tmp_path / "run", tmp_path / "world", CONFIG)
    # One ordinary row alone bounds the rate at .95 and no lower.
    found = calibrate_run(str(tmp_path / "run"), tmp_path / "world", max_false_positive_rate=0.96)
    assert 0.4 < found.background_threshold < 0.9
    assert found.foreground_threshold > 0.3
    assert (found.macro_f1, found.false_positive_rate) == (1.0, 0.0)
    assert found.source.startswith("planted world 3")
    assert found.models == {"generator": "g@1"}


def test_score_of_a_run_needs_the_flagged_list(tmp_path: Path) -> None:
    run = tmp_path / "run"
    _write_run(run, tmp_path / "world", CONFIG)
    with pytest.raises(RunError, match="no flagged list"):
        score_run(str(run), tmp_path / "world")
    (run / "flagged").mkdir()
    flagged = pa.table({"prompt_id": ["a"], "label": ["BM"], "match_ids": [["r"]]})
    pq.write_table(flagged, run / "flagged" / "flagged.parquet")
    result = score_run(str(run), tmp_path / "world")
    assert (result["accuracy"], result["match_precision"], result["missing"]) == (1.0, 1.0, 0)


def test_calibration_on_another_world_is_refused(tmp_path: Path) -> None:
    _write_run(tmp_path / "run", tmp_path / "world", CONFIG)
    pq.write_table(TRUTH.empty_table(), tmp_path / "world" / "truth.parquet")
    with pytest.raises(RunError, match="none of the world's prompts"):
        calibrate_run(str(tmp_path / "run"), tmp_path / "world")
