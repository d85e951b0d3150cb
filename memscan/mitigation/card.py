"""The card of a mitigated model: what was changed, for which prompts, on what evidence.

`mitigation.json` is for programs, `README.md` says the same to people.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from memscan import storage
from memscan.errors import ModelError

FORMAT = "memscan-mitigation/1"
CARD, README, PATCH, SWITCHES = "mitigation.json", "README.md", "patch.safetensors", "switches.json"
NAMES = {
    "nemo": "NeMo (Hintersdorf et al. 2024)",
    "nemo_c": "NeMo-C (Di et al. 2025)",
    "wanda": "Wanda pruning (Chavhan et al. 2024)",
    "finetune": "adversarial fine-tuning (Kowalczuk et al. 2025)",
    "dedup": "fine-tuning on the de-duplicated training set (control)",
}


def read_card(folder: str | Path) -> dict[str, Any]:
    """The card of a mitigated checkpoint. Raises ModelError where there is none."""
    path = storage.join(str(folder), CARD)
    if not storage.exists(path):
        raise ModelError(f"has no {CARD}", where=str(folder), hint="give a folder that memscan mitigate wrote")
    card = storage.read_json(path)
    if not isinstance(card, dict) or card.get("format") != FORMAT:
        raise ModelError(f"{CARD} is not of format {FORMAT}", where=str(folder))
    return card


def write_card(folder: Path, card: Mapping[str, Any]) -> None:
    """Write both forms."""
    document = {"format": FORMAT, **card}
    (folder / CARD).write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    (folder / README).write_text(_readme(document), encoding="utf-8")


def _readme(card: Mapping[str, Any]) -> str:
    changed, targets = card["changed"], card["targets"]
    clusters = {target["cluster"] for target in targets}
    lines = [
        f"# {card['original']['name']}, mitigated",
        "",
        f"Method: {NAMES[card['method']]}, scope: {card['scope']}.",
        "",
        f"Made by memscan from census {card['run']['name']} ({card['run']['fingerprint']}).",
        "",
        f"* Original: {card['original']['name']}@{card['original']['sha256'][:12]}",
        f"* Changed: {changed['weights']:,} of {changed['of']:,} weights of the UNet in {changed['tensors']} tensors",
        f"* For: {len(targets):,} flagged prompts in {len(clusters):,} clusters",
    ]
    if card.get("units"):
        units = card["units"]
        lines.append(f"* Units switched off: {units['off']:,} of {units['of']:,} ({units['share']:.1%})")
        if whole := units.get("before_prune"):
            left, all_of = sum(units["groups"].values()), sum(whole.values())
            lines.append(
                f"* Given back, since their return brings nothing back: {all_of - left:,} of {all_of:,} units, summed "
                f"over {len(whole):,} groups"
            )
    lines += [f"* {note}" for note in card.get("notes", ())]
    if card["scope"] != "all":
        lines += [
            "",
            f"`{SWITCHES}` names the units of each prompt or cluster, as the method is published: they are off only",
            "while that prompt is drawn. The weights in this folder have all of them off for good.",
        ]
    lines += [
        "",
        f"`{PATCH}` holds the changed tensors; `memscan patch` applies it to the original and takes it back.",
        f"`{CARD}` lists the prompts and the evidence. Whether the repair holds is not said here: scan it.",
        "",
    ]
    return "\n".join(lines)
