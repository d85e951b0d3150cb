"""This module chooses what is repaired: flagged prompts with their clusters, and ordinary prompts in two halves.

Ordinary prompts are cut by their id into a half that a mitigation may use (statistics, thresholds) and a half that
only the verification uses, so that nothing is judged on what it was chosen by.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from memscan.mitigation.union import clusters_by_images
from memscan.records import long_id, short_id


@dataclass(frozen=True)
class Target:
    """A target is a flagged prompt.

    Attributes:
        label: its census label.
        match_ids: training images it reproduces, most frequent first.
    """

    prompt_id: str
    caption: str
    label: str
    cluster: str
    match_ids: tuple[str, ...]


def read_targets(rows: Sequence[Mapping[str, Any]]) -> list[Target]:
    """Return the targets of a flagged list, in order of prompt id; ids are those of new runs, whatever the list has.

    A `cluster` column, where there is one, names the clusters; a prompt that it puts in none (0, or null) is a
    cluster of its own. Without the column, prompts are grouped by the training images they share.
    """
    given = bool(rows) and "cluster" in rows[0]
    if given:
        clusters = {
            row["prompt_id"]: f"p-{row['prompt_id']}" if row["cluster"] in (None, "", 0, -1) else str(row["cluster"])
            for row in rows
        }
    else:
        clusters = clusters_by_images({row["prompt_id"]: row["match_ids"] for row in rows})
    targets = [
        Target(
            long_id(row["prompt_id"], row["caption"]),
            row["caption"],
            row["label"],
            clusters[row["prompt_id"]],
            tuple(row["match_ids"]),
        )
        for row in rows
    ]
    return sorted(targets, key=lambda target: target.prompt_id)


def own_images(targets: Sequence[Target]) -> dict[str, frozenset[str]]:
    """Return the training images that count as a prompt's own.

    These are the images of all prompts that it shares images with, in any number of steps. A scan of a few generations
    does not find every image of a one-to-many prompt, but other prompts of its group may have found them.
    """
    groups = clusters_by_images({target.prompt_id: target.match_ids for target in targets})
    images: dict[str, set[str]] = {}
    for target in targets:
        images.setdefault(groups[target.prompt_id], set()).update(target.match_ids)
    return {target.prompt_id: frozenset(images[groups[target.prompt_id]]) for target in targets}


def held_out(prompt_id: str) -> bool:
    """Return whether an ordinary prompt belongs to the verification's half."""
    return bool(int(short_id(prompt_id), 16) % 2)
