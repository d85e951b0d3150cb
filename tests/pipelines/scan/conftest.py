"""An index of the tiny world, and a few of its prompts, for the stages."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from memscan.config import CensusConfig
from memscan.index.store import write_index
from memscan.prompts.table import read_prompts
from memscan.records import REFERENCES, REGIONS
from memscan.sources.reading import open_source
from pipelines.index.building import vectors_of
from pipelines.index.encode import DESCRIBED, DONE, Describe
from pipelines.ray.stage import StageSetup
from tests.support.tiny_world import TinyWorld


@pytest.fixture(scope="session")
def plan(tiny_world: TinyWorld, tmp_path_factory: pytest.TempPathFactory) -> StageSetup:
    """A plan over an index that the Describe stage has described."""
    config: CensusConfig = tiny_world.config(tmp_path_factory.mktemp("run"))
    source = open_source(str(config.index.source))
    work = tmp_path_factory.mktemp("described")
    stage = Describe(StageSetup(config, "cpu", 1), source, str(work))
    done = stage(source.chunks())
    assert done.schema == DONE
    assert sum(done["rows"].to_pylist()) == source.rows
    rows = pa.concat_tables([pq.read_table(file) for file in sorted(work.glob("*.parquet"))])
    assert rows.schema == DESCRIBED
    bad = rows.filter(pa.compute.is_valid(rows["reason"])).to_pylist()
    assert [(row["reference_id"], row["reason"]) for row in bad] == [("truncated", "image_undecodable")]
    good = rows.filter(pa.compute.is_null(rows["reason"]))
    folder = str(tmp_path_factory.mktemp("index"))
    vectors = {region: vectors_of(good, region) for region in REGIONS}
    specs = stage.work.embedder.spec, stage.work.segmenter.spec
    write_index(folder, good.select(REFERENCES.names).cast(REFERENCES), vectors, "Flat", 1, *specs)
    return StageSetup(config, "cpu", 1, folder)


@pytest.fixture
def prompts(plan: StageSetup) -> pa.Table:
    """One memorised, two ordinary and three rejected rows."""
    table = read_prompts(plan.config.prompts).table
    wanted = ["a red lighthouse on a cliff", "an ordinary caption number 3", "an ordinary caption number 5", ""]
    return table.filter(pa.compute.is_in(table["caption"], pa.array(wanted)))
