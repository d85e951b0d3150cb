"""A mistyped index type is refused before anything is described, in one line; every type that memscan picks passes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from memscan.errors import InputError
from memscan.index.store import settle
from memscan.index.vectors import check_factory


@pytest.mark.parametrize("factory", ["Falt", "IVF256,Flatt", "IVFx,Flat", "", "PQ8x4fss"])
def test_a_mistyped_string_is_one_line(factory: str) -> None:
    with pytest.raises(InputError, match=r"index\.factory: FAISS does not know the index type") as caught:
        check_factory(factory)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("factory", ["Flat", "HNSW32", "IVF65536_HNSW32,Flat", "OPQ7_14,IVF16,PQ7x4fsr", "PQ11", "SQ8"])
def test_what_faiss_knows_passes(factory: str) -> None:
    check_factory(factory)


@pytest.mark.parametrize("count", [100, 100_000, 10_000_000, 2_000_000_000])
@pytest.mark.parametrize("dimension", [48, 512, 77])
def test_what_is_chosen_by_size_passes(count: int, dimension: int) -> None:
    check_factory(settle("auto", None, count, dimension, 3, None).factory)


def test_a_build_refuses_it_before_it_looks_at_an_image(tmp_path: Path) -> None:
    """The source is never opened: it is not even there."""
    from memscan.planted.world import world_config
    from pipelines.index.job import build_index
    from pipelines.ray.stage import StageSetup

    config = world_config()
    config = config.model_copy(update={"index": config.index.model_copy(update={"factory": "IVF256,Falt"})})
    nothing: Any = None
    with pytest.raises(InputError, match="IVF256,Falt"):
        build_index(nothing, str(tmp_path / "index"), StageSetup(config, "cpu", 1), nothing, nothing, nothing)
    assert not list(tmp_path.iterdir())
