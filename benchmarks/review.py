"""Reviewing at scale: tables, page and board of 500 runs of 25,000 lines each, and what logging costs a step.

Goals: `bessemer runs` in 2 s, the page of 4 runs with 50 grids each in 10 s and 15 MB, first paint of the board in 1 s;
and of 4 runs that log each step of 100 ms to one store, SQLite or PostgreSQL, at once: no point lost, and 0.01 of the
step for logging. The runs take 3 GB in the directory for temporary files.
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
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from _common import Ratio, finish, parse_options

from bessemer.evaluation.grid import save_png
from bessemer.tracking.journal import Journal

_ROOT = Path(__file__).resolve().parent.parent
_NOISE = np.random.default_rng(0)
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


def make_store(root: Path, runs: int, lines: int, grids: int = 0) -> None:
    """Runs whose journals have `lines` lines of metrics and a hundred evaluations; the first four also have grids."""
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
        for index in range(grids if number < 4 else 0):  # noise: it compresses worse than any sample
            name = f"samples/{index:03d}.png"
            save_png(path / name, _NOISE.integers(0, 256, (256, 256, 3), dtype=np.uint8))
            record = {"kind": "samples", "nimg": index * lines * 20, "time": 1.7e9 + index, "path": name}
            own.append(json.dumps(record))
        own.append(json.dumps({"kind": "event", "nimg": lines * 1000, "time": 1.7e9 + lines, "event": "finished"}))
        (path / "journal.jsonl").write_text("\n".join(own) + "\n")


def seconds_of(*words: str, cwd: Path) -> float:
    """Wall time of a command of its own process."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-m", "bessemer.cli", *words], cwd=cwd, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def board_seconds(root: Path, profile: Path, runs: int) -> dict[str, float]:
    """Time to the page's last byte, and where there is a Chromium, to its first paint; with rows that are kept."""
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
                    tab.wait_for(f"document.querySelectorAll('table.runs tbody tr').length === {runs}")
                    found["all_rows"] = tab.evaluate("performance.now()") / 1000
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


@contextmanager
def shared_store(kind: str, root: Path) -> Iterator[str]:
    """Address of an empty store."""
    from tests.tracking.databases import postgresql

    if kind == "sqlite":
        yield f"sqlite:///{root / 'mlflow.db'}"
    else:
        with postgresql() as uri:
            yield uri


def mirrored(kind: str, root: Path, lines: int) -> dict[str, Any]:
    """Four processes send a line per 100 ms to one store: what lines cost, and points that it lacks."""
    from mlflow import MlflowClient

    make_store(root, 4, 100)
    runs = sorted(map(str, root.glob("run-*")))
    with shared_store(kind, root) as uri:
        command = [sys.executable, "-m", "tests.tracking.mirrored_run", uri, str(lines), "0.1", *runs]
        path = os.pathsep.join([str(_ROOT), os.environ.get("PYTHONPATH", "")])
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": path})
        found: dict[str, Any] = json.loads(done.stdout)
        client = MlflowClient(tracking_uri=uri)
        stored = client.search_runs([client.get_experiment_by_name("shared").experiment_id])
        kept = sum(len(client.get_metric_history(r.info.run_id, name)) for r in stored for name in ("loss/a", "loss/b"))
    seconds = found.pop("line")
    return {**found, "line": statistics.mean(seconds), "slowest": max(seconds), "wanted": 8 * lines, "stored": kept}


def review(directory: Path, runs: int, lines: int) -> tuple[list[Ratio], dict[str, Any]]:
    """Tables, page and board; `runs` several times, as its first look at a store reads all journals."""
    root = directory / "runs"
    root.mkdir()
    make_store(root, runs, lines, grids=50)
    raw: dict[str, Any] = {"runs": runs, "lines": lines}
    raw["runs_first"] = seconds_of("runs", "--root", str(root), cwd=directory)
    raw["runs_again"] = [seconds_of("runs", "--root", str(root), cwd=directory) for _ in range(3)]
    raw["leaderboard"] = seconds_of("leaderboard", "--root", str(root), cwd=directory)
    four = [str(root / f"run-{number:03d}") for number in range(4)]
    page = directory / "report.html"
    raw["report"] = seconds_of("report", *four, "--out", str(page), cwd=directory)
    raw["report_megabytes"] = page.stat().st_size / 1e6
    raw["board"] = board_seconds(root, directory / "profile", runs)
    paint = raw["board"].get("first_paint", raw["board"]["page"])
    ratios = [
        Ratio("runs_seconds", statistics.median(raw["runs_again"]), 2.0),
        Ratio("report_seconds", raw["report"], 10.0),
        Ratio("report_megabytes", raw["report_megabytes"], 15.0),
        Ratio("board_first_paint_seconds", paint, 1.0),
        Ratio("runs_first_seconds", raw["runs_first"]),
    ]
    return ratios, raw


def logging(directory: Path, lines: int) -> tuple[list[Ratio], dict[str, Any]]:
    """Lines by themselves, and of four runs that share a store."""
    raw: dict[str, Any] = {"log_line": statistics.median(logging_seconds(directory / "log.jsonl", 2000))}
    ratios = [Ratio("log_40_metrics_to_100ms_step", raw["log_line"] / 0.1, 0.01)]
    for kind in ("sqlite", "postgresql"):
        (directory / kind).mkdir()
        found = raw[kind] = mirrored(kind, directory / kind, lines)
        ratios += [
            Ratio(f"{kind}_points_lost", found["wanted"] - found["stored"], 0.0),
            Ratio(f"{kind}_log_to_100ms_step", found["line"] / 0.1, 0.01),
            Ratio(f"{kind}_driver_cpu_to_100ms_step", statistics.mean(found["cpu"]) / 0.1),
        ]
    return ratios, raw


def main() -> int:
    """Measure the parts that are asked for."""
    options = parse_options(__doc__, parts=("review", "logging"))
    sys.path.insert(0, str(_ROOT))  # the servers and the browser of the tests
    directory = Path(tempfile.mkdtemp(prefix="bessemer-review-"))
    os.environ["BESSEMER_CACHE"] = str(directory / "cache")
    ratios: list[Ratio] = []
    raw: dict[str, Any] = {}
    try:
        if "review" in options.parts:
            found, raw["review"] = review(directory, *((20, 2000) if options.quick else (500, 25_000)))
            ratios += found
        if "logging" in options.parts:
            found, raw["logging"] = logging(directory, 50 if options.quick else 150)
            ratios += found
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    return finish(ratios, raw, options)


if __name__ == "__main__":
    sys.exit(main())
