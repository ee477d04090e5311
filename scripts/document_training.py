#!/usr/bin/env python
"""Numbers and a figure of a run that was trained: `python scripts/document_training.py RUN [--note TEXT]`.

Reads the run's journal and writes `benchmarks/results/systems/DATE-NAME.json`: the evaluations, some of what
training measured, how often the run was started, and with what packages. The figure beside it shows each metric against
images, and the last sheet of samples. Nothing is measured again. To be run on the machine that trained, which it names.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from bessemer.orchestration.run_directory import RunDirectory
from bessemer.tracking.journal import read_journal

_RESULTS = Path(__file__).resolve().parent.parent / "benchmarks" / "results" / "systems"
_SHOWN = 24
"""Records of training that are kept."""
_DULL = ("time/", "collapse", "lr/", "throughput/mfu", "memory/")


def summary(run: RunDirectory, note: str | None) -> dict[str, Any]:
    """What the journal says, in short.

    Raises:
        SystemExit: nothing was evaluated.
    """
    records = read_journal(run.journal.path)
    evaluations = [r for r in records if r["kind"] == "evaluation"]
    if not evaluations:
        raise SystemExit(f"{run.path}: holds no evaluations, so there is nothing to show; name another run.")
    points: dict[int, dict[str, Any]] = {}
    protocols: dict[str, str] = {}
    for record in evaluations:
        point = points.setdefault(record["nimg"], {"kimg": record["nimg"] / 1000})
        point[record["metric"]] = round(record["value"], 4)
        if record.get("standard_error") is not None:
            point[f"{record['metric']} (standard error)"] = round(record["standard_error"], 4)
        said = (f"{record.get('samples')} samples", record.get("estimator"), record.get("preprocessing"))
        protocols[record["metric"]] = ", ".join(part for part in said if part)
    measured = [
        {
            "kimg": r["nimg"] / 1000,
            **{k: round(v, 4) for k, v in r["values"].items() if not k.startswith(_DULL)},
        }
        for r in records
        if r["kind"] == "metrics"
    ]
    starts = [r for r in records if r["kind"] == "event" and r["event"] in ("started", "resumed")]
    return {
        "result": run.job().name,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "note": note,
        "job": f"jobs/{run.job().name}.yaml",
        "minutes": round((records[-1]["time"] - records[0]["time"]) / 60, 1),
        "starts": [{key: r[key] for key in ("event", "nimg", "workers") if key in r} for r in starts],
        "metrics": protocols,
        "evaluations": [points[nimg] for nimg in sorted(points)],
        "training": measured[:: max(1, len(measured) // _SHOWN)],
        "packages": json.loads((run.path / "run.json").read_text())["packages"],
        "hardware": f"{len(os.sched_getaffinity(0))} cores, {_processor()}",
    }


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((x.partition(":")[2].strip() for x in lines if "model name" in x), platform.processor())


def draw(path: Path, metrics: Sequence[str], points: Sequence[Mapping[str, Any]], sheet: Path | None) -> None:
    """One curve for each metric, and the sheet."""
    panels = [*metrics, *([sheet] if sheet else [])]
    figure = Figure((4 * len(panels), 4), dpi=100, layout="constrained")
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        if isinstance(panel, Path):
            axes.imshow(Image.open(panel), cmap="gray")
            axes.set_axis_off()
            axes.set_title(f"samples at {points[-1]['kimg']:g} kimg")
            continue
        known = [point for point in points if panel in point]
        errors = [point.get(f"{panel} (standard error)", 0.0) for point in known]
        axes.errorbar([point["kimg"] for point in known], [point[panel] for point in known], errors, marker="o")
        axes.set_xlabel("kimg")
        axes.set_title(panel)
    with path.open("wb") as file:
        FigureCanvasAgg(figure).print_png(file)  # type: ignore[no-untyped-call]


def main() -> int:
    """Write both files, and print the line for the table of README.md."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("run", type=Path, help="run directory")
    parser.add_argument("--note", help="what the numbers do not say by themselves")
    parser.add_argument("--out", type=Path, default=_RESULTS, help="folder to write to")
    options = parser.parse_args()
    run = RunDirectory.open(options.run)
    found = summary(run, options.note)
    options.out.mkdir(parents=True, exist_ok=True)
    name = f"{found['date'][:10]}-{found['result']}"
    (options.out / f"{name}.json").write_text(json.dumps(found, indent=1) + "\n")
    sheets = sorted((run.path / "samples").glob("kimg-*.png"))
    draw(options.out / f"{name}.png", list(found["metrics"]), found["evaluations"], sheets[-1] if sheets else None)
    first, last = found["evaluations"][0], found["evaluations"][-1]
    changes = "; ".join(f"`{metric}` {first.get(metric, '-')} to {last[metric]}" for metric in found["metrics"])
    print(f"{name}: {last['kimg']:g} kimg, {found['minutes']:g} minutes; {changes}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
