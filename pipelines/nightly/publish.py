"""This module publishes the outcome of a nightly: history table, trend page, JUnit XML, JSON, webhook.

All of it is made from the records, so it can be made again at any time. Nothing is decided here.
"""

from __future__ import annotations

import csv
import io
import json
import os
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

import pyarrow as pa

from memscan.census.flagged import neutralise
from memscan.census.policy import NightlyConfig, WebhookConfig
from memscan.errors import ConfigError
from memscan.io import storage
from memscan.report.junit import junit
from memscan.report.trend import render_trend
from pipelines.nightly.pairs import write_pairs
from pipelines.run_folder.tables import write_table

SUMMARY = "nightly.json"
RATES = ("memorised", "vm", "fm", "bm")
HISTORY = pa.schema(
    [  # one row a checkpoint, in the order in which they were scanned
        pa.field("sequence", pa.int64(), nullable=False),
        pa.field("name", pa.string(), nullable=False),
        pa.field("source", pa.string(), nullable=False),
        pa.field("model", pa.string(), nullable=False),  # name@sha256 (12 digits)
        pa.field("scanned", pa.string(), nullable=False),  # ISO 8601, UTC
        pa.field("passed", pa.bool_(), nullable=False),
        pa.field("prompts", pa.int64(), nullable=False),
        pa.field("done", pa.int64(), nullable=False),
        pa.field("flagged", pa.int64(), nullable=False),
        *(pa.field(f"{rate}{end}", pa.float64()) for rate in RATES for end in ("_rate", "_low", "_high")),
        pa.field("severity", pa.float64()),  # mean harm of a generation
        pa.field("new", pa.int64()),  # flagged here and not by the checkpoint before; null for the first
        pa.field("gone", pa.int64()),
        pa.field("run", pa.string(), nullable=False),  # folder below the registry
    ]
)


def publish(
    config: NightlyConfig,
    path: str,
    new: Sequence[Mapping[str, Any]],
    errors: Mapping[str, str],
    records: Sequence[Mapping[str, Any]],
    say: Callable[[str], None],
) -> None:
    """Write everything into the registry at `path`, and call the webhook."""
    table = history(records)
    write_table(storage.join(path, "history.parquet"), table)
    storage.write_atomic(storage.join(path, "history.csv"), to_csv(table))
    page = render_trend(config.name, config.baseline, records, config.policy, write_pairs(path, records, say))
    storage.write_atomic(storage.join(path, "trend.html"), page.encode("utf-8"))
    storage.write_atomic(storage.join(path, "junit.xml"), junit(config.name, new, errors))
    document = summary(config, new, errors)
    if config.webhook is not None and (config.webhook.when == "scanned" or document["state"] != "passed"):
        document["webhook"] = post(config.webhook, document)
        say(f"nightly {config.name}: webhook {document['webhook']}")
    document["published"] = max((int(record["sequence"]) for record in records), default=0)
    storage.write_json(storage.join(path, SUMMARY), document)


def summary(config: NightlyConfig, new: Sequence[Mapping[str, Any]], errors: Mapping[str, str]) -> dict[str, Any]:
    """Return the outcome of a call.

    Its state is "passed", "failed" (a policy), "error" (a checkpoint was not scanned), or "nothing new", where no
    checkpoint was judged: that is no pass.
    """
    judged = "passed" if all(record["passed"] for record in new) else "failed"
    state = "error" if errors else judged if new else "nothing new"
    return {
        "nightly": config.name,
        "state": state,
        "out": config.out,
        "text": _text(config, state, new, errors),
        "checkpoints": [dict(record) for record in new],
        "errors": dict(errors),
    }


def _text(config: NightlyConfig, state: str, new: Sequence[Mapping[str, Any]], errors: Mapping[str, str]) -> str:
    """Return the outcome for a chat: what failed first, each checkpoint in a line, and a link where one is known."""
    lines = [f"memscan nightly {config.name}: {state}"]
    for record in sorted(new, key=lambda one: bool(one["passed"])):
        broken = [str(rule["message"]) for rule in record["policy"] if rule["state"] == "failed"]
        verdict = "passed" if record["passed"] else f"FAILED: {'; '.join(broken)}"
        lines.append(f"{record['name']} {verdict}"[:600])
    lines += [f"{name} could not be scanned: {line}"[:600] for name, line in errors.items()]
    if config.webhook is not None and config.webhook.link:
        lines.append(f"{config.webhook.link.rstrip('/')}/trend.html")
    return "\n".join(lines)


