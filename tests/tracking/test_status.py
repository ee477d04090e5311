"""How a run is, from its journal alone."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from bessemer.errors import RunError
from bessemer.tracking.files import hold_lock
from bessemer.tracking.status import status_of

NOW = 1_800_000_000.0


def write_run(path: Path, *records: dict[str, Any], tracking: str = "{mlflow: false}") -> Path:
    path.mkdir()
    (path / "job.yaml").write_text(
        f"name: r\ntraining: {{total_kimg: 4}}\nresources: {{workers: 3}}\nevaluation: {{metrics: [kid_x]}}\n"
        f"tracking: {tracking}\n"
    )
    lines = [json.dumps({"nimg": 0, "time": NOW - 100, **record}) for record in records]
    (path / "journal.jsonl").write_text("".join(f"{line}\n" for line in lines))
    return path


STARTED = {"kind": "event", "event": "started", "workers": 3}
PLACED = {"kind": "event", "event": "placed", "hosts": {"a": 2, "b": 1}}


def line(nimg: int, seconds_ago: float, speed: float, loss: float) -> dict[str, Any]:
    values = {"loss/d": loss, "loss/g": None, "throughput/img_per_s": speed}
    return {"kind": "metrics", "nimg": nimg, "time": NOW - seconds_ago, "values": values}


def evaluation(nimg: int, value: float) -> dict[str, Any]:
    return {"kind": "evaluation", "nimg": nimg, "metric": "kid_x", "value": value, "extractor": "x"}


def test_a_run_that_is_going_on(tmp_path: Path) -> None:
    run = write_run(
        tmp_path / "r",
        STARTED,
        PLACED,
        evaluation(0, 0.9),
        line(500, 60, 90.0, 2.0),
        {"kind": "event", "event": "checkpoint", "nimg": 800, "time": NOW - 40, "path": "kimg-000000.800"},
        evaluation(800, 0.2),
        evaluation(900, 0.3),
        line(1000, 10, 110.0, 1.5),
        line(2000, 5, 100.0, 1.25),
    )
    (run / ".lock").touch()
    os.utime(run / "journal.jsonl", (NOW - 5, NOW - 5))
    with hold_lock(run / ".lock"):
        found = status_of(run, NOW)
    assert (found.state, found.kimg, found.total_kimg) == ("running", 2.0, 4.0)
    assert found.img_per_s == 100.0
    assert found.eta_s == 20.0, "2000 images are left, at the median of 90, 100 and 110 a second"
    assert found.losses == {"d": 1.25}
    assert found.evaluation is not None
    assert (found.evaluation.value, found.evaluation.kimg, found.evaluation.best) == (0.3, 0.9, 0.2)
    assert (found.checkpoint_kimg, found.checkpoint_age_s) == (0.8, 40.0)
    assert (found.workers, found.wanted_workers, found.nodes) == (3, 3, {"a": 2, "b": 1})
    assert (found.restarts, found.trouble, found.seen_s, found.mlflow) == (0, None, 5.0, None)
    assert status_of(run, NOW).eta_s is None, "nobody holds the lock: nothing is going on"


def test_ages_are_those_of_files_where_a_clock_is_off(tmp_path: Path) -> None:
    """The first worker's host is an hour late."""
    checkpoint = {"kind": "event", "event": "checkpoint", "nimg": 800, "time": NOW - 3640, "path": "kimg-000000.800"}
    run = write_run(tmp_path / "r", STARTED, checkpoint, line(1000, 3605, 100.0, 2.0))
    manifest = run / "checkpoints" / "kimg-000000.800" / "manifest.json"
    manifest.parent.mkdir(parents=True)
    manifest.touch()
    os.utime(manifest, (NOW - 40, NOW - 40))
    os.utime(run / "journal.jsonl", (NOW - 5, NOW - 5))
    found = status_of(run, NOW)
    assert (found.checkpoint_age_s, found.seen_s) == (40.0, 5.0)


def test_trouble_is_shown_until_training_goes_on(tmp_path: Path) -> None:
    lost = {"kind": "event", "event": "workers_lost", "nimg": 1000, "reasons": {"1": "died", "0": "noticed"}}
    waiting = {"kind": "event", "event": "waiting", "nimg": 1000, "reason": "2 are asked for"}
    resumed = {"kind": "event", "event": "resumed", "nimg": 800, "workers": 2}
    fewer = {**PLACED, "hosts": {"a": 2}}
    before = [STARTED, PLACED, line(1000, 60, 100.0, 2.0)]
    assert status_of(write_run(tmp_path / "a", *before, lost)).trouble == "worker 1: died; worker 0: noticed"
    assert status_of(write_run(tmp_path / "b", *before, lost, waiting)).trouble == "2 are asked for"
    found = status_of(write_run(tmp_path / "c", *before, lost, fewer, resumed, line(900, 1, 70.0, 2.0)))
    assert (found.trouble, found.restarts, found.workers, found.wanted_workers) == (None, 1, 2, 3)
    failed = {"kind": "event", "event": "failed", "error": "it is over"}
    assert status_of(write_run(tmp_path / "d", *before, failed)).trouble == "it is over"


def test_mlflow_is_linked_without_its_password(tmp_path: Path) -> None:
    run = write_run(tmp_path / "r", STARTED, tracking="{mlflow: true, uri: 'http://me:secret@host:5000/'}")
    assert status_of(run).mlflow is None, "MLflow has not heard of it yet"
    (run / "mlflow.json").write_text(json.dumps({"experiment_id": "7", "run_id": "abc"}))
    assert status_of(run).mlflow == "http://me:***@host:5000/#/experiments/7/runs/abc"


def test_a_run_that_has_not_begun_and_one_that_is_none(tmp_path: Path) -> None:
    found = status_of(write_run(tmp_path / "r"))
    assert (found.kimg, found.img_per_s, found.checkpoint_age_s, found.workers, found.seen_s) == (0.0, *[None] * 4)
    with pytest.raises(RunError, match="is no run directory"):
        status_of(tmp_path)
