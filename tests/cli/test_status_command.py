"""`bessemer status` of a run directory: once, as JSON, and line by line until the run is over."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from bessemer.cli.app import app
from bessemer.tracking.files import hold_lock
from bessemer.tracking.journal import Journal

RUNNER = CliRunner()


@pytest.fixture
def run(tmp_path: Path) -> Path:
    path = tmp_path / "mine"
    path.mkdir()
    (path / "job.yaml").write_text("name: mine\ntraining: {total_kimg: 4}\ntracking: {mlflow: false}\n")
    (path / "run.json").write_text("{}")
    journal = Journal(path / "journal.jsonl")
    journal.write("event", 0, event="started", workers=2)
    journal.write("event", 0, event="placed", hosts={"a": 1, "b": 1})
    journal.write("metrics", 1000, values={"loss/d": 1.5, "throughput/img_per_s": 100.0})
    journal.write("evaluation", 1000, metric="kid_x", value=0.25)
    journal.write("event", 1000, event="checkpoint", path="kimg-000001.000")
    return path


def test_once(run: Path) -> None:
    with hold_lock(run / ".lock"):
        shown = RUNNER.invoke(app, ["status", str(run)]).stdout
        found = json.loads(RUNNER.invoke(app, ["status", str(run), "--json"]).stdout)
    lines = dict(line.split(maxsplit=1) for line in shown.splitlines()[1:])
    assert shown.splitlines()[0] == "mine"
    assert lines["state"] == "running"
    assert lines["progress"] == "1/4 kimg (25%)"
    assert lines["speed"] == "100 img/s, 0:00:30 left"
    assert lines["losses"] == "d 1.5"
    assert lines["evaluation"] == "kid_x 0.25 at 1 kimg, best 0.25"
    assert lines["checkpoint"].startswith("1 kimg, 0:00:0")
    assert lines["workers"] == "2 on a (1), b (1)"
    assert found["nodes"] == {"a": 1, "b": 1}
    assert found["eta_s"] == 30.0


def test_watching_ends_with_the_run(run: Path) -> None:
    def end() -> None:
        time.sleep(0.5)
        journal = Journal(run / "journal.jsonl")
        journal.write("event", 1000, event="workers_lost", reasons={"1": "died"})
        time.sleep(0.5)
        journal.write("event", 4000, event="finished", workers=2)

    thread = threading.Thread(target=end)
    thread.start()
    with hold_lock(run / ".lock"):
        done = RUNNER.invoke(app, ["status", str(run), "--watch", "--every", "0.1"])
    thread.join()
    lines = [line.split(maxsplit=1)[1] for line in done.stdout.splitlines()]
    assert len(lines) > 5
    assert lines[0] == "running  1/4 kimg (25%)  100 img/s, 0:00:30 left  d 1.500"
    assert any(line.endswith("worker 1: died") for line in lines)
    assert lines[-1].startswith("finished  4/4 kimg (100%)")


def test_json_lines(run: Path) -> None:
    Journal(run / "journal.jsonl").write("event", 4000, event="finished", workers=2)
    (line,) = RUNNER.invoke(app, ["status", str(run), "--watch", "--json"]).stdout.splitlines()
    assert json.loads(line)["state"] == "finished"