def body(webhook: WebhookConfig, document: Mapping[str, Any]) -> dict[str, Any]:
    """Return what is posted: the document, or a message in the format of Slack's and Teams' incoming webhooks.

    Source: Slack's "Sending messages using incoming webhooks"; Teams' "Create incoming webhooks with Workflows", an
    adaptive card 1.4 in a message.
    """
    text = str(document.get("text", ""))
    if webhook.format == "slack":
        return {"text": text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")}
    if webhook.format == "teams":
        parts = [{"type": "TextBlock", "wrap": True, "text": line} for line in text.splitlines()]
        card = {"type": "AdaptiveCard", "version": "1.4", "body": parts}
        attachment = {"contentType": "application/vnd.microsoft.card.adaptive", "content": card}
        return {"type": "message", "attachments": [attachment]}
    return dict(document)


def history(records: Sequence[Mapping[str, Any]]) -> pa.Table:
    """Return the table `HISTORY` of records."""
    rows = []
    for record in records:
        figures, change = record["figures"], record["changes"]["previous"]
        rows.append(
            {
                **{name: record[name] for name in ("sequence", "name", "source", "model", "scanned", "passed", "run")},
                **{name: figures[name] for name in ("prompts", "done", "flagged", "severity")},
                **{f"{rate}_{end}": figures[rate][end] for rate in RATES for end in ("rate", "low", "high")},
                **{name: change["counts"][name] if change else None for name in ("new", "gone")},
            }
        )
    return pa.Table.from_pylist(rows, schema=HISTORY)


def to_csv(table: pa.Table) -> bytes:
    """Return the history for spreadsheets."""
    sink = io.StringIO()
    writer = csv.writer(sink)
    writer.writerow(table.column_names)
    # A name that a spreadsheet would take for a formula gets an apostrophe, as in the flagged list.
    safe = [[neutralise(v) if isinstance(v, str) else v for v in row.values()] for row in table.to_pylist()]
    writer.writerows(safe)
    return sink.getvalue().encode("utf-8")


def post(webhook: WebhookConfig, document: Mapping[str, Any]) -> str:
    """Post the document, and return in words how it went.

    The words never contain the path of the address, which may be a secret.

    Raises:
        ConfigError: the variable that should hold the address is not set, or holds no http(s) address.
    """
    url, data = address(webhook), json.dumps(body(webhook, document)).encode()
    token = os.environ.get(webhook.token_env, "").strip() if webhook.token_env else None
    headers = {"Content-Type": "application/json", "User-Agent": "memscan"}
    try:
        request = urllib.request.Request(url, data=data, headers=headers, method="POST")
        if token:
            request.add_header("Authorization", f"Bearer {token}")
        with _OPENER.open(request, timeout=webhook.timeout_seconds) as answer:
            return f"answered {answer.status}"
    except urllib.error.HTTPError as error:
        return f"answered {error.code}"
    except Exception as error:  # http.client, ssl and urllib have kinds of their own, and delivery decides nothing
        # The reason's kind only: some libraries quote the whole address.
        return f"not delivered ({type(getattr(error, 'reason', error)).__name__})"


def address(webhook: WebhookConfig) -> str:
    """Return the webhook's address. Raises ConfigError as `post` does."""
    url = os.environ.get(webhook.url_env, "").strip()
    try:
        parts = urlsplit(url)
        good = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
    except ValueError:  # an IPv6 address or a port that is none
        good = False
    if not good or not url.isascii() or not url.isprintable() or " " in url:
        raise ConfigError(
            f"the variable {webhook.url_env} holds no http(s) address",
            where="webhook.url_env",
            hint="set it, or take the webhook out",
        )
    return url


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A token must not follow a redirect to another host."""

    def redirect_request(self, *_args: Any, **_kwargs: Any) -> None:
        return None


_OPENER = urllib.request.build_opener(_NoRedirects)
