"""This module chooses the prompts that a verification examines, and the images that it attacks.

They are the same for every model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from memscan.errors import RowReject, RunError
from memscan.mitigation.augment import paraphrases
from memscan.mitigation.settings import VerifySettings
from memscan.mitigation.targets import Target, held_out
from memscan.records import prompt_id
from pipelines.mitigate.job import Prepared

FIRST_TEMPLATES = 4  # of each caption's eight; a repair that used more has seen the paraphrases, which its notes say
LOOKED_AT = 20_000  # references among which controls are chosen: every row is read with its image


@dataclass(frozen=True)
class Lists:
    """These are the prompts and images on which every model is examined.

    Attributes:
        paraphrases: caption -> prompt id of the flagged prompt.
        panel: ordinary prompts of the half that repairs do not see, (prompt id, caption).
        attacked: flagged prompts whose image is attacked.
        controls: (row, caption) of training images that are not known to be memorised, one per target.
        references: rows of training images for the Fréchet distance.
        version: of the index.
    """

    flagged: tuple[Target, ...]
    paraphrases: dict[str, str]
    panel: tuple[tuple[str, str], ...]
    attacked: tuple[Target, ...]
    controls: tuple[tuple[int, str], ...]
    references: tuple[int, ...]
    version: int | None

    @property
    def captions(self) -> list[str]:
        """These are all captions of the rescan, each once."""
        flagged = [target.caption for target in self.flagged]
        return list(dict.fromkeys([*flagged, *self.paraphrases, *(caption for _, caption in self.panel)]))


def choose(ready: Prepared, settings: VerifySettings) -> Lists:
    """Choose the lists of a run. Raises RunError if no image can be attacked, or if there is no panel."""
    from pipelines.mitigate.finetune_data import open_references

    panel = tuple(one for one in ready.ordinary if held_out(one[0]))[: settings.panel]
    if len(panel) < 2:
        raise RunError(
            f"{len(panel)} ordinary prompts are left for the panel",
            where=ready.run.folder.path,
            hint="scan ordinary prompts too",
        )
    again = {
        text: target.prompt_id
        for target in ready.targets
        for text in paraphrases(target.caption, settings.paraphrases, skip=FIRST_TEMPLATES)
    }
    version = ready.run.manifest["index"].get("version")
    references = open_references(ready.index, version)
    targets = attacked(ready.targets, references, settings.targets)
    if not targets:
        raise RunError("no matched training image of the flagged prompts can be read", where=ready.index)
    step = max(1, len(references) // settings.references)
    return Lists(
        flagged=ready.targets,
        paraphrases=again,
        panel=panel,
        attacked=targets,
        controls=controls(ready, references, len(targets)),
        references=tuple(range(0, len(references), step))[: settings.references],
        version=version,
    )


def attacked(targets: tuple[Target, ...], references: Any, most: int) -> tuple[Target, ...]:
    """Return targets whose image is attacked: every cluster once before any cluster twice."""
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
    """Return training images that are not known to be memorised.

    They are unmatched, and under no flagged caption. Images whose caption the run scanned and did not flag come first.
    The order within is that of a hash, so that neighbours are not preferred.
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
