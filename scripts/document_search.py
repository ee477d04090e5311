#!/usr/bin/env python
"""What a search found, and whether its winner is better: `python scripts/document_search.py SEARCH [--note TEXT]`.

Trains the winner and the job that was searched for as long as the search's last rung, each with three seeds that the
search did not use, and compares its metric on 1,000 samples. Writes `benchmarks/results/DATE-search-NAME.json`:
the search's trials and how long they took, and the values of these runs. Runs land below `--runs`; those that are there
are not trained again.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections import Counter
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

_RESULTS = Path(__file__).resolve().parent.parent / "benchmarks" / "results"
SEEDS = (1, 2, 3)
SAMPLES = 1000


def bessemer(*words: object) -> str:
    """What a command of bessemer prints."""
    command = [sys.executable, "-m", "bessemer.cli", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=3600)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}: {done.stdout}{done.stderr}")
    return done.stdout


def trained(job: Path, run: Path, changes: dict[str, Any]) -> dict[str, Any]:
    """The last evaluation of a run of this job, trained unless it was."""
    from bessemer.tracking.runs import load_run

    if not (run / "journal.jsonl").exists():
        words = [word for name, value in changes.items() for word in ("--set", f"{name}={json.dumps(value)}")]
        bessemer("train", job, "--run-dir", run, *words)
    found = load_run(run)
    if not found.events("finished"):
        raise SystemExit(f"{run}: has not finished; remove it, and start again.")
    record = list(found.of_kind("evaluation"))[-1]
    return {name: record.get(name) for name in ("metric", "nimg", "value", "standard_error", "samples")}


def main() -> int:
    """Train, compare and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("search", type=Path, help="directory of a search that has ended")
    parser.add_argument("--note", help="what the numbers do not say by themselves")
    parser.add_argument("--runs", type=Path, default=Path("runs/winner"), help="directory that holds the runs")
    parser.add_argument("--out", type=Path, default=_RESULTS, help="folder to write to")
    options = parser.parse_args()
    from bessemer.orchestration.search_directory import SearchDirectory

    directory = SearchDirectory.open(options.search)
    search = directory.search
    last = search.objective.rungs_kimg[-1]
    changes = {
        **search.set,
        "training.total_kimg": last,
        "evaluation.metrics": [search.objective.metric],
        "evaluation.every_kimg": last,
        "evaluation.samples": SAMPLES,
        "evaluation.untrained": False,
        "resources.workers": 1,
        "tracking.mlflow": False,
    }
    found: dict[str, list[dict[str, Any]]] = {"winner": [], "default": []}
    with tempfile.TemporaryDirectory() as scratch:
        jobs = {side: Path(scratch) / f"{side}.yaml" for side in found}
        bessemer("search", "promote", options.search, "--out", jobs["winner"])
        jobs["default"].write_text((directory.path / "original.yaml").read_text())
        for seed in SEEDS:
            for side, job in jobs.items():
                run = trained(job, options.runs / f"{side}-{seed}", {**changes, "seed": seed})
                found[side].append(run)
                print(f"{side}, seed {seed}: {run['metric']} {run['value']:.4g}", flush=True)
    each = [a["value"] / b["value"] for a, b in zip(found["winner"], found["default"], strict=True)]
    report = json.loads(bessemer("search", "report", options.search, "--json"))
    began, ended = (pick(row["time"] for row in _journal(directory.path)) for pick in (min, max))
    date = datetime.now(timezone.utc).isoformat(timespec="seconds")
    record = {
        "result": search.name,
        "date": date,
        "note": options.note,
        "minutes_from_first_to_last_line": round((ended - began) / 60, 1),
        "trials": dict(Counter(row["state"] for row in report["trials"])),
        "best": json.loads(bessemer("search", "best", options.search, "--json")),
        "importance": report["importance"],
        "seeds": SEEDS,
        "samples": SAMPLES,
        "winner_to_default": [round(value, 4) for value in each],
        **found,
        "search": report["trials"],
    }
    name = f"{date[:10]}-search-{search.name}"
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")
    print(f"{name}: {record['trials']}, winner to default {statistics.median(each):.3f} (median of {len(each)} seeds)")
    return 0


def _journal(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (path / "search.jsonl").read_text().splitlines()]


if __name__ == "__main__":
    sys.exit(main())
