"""Settings of repairs and their tests: what cannot be worked with is refused before anything begins."""

from __future__ import annotations

import math
from typing import Any

import pytest
from pydantic import ValidationError

from memscan.mitigation.settings import LocalitySettings, MitigationSettings, Settings, VerifySettings


@pytest.mark.parametrize("kind", [MitigationSettings, VerifySettings, LocalitySettings])
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_numbers_that_are_not_finite_are_refused(kind: type[Settings], value: float) -> None:
    """A bound such as `gt=0` lets infinity pass: each key that is a number is tried."""
    numbers = [name for name, field in kind.model_fields.items() if field.annotation in (float, float | None)]
    assert numbers
    for name in numbers:
        given: dict[str, Any] = {"method": "nemo", name: value} if kind is MitigationSettings else {name: value}
        with pytest.raises(ValidationError, match="finite number"):
            kind(**given)
