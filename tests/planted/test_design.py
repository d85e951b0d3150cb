"""The plan of a world: what is planted, and that the ground truth says so."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from memscan.planted import captions
from memscan.planted.dataset import render_world, truth_table
from memscan.planted.design import WorldDesign, WorldSize, design_world
from memscan.records import TRUTH, Label

SMALL = WorldSize(ordinary=30, ordinary_prompts=10, unseen_prompts=5, groups=2, varied_images=6)


@pytest.fixture(scope="module")
def plan() -> WorldDesign:
    return design_world(11, SMALL)


def test_default_size_is_what_the_project_promises() -> None:
    prompts = design_world(1).prompts
    labels = Counter(p.label for p in prompts if not p.one_to_many)
    assert min(labels[Label.VM], labels[Label.FM], labels[Label.BM]) >= 8
    assert sum(p.one_to_many for p in prompts) >= 8
    ordinary = [p for p in prompts if p.label is Label.NM]
    assert sum(p.seen for p in ordinary) == 200
    assert sum(not p.seen for p in ordinary) == 100


def test_captions_are_distinct_and_unseen_ones_are_not_trained(plan: WorldDesign) -> None:
    asked = [p.caption for p in plan.prompts]
    assert len(set(asked)) == len(asked)
    trained = {row.caption for row in plan.rows}
    for prompt in plan.prompts:
        assert (prompt.caption in trained) == prompt.seen


def test_truth_names_the_images_that_the_caption_was_trained_on(plan: WorldDesign) -> None:
    ids = [reference.reference_id for reference in plan.references]
    assert len(set(ids)) == len(ids)
    by_caption: dict[str, set[str]] = {}
    for row in plan.rows:
        by_caption.setdefault(row.caption, set()).add(ids[row.reference])
    for prompt in plan.prompts:
        if prompt.label is not Label.NM:
            assert by_caption[prompt.caption] <= set(prompt.reference_ids)
            assert prompt.reference_ids
        else:
            assert prompt.reference_ids == ()


def test_groups_share_what_their_class_says(plan: WorldDesign) -> None:
    for prompt in plan.prompts:
        members = [r.scene for r in plan.references if r.group == prompt.group]
        objects, backgrounds = {m.object for m in members}, {m.background for m in members}
        if prompt.label is Label.FM:
            assert (len(objects), len(backgrounds)) == (1, SMALL.varied_images)
        elif prompt.label is Label.BM:
            assert (len(objects), len(backgrounds)) == (SMALL.varied_images, 1)
        elif prompt.one_to_many:
            assert len(objects) == len(backgrounds) == SMALL.images_per_one_to_many
        elif prompt.label is Label.VM:
            assert len(objects) == len(backgrounds) == 1


def test_seed_decides_everything(plan: WorldDesign) -> None:
    assert design_world(11, SMALL) == plan
    other = design_world(12, SMALL)
    planted = {p.caption for p in plan.prompts if p.label is not Label.NM}
    assert not planted & {p.caption for p in other.prompts}


def test_near_duplicates_differ_a_little(plan: WorldDesign) -> None:
    world = render_world(plan)
    group = [i for i, r in enumerate(plan.references) if r.group == "vm1"]
    assert len(group) == SMALL.near_duplicates
    first, *others = (world.images_NHWC[i].astype(float) for i in group)
    for other in others:
        assert 0.5 < np.abs(first - other).mean() < 30


def test_truth_table_has_the_schema(plan: WorldDesign) -> None:
    table = truth_table(plan.prompts)
    assert table.schema.equals(TRUTH)
    assert table.num_rows == len(plan.prompts)


def test_titles_of_a_group_share_the_invented_name() -> None:
    titles = captions.planted_titles(np.random.default_rng(0), 3)
    common = set.intersection(*(set(t.replace(":", "").replace(",", "").split()) for t in titles))
    assert len(common) >= 2


def test_retold_titles_keep_the_name_and_nothing_that_was_trained_on(plan: WorldDesign) -> None:
    groups: dict[str, list[str]] = {}
    for prompt in plan.prompts:
        if prompt.group:
            groups.setdefault(prompt.group, []).append(prompt.caption)
    trained = {row.caption for row in plan.rows}
    for titles in groups.values():
        name = captions.invented_name(titles)
        retold = captions.retold_titles(titles, 40, np.random.default_rng(0))
        assert len(set(retold)) == 40
        assert not trained & set(retold)
        assert all(name in caption for caption in [*retold, *titles])
        assert retold == captions.retold_titles(titles, 40, np.random.default_rng(0))
    with pytest.raises(ValueError, match="0 names in common"):
        captions.invented_name(["one two three", "four five six"])
