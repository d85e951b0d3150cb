"""The card says what was changed, for whom and on what evidence; a caption cannot write into it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from memscan.errors import ModelError
from memscan.mitigation.card import LISTED, read_card, write_card

FOUND = {"candidates": 9, "score": 0.9, "calls": 1, "theta": 1.0}


def card(**changes: Any) -> dict[str, Any]:
    targets = [{"label": "VM", "caption": f"caption {n}", "cluster": str(n % 3)} for n in range(LISTED + 2)]
    targets[0]["caption"] = "`# heading\n* item` <b>"
    return {
        "method": "nemo_c",
        "scope": "cluster",
        "run": {"name": "demo", "fingerprint": "f"},
        "original": {"name": "checkpoint", "sha256": "0" * 64},
        "changed": {"weights": 1234, "of": 9999, "tensors": 2},
        "targets": targets,
        "units": {
            "off": 6,
            "of": 12,
            "share": 0.5,
            "groups": {"0": 2, "1": 3},
            "before_prune": {"0": 5, "1": 4},
        },
        "evidence": {
            "threshold": {"value": 0.4284, "prompts": 60},
            "searches": {
                "a/0": {**FOUND, "seeds": 5, "reached": True, "left": 0.3},
                "b/0": {**FOUND, "seeds": 5, "reached": False, "left": 0.7},
                "c/0": {**FOUND, "seeds": 0, "reached": True, "left": 1.0},
            },
        },
        **changes,
    }


def test_readme(tmp_path: Path) -> None:
    write_card(tmp_path, card())
    assert read_card(tmp_path)["changed"]["weights"] == 1234
    lines = (tmp_path / "README.md").read_text().splitlines()
    assert "* Changed: 1,234 of 9,999 weights of the UNet in 2 tensors" in lines
    assert "* Units switched off: 6 of 12 (50.0%)" in lines
    assert "* Switched on again, as no memorisation comes back: 4 of 9 units, summed over 2 groups" in lines
    assert "* Threshold of the score: 0.428, from 60 ordinary prompts of this model" in lines
    assert "* Searches: 3; 2 showed memorisation, 1 came under it" in lines
    assert "* Similarity left with the units off: median 0.500 (1 where nothing is off)" in lines
    assert "* VM `'# heading * item' <b>`" in lines
    assert "* and 2 more in `mitigation.json`" in lines
    assert sum(line.startswith("* VM `") for line in lines) == LISTED


def test_training_says_its_loss(tmp_path: Path) -> None:
    write_card(tmp_path, card(method="finetune", scope="all", units=None, evidence={"losses": [0.5, 0.25]}))
    text = (tmp_path / "README.md").read_text()
    assert "* Training loss: 0.5 in the first epoch, 0.25 in epoch 2" in text
    assert "Units" not in text
    assert "switches.json" not in text


def test_a_folder_without_a_card(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"has no mitigation\.json"):
        read_card(tmp_path)
    (tmp_path / "mitigation.json").write_text("[]")
    with pytest.raises(ModelError, match="not of format"):
        read_card(tmp_path)
