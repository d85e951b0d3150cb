"""This module builds the reference index on Ray Data.

Image rows become masks and vectors of three regions, then shards, then one manifest.

    chunks       of a source: N references                                                   (`sources/reading.py`)
    Describe     read, decode, segment, embed whole, foreground, background; one file per chunk  (`encode.py`)
    groups       chunks in order, each group the references of one shard
    IdsOf, Repeats   ids that occur twice: the first in the source's order stays
    Train        one template per region, on a sample
    MakeShard    copies of the template, filled; images and ids beside; rejects with their reasons
    MeasureRecall  recall, against exact search of the same shards
    manifest     last; indexed + rejected = N, checked

The driver holds names and counts, and never images or vectors. Every step leaves its result in `INDEX.build` and skips
what is there (`building.py`). So a build that was killed at any point continues and ends with the same bytes: shards
depend on the source and the configuration, and not on the machine, the workers or their order.
"""

from __future__ import annotations

import dataclasses
import json
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from memscan.config import CensusConfig
from memscan.errors import ConfigError, IndexLoadError, InputError, RunError
from memscan.index.change import append
from memscan.index.choice import parse_memory
from memscan.index.manifest import FORMAT, MANIFEST_FILE, REJECTS_FILE, Manifest, Shard
from memscan.index.recall import recall_of
from memscan.index.store import METRIC, check_embedder, settle
from memscan.index.vectors import check_factory
from memscan.inspection import source_facts
from memscan.io import storage
from memscan.io.listing import size_of
from memscan.models.specification import ModelSpec
from memscan.records import REGIONS
from memscan.sources.configured import configured_source
from memscan.sources.reading import Source, check_images, vector_width
from pipelines.index.building import BuildFolder, Group, group_chunks
from pipelines.index.encode import MODELS_FILE, Describe
from pipelines.index.steps import REJECTS, IdsOf, MakeShard, MeasureRecall, Repeats, Train
from pipelines.ray.layout import PoolLayout, actors
from pipelines.ray.mapping import spread
from pipelines.ray.progress import ProgressBar, ProgressDisplay, Reporter, progress_display
from pipelines.ray.session import ray_session
from pipelines.ray.stage import StageSetup
from pipelines.run_folder.inputs import embedder_id, files_id, pinned, segmenter_id
from pipelines.run_folder.tables import read_table

_COLUMNS = {"id_column", "image_column", "caption_column", "url_column", "id_prefix"}
HERE_UP_TO = 20_000  # references whose index is made in the driver: a worker takes longer to start
IDS_A_RANGE = 2**24


def build_index(
    source: Source, folder: str, setup: StageSetup, layout: PoolLayout, display: ProgressDisplay, report: Reporter
) -> Manifest:
    """Index all references of `source` into `folder`, or the rest of them; needs a running Ray.

    Raises:
        RunError: rows went missing on the way, or another build was begun here.
        InputError: not one reference could be indexed, or a factory string that FAISS cannot parse.
    """
    if setup.config.index.factory != "auto":
        check_factory(setup.config.index.factory)
    build = BuildFolder(folder)
    build.open(_identity(source, setup.config))
    groups, specs = _described(source, build, setup, layout, display, report, lambda at: f"{at:05d}")
    good = sum(group.good for group in groups)
    settings = setup.config.index
    regions = ("whole",) if source.layout.kind == "embeddings" else REGIONS
    dimension = vector_width(source) or _dimension(build, groups)
    memory = parse_memory(settings.memory) if settings.memory else None
    chosen = settle(settings.factory, settings.nprobe, good, dimension, len(regions), memory)
    here = good <= HERE_UP_TO
    train = Train(build, folder, chosen.factory, good)
    train.queries(regions)
    spread(_OfRegion(train, regions), len(regions), here=here)
    draft = Manifest(
        format=FORMAT,
        version=1,
        dimension=dimension,
        regions=tuple(regions),
        factory=chosen.factory,
        why=chosen.why,
        nprobe=chosen.nprobe,
        metric=METRIC,
        embedder=specs[0].id,
        segmenter=specs[1].id,
        template=train.entries(regions),
        shards=(),
    )
    shards, reasons = _make_shards(build, folder, draft, groups, here, existing=None)
    manifest = replace(
        draft,
        shards=shards,
        source_rows=_rows(groups),
        rejected=reasons.total(),
        sources=(source_facts(source, _rows(groups), reasons, build.notes()),),
    )
    measure = MeasureRecall(build, folder, manifest)
    spread(measure, len(shards), here=here)
    recall = recall_of(manifest, [measure.answer(at) for at in range(len(shards))])
    manifest = replace(manifest, recall=recall)
    manifest.save(folder)
    build.remove()
    return manifest


