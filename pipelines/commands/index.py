"""This module has the commands `memscan index`, which build, change and examine reference indexes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pipelines.commands.shared import AsJson, Overrides, World, configuration, guarded, say, show, tell

if TYPE_CHECKING:
    from memscan.index.manifest import Manifest

app = typer.Typer(help="Build, change and search indexes of reference images.", no_args_is_help=True)

Folder = Annotated[str, typer.Argument(metavar="INDEX", help="This is the folder of the index, local or s3://.")]
Source = Annotated[
    str,
    typer.Argument(
        metavar="SOURCE",
        help="This is a folder of images, Parquet with encoded images, WebDataset tars, or .npy with Parquet, "
        "local or s3://.",
    ),
]
ConfigFile = Annotated[
    str | None,
    typer.Option("--config", metavar="CONFIG.yaml", help="Take segmenter and embedder from this census configuration."),
]
Version = Annotated[
    int | None,
    typer.Option("--index-version", help="Use this version of the index. Without it, the current version is used."),
]


class Way(str, Enum):
    RESIDENT = "resident"
    SHARD_MAJOR = "shard-major"


@app.command("build")
def index_build(
    source: Source,
    out: Annotated[str, typer.Argument(metavar="OUT", help="Write the index into this folder, local or s3://.")],
    config_path: ConfigFile = None,
    overrides: Overrides = None,
    world: World = None,
    memory: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="A node has this amount of memory for the index, for example 8GB. It decides the type of the index.",
        ),
    ] = None,
    factory: Annotated[
        str | None, typer.Option(help="Use this FAISS factory string. Without it, the size decides the type.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Build a reference index that many runs can use (index.path); the same command continues a stopped build."""
    with guarded(out):
        from pipelines.index.job import build

        given = {"index.source": source, "index.path": out, "index.memory": memory, "index.factory": factory}
        places = [f"{key}={json.dumps(value)}" for key, value in given.items() if value is not None]
        manifest = build(configuration(config_path, [*(overrides or []), *places], world))
        lines = [f"index         {out} ({manifest.count:,} references)"]
        lines.append(f"type          {manifest.factory}: {manifest.why}")
        lines += _source_lines(manifest.sources[-1:], "rejects.parquet")
        tell(as_json, _facts(out, manifest), lines)


@app.command("append")
def index_append(
    index: Folder,
    source: Source,
    config_path: ConfigFile = None,
    overrides: Overrides = None,
    world: World = None,
    as_json: AsJson = False,
) -> None:
    """Add references as further shards, as a new version; the same command continues a stopped addition."""
    with guarded():
        from pipelines.index.job import extend

        places = [f"index.source={json.dumps(source)}", f"index.path={json.dumps(index)}"]
        manifest = extend(configuration(config_path, [*(overrides or []), *places], world))
        lines = [_version_line(manifest)]
        lines += _source_lines(manifest.sources[-1:], f"rejects-{manifest.version:06d}.parquet")
        tell(as_json, _facts(index, manifest), lines)


def _facts(index: str, manifest: Manifest) -> dict[str, Any]:
    """Return what a changed index is, as `info --json` names it."""
    return {
        "index": index,
        "version": manifest.version,
        "hash": manifest.hash,
        "references": manifest.count,
        "removed": manifest.removed_count,
        "shards": len(manifest.shards),
        "factory": manifest.factory,
        "why": manifest.why,
        "sources": [dict(one) for one in manifest.sources],
    }


def _version_line(manifest: Manifest) -> str:
    return f"version       {manifest.version}: {manifest.count:,} references in {len(manifest.shards):,} shards"


def _source_lines(sources: Sequence[Mapping[str, Any]], rejects: str) -> list[str]:
    """Return how a source was read; the last line counts everything that the source holds."""
    from memscan.inspection import lines

    found: list[str] = []
    for facts in sources:
        found += lines({**facts, "examples": []})
        rejected = sum(facts["rejected"].values())
        why = f" ({rejects} says why)" if rejected else ""
        left = facts["not_taken_count"]
        found.append(f"counted       {facts['images']:,} indexed, {rejected:,} rejected{why}, {left:,} not taken")
    return found


