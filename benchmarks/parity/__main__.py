"""The command of `benchmarks.parity`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.parity import authors
from benchmarks.parity.table import STORED, table

STORES: dict[str, Callable[[Path], dict[str, Any]]] = {
    "attention": authors.attention,
    "fbmem": authors.fbmem,
    "rembg": authors.rembg,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    actions = parser.add_subparsers(dest="action", required=True)
    actions.add_parser("table", help="print the table of docs/parity.md")
    store = actions.add_parser("store", help="run the authors' code from a clone and store what it gives")
    store.add_argument("name", choices=sorted(STORES))
    store.add_argument("clone", type=Path)
    options = parser.parse_args()
    if options.action == "table":
        print(table())
        return
    found = STORES[options.name](options.clone)
    (STORED / f"{options.name}.json").write_text(
        json.dumps(found, indent=None if options.name == "rembg" else 2) + "\n", encoding="utf-8"
    )


if __name__ == "__main__":
    main()