def append_index(
    source: Source, folder: str, setup: StageSetup, layout: PoolLayout, display: ProgressDisplay, report: Reporter
) -> Manifest:
    """Add the references of `source` as further shards: a new version, by the template that the index has.

    Raises:
        IndexLoadError: no index here, or one of another embedder.
        RunError, InputError: as `build_index`.
    """
    manifest = Manifest.load(folder)
    width = vector_width(source) or manifest.dimension
    regions = {"whole"} if source.layout.kind == "embeddings" else set(REGIONS)
    if width != manifest.dimension or not set(manifest.regions) <= regions:
        raise InputError(
            f"gives vectors of length {width} for {', '.join(sorted(regions))}; the index has {manifest.dimension} for "
            f"{', '.join(manifest.regions)}",
            where=source.layout.root,
        )
    build, identity = BuildFolder(folder), _identity(source, setup.config)
    begun = build.appended_to(identity)
    if begun is not None and _holds(manifest, build.groups()):
        build.remove()  # all that was left to do when it was stopped
        return manifest
    # Takedowns since it was begun change nothing of what was described.
    start = begun if begun is not None and _same_shards(folder, begun, manifest) else manifest.version
    build.open({**identity, "appended to": start})
    number = start + 1
    groups, specs = _described(source, build, setup, layout, display, report, lambda at: f"{number:06d}.{at:05d}")
    check_embedder(folder, manifest, specs[0])
    if "foreground" in manifest.regions and specs[1].id != manifest.segmenter:
        raise IndexLoadError(
            f"the index was built with segmenter {manifest.segmenter}, the configuration has {specs[1].id}",
            where=folder,
            hint="configure that segmenter, or build the index again",
        )
    here = sum(group.good for group in groups) <= HERE_UP_TO
    draft = replace(manifest, version=number)
    shards, reasons = _make_shards(build, folder, draft, groups, here, existing=manifest)
    facts = source_facts(source, _rows(groups), reasons, build.notes())
    successor = append(folder, shards, source_rows=_rows(groups), rejected=reasons.total(), base=manifest, source=facts)
    build.remove()
    return successor


def build(config: CensusConfig) -> Manifest:
    """Build `config.index.source` into `config.index.path`, or go on with it, with a Ray of its own.

    Raises:
        RunError: another file or folder exists at the path already.
        MemscanError: see `open_source` and `build_index`.
    """
    folder = _places(config)
    build, complete = BuildFolder(folder), storage.exists(storage.join(folder, MANIFEST_FILE))
    begun = storage.exists(build.path("plan.json"))
    if complete and begun and build.is_of(_identity(source_of(config), config)):
        build.remove()  # all that was left to do when it was stopped
        return Manifest.load(folder)
    if complete or (storage.exists(folder) and not begun):
        raise RunError("is there already", where=folder, hint="remove it, or choose another folder")
    return _with_ray(config, folder, source_of(config, checked=True), build_index)


def extend(config: CensusConfig) -> Manifest:
    """Add `config.index.source` to the index at `config.index.path`; raises as `append_index`."""
    folder = _places(config)
    if not storage.exists(storage.join(folder, MANIFEST_FILE)):
        raise IndexLoadError("no index here (manifest.json is missing)", where=folder, hint="memscan index build")
    return _with_ray(config, folder, _checked(configured_source(config.index, appended=True), config), append_index)


def _places(config: CensusConfig) -> str:
    if config.index.path is None or config.index.source is None:
        raise ConfigError("give index.source and index.path")
    segmenter_id(config.segmenter)
    embedder_id(config.embedder)
    return config.index.path


def source_of(config: CensusConfig, *, checked: bool = False) -> Source:
    """Return the configured references.

    Raises InputError as `configured_source` does and, if checked, when none could be used.
    """
    source = configured_source(config.index)
    return _checked(source, config) if checked else source


