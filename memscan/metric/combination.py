"""This module holds the weights of the variant `combined`.

They are a logistic model per region over named terms, in a JSON file.

A score is expit(intercept + sum of weight x term). The intercepts include the operating point, so that a score of .5 is
the threshold that the calibration chose, whichever terms there are: one model has the copy embeddings' similarities
among its terms, one does without. Weights belong to a canvas and, where they have a similarity, to its embedder.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from scipy.special import expit

from memscan.config import shipped_weights_path
from memscan.errors import InputError
from memscan.io import storage

FORMAT = 1
SIMILARITIES = ("similarity_foreground", "similarity_background")

Finite = Annotated[float, Field(allow_inf_nan=False)]


@dataclass(frozen=True)
class RegionModel:
    """This is the model of one region: score = expit(intercept + sum of weights[name] * terms[name])."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    intercept: Finite
    weights: dict[str, Finite]

    def score(self, terms: Mapping[str, float]) -> float:
        """Return the region's score in [0, 1]. Raises KeyError if a term is missing."""
        return float(expit(self.intercept + sum(weight * terms[name] for name, weight in self.weights.items())))


@dataclass(frozen=True)
class Models:
    """These are the models of both regions."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    foreground: RegionModel
    background: RegionModel


@dataclass(frozen=True)
class Combination:
    """These are weights with their provenance.

    Attributes:
        canvas: of the region and robust scores among the terms.
        plain: the models without a similarity.
        embedded: the models with one; None if there are none.
        embedder: the name of the embedder whose similarity they take.
        source: where the pairs come from that the weights and the operating points were fitted on.
        figures: what was measured, cross-validated by concept.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    canvas: int
    plain: Models
    embedded: Models | None
    embedder: str
    source: str
    figures: dict[str, Any]

    def models(self, terms: Mapping[str, float]) -> Models:
        """Return the models for the terms that there are."""
        known = all(name in terms for name in SIMILARITIES)
        return self.embedded if self.embedded is not None and known else self.plain

    @classmethod
    def load(cls, path: str) -> Combination:
        """Read a file of weights. Raises InputError if it is missing or is not such a file."""
        data = storage.read_json(path)
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise InputError(f"is not a file of weights of format {FORMAT}", where=path)
        try:
            return _parser().validate_python({key: value for key, value in data.items() if key != "format"})
        except ValidationError as error:
            first = error.errors()[0]
            name = ".".join(map(str, first["loc"]))
            raise InputError(f"is not a file of weights: {name!r}: {first['msg']}", where=path) from error


def shipped_weights(canvas: int) -> Combination:
    """Return the weights that ship for a canvas; a `MetricConfig` of another canvas does not validate."""
    return _loaded(str(shipped_weights_path(canvas)))


@functools.cache
def _loaded(path: str) -> Combination:
    return Combination.load(path)


@functools.cache
def _parser() -> TypeAdapter[Combination]:
    return TypeAdapter(Combination)
