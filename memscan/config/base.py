"""This module has the base class of all sections, which are immutable, checked, and closed to unknown keys."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """This is a section of a configuration file. It refuses unknown keys, and checks defaults like given values."""

    # Infinity and NaN pass every lower bound, and fail only where somebody computes with them.
    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)
