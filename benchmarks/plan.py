"""Plans held to what then happened: predicted and actual seconds of censuses of the planted world.

For every setting `memscan plan` times a sample and predicts, then `memscan scan` scans so many prompts. The prediction
uses nothing of the scan. Actual seconds are those of the run's own log, from its beginning to its end, with Ray's start
and the loading of models; the index is there before. Ratio: predicted over actual.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from datetime import datetime
from pathlib import Path
from typing import Any

from memscan.planted.world import world_config

# name -> workers of each pool, as `--set` wants them
SETTINGS: dict[str, dict[str, int]] = {
    "one worker": {"samplers": 1},
    "two workers": {"samplers": 2},
    "a judge apart": {"samplers": 1, "judges": 1},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=int, nargs="+", default=[64, 256], help="of each census; 345 at most")
    parser.add_argument("--sample", type=int, default=96)
    parser.add_argument("--settings", nargs="+", choices=[*SETTINGS], default=[*SETTINGS])
    parser.add_argument("--index", help="of the world's references; default: built first")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        index = arguments.index or _index(Path(scratch))
        rows = [row for name in arguments.settings for row in _measure(name, arguments, index, Path(scratch))]
    columns = ("setting", "prompts", "predicted s", "actual s", "ratio", "predicted MB", "actual MB")
    print("".join(f"{name:>15}" for name in columns))
    for row in rows:
        numbers = (
            row["predicted"],
            row["actual"],
            row["ratio"],
            row["predicted_bytes"] / 1e6,
            row["actual_bytes"] / 1e6,
        )
        print(f"{row['setting']:>15}{row['prompts']:15,}" + "".join(f"{value:15.2f}" for value in numbers))
    worst = max((row["ratio"] for row in rows), key=lambda ratio: abs(ratio - 1))
    print(json.dumps({"benchmark": "plan", "settings": vars(arguments), "figures": rows, "ratio": worst}))


def _index(scratch: Path) -> str:
    source, folder = str(world_config().index.source), str(scratch / "index")
    (scratch / "world.json").write_text(world_config().model_dump_json(), encoding="utf-8")
    _memscan("index", "build", source, folder, "--config", str(scratch / "world.json"))
    return folder


def _measure(name: str, arguments: argparse.Namespace, index: str, scratch: Path) -> list[dict[str, Any]]:
    pools = SETTINGS[name]
    settings = [f"index.path={index}", *(f"resources.{pool}={count}" for pool, count in pools.items())]
    base = ["--world", "shipped", *(part for setting in settings for part in ("--set", setting))]
    rates = str(scratch / f"{name}.json")
    _memscan("plan", *base, "--sample", str(arguments.sample), "--save", rates)
    rows = []
    for prompts in arguments.prompts:
        workers = str(sum(pools.values()))
        told = _memscan("plan", *base, "--rates", rates, "--gpus", workers, "--prompts", str(prompts), "--json")
        plan = json.loads(told)
        out = scratch / f"{name}-{prompts}"
        _memscan("scan", *base, "--set", f"out={out}", "--set", f"prompts.limit={prompts}")
        predicted, actual = plan["expected"]["seconds"], _seconds(out)
        size = sum(file.stat().st_size for file in (out / "census").rglob("*.parquet"))
        row = {
            "setting": name,
            "prompts": prompts,
            "predicted": predicted,
            "actual": actual,
            "ratio": predicted / actual,
        }
        rows.append({**row, "predicted_bytes": plan["storage_bytes"], "actual_bytes": size, "rates": plan["rates"]})
        print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    return rows


def _seconds(run: Path) -> float:
    """From the first to the last line of a run's log."""
    lines = (run / "logs" / "memscan.jsonl").read_text(encoding="utf-8").splitlines()
    first, last = (datetime.fromisoformat(json.loads(line)["time"]) for line in (lines[0], lines[-1]))
    return (last - first).total_seconds()


def _memscan(*arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "pipelines.cli", *arguments], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(done.stderr)
    return done.stdout


if __name__ == "__main__":
    main()
