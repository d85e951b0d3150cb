"""This module compares checkpoints on one panel of prompts, and checks them against a policy.

Two checkpoints are compared prompt by prompt, on the prompts that both scans processed, because the panel and its seeds
are the same. If a rate did not change, as many prompts may have been gained as lost.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from memscan.census.policy import PolicyConfig
from memscan.records import alike


@dataclass(frozen=True)
class Panel:
    """This is the outcome of one checkpoint on the panel.

    Args:
        done: ids of the prompts that were processed.
        flagged: id -> label of those whose verdict is VM, FM or BM.
        severity: mean harm of a generation.
    """

    done: frozenset[str]
    flagged: Mapping[str, str]
    severity: float

    def named(self, name: Callable[[str], str]) -> Panel:
        """Return the same with other ids (`records.alike`)."""
        if name is str:  # both runs have ids of one length, as nearly always
            return self
        flagged = {name(prompt): label for prompt, label in self.flagged.items()}
        return Panel(frozenset(map(name, self.done)), flagged, self.severity)


@dataclass(frozen=True)
class Change:
    """This is the change from one checkpoint to another, over `common` prompts; tuples of ids are sorted.

    Args:
        new: flagged after and not before.
        gone: flagged before and not after.
        relabelled: flagged both times, with another label.
        p_value: of `mcnemar` over new and gone.
        severity: mean harm after less before.
    """

    name: str
    common: int
    new: tuple[str, ...]
    gone: tuple[str, ...]
    relabelled: tuple[str, ...]
    p_value: float
    severity: float

    def to_json(self) -> dict[str, Any]:
        counts = {key: len(getattr(self, key)) for key in ("new", "gone", "relabelled")}
        return {**asdict(self), **{key: list(getattr(self, key)) for key in counts}, "counts": counts}


def panel_change(name: str, before: Panel, after: Panel) -> Change:
    """Return what changed since the checkpoint `name`; ids are short where one of the two has short ones."""
    same = alike(before.done, after.done)
    before, after = before.named(same), after.named(same)
    common = before.done & after.done
    then = {key for key in before.flagged if key in common}
    now = {key for key in after.flagged if key in common}
    relabelled = [key for key in then & now if before.flagged[key] != after.flagged[key]]
    new, gone = tuple(sorted(now - then)), tuple(sorted(then - now))
    return Change(
        name,
        len(common),
        new,
        gone,
        tuple(sorted(relabelled)),
        mcnemar(len(new), len(gone)),
        after.severity - before.severity,
    )


def mcnemar(gained: int, lost: int) -> float:
    """Return the two-sided exact p-value that changed pairs went either way with probability 1/2; 1 if none changed.

    Source: McNemar, Psychometrika 12 (1947), in the exact binomial form.
    """
    from scipy.stats import binomtest

    return float(binomtest(gained, gained + lost, 0.5).pvalue) if gained + lost else 1.0


@dataclass(frozen=True)
class Rule:
    """This is the outcome of one rule of a policy for one checkpoint.

    Args:
        against: name of the checkpoint it was compared with; "" for rules about one checkpoint.
        state: "passed", "failed", or "skipped" if there is nothing to compare with.
        value: what was found; None if skipped.
    """

    name: str
    limit: float
    value: float | None
    state: str
    message: str
    against: str = ""
    ids: tuple[str, ...] = field(default=())

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "ids": list(self.ids)}


def hold(
    policy: PolicyConfig,
    figures: Mapping[str, Any],
    changes: Mapping[str, Change | None],
) -> list[Rule]:
    """Check a checkpoint against a policy.

    Args:
        figures: "vm" and "memorised" (`rates.Rate.as_dict()`), "severity", "rejected" (share of the panel).
        changes: "previous" and "baseline" -> the comparison, None if there is no such checkpoint.
    """
    bound = "high" if policy.judge == "upper" else "rate"
    values: dict[str, float | None] = {
        "max_vm_rate": figures["vm"][bound],
        "max_memorised_rate": figures["memorised"][bound],
        "max_severity": figures["severity"],
        "max_rejected_rate": figures["rejected"],
    }
    rules = [_rule(name, getattr(policy, name), value) for name, value in values.items()]
    asked: set[str] = set()
    for which in policy.against:
        change = changes.get(which)
        name = change.name if change else which
        if name in asked:
            continue  # the checkpoint before is the baseline too: one comparison, one rule
        asked.add(name)
        new = float(len(change.new)) if change else None
        rules.append(_rule("max_new_flagged", policy.max_new_flagged, new, name, change.new if change else ()))
        rise = change.severity if change else None
        rules.append(_rule("max_severity_increase", policy.max_severity_increase, rise, name))
    return [rule for rule in rules if rule is not None]


def passed(rules: list[Rule]) -> bool:
    """Return whether no rule failed."""
    return all(rule.state != "failed" for rule in rules)


def _rule(
    name: str, limit: float | None, value: float | None, against: str = "", ids: tuple[str, ...] = ()
) -> Rule | None:
    if limit is None:
        return None
    what = name.removeprefix("max_").replace("_", " ")
    beside = f" against {against}" if against else ""
    if value is None:
        reason = "nothing to compare with" if against else "no prompt was scanned"
        # A comparison that cannot be made yet is no failure; a rate of nothing is.
        return Rule(name, limit, None, "skipped" if against else "failed", f"{what}{beside}: {reason}", against)
    over = value > limit + 1e-12
    message = f"{what}{beside} is {value:.4g}, limit {limit:.4g}"
    return Rule(name, limit, value, "failed" if over else "passed", message, against, ids if over else ())
