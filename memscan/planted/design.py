"""This module plans what a world contains before it is rendered: its training set, planted groups and ground truth.

* **VM** is one image under several captions with many copies; in half of the groups the copies are near-duplicates.
* **VM, one-to-many** is a caption whose copies show one of several images.
* **FM** is one object in the same place in front of many backgrounds.
* **BM** is one background behind many objects.
* **ordinary** are unique images with captions of the grammar; some captions are held back and never trained on.

Everything derives from the seed.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from memscan.planted import captions
from memscan.planted.renderer import Scene, random_background, random_object
from memscan.records import Label


@dataclass(frozen=True)
class WorldSize:
    """This says how much there is of each kind; the defaults are those of the shipped world."""

    ordinary: int = 2200
    ordinary_prompts: int = 200  # of the trained captions, how many are asked again
    unseen_prompts: int = 100
    groups: int = 4  # of each of VM, FM, BM
    one_to_many_groups: int = 3
    captions_per_group: int = 3
    images_per_one_to_many: int = 3
    varied_images: int = 100  # of an FM or BM group
    verbatim_copies: int = 30  # of each caption's image in the training set
    one_to_many_copies: int = 14
    near_duplicates: int = 4


@dataclass(frozen=True)
class Variation:
    """This says how a near-duplicate differs from its original: brightness factor and shift in pixels."""

    brightness: float = 1.0
    shift: tuple[int, int] = (0, 0)


@dataclass(frozen=True)
class Reference:
    """This is a training image."""

    reference_id: str
    caption: str
    scene: Scene
    group: str
    variation: Variation = Variation()


@dataclass(frozen=True)
class TrainingRow:
    """This is a caption and an image (index into the design's references), `copies` times in the training set."""

    caption: str
    reference: int
    copies: int
    planted: bool


@dataclass(frozen=True)
class PlantedPrompt:
    """This is one row of the ground truth."""

    caption: str
    label: Label
    group: str
    seen: bool
    one_to_many: bool
    reference_ids: tuple[str, ...]


@dataclass(frozen=True)
class WorldDesign:
    seed: int
    size: WorldSize
    references: tuple[Reference, ...]
    rows: tuple[TrainingRow, ...]
    prompts: tuple[PlantedPrompt, ...]


class _Builder:
    def __init__(self, seed: int, size: WorldSize) -> None:
        self.seed, self.size = seed, size
        self.rng = np.random.default_rng([seed, 1])
        self.references: list[Reference] = []
        self.rows: list[TrainingRow] = []
        self.prompts: list[PlantedPrompt] = []

    def add_reference(self, caption: str, scene: Scene, group: str, variation: Variation = Variation()) -> int:
        number = len(self.references)
        self.references.append(Reference(f"w{self.seed}-{number:05d}", caption, scene, group, variation))
        return number

    def add_group(self, name: str, label: Label, titles: list[str], members: list[int], *, one_to_many: bool) -> None:
        ids = tuple(self.references[member].reference_id for member in members)
        self.prompts += [PlantedPrompt(title, label, name, True, one_to_many, ids) for title in titles]

    def scene(self) -> Scene:
        return Scene(random_object(self.rng), random_background(self.rng))

    def titles(self) -> list[str]:
        return captions.planted_titles(self.rng, self.size.captions_per_group)

    def verbatim(self, number: int) -> None:
        name, titles, scene = f"vm{number}", self.titles(), self.scene()
        variations = [Variation()]
        if number % 2:
            variations += [self.near_duplicate() for _ in range(self.size.near_duplicates - 1)]
        members = [self.add_reference(titles[i % len(titles)], scene, name, v) for i, v in enumerate(variations)]
        copies = max(1, self.size.verbatim_copies // len(members))
        self.rows += [TrainingRow(title, member, copies, True) for title in titles for member in members]
        self.add_group(name, Label.VM, titles, members, one_to_many=False)

    def near_duplicate(self) -> Variation:
        shift = (int(self.rng.integers(-1, 2)), int(self.rng.integers(-1, 2)))
        return Variation(float(self.rng.uniform(0.94, 1.06)), shift)

    def one_to_many(self, number: int) -> None:
        name, titles = f"many{number}", self.titles()
        count = self.size.images_per_one_to_many
        members = [self.add_reference(titles[i % len(titles)], self.scene(), name) for i in range(count)]
        copies = self.size.one_to_many_copies
        self.rows += [TrainingRow(title, member, copies, True) for title in titles for member in members]
        self.add_group(name, Label.VM, titles, members, one_to_many=True)

    def varied(self, number: int, label: Label) -> None:
        name, titles, fixed = f"{label.value.lower()}{number}", self.titles(), self.scene()
        members = []
        for i in range(self.size.varied_images):
            fresh = self.scene()
            scene = (
                replace(fresh, object=fixed.object)
                if label is Label.FM
                else replace(fresh, background=fixed.background)
            )
            title = titles[i % len(titles)]
            members.append(self.add_reference(title, scene, name))
            self.rows.append(TrainingRow(title, members[-1], 1, True))
        self.add_group(name, label, titles, members, one_to_many=False)

    def ordinary(self) -> None:
        size, seen = self.size, set[str]()
        while len(seen) < size.ordinary + size.unseen_prompts:
            scene = self.scene()
            caption = captions.ordinary_caption(scene.object, scene.background, self.rng)
            if caption in seen:
                continue
            seen.add(caption)
            trained = len(seen) <= size.ordinary
            if trained:
                self.rows.append(TrainingRow(caption, self.add_reference(caption, scene, ""), 1, False))
            if not trained or len(seen) <= size.ordinary_prompts:
                self.prompts.append(PlantedPrompt(caption, Label.NM, "", trained, False, ()))


def design_world(seed: int, size: WorldSize | None = None) -> WorldDesign:
    """Lay out a world. The same seed and size give the same design."""
    size = size or WorldSize()
    builder = _Builder(seed, size)
    for number in range(size.groups):
        builder.verbatim(number)
        builder.varied(number, Label.FM)
        builder.varied(number, Label.BM)
    for number in range(size.one_to_many_groups):
        builder.one_to_many(number)
    builder.ordinary()
    return WorldDesign(seed, size, tuple(builder.references), tuple(builder.rows), tuple(builder.prompts))
