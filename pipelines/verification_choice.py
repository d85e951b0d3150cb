"""Which images a verification attacks: memorised ones of every cluster, and unmemorised ones beside them."""

from __future__ import annotations

from typing import Any

from memscan.errors import RowReject
from memscan.mitigation.targets import Target
from memscan.records import prompt_id
from pipelines.mitigate import Prepared

LOOKED_AT = 20_000  # references among which controls are chosen: every row is read with its image


def attacked(targets: tuple[Target, ...], references: Any, most: int) -> tuple[Target, ...]:
    """Targets whose image is attacked: every cluster once before any cluster twice."""
    seen: dict[str, int] = {}
    ranked = []
    for target in targets:
        seen[target.cluster] = seen.get(target.cluster, 0) + 1
        ranked.append((seen[target.cluster], target.prompt_id, target))
    chosen: list[Target] = []
    for _, _, target in sorted(ranked, key=lambda one: one[:2]):
        if len(chosen) < most and _readable(references, target):
            chosen.append(target)
    return tuple(chosen)


def _readable(references: Any, target: Target) -> bool:
    try:
        references.fetch(references.row_of(target.match_ids[0]))
    except RowReject:
        return False
    return True


def controls(ready: Prepared, references: Any, count: int) -> tuple[tuple[int, str], ...]:
    """Training images that are not known to be memorised: unmatched, and under no flagged caption. First those whose
    caption the run scanned and did not flag; the order within is that of a hash, so that neighbours are not preferred.
    """
    matched = {match for target in ready.targets for match in target.match_ids}
    flagged = {target.caption for target in ready.targets}
    ordinary = {caption for _, caption in ready.ordinary}
    ranked = []
    for row in range(0, len(references), max(1, len(references) // LOOKED_AT)):
        stored = references.encoded(row)
        caption = stored["caption"]
        if caption and stored["reference_id"] not in matched and caption not in flagged:
            ranked.append((caption not in ordinary, prompt_id(str(stored["reference_id"])), row, str(caption)))
    chosen: list[tuple[int, str]] = []
    for _, _, row, caption in sorted(ranked):
        if len(chosen) == count:
            break
        try:
            references.fetch(row)
        except RowReject:
            continue
        chosen.append((row, caption))
    return tuple(chosen)
