"""A search in MLflow: a run of its own with the table, runs of its trials below it, and no harm when MLflow is down."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from mlflow import MlflowClient

from bessemer.spec.job import TrackingSpec
from bessemer.tracking.journal import Journal
from bessemer.tracking.mlflow_store import page_of
from bessemer.tracking.search_journal import SearchJournal
from bessemer.tracking.search_mlflow import SearchMirror, _links, _table

SEARCH: dict[str, Any] = {
    "name": "mine",
    "job": "job.yaml",
    "space": {"training.optimizers.generator.lr": {"loguniform": [1e-5, 1e-3]}},
    "objective": {"metric": "kid_efflite0", "rungs_kimg": [1, 3]},
    "final": {"metric": "fd_efflite0", "top": 2},
    "budget": {"trials": 2},
}

# MLflow's own use of SQLAlchemy.
pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy is deprecated:DeprecationWarning")


@pytest.fixture
def search(tmp_path: Path) -> Path:
    directory = tmp_path / "searches" / "mine"
    directory.mkdir(parents=True)
    (directory / "search.yaml").write_text(yaml.safe_dump(SEARCH))
    (directory / "search.json").write_text(json.dumps({"id": "abc", "name": "mine"}))
    journal = SearchJournal(directory)
    journal.write("session", number=1)
    for number in range(2):
        rate = 10.0 ** (-3 - number)
        journal.write("trial", trial=number, point={"training.optimizers.generator.lr": rate})
        run = directory / "trials" / f"t{number:04d}"
        run.mkdir(parents=True)
        (run / "run.json").write_text(json.dumps({"id": f"run-{number}", "name": run.name, "created": 1.0}))
        (run / "job.yaml").write_text(yaml.safe_dump({"name": run.name}))
        Journal(run / "journal.jsonl").write("metrics", 1000, values={"loss/main": 0.5})
        for rung in range(2):
            fields = {"kimg": 1.0 + 2 * rung, "standard_error": 0.1, "seconds": 1.0, "values": {}}
            decision = "finish" if rung else "continue"
            value = 1.0 - 0.1 * number
            journal.write("result", trial=number, rung=rung, value=value, decision=decision, **fields)
    journal.write("finalists", trials=[1, 0], metric="fd_efflite0", mode="min", samples=10000, draws=3)
    for number in (1, 0):
        journal.write("final", trial=number, value=30.0 - number, standard_error=0.25, seconds=1.0)
    journal.write("ended", reason="all trials are over")
    return directory


@pytest.mark.slow
def test_the_search_and_its_trials_are_runs(search: Path) -> None:
    spec = TrackingSpec()
    mirror = SearchMirror(search, spec)
    mirror.finish()
    assert mirror.problem is None
    again = SearchMirror(search, spec)  # a resumed search has the same run
    again.finish()
    client = MlflowClient(tracking_uri=f"sqlite:///{search.parent / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("bessemer")
    assert experiment is not None
    runs = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
    assert sorted(runs) == ["mine", "t0000", "t0001"]
    parent = runs["mine"]
    assert parent.info.status == "FINISHED"
    assert parent.data.metrics["best/kid_efflite0"] == pytest.approx(0.9)
    for name in ("t0000", "t0001"):
        assert runs[name].data.tags["mlflow.parentRunId"] == parent.info.run_id
        assert runs[name].data.metrics["loss/main"] == 0.5
    # MLflow's page hides trials: the description of the search's run is a table that leads to each of them.
    assert parent.data.metrics["final/fd_efflite0"] == 29.0
    note = parent.data.tags["mlflow.note.content"].splitlines()
    best = f"[t0001](#/experiments/{experiment.experiment_id}/runs/{runs['t0001'].info.run_id})"
    assert note[0].startswith(
        f"Best: {best} with fd_efflite0 29 ± 0.25 (final, 3 draws of 10000 samples; kid_efflite0 0.9"
    )
    assert note[2] == "| trial | state | final fd_efflite0 | kid_efflite0 | kimg | training.optimizers.generator.lr |"
    for line, name, values in ((note[4], "t0001", "29 ± 0.25 | 0.9"), (note[5], "t0000", "30 ± 0.25 | 1")):
        link = f"#/experiments/{experiment.experiment_id}/runs/{runs[name].info.run_id}"
        assert line.startswith(f"| [{name}]({link}) | finished | {values} ± 0.1 | 3 | "), line
    table = client.download_artifacts(parent.info.run_id, "trials.csv", str(search))
    listed = {row["trial"]: row["mlflow_run"] for row in csv.DictReader(Path(table).read_text().splitlines())}
    assert listed == {name: runs[name].info.run_id for name in ("t0000", "t0001")}
    # Artifacts lie beside the database, wherever this process was started.
    assert parent.info.artifact_uri.startswith((search.parent / "mlartifacts").as_uri())
    files = {item.path for item in client.list_artifacts(parent.info.run_id)}
    assert files >= {"trials.csv", "report.json", "search.yaml", "parallel.png", "pareto.png"}


def test_links_of_a_server_are_whole_and_a_long_table_is_cut() -> None:
    page = page_of("http://host:5000/")
    assert _links(page, [("3", "abc")]) == ["http://host:5000/?workflowType=machine_learning#/experiments/3/runs/abc"]
    rows = [
        {
            "trial": f"t{n:04d}",
            "state": "stopped",
            "kimg": 1.5,
            "value": 0.1,
            "standard_error": None,
            "point": {"a": "x|y"},
        }
        for n in range(300)
    ]
    links = {row["trial"]: _links("", [("3", "a" * 32), ("3", "b" * 32)]) for row in rows}
    lines = _table({"trials": rows, "metric": "kid_efflite0", "final": None}, links)
    seeds = f"[t0000](#/experiments/3/runs/{'a' * 32}) [2](#/experiments/3/runs/{'b' * 32})"
    assert lines[2] == f"| {seeds} | stopped | 0.1 | 1.5 | x\\|y |"
    assert 4000 < len("\n".join(lines)) < 5000
    assert lines[-1] == f"\n{300 - (len(lines) - 3)} more are in trials.csv."


def test_a_dead_server_costs_nothing_but_a_note(search: Path) -> None:
    mirror = SearchMirror(search, TrackingSpec(uri="http://127.0.0.1:9"))
    with mirror:
        pass
    mirror.finish()
    assert mirror.problem is not None
    assert "127.0.0.1:9" in mirror.problem
