"""`memscan evaluate clusters`, training images above a threshold, and flagged lists of before there were any."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from memscan.census import flagged
from memscan.census.clusters import TextVectors
from memscan.census.matches import alike, matched
from memscan.config import ClustersConfig
from memscan.errors import ConfigError
from memscan.evaluation.clusters import evaluate_stability, planted_agreement, rand_index
from memscan.records import ASSIGNMENTS, FLAGGED
from pipelines.evaluate.clusters import stability_of_prompts


def test_stability_of_what_is_there_and_of_what_is_not(rng: np.random.Generator) -> None:
    planted = np.arange(120) % 6
    centres = rng.normal(size=(6, 16)) * 8
    config = ClustersConfig(kmeans=6)
    clear = evaluate_stability(
        TextVectors(np.float32(centres[planted] + rng.normal(size=(120, 16))), "made"),
        config,
        [f"group {one}" for one in planted],
        subsamples=3,
    )["methods"]["hdbscan"]
    assert clear["clusters"] == 6
    assert clear["published"] > 0.9
    assert clear["stability_placed"] > 0.9
    noise = TextVectors(rng.normal(size=(120, 16)).astype(np.float32), "made")
    assert evaluate_stability(noise, config, subsamples=3)["methods"]["kmeans_vectors"]["stability"] < 0.7


def test_what_is_in_no_cluster_is_alone() -> None:
    assert rand_index(["a", "b", "c"], [0, 0, 0]) == 1.0
    assert rand_index(["a", "a", "b", "b"], [1, 1, 0, 0]) < 1.0
    rows = [dict.fromkeys(ASSIGNMENTS.names) | {"prompt_id": f"{n}", "cluster": 1 + n % 2} for n in range(4)]
    rows = [row | {"strength": 1.0, "text": 1, "component": 1} for row in rows]
    table = pa.Table.from_pylist(rows, schema=ASSIGNMENTS)
    found = planted_agreement(table, {"0": "x", "1": "y", "2": "x", "3": ""})
    assert found["cluster"] == 1.0
    assert found["kmeans"] is None


def test_a_prompt_file(tmp_path: Path) -> None:
    file = tmp_path / "prompts.csv"
    lines = [f"a {kind} fox number {n};{kind}" for kind in ("red", "blue") for n in range(15)]
    file.write_text("caption;group\n" + "\n".join(lines))
    document = stability_of_prompts(str(file), "words", None, None, "group", 2)
    assert document["prompts"] == 30
    with pytest.raises(ConfigError, match="--path"):
        stability_of_prompts(str(file), "sentence", None, None, None, 2)


def test_only_memorised_generations_reach_anything() -> None:
    def generation(label: str, match: str, **candidates: str) -> dict[str, object]:
        found = [{"reference_id": one, "label": of} for one, of in candidates.items()]
        return {"label": label, "match_id": match, "candidates": found}

    rows = [
        generation("FM", "b", a="FM", b="FM", c="NM", z="FM"),
        generation("FM", "b", z="BM"),
        generation("NM", "q", q="NM", r="VM"),
    ]
    matches = matched(rows, "b")
    assert matches == {"b": 2}
    assert alike(rows, matches) == ["z", "a"]


def test_a_list_of_before_is_read(tmp_path: Path) -> None:
    path = tmp_path / "flagged.parquet"
    pq.write_table(FLAGGED.empty_table().drop(["alike_ids"]), path)
    assert flagged.read_parquet(str(path)).schema.equals(FLAGGED)