def _checked(source: Source, config: CensusConfig) -> Source:
    """The source, whose vectors are as long as the embedder's and whose images are there; the settings are good too.

    Raises:
        InputError: they are not.
        ConfigError: `index.memory` is not a size.
    """
    if config.index.memory is not None:
        parse_memory(config.index.memory)  # now, and not when all images have been described
    if config.index.factory != "auto":
        check_factory(config.index.factory)
    given = vector_width(source)
    if given is not None:
        from memscan.models.embedder import load_embedder  # comes with torch; vectors need no worker to look at one

        embedder = load_embedder(config.embedder, "cpu")
        made = len(embedder.embed([np.full((64, 64, 3), 128, np.uint8)])[0])
        if made != given:
            raise InputError(
                f"vectors of {given} numbers; the embedder {embedder.spec.id} makes {made}",
                where=source.layout.files[0],
                hint="configure the embedder that made them, or give the images as source",
            )
    check_images(source)
    return source


def _holds(manifest: Manifest, groups: Sequence[Group] | None) -> bool:
    """Return whether shards of a version, or those that a compaction made of them, were made of these groups."""
    return not {shard.name.partition("-")[0] for shard in manifest.shards}.isdisjoint(g.name for g in groups or ())


def _same_shards(folder: str, version: int, manifest: Manifest) -> bool:
    try:
        return [one.name for one in Manifest.load(folder, version).shards] == [one.name for one in manifest.shards]
    except IndexLoadError:
        return False


def _with_ray(config: CensusConfig, folder: str, source: Source, job: Any) -> Manifest:
    storage.check_exclusive(folder)
    with (
        ray_session(Path(tempfile.mkdtemp(prefix="memscan-index-"))) as machine,
        progress_display() as (display, report),
    ):
        layout = PoolLayout.of(config, machine, source.rows or len(source.layout.files))
        models = {"segmenter": segmenter_id(config.segmenter), "embedder": embedder_id(config.embedder)}
        setup = StageSetup(pinned(config, models), layout.device, layout.threads, models=models)
        manifest: Manifest = job(source, folder, setup, layout, display, report)
        return manifest


def _identity(source: Source, config: CensusConfig) -> dict[str, Any]:
    """Return what decides the bytes of an index."""
    settings = config.index.model_dump(mode="json", include={"factory", "nprobe", "memory", "shard_rows", "images"})
    return {
        "references": files_id(source.layout.root, ((f, size_of(f)) for f in source.layout.all_files)),
        "ids": f"by path{source.prefix and f', after {source.prefix}'}",
        "embedder": json.loads(config.embedder.model_dump_json(exclude={"batch_size", "path"})),
        "models": [embedder_id(config.embedder), segmenter_id(config.segmenter)],
        **settings,
        **config.index.model_dump(mode="json", include=_COLUMNS, exclude_none=True),
    }


def _described(
    source: Source,
    build: BuildFolder,
    setup: StageSetup,
    layout: PoolLayout,
    display: ProgressDisplay,
    report: Reporter,
    name: Any,
) -> tuple[list[Group], tuple[ModelSpec, ModelSpec]]:
    """Describe the chunks that are left, then fix which of them make which shard."""
    groups = build.groups()
    if groups is None:
        chunks = source.chunks()
        _describe(source, build, setup, layout, display, report, chunks)
        done = build.described()
        missing = set(chunks["number"].to_pylist()) ^ done.keys()
        rows = sum(count for _, count, _ in done.values())
        if missing or (source.rows is not None and rows != source.rows):
            raise RunError(
                f"{source.rows or 'all'} references went in, {rows} came out, of {len(done)} chunks", where=build.folder
            )
        if not any(good for _, _, good in done.values()):
            raise InputError(_nothing(build, done), where=source.layout.root or source.layout.files[0])
        groups = group_chunks(list(done.values()), setup.config.index.shard_rows, name)
        build.write_groups(groups)
    embedder, segmenter = build.read_json("described", MODELS_FILE)
    return groups, (ModelSpec(**embedder), ModelSpec(**segmenter))


def _describe(
    source: Source,
    build: BuildFolder,
    setup: StageSetup,
    layout: PoolLayout,
    display: ProgressDisplay,
    report: Reporter,
    chunks: pa.Table,
) -> None:
    import ray.data

    done = build.described()
    left = chunks.filter(pa.array([number not in done for number in chunks["number"].to_pylist()]))
    before = sum(rows for _, rows, _ in done.values()) if source.rows is not None else len(done)
    bar = ProgressBar("index", "images" if source.rows is not None else "tars", source.rows or chunks.num_rows, before)
    with display.show(bar):
        if left.num_rows:
            setup = replace(setup, journal=build.path("journal"))
            setup.open_journal().clear()
            described = ray.data.from_arrow([left.slice(at, 1) for at in range(left.num_rows)]).map_batches(
                Describe,
                fn_constructor_args=(setup, source.for_workers(), build.path("described"), report),
                batch_size=1,
                batch_format="pyarrow",
                **actors(min(layout.samplers, left.num_rows), layout.gpus),
            )
            for _ in described.iter_batches(batch_size=None, batch_format="pyarrow"):
                pass  # the files are the outcome