@app.command("remove")
def index_remove(
    index: Folder,
    ids: Annotated[
        list[str] | None, typer.Argument(metavar="ID...", help="Remove the references with these ids.")
    ] = None,
    file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Read further ids from this file, one per line.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Remove references from every answer, as a new version; their bytes stay until `compact` and `prune`."""
    with guarded():
        from memscan.errors import ConfigError, InputError
        from memscan.index.change import remove

        names = list(ids or [])
        if file is not None:
            try:
                names += [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
            except (OSError, UnicodeDecodeError) as error:
                raise InputError(f"cannot read it ({error})", where=str(file)) from error
        if not names:
            raise ConfigError("no ids", hint="give them as arguments or with --file")
        manifest = remove(index, names)
        line = f"version       {manifest.version}: {manifest.count:,} references, {manifest.removed_count:,} removed"
        tell(as_json, _facts(index, manifest), [line])


@app.command("compact")
def index_compact(index: Folder, as_json: AsJson = False) -> None:
    """Rewrite the shards that contain removed references, without these references, as a new version."""
    with guarded():
        from memscan.index.change import compact

        manifest = compact(index)
        tell(as_json, _facts(index, manifest), [_version_line(manifest)])
        say("earlier versions still hold what was removed; `memscan index prune` deletes them")


@app.command("prune")
def index_prune(
    index: Folder,
    keep: Annotated[int, typer.Option(min=1, help="Keep this number of versions, the current one included.")] = 1,
    as_json: AsJson = False,
) -> None:
    """Delete earlier versions and the files that only they use; no running census may use one of them."""
    with guarded():
        from memscan.index.change import prune

        deleted = prune(index, keep)
        answer = {"index": index, "deleted": sorted(map(str, deleted))}
        tell(as_json, answer, [f"deleted       {len(deleted):,} files"])


@app.command("info")
def index_info(index: Folder, version: Version = None, as_json: AsJson = False) -> None:
    """Show what an index holds, its type and the reason for it, and its recall."""
    with guarded():
        from pipelines.index.view import facts

        found = facts(index, version)
        if as_json:
            show(json.dumps(found, indent=2))
            return
        counts = f"{found['references']:,} ({found['removed']:,} removed, {found['rejected']:,} rejected at build time)"
        rows = {
            "version": f"{found['version']} ({found['hash']})",
            "references": counts,
            "type": f"{found['factory']}, nprobe {found['nprobe']}: {found['why']}",
            "vectors": f"{found['dimension']} of {', '.join(found['regions'])}",
            "embedder": found["embedder"],
            "segmenter": found["segmenter"],
            "size": f"{found['bytes'] / 1e6:,.1f} MB in {len(found['shards']):,} shards",
            "recall": ", ".join(f"{name} {value:.4f}" for name, value in found["recall"].items()) or "not measured",
        }
        for name, value in rows.items():
            show(f"{name:<13} {value}")
        for line in _source_lines(found["sources"], "rejects.parquet"):
            show(line)


@app.command("verify")
def index_verify(
    index: Folder,
    version: Version = None,
    repair: Annotated[
        bool, typer.Option("--repair", help="Go back to the last version whose files are all intact, as a new version.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Read every file, compare it with the manifest, and name the first that is missing, truncated or altered."""
    with guarded():
        from memscan.errors import ConfigError
        from memscan.index.repair import repair as run_repair
        from pipelines.index.view import verify

        if repair and version is not None:
            raise ConfigError("--repair looks for the version itself", hint="leave --index-version out")
        lines, answer = [], {"index": index, "given_up": {}, "removed_again": 0}
        if repair:
            done = run_repair(index)
            answer |= {"given_up": {str(at): what for at, what in done.dropped.items()}, "removed_again": done.removed}
            lines += [f"given up      version {number}: {what}" for number, what in done.dropped.items()]
            if done.dropped:
                lines.append(f"version       {done.manifest.version}: the content of version {done.good}")
            if done.removed:
                lines.append(
                    f"removed       {done.removed:,} references again, whose takedown was in a version given up"
                )
        files, size = verify(index, version)
        lines.append(f"sound         {files:,} files, {size:,} bytes")
        tell(as_json, {**answer, "files": files, "bytes": size}, lines)


@app.command("recall")
def index_recall(
    index: Folder,
    nprobe: Annotated[
        int | None,
        typer.Option(
            min=1, help="Search this number of lists. Without it, the number that the index was built with is used."
        ),
    ] = None,
    probes: Annotated[int, typer.Option(min=1, help="Search for this number of near copies of references.")] = 256,
    as_json: AsJson = False,
) -> None:
    """Measure recall: the share of the results of exact search that the index finds, for near copies of references."""
    with guarded():
        from pipelines.index.view import measure_recall

        recall = measure_recall(index, nprobe, probes)
        if as_json:
            show(json.dumps(recall))
            return
        for name, value in recall.items():
            show(f"{name:<13} {value:.4f}")


@app.command("search")
def index_search(
    index: Folder,
    images: Annotated[
        list[str], typer.Argument(metavar="IMAGE...", help="These are image files, or folders of images.")
    ],
    config_path: ConfigFile = None,
    overrides: Overrides = None,
    world: World = None,
    top_k: Annotated[
        int,
        typer.Option(min=1, help="Find this number of references by each of whole image, foreground and background."),
    ] = 5,
    plan: Annotated[
        Way,
        typer.Option(
            help="Open all shards at once (resident), or one by one (shard-major), which suits many images and little "
            "memory."
        ),
    ] = Way.RESIDENT,
    as_json: AsJson = False,
) -> None:
    """Find the references that are nearest to images (with --json, one JSON object per image)."""
    with guarded():
        from pipelines.index.view import search_images

        config = configuration(config_path, [*(overrides or []), f"index.path={json.dumps(index)}"], world)
        for found in search_images(index, images, config, top_k, plan.value):
            if as_json:
                show(json.dumps(found, ensure_ascii=False))
            elif found["status"] == "rejected":
                show(f"{found['image']}\n  rejected: {found['reason']}: {found['message']}")
            else:
                show(found["image"])
                for hit in found["hits"]:
                    show(f"  {hit['similarity']:7.4f}  {hit['reference']}  ({hit['found_by']})  {hit['caption'] or ''}")
