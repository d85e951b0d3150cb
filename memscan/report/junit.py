"""Nightly outcomes as JUnit XML, which every CI system reads: a suite a checkpoint, a test case a rule of the policy.

Source of the form: the XML schema of Apache Ant's JUnit task as Jenkins, GitLab and GitHub's actions read it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any
from xml.etree import ElementTree

# What XML 1.0 cannot hold, not even escaped (section 2.2, production Char).
_NOT_XML = re.compile("[^\t\n\r -\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def junit(name: str, records: Sequence[Mapping[str, Any]], errors: Mapping[str, str]) -> bytes:
    """A JUnit document.

    Args:
        name: of the nightly.
        records: checkpoints that were scanned, with their rules under "policy".
        errors: checkpoint -> why it could not be scanned.
    """
    root = ElementTree.Element("testsuites", name=_text(name))
    for record in records:
        suite = _suite(root, record["name"], record["scanned"])
        for rule in record["policy"]:
            _case(suite, name, record["name"], rule)
        if not record["policy"]:
            ElementTree.SubElement(
                suite, "testcase", name="scanned", classname=f"{_text(name)}.{_text(record['name'])}"
            )
        _count(suite)
    for checkpoint, line in errors.items():
        suite = _suite(root, checkpoint, None)
        case = ElementTree.SubElement(
            suite, "testcase", name="scanned", classname=f"{_text(name)}.{_text(checkpoint)}", time="0"
        )
        ElementTree.SubElement(case, "error", message=_text(line), type="MemscanError")
        _count(suite)
    for kind in ("tests", "failures", "errors", "skipped"):
        root.set(kind, str(sum(int(suite.get(kind, 0)) for suite in root)))
    ElementTree.indent(root)
    return bytes(ElementTree.tostring(root, encoding="utf-8", xml_declaration=True))


def _suite(root: ElementTree.Element, checkpoint: str, scanned: str | None) -> ElementTree.Element:
    suite = ElementTree.SubElement(root, "testsuite", name=_text(checkpoint))
    if scanned:
        suite.set("timestamp", scanned)
    return suite


def _case(suite: ElementTree.Element, name: str, checkpoint: str, rule: Mapping[str, Any]) -> None:
    title = f"{rule['name']} against {rule['against']}" if rule["against"] else rule["name"]
    case = ElementTree.SubElement(
        suite, "testcase", name=_text(title), classname=f"{_text(name)}.{_text(checkpoint)}", time="0"
    )
    if rule["state"] == "failed":
        ElementTree.SubElement(case, "failure", message=_text(rule["message"]), type=rule["name"])
    elif rule["state"] == "skipped":
        ElementTree.SubElement(case, "skipped", message=_text(rule["message"]))
    else:
        ElementTree.SubElement(case, "system-out").text = _text(rule["message"])


def _count(suite: ElementTree.Element) -> None:
    suite.set("tests", str(len(suite.findall("testcase"))))
    for tag, key in (("failure", "failures"), ("error", "errors"), ("skipped", "skipped")):
        suite.set(key, str(len(suite.findall(f"testcase/{tag}"))))
    suite.set("time", "0")


def _text(text: str) -> str:
    return _NOT_XML.sub("\ufffd", text)
