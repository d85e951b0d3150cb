"""This module writes nightly outcomes as JUnit XML, which every CI system reads.

There is one suite per checkpoint, and one test case per rule of the policy.

The format is that of the XML schema of Apache Ant's JUnit task as Jenkins, GitLab and GitHub's actions read it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any
from xml.etree import ElementTree

# What XML 1.0 cannot hold, not even escaped (section 2.2, production Char).
_NOT_XML = re.compile("[^\t\n\r -\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def junit(name: str, records: Sequence[Mapping[str, Any]], errors: Mapping[str, str]) -> bytes:
    """Return a JUnit document.

    Args:
        name: of the nightly.
        records: checkpoints that were scanned, with their rules under "policy".
        errors: checkpoint -> why it could not be scanned.

    Without any of them the document has one test case, "nothing new", which is skipped: many readers take an empty
    document for a broken one, and none for a pass. No two test cases have one name: readers keep the last of them.
    """
    root = ElementTree.Element("testsuites", name=_text(name))
    taken: set[str] = set()
    for record in records:
        checkpoint = _unique(taken, record["name"])
        suite = _suite(root, checkpoint, record["scanned"])
        titles: set[str] = set()
        for rule in record["policy"]:
            _case(suite, name, checkpoint, titles, rule)
        if not record["policy"]:
            _one(suite, "scanned", name, checkpoint)
        _count(suite)
    for failed, line in errors.items():
        checkpoint = _unique(taken, failed)
        suite = _suite(root, checkpoint, None)
        case = _one(suite, "scanned", name, checkpoint)
        ElementTree.SubElement(case, "error", message=_text(line), type="MemscanError")
        _count(suite)
    if not len(root):
        suite = _suite(root, name, None)
        case = _one(suite, "nothing new", name, name)
        ElementTree.SubElement(case, "skipped", message="no checkpoint is new: nothing was scanned or judged")
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


def _one(suite: ElementTree.Element, title: str, name: str, checkpoint: str) -> ElementTree.Element:
    return ElementTree.SubElement(
        suite, "testcase", name=_text(title), classname=f"{_text(name)}.{_text(checkpoint)}", time="0"
    )


def _unique(taken: set[str], name: str) -> str:
    """Return the name, with a number where it is taken, as the document will have it."""
    found, number = name, 1
    while _text(found) in taken:
        number += 1
        found = f"{name} ({number})"
    taken.add(_text(found))
    return found


def _case(suite: ElementTree.Element, name: str, checkpoint: str, titles: set[str], rule: Mapping[str, Any]) -> None:
    title = f"{rule['name']} against {rule['against']}" if rule["against"] else rule["name"]
    case = _one(suite, _unique(titles, title), name, checkpoint)
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
