"""This module writes one table and one page over all verified repairs of a run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memscan.errors import RowReject
from memscan.io import storage
from pipelines.mitigate.job import Prepared

if TYPE_CHECKING:
    from memscan.mitigation.policy import RepairPolicy

Say = Callable[[str], None]
FORMAT = "memscan-verify/1"
ORIGINAL, RESULT = "original", "verify.json"
POLICY = "policy.json"
LOCALITY = "locality.json"  # by memscan evaluate locality; it is about the original


def write_table_and_page(ready: Prepared, place: Path, say: Say) -> None:
    """Write one table and one page over every repair that was verified into a folder, and the locality analyses."""
    import numpy as np
    from safetensors.numpy import load_file

    from memscan.mitigation.policy import RepairPolicy, judge
    from memscan.report.verification import render_verification
    from pipelines.verify.workers import EXAMINED

    files = sorted(place.glob(f"*/{RESULT}"))
    results = [storage.read_json(str(file)) for file in files]
    policy = read_policy(place)
    judgements = [judge(result, policy or RepairPolicy()).to_json() for result in results]
    limits = (policy or RepairPolicy()).model_dump(mode="json")
    table = {"format": FORMAT, "methods": results, "policy": limits, "judgements": judgements}
    storage.write_json(str(place / "table.json"), table)
    pictures = {file.parent.name: load_file(str(file.parent / EXAMINED))["pictures_KHWC"] for file in files}
    before = load_file(str(place / ORIGINAL / EXAMINED))["pictures_KHWC"] if files else np.zeros((0, 1, 1, 3), np.uint8)
    locality = storage.read_json(str(place / LOCALITY)) if (place / LOCALITY).is_file() else None
    page = render_verification(results, before, pictures, _copied(ready, len(before)), locality, policy)
    storage.write_atomic(str(place / "report.html"), page.encode())
    say(f"verify: {place / 'report.html'}")


def read_policy(place: Path) -> RepairPolicy | None:
    """Return the policy that was given last; None if none was. Raises ConfigError if it is damaged."""
    from memscan.config import parse_section, read_yaml
    from memscan.mitigation.policy import RepairPolicy

    file = place / POLICY
    return parse_section(RepairPolicy, read_yaml(str(file)), where=str(file)) if file.is_file() else None


def _copied(ready: Prepared, count: int) -> list[Any]:
    """Return the training images that the pictured prompts reproduce most often; None for one that cannot be read."""
    from pipelines.mitigate.finetune_data import open_references

    references = open_references(ready.index, ready.run.manifest["index"].get("version"))
    images: list[Any] = []
    for target in ready.targets[:count]:
        try:
            images.append(references.fetch(references.row_of(target.match_ids[0])).image_HWC)
        except RowReject:
            images.append(None)
    return images
