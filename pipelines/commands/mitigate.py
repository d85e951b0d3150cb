"""This module has the commands `memscan mitigate`, `verify` and `patch`.

They repair a model, test the repair and revert it.
"""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from pipelines.commands import track
from pipelines.commands.shared import AsJson, RunPath, Track, guarded, say, show, tell

POLICY_FAILED = 3

patch = typer.Typer(
    help="Apply the patch of a mitigation to its original checkpoint, or revert it.", no_args_is_help=True
)


class Method(str, Enum):
    NEMO = "nemo"
    NEMO_C = "nemo_c"
    WANDA = "wanda"
    FINETUNE = "finetune"
    DEDUP = "dedup"


class Scope(str, Enum):
    PROMPT = "prompt"
    CLUSTER = "cluster"
    ALL = "all"


def mitigate(
    run: RunPath,
    method: Annotated[
        Method,
        typer.Option(
            help="Repair with this method. nemo and nemo_c switch off units of cross-attention, by prompt or by "
            "cluster. wanda removes single weights. finetune trains against an attack. dedup is plain fine-tuning, as "
            "a control."
        ),
    ],
    out: Annotated[
        str | None,
        typer.Option(
            metavar="DIR",
            help="Write the repaired checkpoint into this folder. Without it, it is RUN/mitigated/METHOD.",
        ),
    ] = None,
    scope: Annotated[
        Scope | None,
        typer.Option(
            help="Switch off the units of one prompt, of a cluster, or of all prompts together. Without it, it is "
            "prompt for nemo, cluster for nemo_c, and all for the other methods."
        ),
    ] = None,
    pruned: Annotated[
        str | None,
        typer.Option(
            metavar="DIR", help="Generate the surrogate images of finetune with the mitigation in this folder."
        ),
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Use this number of workers. Without it, there is one worker per GPU, or one per CPU core if there "
            "is no GPU.",
        ),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="Change a setting, for example seeds=6; docs/configuration.md lists the settings.",
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Repair the model of a reduced run; the same command continues a repair that was stopped."""
    with guarded(run):
        from pipelines.mitigate.job import mitigate as run_mitigate

        chosen = mitigation_settings(method.value, scope.value if scope else None, pruned, settings or [])
        card = run_mitigate(run, chosen, out, workers, say)
        changed = card["changed"]
        lines = [f"changed       {changed['weights']:,} of {changed['of']:,} weights in {changed['tensors']} tensors"]
        if card.get("units"):
            lines.append(
                f"units off     {card['units']['off']} of {card['units']['of']} ({card['units']['share']:.1%})"
            )
        place = out or f"{run}/mitigated/{method.value}"
        lines += [f"checkpoint    {place}", f"next          memscan verify {run} {place}"]
        tell(as_json, {"checkpoint": place, "card": card}, lines)


def mitigation_settings(method: str, scope: str | None, pruned: str | None, overrides: list[str]) -> Any:
    """Return the settings of a mitigation. Raises ConfigError as `parse_settings` does."""
    from memscan.mitigation.settings import MitigationSettings

    values: dict[str, Any] = {"method": method, "pruned": pruned}
    values["scope"] = scope or {"nemo": "prompt", "nemo_c": "cluster"}.get(method, "all")
    if method == "nemo_c":
        values |= {"paraphrases": 1, "embeddings": 1}
    return parse_settings(MitigationSettings, values, overrides, fixed=("method",))


def parse_settings(model: Any, values: dict[str, Any], overrides: list[str], fixed: tuple[str, ...] = ()) -> Any:
    """Return the settings of a command line. Raises ConfigError for an unknown key or a value that is not valid."""
    import difflib

    import yaml
    from pydantic import ValidationError

    from memscan.errors import ConfigError
    from memscan.validation import explain, listed

    wrong = []
    for override in overrides:
        key, sign, text = override.partition("=")
        if not sign or key not in model.model_fields or key in fixed:
            known = [name for name in model.model_fields if name not in fixed]
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"one of {', '.join(known)}"
            if not sign and key in known:
                hint = f"write {key}=VALUE"
            wrong.append(f"{f'no setting {key!r}' if sign else f'{key!r} has no value'}; {hint}")
            continue
        try:
            values[key] = yaml.safe_load(text)
        except (yaml.YAMLError, ValueError, RecursionError):
            wrong.append(f"{key!r}: {text!r} is not a YAML value")
            continue
        if key == "rate":
            values[key] = text  # YAML reads 1e-5 as text already, pydantic as a number
    if wrong:
        raise ConfigError(listed(wrong), where="--set")
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise ConfigError(explain(error, model), where="--set") from error


def verify(
    run: RunPath,
    checkpoint: Annotated[
        str,
        typer.Argument(
            metavar="CHECKPOINT", help="This is the folder of the repaired checkpoint, in diffusers' format."
        ),
    ],
    out: Annotated[
        str | None,
        typer.Option(metavar="DIR", help="Write the table into this folder. Without it, it is RUN/verified."),
    ] = None,
    permanent: Annotated[
        bool,
        typer.Option(
            "--permanent",
            help="Verify the weights of the folder, even if the repair switches units off only by prompt.",
        ),
    ] = False,
    workers: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Use this number of workers. Without it, there is one worker per GPU, or one per CPU core if there "
            "is no GPU.",
        ),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="Change a setting, for example panel=200; docs/configuration.md lists the settings.",
        ),
    ] = None,
    policy: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="This is a YAML file with the limits that the repair must keep (docs/mitigation.md). If it does not, "
            "the exit code is 3. Without this option, the default limits are shown and do not decide the exit code.",
        ),
    ] = None,
    tracker: Track = None,
    as_json: AsJson = False,
) -> None:
    """Rescan, attack and measure a repaired model and the original, in one table over all repairs of a run."""
    with guarded(run):
        import json

        from memscan.mitigation.policy import RepairPolicy, judge, load_policy
        from memscan.mitigation.settings import VerifySettings
        from memscan.report.holds import verdict
        from pipelines.verify.job import verify as run_verify
        from pipelines.verify.page import read_policy

        track.check(tracker)
        chosen = load_policy(policy) if policy else None
        asked = parse_settings(VerifySettings, {}, settings or [])
        result = run_verify(run, checkpoint, asked, out, workers, permanent, say, chosen)
        held = judge(result, chosen or read_policy(Path(out or f"{run}/verified")) or RepairPolicy())
        if as_json:
            show(json.dumps({**result, "judgement": held.to_json()}, indent=2))
        else:
            show(verdict(held))
            for line in _verdict_lines(result):
                show(line)
            show(f"table         {out or f'{run}/verified'}/report.html")
        page = f"{out or f'{run}/verified'}/report.html"
        track.tell(tracker, track.of_verify(result, held.to_json(), page), say)
        if chosen is not None and held.state != "passed":
            raise typer.Exit(POLICY_FAILED)


def _verdict_lines(result: dict[str, Any]) -> list[str]:
    from memscan.report import words

    found, attack, utility = result["prompts"]["flagged"], result["attack"]["after"], result["utility"]
    before, after = (
        "  ".join(f"{label} {found['classes'][when][label]['count']:,}" for label in ("VM", "FM", "BM", "NM"))
        for when in ("before", "after")
    )
    severity = found["severity"]
    removed = (
        f"{words.percent(severity['removed'])} ({words.interval(severity['low'], severity['high'])})"
        if severity["removed"] is not None
        else "n/a"
    )
    again = result["prompts"]["paraphrases"]["classes"]["after"]["memorised"]["rate"]
    control = attack.get("control", {}).get("all", {}).get("memorised", {}).get("rate")
    broken = attack["memorised"]["all"]
    found_again = "  ".join(f"{label} {broken[label]['count']:,}" for label in ("VM", "FM", "BM", "NM"))
    whole = result["attack"]["before"]["memorised"]["all"]["memorised"]["rate"]
    success = f"{words.percent(broken['memorised']['rate'])} succeeds, {words.percent(whole)} before"
    frechet, off = utility["frechet"], result["utility_off"]
    shares = {when: words.percent(one["more_than_one"]["rate"]) for when, one in found["one_to_many"].items()}
    pair = {
        name: " before, ".join(words.number(utility[name][when], 4) for when in ("before", "after")) + " after"
        for name in ("alignment", "diversity")
    }
    lines = [
        f"before        {before}",
        f"after         {after}",
        f"severity      {removed} removed",
        f"one-to-many   {shares['before']} of memorised prompts reach several images before, {shares['after']} after",
        f"paraphrases   {words.percent(again)} memorised",
        f"attack        {found_again}   {success}; control {words.percent(control)}",
        f"Fréchet       {frechet['before']:.4g} before, {frechet['after']:.4g} after",
        f"panels        {frechet['between']:.4g} from the original's to the repaired model's",
        f"alignment     {pair['alignment']}",
        f"diversity     {pair['diversity']}",
    ]
    if off is not None:
        lines.append(f"units off     {off['frechet']['after']:.4g} for ordinary prompts drawn with a group's units off")
    return [*lines, f"changed       {result['changed']['weights']:,} of {result['changed']['of']:,} weights"]


@patch.command("apply")
def patch_apply(
    checkpoint: Annotated[
        str,
        typer.Argument(
            metavar="CHECKPOINT", help="This is the folder of the original checkpoint, in diffusers' format."
        ),
    ],
    file: Annotated[str, typer.Argument(metavar="PATCH", help="This is the file patch.safetensors of a mitigation.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Write the checkpoint into this folder.")],
    as_json: AsJson = False,
) -> None:
    """Write the repaired checkpoint from the original and the patch."""
    _patched(checkpoint, file, out, as_json, reverse=False)


@patch.command("revert")
def patch_revert(
    checkpoint: Annotated[
        str,
        typer.Argument(
            metavar="CHECKPOINT", help="This is the folder of the repaired checkpoint, in diffusers' format."
        ),
    ],
    file: Annotated[str, typer.Argument(metavar="PATCH", help="This is the file patch.safetensors of the mitigation.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Write the checkpoint into this folder.")],
    as_json: AsJson = False,
) -> None:
    """Write the original checkpoint again from the repaired one and the patch."""
    _patched(checkpoint, file, out, as_json, reverse=True)


def _patched(checkpoint: str, file: str, out: Path, as_json: bool, *, reverse: bool) -> None:
    with guarded():
        from memscan.mitigation.patch import Patch, patch_folder

        patch_folder(checkpoint, Patch.load(file), out, reverse=reverse)
        tell(as_json, {"checkpoint": str(out), "reverse": reverse}, [f"checkpoint    {out}"])
