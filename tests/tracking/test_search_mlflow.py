"""A search in MLflow: a run of its own with the table, runs of its trials below it, and no harm when MLflow is down."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from mlflow import MlflowClient

from bessemer.spec.job import TrackingSpec
from bessemer.tracking.journal import Journal
from bessemer.tracking.search_journal import SearchJournal
from bessemer.tracking.search_mlflow import SearchMirror

SEARCH: dict[str, Any] = {
    "name": "mine",
    "job": "job.yaml",
    "space": {"training.optimizers.generator.lr": {"loguniform": [1e-5, 1e-3]}},
    "objective": {"metric": "kid_efflite0", "rungs_kimg": [1, 3]},
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
    files = {item.path for item in client.list_artifacts(parent.info.run_id)}
    assert files >= {"trials.csv", "report.json", "search.yaml", "parallel.png", "pareto.png"}


def test_a_dead_server_costs_nothing_but_a_note(search: Path) -> None:
    mirror = SearchMirror(search, TrackingSpec(uri="http://127.0.0.1:9"))
    with mirror:
        pass
    mirror.finish()
    assert mirror.problem is not None
    assert "127.0.0.1:9" in mirror.problem
