"""This module writes the card of a mitigated model: what was changed, for which prompts, and on what evidence.

`mitigation.json` is for programs, `README.md` says the same to people.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from memscan.errors import ModelError
from memscan.io import storage

FORMAT = "memscan-mitigation/1"
CARD, README, PATCH, SWITCHES = "mitigation.json", "README.md", "patch.safetensors", "switches.json"
LISTED = 30  # prompts in the README
NAMES = {
    "nemo": "NeMo (Hintersdorf et al. 2024)",
    "nemo_c": "NeMo-C (Di et al. 2025)",
    "wanda": "Wanda pruning (Chavhan et al. 2024)",
    "finetune": "adversarial fine-tuning (Kowalczuk et al. 2025)",
    "dedup": "fine-tuning on the de-duplicated training set (control)",
}


def read_card(folder: str | Path) -> dict[str, Any]:
    """Return the card of a mitigated checkpoint. Raises ModelError if there is none."""
    path = storage.join(str(folder), CARD)
    if not storage.exists(path):
        raise ModelError(f"has no {CARD}", where=str(folder), hint="give a folder that memscan mitigate wrote")
    card = storage.read_json(path)
    if not isinstance(card, dict) or card.get("format") != FORMAT:
        raise ModelError(f"{CARD} is not of format {FORMAT}", where=str(folder))
    return card


def write_card(folder: Path, card: Mapping[str, Any]) -> None:
    """Write both forms of the card."""
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
                f"* Switched on again, as no memorisation comes back: {all_of - left:,} of {all_of:,} units, "
                f"summed over {len(whole):,} groups"
            )
    lines += [f"* {note}" for note in card.get("notes", ())]
    if card["scope"] != "all":
        lines += [
            "",
            f"`{SWITCHES}` names the units of each prompt or cluster. As published, they are off only",
            "while that prompt is drawn. The weights in this folder have all of them off permanently.",
        ]
    lines += [
        "",
        f"`{PATCH}` holds the changed tensors; `memscan patch` applies it to the original and takes it back.",
        f"`{CARD}` lists all prompts and all evidence. `memscan verify` says whether the repair holds.",
        *_evidence(card),
        *_prompts(targets),
        "",
    ]
    return "\n".join(lines)


def _evidence(card: Mapping[str, Any]) -> list[str]:
    """Return what the method saw, in a few lines."""
    evidence = card.get("evidence") or {}
    lines = []
    if "threshold" in evidence:
        rule, searches = evidence["threshold"], list(evidence["searches"].values())
        shown = [one for one in searches if one["seeds"]]
        reached = [one for one in shown if one["reached"]]
        lines += [
            f"* Threshold of the score: {rule['value']:.3f}, from {rule['prompts']:,} ordinary prompts of this model",
            f"* Searches: {len(searches):,}; {len(shown):,} showed memorisation, {len(reached):,} came under it",
        ]
        if shown:
            left = f"{median(one['left'] for one in shown):.3f}"
            lines.append(f"* Similarity left with the units off: median {left} (1 where nothing is off)")
    if losses := evidence.get("losses"):
        lines.append(f"* Training loss: {losses[0]:.4g} in the first epoch, {losses[-1]:.4g} in epoch {len(losses):,}")
    return ["", "## Evidence", "", *lines] if lines else []


def _prompts(targets: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the first prompts, as text that no Markdown can hide in."""
    rows = [f"* {one['label']} `{_plain(one['caption'])}`" for one in targets[:LISTED]]
    if len(targets) > LISTED:
        rows.append(f"* and {len(targets) - LISTED:,} more in `{CARD}`")
    return ["", "## Prompts", "", *rows]


def _plain(text: str) -> str:
    short = " ".join(text.replace("`", "'").split())
    return short if len(short) <= 200 else f"{short[:199]}\u2026"
