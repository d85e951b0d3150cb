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

from memscan.config import CensusConfig, _Section, parse_config, parse_section, read_yaml

# What `generator.path` holds in a panel: the checkpoints come from the watch.
WATCHED = "watched"


class SourceConfig(_Section):
    """Where checkpoints appear: a folder or s3:// prefix, or a hub repository."""

    path: str | None = Field(None, description="every folder below it that holds a model_index.json")
    hub: str | None = Field(None, pattern=r"^[\w.-]+/[\w.-]+$", description="repository on the Hugging Face hub")
    refs: Literal["tags", "branches", "commits"] = "tags"
    match: str = Field("*", description="only checkpoints whose name matches, as a shell matches file names")

    @model_validator(mode="after")
    def _one_of(self) -> SourceConfig:
        if (self.path is None) == (self.hub is None):
            raise ValueError("give either path or hub")
        return self


class PolicyConfig(_Section):
    """What a checkpoint must hold to pass. A limit that is null is not looked at."""

    max_vm_rate: float | None = Field(None, ge=0, le=1, description="share of prompts whose verdict is VM")
    max_memorised_rate: float | None = Field(None, ge=0, le=1, description="share of prompts that are flagged")
    max_severity: float | None = Field(None, ge=0, description="mean harm of a generation, in [0, 2] by default")
    max_new_flagged: int | None = Field(None, ge=0, description="prompts flagged now and not in the comparison")
    max_severity_increase: float | None = Field(None, ge=0, description="of the mean harm over the comparison's")
    max_rejected_rate: float | None = Field(
        0.01, ge=0, le=1, description="share of the panel that could not be processed: such a scan proves little"
    )
    against: list[Literal["previous", "baseline"]] = Field(
        ["previous", "baseline"], description="which comparisons max_new_flagged and max_severity_increase hold for"
    )
    judge: Literal["rate", "upper"] = Field(
        "rate", description="hold rates themselves to their limits, or the upper ends of their 95 % intervals"
    )


class WebhookConfig(_Section):
    """POST of the outcome: the whole document, or a message for a chat."""

    url_env: str = Field(pattern=r"^[A-Za-z_]\w*$", description="variable that holds the address")
    token_env: str | None = Field(
        None, pattern=r"^[A-Za-z_]\w*$", description="variable whose value is sent as Authorization: Bearer"
    )
    when: Literal["scanned", "failed"] = Field("scanned", description="after every new checkpoint, or after a failure")
    format: Literal["json", "slack", "teams"] = Field(
        "json",
        description="json: the outcome, with a `text`; slack, teams: a message for their incoming webhooks",
    )
    link: str | None = Field(
        None, pattern=r"^https?://", description="where the registry can be read in a browser; the message links there"
    )
    timeout_seconds: float = Field(10.0, gt=0)


class NightlyConfig(_Section):
    """A nightly scan."""

    name: str = Field("nightly", pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
    out: str = Field(description="folder of the registry, local or s3://")
    census: str | dict[str, Any] = Field(description="the panel: a census configuration's path, or its content")
    watch: list[SourceConfig] = Field(min_length=1)
    baseline: str | None = Field(None, description="name of a checkpoint that every other is compared with")
    policy: PolicyConfig = PolicyConfig()
    webhook: WebhookConfig | None = None

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
        return parse_config(data, where=where)


def load_watch(path: str | Path) -> NightlyConfig:
    """Read a watch file. Raises ConfigError: missing, not YAML, or it does not validate; names the key."""
    return parse_section(NightlyConfig, read_yaml(path), where=str(path))
