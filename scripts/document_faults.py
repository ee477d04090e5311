#!/usr/bin/env python
"""Write the table of faults into docs/clusters.md from the newest benchmarks/results/*-faults.json; a test checks it.

The numbers come from `BESSEMER_FAULTS=benchmarks/results/DATE-faults.json make test-cluster`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "clusters.md"
START, END = "<!-- faults: written by scripts/document_faults.py -->", "<!-- end of faults -->"


def newest() -> Path:
    """The result that the table shows."""
    return max((ROOT / "benchmarks" / "results").glob("*-faults.json"))


def table(record: dict[str, Any], name: str) -> str:
    """Rows of a result, and what the hosts took."""
    raw = record["raw"]
    rows = [
        f"| {row['fault']} | {row['seconds']:.1f} | {row['workers']} | {row['repeated']} | {row['load']:.0f} |"
        for row in raw["faults"]
    ]
    comparison = (
        f"All {raw['compared']['steps']} steps of this run have the losses of an undisturbed one (1e-5)."
        if "compared" in raw
        else "The losses of this run were not compared with those of an undisturbed one."
    )
    hardware = f"{record['hardware']['cores']} cores of an {record['hardware']['cpu']}"
    return "\n".join(
        (
            "| fault | seconds | workers then | images repeated | load |",
            "|---|---|---|---|---|",
            *rows,
            "",
            comparison,
            f"[Numbers](../benchmarks/results/{name}) of {record['date'][:10]}, {hardware}.",
        )
    )


def with_faults(page: str) -> str:
    """The page with the table that its markers enclose renewed."""
    before, _, rest = page.partition(START)
    _, _, after = rest.partition(END)
    file = newest()
    return f"{before}{START}\n\n{table(json.loads(file.read_text()), file.name)}\n\n{END}{after}"


if __name__ == "__main__":
    PAGE.write_text(with_faults(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
