"""What a nightly scan watches, with which panel, under which policy: one YAML file.

    name: sd-finetune
    out: s3://BUCKET/nightly           # history, trend page, index, one run a checkpoint
    census: census.yaml                # the fixed panel; its generator.path and out are filled in for each checkpoint
    watch:
      - path: s3://BUCKET/checkpoints  # every model folder below it; or a local folder
      - hub: ORG/MODEL                 # revisions of a hub repository, by tags, branches or commits
        refs: tags
    baseline: step-10000               # a checkpoint's name, pinned; optional
    policy: {max_vm_rate: 0.01, max_new_flagged: 0}

Secrets never stand in it: the webhook's address and token are read from variables that the file names.
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
    """Where checkpoints appear: a folder or s3:// prefix, or a hub repository."""

    path: str | None = Field(
        None,
        description="A folder, local or s3://; every folder below it that holds a model_index.json is a checkpoint.",
    )
    hub: str | None = Field(
        None,
        pattern=r"^[\w.-]+/[\w.-]+$",
        description="A repository on the Hugging Face hub, as ORG/MODEL, whose revisions are checkpoints.",
    )
    refs: Literal["tags", "branches", "commits"] = Field(
        "tags", description="Which revisions of the hub repository are checkpoints; each is pinned by its commit."
    )
    kind: Literal["checkpoint", "part", "lora", "file"] = Field(
        "checkpoint",
        description='What is watched for below `path`: "checkpoint" (folders with a model_index.json), "part" (unet/, '
        'unet_ema/ or transformer/ of a training), "lora" (LoRAs as safetensors files) or "file" (whole models as '
        "single safetensors files). The last three are scanned on the panel's generator.base.",
    )
    match: str = Field(
        "*", description="A pattern, as a shell matches file names, that the name of a checkpoint must match."
    )

    @model_validator(mode="after")
    def _one_of(self) -> SourceConfig:
        if (self.path is None) == (self.hub is None):
            raise ValueError("give either path or hub")
        if self.kind != "checkpoint" and self.path is None:
            raise ValueError(f"kind {self.kind} is watched for below a path")
        return self


class PolicyConfig(Section):
    """What a checkpoint must hold to pass. A limit that is null is not looked at."""

    max_vm_rate: float | None = Field(
        None, ge=0, le=1, description="The largest share of prompts, in [0, 1], whose verdict may be VM."
    )
    max_memorised_rate: float | None = Field(
        None, ge=0, le=1, description="The largest share of prompts, in [0, 1], that may be flagged."
    )
    max_severity: float | None = Field(
        None,
        ge=0,
        description="The largest mean harm of a generation; it lies in [0, 2] with the default of verdict.harm.",
    )
    max_new_flagged: int | None = Field(
        None, ge=0, description="The largest number of prompts that are flagged now and not in the comparison."
    )
    max_severity_increase: float | None = Field(
        None, ge=0, description="The largest increase of the mean harm of a generation over that of the comparison."
    )
    max_rejected_rate: float | None = Field(
        0.01,
        ge=0,
        le=1,
        description="The largest share of the panel, in [0, 1], that could not be processed; a scan that lost more "
        "proves little.",
    )
    against: list[Literal["previous", "baseline"]] = Field(
        ["previous", "baseline"],
        description="The checkpoints that max_new_flagged and max_severity_increase compare with: the one before, the "
        "baseline, or both.",
    )
    judge: Literal["rate", "upper"] = Field(
        "rate",
        description='What is held to a limit: "rate" is the rate itself, "upper" the upper end of its 95 % interval.',
    )


class WebhookConfig(Section):
    """POST of the outcome: the whole document, or a message for a chat."""

    url_env: str = Field(pattern=r"^[A-Za-z_]\w*$", description="The environment variable that holds the address.")
    token_env: str | None = Field(
        None,
        pattern=r"^[A-Za-z_]\w*$",
        description="The environment variable whose value is sent as a bearer token. When it is not given, none is "
        "sent.",
    )
    when: Literal["scanned", "failed"] = Field(
        "scanned",
        description='When the message is sent: "scanned" is after every new checkpoint, "failed" only where one did '
        "not pass or could not be scanned.",
    )
    timeout_seconds: float = Field(
        10.0, gt=0, description="The time in seconds after which a call that has no answer is given up."
    )
    format: Literal["json", "slack", "teams"] = Field(
        "json",
        description='What is sent: "json" is the whole outcome, "slack" and "teams" are messages as their incoming '
        "webhooks take them.",
    )
    link: str | None = Field(
        None,
        pattern=r"^https?://",
        description="The address at which the registry can be read in a browser. The message links to it; when it is "
        "not given, there is no link.",
    )


class NightlyConfig(Section):
    """A nightly scan."""

    name: str = Field(
        "nightly",
        pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$",
        description="The name of the nightly in its page, its JUnit file and its messages.",
    )
    out: str = Field(description="The folder of the registry, local or s3://: history, trend page, index and runs.")
    census: str | dict[str, Any] = Field(
        description="The panel: the path of a census configuration, or its content; generator.path and out are filled "
        "in."
    )
    watch: list[SourceConfig] = Field(min_length=1, description="The places where checkpoints appear.")
    baseline: str | None = Field(
        None,
        description="The name of a checkpoint that every other one is compared with. When it is not given, checkpoints "
        "are compared with the one before only.",
    )
    policy: PolicyConfig = Field(PolicyConfig(), description="The limits that a checkpoint must hold to pass.")
    webhook: WebhookConfig | None = Field(
        None, description="The message about the outcome. When it is not given, none is sent."
    )

    def panel(self) -> CensusConfig:
        """The census of the panel; its generator is `WATCHED`, to be replaced.

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
                "is missing: a part or a LoRA is scanned on it", where=f"{where}: generator.base", hint="name the base"
            )
        return panel


def load_watch(path: str | Path) -> NightlyConfig:
    """Read a watch file. Raises ConfigError: missing, not YAML, or it does not validate; names the key."""
    return parse_section(NightlyConfig, read_yaml(path), where=str(path))
