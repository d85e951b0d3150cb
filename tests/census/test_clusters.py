"""Clusters of flagged prompts: what was planted is found, and no order of rows changes anything."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from sklearn.metrics import adjusted_rand_score

from memscan.census.clusters import TextVectors, group_prompts, with_clusters, word_vectors
from memscan.census.clusters.density import density_clusters, neighbours
from memscan.census.clusters.naming import name_of, telling_words
from memscan.census.clusters.vectors import drawn_together, unit
from memscan.census.correspondence import with_groups
from memscan.config import ClustersConfig
from memscan.models.sentences import load_text_encoder
from memscan.planted.world import shipped_world
from memscan.records import FLAGGED, TRUTH

TOPICS = 12


def blobs(rng: np.random.Generator, rows: int, noise: int = 0, size: int = 24) -> tuple[np.ndarray, np.ndarray]:
    """Unit vectors around `TOPICS` directions, and some around none (-1)."""
    centres = unit(rng.normal(size=(TOPICS, size)))
    planted = np.concatenate([rng.permutation(np.arange(rows) % TOPICS), np.full(noise, -1)])
    near = centres[planted] + 0.05 * rng.normal(size=(rows + noise, size))
    return unit(np.where(planted[:, None] >= 0, near, rng.normal(size=near.shape))), planted


def flagged_table(captions: list[str], matches: list[list[str]]) -> pa.Table:
    rows = [
        dict.fromkeys(FLAGGED.names)
        | {"prompt_id": f"{number:04x}", "caption": caption, "count": 1, "label": "VM", "severity": 2.0, "share": 1.0}
        | {"samples": 4, "foreground": 0.9, "background": 0.9, "margin": 0.1, "source": "a", "row": number}
        | {"match_ids": ids, "match_counts": [1] * len(ids), "match_groups": ids, "match_urls": [None] * len(ids)}
        | {"reach": len(ids), "component": 0, "cluster": 0, "signals": [], "evidence_sample": 0}
        for number, (caption, ids) in enumerate(zip(captions, matches, strict=True))
    ]
    return with_groups(pa.Table.from_pylist(rows, schema=FLAGGED), {})


def test_planted_blobs_are_found_exactly_and_on_a_graph(rng: np.random.Generator) -> None:
    vectors, planted = blobs(rng, 600, noise=60)
    inside = planted >= 0
    for direct in (10_000, 0):
        found = density_clusters(vectors, 5, 1, direct)
        assert adjusted_rand_score(planted[inside], found.labels_N[inside]) > 0.98
        assert found.strengths_N[found.labels_N < 0].max(initial=0) == 0
        assert len(found.persistence_K) == found.labels_N.max() + 1


def test_graph_and_exact_agree(rng: np.random.Generator) -> None:
    vectors, _ = blobs(rng, 480)
    exact, graph = (density_clusters(vectors, 5, 1, direct).labels_N for direct in (10_000, 0))
    assert adjusted_rand_score(exact, graph) == 1.0


def test_neighbours_are_those_of_brute_force(rng: np.random.Generator) -> None:
    vectors, _ = blobs(rng, 200)
    distances, rows = neighbours(vectors, 5)
    every = np.linalg.norm(vectors[:, None].astype(np.float64) - vectors[None], axis=2)
    np.fill_diagonal(every, np.inf)
    # float32 squares of unit vectors: 1e-6 of a square is 1e-3 of a small distance
    np.testing.assert_allclose(distances, np.sort(every, axis=1)[:, :5], atol=1e-3)
    assert (rows != np.arange(200)[:, None]).all()


@pytest.mark.parametrize("count", [0, 1, 2, 5])
def test_too_few_prompts_are_no_cluster(count: int) -> None:
    assert density_clusters(np.ones((count, 3), np.float32)).labels_N.tolist() == [-1] * count


def test_equal_vectors_are_one_cluster_each() -> None:
    vectors = np.repeat(np.eye(4, dtype=np.float32), 5, axis=0)
    for direct in (100, 0):
        labels = density_clusters(vectors, 3, 1, direct).labels_N
        assert adjusted_rand_score(np.repeat(np.arange(4), 5), labels) == 1.0


def test_sharing_an_image_draws_together_and_nothing_else_moves(rng: np.random.Generator) -> None:
    text = unit(rng.normal(size=(6, 16)))
    groups = [["a"], ["a", "b"], ["b"], ["c"], ["d"], []]
    moved = drawn_together(text, groups, [[1] * len(row) for row in groups], 0.5)
    assert (text[0] @ text[1]) < (moved[0] @ moved[1])
    # c and d are reached by one prompt each, the last prompt reaches nothing
    np.testing.assert_allclose(moved[3:], text[3:], atol=1e-6)
    np.testing.assert_array_equal(drawn_together(text, groups, [[1] * len(row) for row in groups], 0.0), text)


def test_propagation_by_hand(rng: np.random.Generator) -> None:
    text = unit(rng.normal(size=(3, 8)))
    moved = drawn_together(text, [["a", "b"], ["a"], ["b"]], [[3, 1], [1], [2]], 0.25)
    # by hand: the mean over a prompt's images of the mean over an image's prompts; then the series' closed form
    step = np.array([[3 / 4, 1 / 4], [1, 0], [0, 1]]) @ np.array([[3 / 4, 1 / 4, 0], [1 / 3, 0, 2 / 3]])
    limit = 0.75 * np.linalg.inv(np.eye(3) - 0.25 * step) @ text
    np.testing.assert_allclose(moved, unit(limit), atol=1e-5)  # what ten steps leave out: 0.25 to the 11th


def test_images_above_a_threshold_bring_prompts_together(rng: np.random.Generator) -> None:
    """Two kinds of prompts whose texts say nothing and that share no match, only what was above a threshold as well."""
    matches = [[f"own-{number}"] for number in range(16)]
    table = flagged_table([f"caption {number}" for number in range(16)], matches)
    alike = pa.array([[f"shown-{number % 2}-{one}" for one in range(4)] for number in range(16)])
    table = table.set_column(table.schema.get_field_index("alike_ids"), FLAGGED.field("alike_ids"), alike)
    vectors = unit(rng.normal(size=(16, 32)))
    for weight, agreement in ((0.75, 1.0), (0.0, 0.0)):
        found = group_prompts(table, TextVectors(vectors, "none"), ClustersConfig(image_weight=weight, kmeans=0))
        labels = found.assignments["cluster"].to_pylist()
        score = adjusted_rand_score([number % 2 for number in range(16)], labels)
        assert score == 1.0 if agreement else score < 0.5


def planted_list() -> tuple[pa.Table, list[str], np.ndarray]:
    """The planted prompts of the shipped world as a flagged list that matches what was planted, and their groups."""
    import pyarrow.parquet as pq

    truth = [row for row in pq.read_table(shipped_world() / "truth.parquet", schema=TRUTH).to_pylist() if row["group"]]
    captions, groups = [row["caption"] for row in truth], [row["group"] for row in truth]
    table = flagged_table(captions, [row["reference_ids"][:3] for row in truth])
    vectors, _ = load_text_encoder("model", str(shipped_world() / "checkpoint")).encode(captions)
    return table, groups, vectors


def test_planted_clusters_of_the_world() -> None:
    table, groups, vectors = planted_list()
    found = group_prompts(table, TextVectors(vectors, "model"), ClustersConfig(kmeans=0))
    alone = [number or -place for place, number in enumerate(found.assignments["cluster"].to_pylist())]
    assert adjusted_rand_score(groups, alone) >= 0.9
    names = found.clusters["name"].to_pylist()
    assert len(set(names)) == len(names) == found.clusters.num_rows


@pytest.mark.parametrize("direct", [10_000, 0])
def test_order_of_rows_does_not_matter(direct: int, rng: np.random.Generator) -> None:
    table, _, vectors = planted_list()
    config = ClustersConfig(direct=direct, kmeans=5)
    first = group_prompts(table, TextVectors(vectors, "model", vectors), config)
    order = rng.permutation(table.num_rows)
    shuffled = table.take(pa.array(order))
    again = group_prompts(shuffled, TextVectors(vectors[order], "model", vectors[order]), config)
    assert again.assignments.equals(first.assignments)
    assert again.clusters.equals(first.clusters)
    assert again.summary == first.summary
    filled = with_clusters(shuffled, again.assignments)
    known = dict(zip(*(first.assignments[name].to_pylist() for name in ("prompt_id", "cluster")), strict=True))
    assert filled["cluster"].to_pylist() == [known[one] for one in filled["prompt_id"].to_pylist()]


def test_clusters_are_numbered_by_harm_and_described() -> None:
    table, _, vectors = planted_list()
    found = group_prompts(table, TextVectors(vectors, "model"), ClustersConfig())
    rows = found.clusters.to_pylist()
    assert [row["cluster"] for row in rows] == list(range(1, len(rows) + 1))
    assert [row["severity"] for row in rows] == sorted((row["severity"] for row in rows), reverse=True)
    by_id: dict[str, Any] = {row["prompt_id"]: row for row in table.to_pylist()}
    cluster = dict(zip(*(found.assignments[name].to_pylist() for name in ("prompt_id", "cluster")), strict=True))
    for row in rows:
        members = [one for one, number in cluster.items() if number == row["cluster"]]
        assert row["prompts"] == len(members) == row["VM"] + row["FM"] + row["BM"]
        assert row["medoid"] in members
        assert row["caption"] == by_id[row["medoid"]]["caption"]
        assert row["images"] == len({group for one in members for group in by_id[one]["match_groups"]})
        assert 0 <= row["stability"] <= 1
        assert all(word in " ".join(by_id[one]["caption"] for one in members).casefold() for word in row["words"])


def test_telling_words() -> None:
    captions = ["a red fox poster", "the red fox poster", "a blue door poster", "one blue door poster", "a chair"]
    words = telling_words(captions, [1, 1, 2, 2, 0])
    assert {words[1][0], words[1][1]} == {"red", "fox"}
    assert {words[2][0], words[2][1]} == {"blue", "door"}
    assert 0 not in words
    assert name_of([], "\u202ecaption") == "\u202ecaption"


def test_words_stand_in_for_a_text_encoder() -> None:
    captions = [f"{animal} in the {place}" for animal in ("red fox", "grey wolf") for place in ("wood", "snow", "dark")]
    vectors = unit(word_vectors(captions))
    similar = vectors @ vectors.T
    assert similar[0, 1:3].min() > similar[0, 3:].max()
    assert word_vectors(["", "!"]).shape == (2, 1)
    order = [3, 1, 5, 0, 2, 4]
    np.testing.assert_array_equal(word_vectors([captions[at] for at in order]), word_vectors(captions)[order])


def test_sentence_encoder_is_a_mean_over_tokens(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    import torch

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "red", "fox", "door"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    transformers.BertTokenizerFast(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path)
    torch.manual_seed(0)
    size = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    model = transformers.BertModel(transformers.BertConfig(vocab_size=len(words), **size)).eval()
    model.save_pretrained(tmp_path)
    encoder = load_text_encoder("sentence", str(tmp_path))
    both, _ = encoder.encode(["red fox", "door"])
    with torch.inference_mode():
        ids = transformers.AutoTokenizer.from_pretrained(tmp_path)("door", return_tensors="pt")
        alone = model(**ids).last_hidden_state.mean(1).numpy()
    np.testing.assert_allclose(both[1:], alone, atol=1e-5)  # padding beside a longer caption changes nothing
