"""This module is a caption before it is sampled.

It is separate from the screen, so that it does not need torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # comes with torch
    from memscan.detection.decide import Decided


@dataclass(frozen=True)
class Prompt:
    """This is a caption to sample.

    Args:
        decided: the screen's decision; None without a screen.
        first: what `Generator.generate` takes up of the bank's seeds, (2 or 1, seeds, C, h, w); None if there is
            nothing to take up.
    """

    prompt_id: str
    caption: str
    decided: Decided | None = None
    first: Any = None

    @property
    def scanned(self) -> bool:
        return self.decided is None or self.decided.scanned
