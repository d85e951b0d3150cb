"""What every section of a configuration is: immutable, checked, and closed to unknown keys."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A section of a configuration file. Unknown keys are refused, and defaults are checked like given values."""

    # Infinity and NaN pass every lower bound, and fail only where somebody computes with them.
    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)
