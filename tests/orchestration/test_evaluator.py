"""Evaluation beside training: what waits, what it means for the run, and that nobody's death loses anything."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from tests.orchestration.processes import bessemer, torchrun, wait_for

from bessemer.data.packing.pack import pack
from bessemer.orchestration.backlog import Backlog, Published, split
from bessemer.orchestration.verdict import judge_curve
from bessemer.spec.job import EvaluationSpec
from bessemer.tracking.files import hold_lock
from bessemer.tracking.journal import Journal, Record, read_journal
from bessemer.tracking.runs import Point


def published(nimg: int, sha: str = "a") -> Published:
    return Published(nimg, f"snapshots/kimg-{nimg}", sha)


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    return Journal(tmp_path / "journal.jsonl")


def publish(journal: Journal, nimg: int, sha: str = "a") -> None:
    journal.write("event", nimg, event="snapshot", path=published(nimg).path, weights_sha256=sha)


def test_what_is_published_waits_until_it_is_judged(journal: Journal) -> None:
    backlog = Backlog(journal.path)
    assert backlog.read() == []
    for nimg in (0, 200, 100):
        publish(journal, nimg)
    assert backlog.read() == [published(0), published(100), published(200)]
    for nimg, event in ((0, "evaluated"), (100, "evaluation_skipped"), (200, "evaluation_failed")):
        journal.write("event", nimg, event=event, weights_sha256="a")
    assert backlog.read() == []
    assert Backlog(journal.path).read() == [], "whoever comes later reads the same"


def test_going_back_takes_away_what_waits_beyond(journal: Journal) -> None:
    backlog = Backlog(journal.path)
    for nimg in (100, 200, 300):
        publish(journal, nimg)
    journal.write("event", 200, event="resumed")
    assert backlog.read() == [published(100), published(200)]
    publish(journal, 300, sha="b")
    journal.write("event", 300, event="evaluated", weights_sha256="a")  # of what is no part of the run any more
    assert backlog.read()[-1] == published(300, "b")


def test_the_end_of_training_is_the_end_unless_it_goes_on(journal: Journal) -> None:
    backlog = Backlog(journal.path)
    for event, over in (("started", False), ("preempted", True), ("resumed", False), ("finished", True)):
        journal.write("event", 10, event=event)
        backlog.read()
        assert backlog.over is over, event


def test_the_newest_goes_first_and_the_untrained_network_is_never_left_out() -> None:
    waiting = [published(nimg) for nimg in (0, 100, 200, 300, 400)]
    wanted, beyond = split(waiting, 2)
    assert [p.nimg for p in wanted] == [400, 300, 0]
    assert sorted(p.nimg for p in beyond) == [100, 200]
    assert split(waiting[:2], 2) == ([published(100), published(0)], [])


def spec(**fields: Any) -> EvaluationSpec:
    return EvaluationSpec(metrics=("kid_efflite0",), **fields)


def points(values: Sequence[float], error: float | None = None) -> list[Point]:
    return [Point(1000 * k, value, error) for k, value in enumerate(values)]


@pytest.mark.parametrize(
    ("values", "error", "stops"),
    [
        ([], None, False),
        ([5, 4, 3, 2], None, False),
        ([5, 3, 3.1, 3.2], None, False),  # two kimg since the best
        ([5, 3, 3.1, 3.2, 3.3], None, True),
        ([5, 3, 3.1, 3.2, 2.9], None, False),
        ([5, 3, 3.1, 3.2, 2.9], 0.2, True),  # within its error, no improvement
        ([5, 4.9, 4.8, 4.7], 0.2, False),  # slowly, but more than its error over the patience
        ([5, 4.95, 4.9, 4.85], 0.2, True),
    ],
)
def test_a_run_stops_when_its_metric_has_not_improved(values: list[float], error: float | None, stops: bool) -> None:
    verdict = judge_curve(points(values, error), spec(stop_after_kimg=3))
    assert (verdict is not None) is stops
    if verdict is not None:
        assert verdict.action == "stop"
        assert "kid_efflite0 has not improved on" in verdict.reason


@pytest.mark.parametrize(
    ("values", "error", "latest"),
    [
        ([5, 2, 3.9], None, None),
        ([5, 2, 4.1], None, 1000),
        ([5, 2, 4.1, 3], None, None),  # it came back by itself
        ([5, -0.01, 0.15], 0.1, None),  # within twice the error of nothing
        ([5, -0.01, 0.25], 0.1, 1000),
        ([5], None, None),
    ],
)
def test_a_run_goes_back_when_its_metric_is_far_worse(
    values: list[float], error: float | None, latest: int | None
) -> None:
    verdict = judge_curve(points(values, error), spec(rollback_at=2.0))
    assert (verdict and verdict.latest) == latest
    if verdict is not None:
        assert verdict.action == "rollback"


def test_a_share_is_judged_the_other_way_round() -> None:
    rises, falls = points([0.1, 0.3, 0.5, 0.6], None), points([0.6, 0.5, 0.4, 0.2], None)
    assert judge_curve(rises, spec(stop_after_kimg=3, rollback_at=2.0), higher_is_better=True) is None
    stop = judge_curve(falls, spec(stop_after_kimg=3), higher_is_better=True)
    assert stop is not None
    assert "has not improved on 0.6 since 0 kimg" in stop.reason
    back = judge_curve(falls, spec(rollback_at=2.0), higher_is_better=True)
    assert back is not None
    assert back.latest == 0
    assert "less than 1/2 its best, 0.6" in back.reason


JOB = """
name: beside
seed: 3
system: {name: biggan, preset: tiny32}
data: {path: DATA}
training: {total_kimg: 0.48, batch_size: 16, slice_size: 8, log_every_kimg: 0.1}
ema: {half_life_kimg: 0.2}
checkpoint: {every_kimg: 0.16}
evaluation: {metrics: [kid_efflite0], samples: 32, every_kimg: 0.16, grid: 2, backlog: 9}
tracking: {mlflow: false}
resources: {workers: 1}
"""


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("beside")
    pack("digits", root / "digits", size=32, mode="RGB", limit=20)
    path = root / "job.yaml"
    path.write_text(JOB.replace("DATA", str(root / "digits")))
    return path


@pytest.fixture(scope="module")
def in_training(job: Path) -> Path:
    """The run whose worker evaluates while training stands still."""
    run = job.parent / "in_training"
    process = torchrun(job, run, workers=1)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return run


def beside(job: Path, directory: Path, **changes: str) -> Path:
    """The same job with an evaluator beside it, and other changes of text."""
    text = job.read_text().replace("evaluation: {", "evaluation: {beside: true, ")
    for old, new in changes.items():
        assert old in text
        text = text.replace(old, new)
    path = directory / "job.yaml"
    path.write_text(text)
    return path


def evaluator(run: Path, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "bessemer.orchestration.evaluator", str(run), *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def results(run: Path) -> dict[int, tuple[Any, ...]]:
    """What evaluations say, without how long they took."""
    records = [r for r in read_journal(run / "journal.jsonl") if r["kind"] == "evaluation"]
    found = {r["nimg"]: tuple(r[k] for k in ("metric", "value", "standard_error", "weights_sha256")) for r in records}
    assert len(found) == len(records)
    return found


def happened(run: Path, *names: str) -> list[Record]:
    return [r for r in read_journal(run / "journal.jsonl") if r.get("event") in names]


@pytest.mark.multiprocess
@pytest.mark.slow
def test_killed_evaluators_lose_nothing_and_say_the_same(job: Path, in_training: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    trainer = torchrun(beside(job, tmp_path), run, workers=1)
    wait_for("a snapshot", lambda: bool(happened(run, "snapshot")), trainer)
    first = evaluator(run)
    wait_for("a result", lambda: bool(happened(run, "evaluated")), first)
    first.kill()
    first.communicate()
    output, _ = trainer.communicate(timeout=300)
    assert trainer.returncode == 0, output
    left = Backlog(run / "journal.jsonl").read()
    assert len(left) in (1, 2, 3), "training must not have waited for the evaluator"
    with hold_lock(run / ".evaluator.lock"):
        refused = evaluator(run)
        output, _ = refused.communicate(timeout=60)
        assert refused.returncode == 2
        assert "another process holds this lock" in output
    second = evaluator(run)
    output, _ = second.communicate(timeout=300)
    assert second.returncode == 0, output
    assert Backlog(run / "journal.jsonl").read() == []
    assert set(results(run)) == {0, 160, 320, 480}
    assert results(run) == results(in_training)
    for nimg in (0, 160, 320, 480):
        grid = f"samples/kimg-{nimg / 1000:010.3f}.png"
        assert (run / grid).read_bytes() == (in_training / grid).read_bytes()


@pytest.mark.multiprocess
@pytest.mark.slow
def test_ray_replaces_a_lost_evaluator_and_the_run_ends_with_all_results(
    job: Path, in_training: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    small = {"{workers: 1}": "{workers: 1, cpus_per_worker: 0.5, evaluator_cpus: 0.5}"}
    process = bessemer("train", beside(job, tmp_path, **small), "--run-dir", run)
    log = run / "logs" / "evaluator.log"
    wait_for("the evaluator", lambda: log.exists() and "judging" in log.read_text(), process)
    os.kill(int(re.findall(r"process (\d+)", log.read_text())[-1]), signal.SIGKILL)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    assert len(set(re.findall(r"process (\d+)", log.read_text()))) == 2
    assert results(run) == results(in_training)
    assert (run / "report.html").is_file()


@pytest.mark.multiprocess
@pytest.mark.slow
def test_a_run_that_does_not_improve_stops_early_and_is_finished(job: Path, tmp_path: Path) -> None:
    """At this learning rate no image changes: the second evaluation is as good as the first."""
    text = job.read_text().replace("backlog: 9", "stop_after_kimg: 0.16").replace("total_kimg: 0.48", "total_kimg: 48")
    path = tmp_path / "job.yaml"
    path.write_text(text.replace("log_every", "optimizers: {generator: {lr: 1.0e-12}}, log_every"))
    run = tmp_path / "run"
    process = torchrun(path, run, workers=1)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    (early,) = happened(run, "stopped_early")
    assert early["nimg"] == 160
    assert "kid_efflite0 has not improved on" in early["reason"]
    assert [r["nimg"] for r in happened(run, "finished")] == [160]
    assert (run / "checkpoints" / "kimg-000000.160" / "manifest.json").is_file()
