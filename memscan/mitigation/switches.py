"""This module generates with units switched off by prompt, as NeMo and NeMo-C do it in their papers.

A switch file names groups of units and, by prompt id, the group that is off while that prompt is drawn; prompts that
it does not name are drawn with everything on. A checkpoint with a group's rows at zero draws the same images (a test
says so).

    {"format": "memscan-switches/1", "groups": {GROUP: {LAYER: [ROWS]}}, "prompts": {PROMPT_ID: GROUP}}
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import numpy as np
from pydantic import Field, TypeAdapter, ValidationError
from torch import Tensor
from typing_extensions import TypedDict

from memscan.errors import ModelError
from memscan.io import storage
from memscan.mitigation.units import BLOCKS, Layout, UnitSet, switched_off
from memscan.models.generator import Generations, Generator, concatenate
from memscan.records import prompt_id, short_id

FORMAT = "memscan-switches/1"


class _Switches(TypedDict):
    groups: dict[str, dict[str, list[Annotated[int, Field(ge=0, lt=2**31)]]]]
    prompts: dict[str, str]


def write_switches(path: str, groups: Mapping[str, UnitSet], prompts: Mapping[str, str]) -> None:
    """Write a switch file. Raises ValueError for a prompt of a group that is not there."""
    missing = set(prompts.values()) - set(groups)
    if missing:
        raise ValueError(f"prompts of unknown groups {sorted(missing)[:3]}")
    document = {
        "format": FORMAT,
        "groups": {name: units.to_json() for name, units in groups.items()},
        "prompts": dict(prompts),
    }
    storage.write_json(path, document)


def read_switches(path: str) -> tuple[dict[str, UnitSet], dict[str, str]]:
    """Return the groups and prompts of a switch file. Raises ModelError if the file is not a switch file."""
    document = storage.read_json(path)
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise ModelError(f"is not a switch file ({FORMAT})", where=path)
    try:
        content = TypeAdapter(_Switches).validate_python(document)
    except ValidationError as error:
        raise ModelError(f"is not a switch file ({error.errors()[0]['msg']})", where=path) from error
    groups = {name: UnitSet.from_json(layers) for name, layers in content["groups"].items()}
    prompts = content["prompts"]
    unknown = set(prompts.values()) - set(groups)
    if unknown:
        raise ModelError(f"names unknown groups: {', '.join(sorted(unknown)[:3])}", where=path)
    return groups, prompts


def group_for(prompts: Mapping[str, str], prompt: str) -> str | None:
    """Return the group that is off for a prompt id; None if there is none.

    Args:
        prompts: of a switch file; files of repairs before 0.2.0 name prompts by their short ids.
    """
    return prompts.get(prompt, prompts.get(short_id(prompt)))


class GuardedGenerator(Generator):
    """This generator generates each caption with the units of its group off.

    Raises:
        ModelError: the file is no switch file, or names units that the UNet has not.
    """

    @classmethod
    def guard(cls, generator: Generator, path: str) -> GuardedGenerator:
        """Return the same generator under a switch file."""
        guarded = cls(generator.checkpoint, generator.config, generator.hooks)
        guarded.groups, guarded.prompts = read_switches(path)
        guarded.layout = Layout.of(generator.checkpoint.unet, BLOCKS)
        for units in guarded.groups.values():
            guarded.layout.mask(units)
        return guarded

    groups: dict[str, UnitSet]
    prompts: dict[str, str]
    layout: Layout

    def generate(self, captions: Sequence[str], seeds: Sequence[int], first: Tensor | None = None) -> Generations:
        """Generate as `Generator.generate` does; captions of one group share their batches.

        A first step that is known was made with all units on: captions of a group make theirs again.
        """
        members: dict[str | None, list[int]] = {}
        for at, caption in enumerate(captions):
            members.setdefault(group_for(self.prompts, prompt_id(caption)), []).append(at)
        parts = [self._group(group, captions, seeds, rows, first) for group, rows in members.items()]
        if len(parts) == 1:
            return parts[0]
        if not parts:
            return super().generate(captions, seeds, first)
        back = np.argsort(np.concatenate(list(members.values())))
        return concatenate(parts, self.height, self.width).take(back)

    def _group(
        self,
        group: str | None,
        captions: Sequence[str],
        seeds: Sequence[int],
        rows: Sequence[int],
        first: Tensor | None,
    ) -> Generations:
        chosen: tuple[Any, Any] = [captions[at] for at in rows], [seeds[at] for at in rows]
        if group is None:
            return super().generate(*chosen, None if first is None else first[:, list(rows)])
        with switched_off(self.checkpoint.unet, self.layout, self.groups[group]):
            return super().generate(*chosen)
