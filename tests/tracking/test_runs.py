"""The table of runs, for sound directories and broken ones."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.tracking.conftest import RunMaker

from bessemer.cli.runs import runs as runs_command
from bessemer.errors import RunError
from bessemer.tracking.files import RUN_LOCK, hold_lock
from bessemer.tracking.index import list_runs
from bessemer.tracking.runs import evaluation_curves, flatten, load_run, metric_scores
from bessemer.tracking.search_journal import SEARCH_LOCK
from bessemer.tracking.summary import summarise


def test_row_of_a_finished_run(make_run: Any) -> None:
    row = summarise(load_run(make_run().whole().path))
    assert (row.name, row.state, row.system, row.preset) == ("quickstart", "finished", "biggan", "cifar10-ch16")
    assert (row.kimg, row.total_kimg, row.workers, row.restarts) == (40.0, 40.0, 2, 1)
    assert (row.metric, row.best, row.best_kimg, row.last) == ("kid_efflite0", pytest.approx(0.1), 40.0, row.best)
    assert (row.img_per_s, row.created) == (100.0, 1.75e9)


def _state(path: Path) -> str:
    return load_run(path).state


def test_states(make_run: Any) -> None:
    run = make_run()
    assert _state(run.path) == "stopped"  # nothing ever happened
    run.event("started", 0)
    assert _state(run.path) == "running"  # no lock, but the journal is fresh
    (run.path / RUN_LOCK).touch()
    assert _state(run.path) == "stopped"  # nobody holds the lock
    with hold_lock(run.path / RUN_LOCK):
        assert _state(run.path) == "running"
        run.event("failed", 100, error="no")
        assert _state(run.path) == "failed"  # the driver still holds the lock while it writes the report
        run.event("resumed", 0)
        assert _state(run.path) == "running"
    assert _state(run.path) == "stopped"
    run.event("finished", 200)
    run.evaluate(100, 0.1)
    run.event("warning", 200, about="mlflow", message="late")
    assert _state(run.path) == "finished"


def test_a_trial_runs_for_as_long_as_its_search_unless_it_is_over(tmp_path: Path) -> None:
    search = tmp_path / "mine"
    run = RunMaker(search / "trials" / "t0000")
    (search / "search.json").write_text("{}")
    (search / SEARCH_LOCK).touch()
    run.event("started", 0)
    assert _state(run.path) == "stopped"  # its search was killed: the journal is fresh, and has no last word
    with hold_lock(search / SEARCH_LOCK):
        assert _state(run.path) == "running"
        assert list_runs(search / "trials")[0].state == "running"
        run.event("stopped", 100, reason="others were better")
        assert _state(run.path) == "stopped"
    assert list_runs(search / "trials")[0].state == "stopped"


def test_a_run_that_was_told_to_stop_is_stopped_until_it_goes_on(make_run: Any) -> None:
    run = make_run()
    run.event("started", 0)
    run.event("preempted", 100)
    assert _state(run.path) == "stopped"
    run.event("resumed", 100)
    assert _state(run.path) == "running"


def test_scores_are_of_one_protocol(make_run: Any) -> None:
    run = make_run().whole()
    run.evaluate(40_000, 0.01, samples=7)  # somebody looked again, with fewer samples
    run.evaluate(20_000, float("nan"))
    scores = metric_scores(run.path, "kid_efflite0")
    assert scores == {0: 0.5, 10_000: pytest.approx(0.4), 30_000: pytest.approx(0.2), 40_000: pytest.approx(0.1)}
    assert metric_scores(run.path, None) == metric_scores(run.path, "fid") == {}


def test_the_best_of_a_share_is_the_highest(make_run: Any) -> None:
    run = make_run()
    for nimg, value in ((0, 0.1), (1000, 0.6), (2000, 0.4)):
        run.evaluate(nimg, value, metric="recall_efflite0", higher_is_better=True)
    assert (summarise(load_run(run.path)).best, summarise(load_run(run.path)).best_kimg) == (0.6, 1.0)
    assert metric_scores(run.path, "recall_efflite0") == {0: -0.1, 1000: -0.6, 2000: -0.4}


def test_old_journal_without_lock_is_stopped(make_run: Any) -> None:
    run = make_run()
    (run.path / "journal.jsonl").write_text('{"kind":"event","nimg":0,"time":1.7e9,"event":"started"}\n')
    assert _state(run.path) == "stopped"


def test_evaluation_of_an_old_snapshot_does_not_turn_the_clock_back(make_run: Any) -> None:
    run = make_run().whole()
    before = load_run(run.path)
    late = {"kind": "evaluation", "nimg": 10_000, "time": before.records[-1]["time"] + 9e4, "metric": "fid", "value": 1}
    with run.journal.path.open("a") as file:
        file.write(json.dumps(late) + "\n")
    after = load_run(run.path)
    assert len(after.records) == len(before.records) + 1
    assert after.nimg == 40_000
    assert after.seconds == before.seconds


def test_data_hash_is_found_where_it_is(make_run: Any) -> None:
    run = make_run()
    assert load_run(run.path).data_hash is None
    for name, value in (("kimg-000000.000", "old"), ("kimg-000001.000", "snapshot")):
        (run.path / "snapshots" / name).mkdir(parents=True)
        (run.path / "snapshots" / name / "snapshot.json").write_text(json.dumps({"data_hash": value}))
    assert load_run(run.path).data_hash == "snapshot"
    run.event("started", 0, data_hash="event")
    run.event("checkpoint", 0)
    assert load_run(run.path).data_hash == "event"
    assert load_run(make_run("other", data_hash="info").path).data_hash == "info"


def test_protocols_do_not_share_a_curve(make_run: Any) -> None:
    run = make_run().whole()
    run.evaluate(40_000, 0.001, samples=50)
    own, visitor = evaluation_curves(load_run(run.path))
    assert [point.nimg for point in own.points] == [0, 10_000, 20_000, 30_000, 40_000]
    assert [point.value for point in visitor.points] == [0.001]
    assert visitor.protocol["samples"] == 50
    assert summarise(load_run(run.path)).best == pytest.approx(0.1)  # not the visitor's


def test_list_keeps_sound_runs_beside_broken_ones(make_run: Any, runs_root: Path) -> None:
    make_run("sound").whole()
    make_run("newer", created=1.76e9)
    shutil.copytree(runs_root / "sound", runs_root / "no-info")
    (runs_root / "no-info" / "run.json").unlink()
    shutil.copytree(runs_root / "sound", runs_root / "bad-info")
    (runs_root / "bad-info" / "run.json").write_text("[1, 2]")
    for name, source in {"bad-job": "a: [", "alias": "a: &x [1]\nb: [*x, *x]", "list": "- 1"}.items():
        shutil.copytree(runs_root / "sound", runs_root / name)
        (runs_root / name / "job.yaml").write_text(source)
    (runs_root / "journal-is-directory" / "journal.jsonl").mkdir(parents=True)
    make_run("also").path.joinpath("journal.jsonl").mkdir()
    (runs_root / "mlartifacts").mkdir()
    (runs_root / ".hidden").mkdir()
    (runs_root / "mlflow.db").touch()
    rows = list_runs(runs_root)
    assert [row.name for row in rows if row.state != "broken"] == ["newer", "sound"]
    notes = {row.name: row.note for row in rows if row.state == "broken"}
    assert notes.pop("also").endswith("check its permissions")
    assert notes == {
        "no-info": "run.json is missing",
        "bad-info": "run.json is damaged",
        "bad-job": "job.yaml is damaged",
        "alias": "job.yaml is damaged",
        "list": "job.yaml is damaged",
    }


def test_wrong_types_everywhere(make_run: Any) -> None:
    run = make_run("odd", created="yesterday", git_sha=["x"])
    run.path.joinpath("job.yaml").write_text("system: 3\ntraining: {total_kimg: many}\nevaluation: {metrics: 5}\n")
    run.journal.write("metrics", 1, values=[1, 2])
    run.journal.write("metrics", 2, values={"throughput/img_per_s": "fast"})
    run.journal.write("evaluation", 2, metric=7, value="low")
    run.journal.write("evaluation", 2, metric="fid", value=None)
    run.journal.write("event", 3, event=["finished"], workers="two")
    row = summarise(load_run(run.path))
    assert (row.system, row.total_kimg, row.metric, row.img_per_s, row.workers) == (None,) * 5
    (curve,) = evaluation_curves(load_run(run.path))
    assert (curve.points, curve.not_finite) == ([], 1)


def test_not_a_run_and_not_a_directory(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"no run directory.*`bessemer runs`"):
        load_run(tmp_path)
    with pytest.raises(RunError, match=r"absent: cannot be listed .*--root"):
        list_runs(tmp_path / "absent")


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_unreadable_directory_is_noted(make_run: Any, runs_root: Path) -> None:
    run = make_run().whole()
    run.path.joinpath("journal.jsonl").chmod(0)
    assert "check its permissions" in (list_runs(runs_root)[0].note or "")


def test_flatten_names_fields_by_their_path() -> None:
    job = yaml.safe_load("a: {b: 1, c: [1, x], d: {}}\ne: null\nf: text\n2026-01-01: {1: true}\n")
    assert flatten(job) == [
        ("a.b", "1"),
        ("a.c", '[1, "x"]'),
        ("a.d", "{}"),
        ("e", "null"),
        ("f", "text"),
        ("2026-01-01.1", "true"),
    ]


def test_flatten_is_bounded() -> None:
    wide: Any = 0
    for _ in range(5):
        wide = {str(key): wide for key in range(9)}
    assert len(flatten(wide)) == 1000
    deep: Any = 0
    for _ in range(30):
        deep = {"x": deep}
    ((name, value),) = flatten(deep)
    assert name.count("x") == 8
    assert value.count("x") == 22


def test_command_prints_the_table_and_the_notes(
    make_run: Any, runs_root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_run("first").whole()
    make_run("broken").path.joinpath("run.json").unlink()
    runs_command(root=runs_root)
    shown = capsys.readouterr()
    assert "first" in shown.out
    assert "finished" in shown.out
    assert "skipped" in shown.err
    assert "run.json is missing" in shown.err
    runs_command(root=runs_root, json=True)
    rows = json.loads(capsys.readouterr().out)
    assert [(row["name"], row["state"]) for row in rows] == [("first", "finished"), ("broken", "broken")]