def _nothing(build: BuildFolder, done: dict[int, tuple[int, int, int]]) -> str:
    first = next((chunk for _, chunk in sorted(done.items()) if chunk[1]), None)
    if first is None:
        return "the source has no reference"
    row = build.chunk(first, ["reason", "message"]).slice(0, 1).to_pylist()[0]
    rows = sum(count for _, count, _ in done.values())
    return f"none of {rows} references could be indexed; the first: {row['reason']}: {row['message']}"


def _dimension(build: BuildFolder, groups: Sequence[Group]) -> int:
    chunk = next(chunk for group in groups for chunk in group.chunks if chunk[2])
    vectors = build.chunk(chunk, ["whole"])["whole"].to_pylist()
    return len(next(vector for vector in vectors if vector is not None))


def _make_shards(
    build: BuildFolder, folder: str, draft: Manifest, groups: Sequence[Group], here: bool, existing: Manifest | None
) -> tuple[tuple[Shard, ...], Counter[str]]:
    """Make all shards and the file of rejects; return the shards, and how many rows were rejected by reason."""
    ids = IdsOf(build)
    spread(ids, len(groups), here=here)
    numbers = list(range(len(groups)))
    held = len(existing.shards) if existing else 0
    for at in range(held):
        ids.existing(folder, draft, at)
    numbers += [-1 - at for at in range(held)]
    total = sum(group.good for group in groups) + (existing.rows if existing else 0)
    ranges = max(1, -(-total // IDS_A_RANGE))
    spread(Repeats(build, tuple(numbers), ranges), ranges, here=here)
    spread(MakeShard(build, folder, draft), len(groups), here=here)
    _sweep(folder)
    made = [build.read_json("shards", f"{group.name}.json") for group in groups]
    rejected = sum(record["rejected"] for record in made)
    shards = tuple(
        found[0]
        for group, record in zip(groups, made, strict=True)
        if record["shard"] and (found := build.shard(group.name))
    )
    indexed = sum(shard.count for shard in shards)
    if indexed + rejected != _rows(groups):
        raise RunError(f"{_rows(groups)} references went in, {indexed} + {rejected} came out", where=folder)
    # Before it may end here: what was rejected is to be seen in any case.
    table = storage.join(folder, _rejects_file(draft, existing))
    reasons = _join_rejects(build, groups, table)
    if not shards:
        build.remove()  # there is nothing to go on with, and it would stand in the way of the next addition
        first = reasons.most_common(1)[0][0]
        raise InputError(f"all {rejected} references were rejected, most as {first}", where=folder, hint=f"see {table}")
    return shards, reasons


def _rejects_file(draft: Manifest, existing: Manifest | None) -> str:
    return REJECTS_FILE if existing is None else REJECTS_FILE.replace(".", f"-{draft.version:06d}.")


def _join_rejects(build: BuildFolder, groups: Sequence[Group], path: str) -> Counter[str]:
    """Write the rejects of all groups into one file; gives how many there are by reason."""
    reasons: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "rejects.parquet"
        with pq.ParquetWriter(file, REJECTS, compression="zstd") as writer:
            for group in groups:
                table = read_table(build.path("rejects", f"{group.name}.parquet"))
                reasons.update(table["reason"].to_pylist())
                writer.write_table(table)
        storage.move_in(file, path)
    return reasons


def _sweep(folder: str) -> None:
    """Remove what a worker that was killed left half made; on s3:// nothing is ever half there."""
    if not storage.is_remote(folder):
        for left in Path(folder, "shards").glob(".making-*"):
            storage.remove_tree(str(left))


def _rows(groups: Sequence[Group]) -> int:
    return sum(group.rows for group in groups)


@dataclasses.dataclass(frozen=True)
class _OfRegion:
    """`Train` by the number of its region."""

    train: Train
    regions: Sequence[str]

    def __call__(self, at: int) -> int:
        self.train(self.regions[at])
        return at
