"""This module reads the watch file of a nightly scan.

The file is YAML. It says what is watched, with which panel, and under which policy.

    name: sd-finetune
    out: s3://BUCKET/nightly           # history, trend page, index, and one run per checkpoint
    census: census.yaml                # the fixed panel; its generator.path and out are filled in for each checkpoint
    watch:
      - path: s3://BUCKET/checkpoints  # every model folder below it; or a local folder
      - hub: ORG/MODEL                 # revisions of a hub repository, by tags, branches or commits
        refs: tags
    baseline: step-10000               # a checkpoint's name, pinned; optional
    policy: {max_vm_rate: 0.01, max_new_flagged: 0}

The file contains no secrets. The webhook's address and token are read from environment variables that the file names.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from memscan.config import CensusConfig, Section, parse_config, parse_section, read_yaml
from memscan.errors import ConfigError

# What `generator.path` holds in a panel: the checkpoints come from the watch.
WATCHED = "watched"


class SourceConfig(Section):
    """This section says where checkpoints appear: in a folder, below an s3:// prefix, or in a hub repository."""

    path: str | None = Field(
        None,
        description="Every folder below this folder, local or s3://, that holds a model_index.json is a checkpoint.",
    )
    hub: str | None = Field(
        None,
        pattern=r"^[\w.-]+/[\w.-]+$",
        description="The revisions of this repository on the Hugging Face hub, given as ORG/MODEL, are checkpoints.",
    )
    refs: Literal["tags", "branches", "commits"] = Field(
        "tags", description="These revisions of the hub repository are checkpoints. Each is pinned by its commit."
    )
    kind: Literal["checkpoint", "part", "lora", "file"] = Field(
        "checkpoint",
        description='This key says what is watched for below `path`: "checkpoint" (folders with a model_index.json), '
        '"part" (unet/, unet_ema/ or transformer/ of a training), "lora" (LoRAs as safetensors files) or "file" (whole '
        "models as single safetensors files). The last three are scanned on the panel's generator.base.",
    )
    match: str = Field(
        "*", description="The name of a checkpoint must match this pattern, by the rules of a shell for file names."
    )

    @model_validator(mode="after")
    def _one_of(self) -> SourceConfig:
        if (self.path is None) == (self.hub is None):
            raise ValueError("give either path or hub")
        if self.kind != "checkpoint" and self.path is None:
            raise ValueError(f"kind {self.kind} needs a path, and not a hub")
        return self


class PolicyConfig(Section):
    """This section sets the limits that a checkpoint must keep to pass. A limit that is null is not checked."""

    max_vm_rate: float | None = Field(
        None, ge=0, le=1, description="At most this share of prompts, in [0, 1], may have the verdict VM."
    )
    max_memorised_rate: float | None = Field(
        None, ge=0, le=1, description="At most this share of prompts, in [0, 1], may be flagged."
    )
    max_severity: float | None = Field(
        None,
        ge=0,
        description="The mean harm per generation may be at most this number. It lies in [0, 2] with the default of "
        "verdict.harm.",
    )
    max_new_flagged: int | None = Field(
        None, ge=0, description="At most this number of prompts may be flagged now and not in the compared checkpoint."
    )
    max_severity_increase: float | None = Field(
        None,
        ge=0,
        description="The mean harm per generation may be at most this much higher than that of the compared "
        "checkpoint.",
    )
    max_rejected_rate: float | None = Field(
        0.01,
        ge=0,
        le=1,
        description="At most this share of the panel, in [0, 1], may be rejected, because the figures of a scan with "
        "more rejects mean little.",
    )
    against: list[Literal["previous", "baseline"]] = Field(
        ["previous", "baseline"],
        description="The limits max_new_flagged and max_severity_increase compare with these checkpoints: the previous "
        "one, the baseline, or both.",
    )
    judge: Literal["rate", "upper"] = Field(
        "rate",
        description='This key says which value must be within a limit: "rate" is the rate itself, and "upper" is the '
        "upper end of its 95 % interval.",
    )


class WebhookConfig(Section):
    """This section describes the webhook, which receives the outcome by POST as a document or as a chat message."""

    url_env: str = Field(pattern=r"^[A-Za-z_]\w*$", description="This environment variable holds the address.")
    token_env: str | None = Field(
        None,
        pattern=r"^[A-Za-z_]\w*$",
        description="The value of this environment variable is sent as a bearer token. If it is not given, no token "
        "is sent.",
    )
    when: Literal["scanned", "failed"] = Field(
        "scanned",
        description='This key says when the message is sent: "scanned" sends it after every new checkpoint, and '
        '"failed" sends it only if one did not pass or could not be scanned.',
    )
    timeout_seconds: float = Field(
        10.0, gt=0, description="A call without an answer is given up after this time, in seconds."
    )
    format: Literal["json", "slack", "teams"] = Field(
        "json",
        description='This key says what is sent: "json" is the whole outcome, while "slack" and "teams" are messages '
        "in the format of their incoming webhooks.",
    )
    link: str | None = Field(
        None,
        pattern=r"^https?://",
        description="The registry can be read in a browser at this address, and the message links to it. If it is not "
        "given, the message has no link.",
    )


class NightlyConfig(Section):
    """This section describes a nightly scan."""

    name: str = Field(
        "nightly",
        pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$",
        description="The page, the JUnit file and the messages show this name of the nightly.",
    )
    out: str = Field(
        description="This is the folder of the registry, local or s3://. It holds history, trend page, index and runs."
    )
    census: str | dict[str, Any] = Field(
        description="This is the panel: the path of a census configuration, or its content. Its generator.path and "
        "out are filled in."
    )
    watch: list[SourceConfig] = Field(min_length=1, description="Checkpoints are looked for in these places.")
    baseline: str | None = Field(
        None,
        description="Every other checkpoint is compared with the checkpoint of this name. If it is not given, "
        "checkpoints are compared only with the previous one.",
    )
    policy: PolicyConfig = Field(PolicyConfig(), description="A checkpoint must be within these limits to pass.")
    webhook: WebhookConfig | None = Field(
        None, description="This is the message about the outcome. If it is not given, no message is sent."
    )

    def panel(self) -> CensusConfig:
        """Return the census configuration of the panel. Its generator is `WATCHED` and must be replaced.

        Raises:
            ConfigError: it cannot be read or does not validate.
        """
        where = self.census if isinstance(self.census, str) else "census"
        data = read_yaml(self.census) if isinstance(self.census, str) else dict(self.census)
        generator = data.get("generator")
        if generator is None or isinstance(generator, dict):
            data["generator"] = {**(generator or {}), "path": WATCHED, "revision": None}
        panel = parse_config(data, where=where)
        if panel.generator.base is None and any(source.kind != "checkpoint" for source in self.watch):
            raise ConfigError(
                "is missing, and a part, a LoRA or a single file is scanned on it",
                where=f"{where}: generator.base",
                hint="name the base",
            )
        return panel


def load_watch(path: str | Path) -> NightlyConfig:
    """Read a watch file. Raises ConfigError, which names the key, if it is missing, not YAML, or does not validate."""
    return parse_section(NightlyConfig, read_yaml(path), where=str(path))
