"""This module has the commands `memscan config`, which describe the configuration and write a first one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from pipelines.commands.shared import AsJson, guarded, say, show, tell

app = typer.Typer(help="Describe the configuration, and write a first one.", no_args_is_help=True)

Nightly = Annotated[
    bool, typer.Option("--nightly", help="Describe the watch file of a nightly, and not the configuration of a census.")
]


@app.command("init")
def config_init(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="This is the folder of a checkpoint in diffusers' format.")
    ],
    prompts: Annotated[
        str, typer.Argument(metavar="PROMPTS", help="This is a prompt file, or a folder of prompt files.")
    ],
    images: Annotated[
        str,
        typer.Argument(
            metavar="IMAGES",
            help="These are the reference images: a folder of images, Parquet, WebDataset tars or embeddings.",
        ),
    ],
    out: Annotated[Path, typer.Option(metavar="FILE", help="Write the configuration to this file.")] = Path(
        "census.yaml"
    ),
    segmenter: Annotated[
        str | None,
        typer.Option(
            metavar="FILE", help="This is the ONNX file of the segmenter. Without it, you have to fill it in."
        ),
    ] = None,
    embedder: Annotated[
        str | None,
        typer.Option(
            metavar="FILE", help="This is the TorchScript file of the embedder. Without it, you have to fill it in."
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a file that exists already.")] = False,
    as_json: AsJson = False,
) -> None:
    """Write a commented configuration for an existing model, prompts and reference images."""
    with guarded():
        from memscan.errors import ConfigError
        from pipelines.starting import starting_file

        if out.exists() and not force:
            raise ConfigError("is there already", where=str(out), hint="give another --out, or --force")
        text = starting_file(model, prompts, images, segmenter=segmenter, embedder=embedder)
        try:
            out.write_text(text, encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"cannot be written ({error.strerror})", where=str(out)) from error
        missing = [name for name, given in (("segmenter", segmenter), ("embedder", embedder)) if given is None]
        if missing:
            say(f"memscan: fill in {' and '.join(missing)}: path and sha256")
        lines = [f"configuration {out}", f"next          memscan doctor {out}"]
        tell(as_json, {"configuration": str(out), "to_fill_in": missing}, lines)


@app.command("schema")
def config_schema(nightly: Nightly = False) -> None:
    """Print the JSON Schema of a configuration file; editors use it to complete and check keys."""
    with guarded():
        from memscan.census.policy import NightlyConfig
        from memscan.config import CensusConfig
        from memscan.config.reference import schema

        show(json.dumps(schema(NightlyConfig if nightly else CensusConfig), indent=2, ensure_ascii=False))


@app.command("reference")
def config_reference() -> None:
    """Print the page that describes every key, which is docs/configuration.md."""
    with guarded():
        typer.echo(reference_page(), nl=False)


def reference_page() -> str:
    """Return the text of docs/configuration.md, which describes every key that a person can set."""
    from memscan.census.policy import NightlyConfig
    from memscan.config.reference import Part, page
    from memscan.mitigation.policy import RepairPolicy
    from memscan.mitigation.settings import LocalitySettings, MitigationSettings, VerifySettings

    return page(
        [
            Part(
                "The watch file of a nightly",
                "`memscan nightly` reads a file of another kind ([nightly.md](nightly.md)). The panel in it has the "
                "keys above.",
                NightlyConfig,
                "At the top of the watch file",
            ),
            Part(
                "Settings of a mitigation",
                "`memscan mitigate` takes these keys as `--set KEY=VALUE` ([mitigation.md](mitigation.md)). They name "
                "the repair: a folder that was made with other settings is refused.",
                MitigationSettings,
            ),
            Part(
                "Settings of a verification",
                "`memscan verify` takes these keys as `--set KEY=VALUE` ([mitigation.md](mitigation.md)).",
                VerifySettings,
            ),
            Part(
                "The policy of a repair",
                "`memscan verify --policy FILE` reads these keys from a YAML file. They decide whether a repair "
                "passes, and change no measurement.",
                RepairPolicy,
            ),
            Part(
                "Settings of the locality analysis",
                "`memscan evaluate locality` takes these keys as `--set KEY=VALUE` ([mitigation.md](mitigation.md)). "
                "Those of the search are the same as for a mitigation.",
                LocalitySettings,
            ),
        ]
    )
