"""Reviewing at scale: tables, page and board of 500 runs of 25,000 lines each, and what logging costs a step.

Goals: `bessemer runs` in 2 s, the page of 4 runs in 10 s and 15 MB, first paint of the board in 1 s, a line of metrics
in 0.01 of a step of 100 ms, no point lost by 4 runs that send to one SQLite store at once. The store takes 3 GB in the
directory for temporary files while it runs.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from _common import Ratio, finish, parse_options

from bessemer.tracking.journal import Journal

_ROOT = Path(__file__).resolve().parent.parent
_NAMES = (
    "loss/generator",
    "loss/discriminator",
    "grad_norm/generator",
    "grad_norm/discriminator",
    "throughput/img_per_s",
)
_JOB = """\
name: run
seed: 0
system: {{name: biggan, preset: cifar10}}
data: {{path: datasets/cifar10}}
training: {{total_kimg: 25000.0, batch_size: {batch}, slice_size: 16}}
evaluation: {{metrics: [kid_efflite0], samples: 500}}
"""


def make_store(root: Path, runs: int, lines: int) -> None:
    """Runs whose journals have `lines` lines of metrics and a hundred evaluations."""
    body = []
    for n in range(lines):
        values = dict.fromkeys(_NAMES, 1 + n * 7919 % 1000 / 1000)
        body.append(
            json.dumps(
                {"kind": "metrics", "nimg": n * 1000, "time": 1.7e9 + n, "values": values}, separators=(",", ":")
            )
        )
    for number in range(runs):
        path = root / f"run-{number:03d}"
        path.mkdir()
        (path / "job.yaml").write_text(_JOB.format(batch=32 << number % 4))
        (path / "run.json").write_text(json.dumps({"id": str(number), "name": path.name, "created": 1.7e9 + number}))
        own = list(body)
        for index in range(100):
            record = {
                "kind": "evaluation", "nimg": index * lines * 10, "time": 1.7e9 + index, "metric": "kid_efflite0",
                "value": 1 / (index + 1 + number), "standard_error": 0.01, "samples": 500, "reference_hash": "r",
                "extractor": "efflite0", "extractor_sha256": "w", "seed": 0, "weights": "ema",
            }  # fmt: skip
            own.insert(index * (lines // 100 + 1), json.dumps(record, separators=(",", ":")))
        own.append(json.dumps({"kind": "event", "nimg": lines * 1000, "time": 1.7e9 + lines, "event": "finished"}))
        (path / "journal.jsonl").write_text("\n".join(own) + "\n")


def seconds_of(*words: str, cwd: Path) -> float:
    """Wall time of a command of its own process."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-m", "bessemer.cli", *words], cwd=cwd, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def board_seconds(root: Path, profile: Path) -> dict[str, float]:
    """Time to the page's last byte, and where there is a Chromium, to its first paint; with rows that are kept."""
    sys.path.insert(0, str(_ROOT))
    from tests.tracking.browser import CHROMIUM, browser

    command = [sys.executable, "-m", "bessemer.cli", "board", "--root", str(root), "--port", "0"]
    found = {}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            address = process.stdout.readline().split()[1]
            for _ in range(600):
                try:
                    urllib.request.urlopen(f"{address}favicon.ico", timeout=5).close()
                    break
                except OSError:
                    time.sleep(0.05)
            start = time.perf_counter()
            with urllib.request.urlopen(address, timeout=60) as answer:
                found["megabytes"] = len(answer.read()) / 1e6
            found["page"] = time.perf_counter() - start
            if CHROMIUM is not None:
                with browser(profile) as tab:
                    tab.open(address)
                    tab.wait_for("performance.getEntriesByName('first-contentful-paint').length")
                    paint = tab.evaluate("performance.getEntriesByName('first-contentful-paint')[0].startTime")
                    found["first_paint"] = paint / 1000
                    found["rows"] = tab.evaluate("document.querySelectorAll('table.runs tbody tr').length")
        finally:
            process.terminate()
    return found


