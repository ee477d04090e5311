"""Drivers with nothing but a journal and its mirror: `python -m tests.tracking.mirrored_run URI LINES PAUSE RUN...`.

One process for each run writes so many lines of two metrics, each so many seconds after the other, while its mirror
sends them. It prints the number of runs of which MLflow then has everything, the seconds that each line took, and the
CPU seconds of a process for each of its lines, as JSON.
"""

from __future__ import annotations

import json
import multiprocessing
import sys
import time
from pathlib import Path
from typing import Any

from bessemer.spec.job import TrackingSpec
from bessemer.tracking.journal import Journal
from bessemer.tracking.mlflow_mirror import MlflowMirror
from bessemer.tracking.mlflow_store import quiet_mlflow


def drive(run: Path, uri: str, lines: int, pause: float) -> dict[str, Any]:
    """Write and send one run."""
    mirror = MlflowMirror(run, TrackingSpec(uri=uri, experiment="shared"), run.parent)
    journal = Journal(run / "journal.jsonl")
    mirror.start()
    deadline = time.monotonic() + 120
    while not (run / "mlflow.json").exists():  # what follows is to overlap
        assert time.monotonic() < deadline, journal.path.read_text()
        time.sleep(0.05)
    began, took = time.process_time(), []
    for line in range(lines):
        start = time.perf_counter()
        journal.write("metrics", line + 1, values={"loss/a": line / 7, "loss/b": -line})
        took.append(time.perf_counter() - start)
        time.sleep(pause)
    cpu = (time.process_time() - began) / lines
    return {"complete": mirror.stop("FINISHED", timeout=300), "line": took, "cpu": cpu}


def main(uri: str, lines: str, pause: str, *runs: str) -> None:
    """Drive all runs at once."""
    quiet_mlflow()
    import mlflow  # noqa: F401  # once: that takes as long as all that follows

    with multiprocessing.get_context("fork").Pool(len(runs)) as pool:
        found = pool.starmap(drive, [(Path(run), uri, int(lines), float(pause)) for run in runs], chunksize=1)
    every = [seconds for one in found for seconds in one["line"]]
    print(
        json.dumps({"complete": sum(one["complete"] for one in found), "line": every, "cpu": [o["cpu"] for o in found]})
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