def logging_seconds(path: Path, lines: int) -> list[float]:
    """Time of each line of 40 metrics."""
    journal, found = Journal(path), []
    values = {f"group/metric-{index}": index / 7 for index in range(40)}
    for n in range(lines):
        start = time.perf_counter()
        journal.write("metrics", n, values=values)
        found.append(time.perf_counter() - start)
    return found


def lost_points(root: Path, lines: int) -> dict[str, float]:
    """Four runs write and are mirrored to one SQLite store at the same time; points that it lacks in the end."""
    from mlflow import MlflowClient

    from bessemer.spec.job import TrackingSpec
    from bessemer.tracking.mlflow_mirror import MlflowMirror

    spec = TrackingSpec(uri="sqlite:///mlflow.db", experiment="benchmark")
    make_store(root, 4, 100)
    start = time.perf_counter()

    def run(number: int) -> bool:
        path = root / f"run-{number:03d}"
        mirror = MlflowMirror(path, spec, root, interval=0.2)
        mirror.start()
        journal = Journal(path / "journal.jsonl")
        for n in range(lines):
            journal.write("metrics", 200_000 + n, values={"late/a": n, "late/b": -n})
            time.sleep(0.002)
        return mirror.stop("FINISHED", timeout=300)

    with ThreadPoolExecutor(4) as pool:
        complete = list(pool.map(run, range(4)))
    client = MlflowClient(tracking_uri=f"sqlite:///{root / 'mlflow.db'}")
    runs = client.search_runs([client.get_experiment_by_name("benchmark").experiment_id])
    stored = sum(len(client.get_metric_history(one.info.run_id, name)) for one in runs for name in ("late/a", "late/b"))
    wanted = 4 * 2 * lines
    return {"wanted": wanted, "stored": stored, "complete": sum(complete), "seconds": time.perf_counter() - start}


def main() -> int:
    """Measure everything once; `runs` and logging several times."""
    options = parse_options(__doc__)
    runs, lines = (20, 2000) if options.quick else (500, 25_000)
    directory = Path(tempfile.mkdtemp(prefix="bessemer-review-"))
    os.environ["BESSEMER_CACHE"] = str(directory / "cache")
    raw: dict[str, Any] = {"runs": runs, "lines": lines}
    try:
        root = directory / "runs"
        root.mkdir()
        make_store(root, runs, lines)
        raw["runs_first"] = seconds_of("runs", "--root", str(root), cwd=directory)
        raw["runs_again"] = [seconds_of("runs", "--root", str(root), cwd=directory) for _ in range(3)]
        raw["leaderboard"] = seconds_of("leaderboard", "--root", str(root), cwd=directory)
        four = [str(root / f"run-{number:03d}") for number in range(4)]
        page = directory / "report.html"
        raw["report"] = seconds_of("report", *four, "--out", str(page), cwd=directory)
        raw["report_megabytes"] = page.stat().st_size / 1e6
        raw["board"] = board_seconds(root, directory / "profile")
        raw["log_line"] = statistics.median(logging_seconds(directory / "log.jsonl", 2000))
        (directory / "mirrored").mkdir()
        raw["mirror"] = lost_points(directory / "mirrored", 100 if options.quick else 500)
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    paint = raw["board"].get("first_paint", raw["board"]["page"])
    ratios = [
        Ratio("runs_seconds", statistics.median(raw["runs_again"]), 2.0),
        Ratio("report_seconds", raw["report"], 10.0),
        Ratio("report_megabytes", raw["report_megabytes"], 15.0),
        Ratio("board_first_paint_seconds", paint, 1.0),
        Ratio("log_line_to_100ms_step", raw["log_line"] / 0.1, 0.01),
        Ratio("points_lost", raw["mirror"]["wanted"] - raw["mirror"]["stored"], 0.0),
        Ratio("runs_first_seconds", raw["runs_first"]),
    ]
    return finish(ratios, raw, options)


if __name__ == "__main__":
    sys.exit(main())
