"""The mirror against real MLflow stores on SQLite, and against stores that refuse, hang or vanish."""

from __future__ import annotations

import json
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bessemer.cli.report import report as report_command
from bessemer.errors import RunError, TrackingError
from bessemer.spec.job import TrackingSpec
from bessemer.tracking.files import hold_lock
from bessemer.tracking.journal import read_entries, read_journal
from bessemer.tracking.mlflow_mirror import MlflowMirror, replay

pytestmark = [
    pytest.mark.slow,  # MLflow takes seconds to import and to make its tables
    # MLflow's own use of SQLAlchemy; Python hides it from people, pytest does not.
    pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy is deprecated:DeprecationWarning"),
]

SPEC = TrackingSpec(uri="sqlite:///mlflow.db", experiment="tests")


class Store:
    """What a person would see in MLflow."""

    def __init__(self, database: Path) -> None:
        from mlflow import MlflowClient

        self.client = MlflowClient(tracking_uri=f"sqlite:///{database}")

    def runs(self) -> list[Any]:
        experiments = [e.experiment_id for e in self.client.search_experiments()]
        return list(self.client.search_runs(experiments))

    def only_run(self) -> Any:
        (run,) = self.runs()
        return run

    def points(self, name: str) -> list[tuple[int, float]]:
        history = self.client.get_metric_history(self.only_run().info.run_id, name)
        return sorted((metric.step, metric.value) for metric in history)

    def files(self, folder: str | None = None) -> set[str]:
        return {item.path for item in self.client.list_artifacts(self.only_run().info.run_id, folder)}


def _mirror(run: Any, status: Any, spec: TrackingSpec = SPEC) -> bool:
    mirror = MlflowMirror(run.path, spec, run.path.parent, interval=0.02)
    mirror.start()
    return mirror.stop(status, timeout=120)


def _messages(run: Any) -> list[str]:
    return [r["message"] for r in read_journal(run.journal.path) if r.get("event") == "warning"]


def _raw(run: Any, name: str) -> list[tuple[int, float]]:
    """Every value of the journal, those of the repeated stretch once."""
    records = [entry.record for entry in read_entries(run.journal.path)]
    return sorted({(r["nimg"], r["values"][name]) for r in records if r["kind"] == "metrics"})


def test_whole_run_arrives(make_run: Any, database: Path) -> None:
    run = make_run(data_hash="d474").whole()
    (run.path / "report.html").write_text("<p>report")
    assert _mirror(run, "FINISHED")
    store, entry = Store(database), Store(database).only_run()
    assert set(store.points("loss/generator")) == set(_raw(run, "loss/generator"))
    assert {step for step, _ in store.points("throughput/img_per_s")} == set(range(1000, 40_001, 1000))
    assert [step for step, _ in store.points("evaluation/kid_efflite0")] == [0, 10_000, 20_000, 30_000, 40_000]
    assert entry.data.metrics["best/kid_efflite0"] == pytest.approx(0.1)
    assert entry.data.metrics["standard_error/kid_efflite0"] == 0.01
    assert entry.data.params["training.batch_size"] == "64"
    assert entry.data.params["evaluation.metrics"] == '["kid_efflite0", "fd_efflite0"]'
    tags = entry.data.tags
    assert tags["bessemer.data_hash"] == "d474"
    assert tags["mlflow.source.git.commit"] == tags["bessemer.git_sha"] == "0123abc"
    assert tags["bessemer.bessemer"] == "0.1"
    assert tags["bessemer.run_dir"] == str(run.path)
    assert (entry.info.status, entry.info.run_name) == ("FINISHED", "quickstart")
    assert {"job.yaml", "journal.jsonl", "report.html", "samples"} <= store.files()
    assert "samples/kimg-000040.000.png" in store.files("samples")
    assert "mlartifacts" in entry.info.artifact_uri
    assert str(run.path.parent) in entry.info.artifact_uri
    assert _messages(run) == []


def test_restarts_continue_one_run(make_run: Any, database: Path) -> None:
    run = make_run()
    run.event("started", 0)
    run.train(0, 10_000)
    assert _mirror(run, "KILLED")
    store = Store(database)
    assert store.only_run().info.status == "KILLED"
    run.event("resumed", 10_000)
    run.train(10_000, 20_000)
    mirror = MlflowMirror(run.path, SPEC, run.path.parent, interval=0.02)
    mirror.start()
    run.train(20_000, 30_000)  # while it follows
    assert mirror.stop("FINISHED", timeout=120)
    assert store.only_run().info.status == "FINISHED"
    assert store.points("loss/generator") == _raw(run, "loss/generator")
    state = json.loads((run.path / "mlflow.json").read_text())
    assert state["run_id"] == store.only_run().info.run_id
    assert state["offset"] == run.journal.path.stat().st_size


@pytest.mark.parametrize("damage", ["lost", "torn", "old"])
def test_lost_or_old_state_neither_doubles_the_run_nor_its_points(make_run: Any, database: Path, damage: str) -> None:
    run = make_run().whole()
    assert _mirror(run, "FINISHED")
    store, state = Store(database), run.path / "mlflow.json"
    before = {name: store.points(name) for name in ("loss/generator", "evaluation/kid_efflite0", "best/kid_efflite0")}
    if damage == "lost":
        state.unlink()
    elif damage == "torn":
        state.write_text('{"run_id": "')
    else:  # as after a crash between sending and writing the offset
        state.write_text(json.dumps(json.loads(state.read_text()) | {"offset": 100}))
    replay(run.path)
    assert {name: store.points(name) for name in before} == before
    assert store.only_run().info.status == "FINISHED"


def test_store_that_cannot_be_opened_is_replayed_later(make_run: Any, runs_root: Path, empty_database: Path) -> None:
    run = make_run().whole()
    (runs_root / "mlflow.db").mkdir()  # no database can be made here
    mirror = MlflowMirror(run.path, SPEC, runs_root, interval=0.02)
    mirror.start()
    assert not mirror.stop("FINISHED", timeout=120)
    assert any("bessemer report quickstart --mirror" in message for message in _messages(run))
    with pytest.raises(TrackingError, match=r"^tracking\.uri 'sqlite:.*is a directory"):
        replay(run.path)
    (runs_root / "mlflow.db").rmdir()
    shutil.copy(empty_database, runs_root / "mlflow.db")
    assert replay(run.path) == Store(runs_root / "mlflow.db").only_run().info.run_id
    store = Store(runs_root / "mlflow.db")
    assert set(store.points("loss/generator")) == set(_raw(run, "loss/generator"))
    assert store.only_run().info.status == "FINISHED"
    assert read_journal(run.journal.path)[-1]["event"] == "recovered"


def test_store_that_comes_back_during_the_run(make_run: Any, runs_root: Path, empty_database: Path) -> None:
    run = make_run()
    run.train(0, 5000)
    (runs_root / "mlflow.db").mkdir()
    mirror = MlflowMirror(run.path, SPEC, runs_root, interval=0.02)
    mirror.start()
    _wait_for(run, "warning")
    (runs_root / "mlflow.db").rmdir()
    shutil.copy(empty_database, runs_root / "mlflow.db")
    _wait_for(run, "recovered")
    run.train(5000, 8000)
    assert mirror.stop("FINISHED", timeout=120)
    assert len(_messages(run)) == 1
    assert Store(runs_root / "mlflow.db").points("loss/generator") == _raw(run, "loss/generator")


def _wait_for(run: Any, event: str) -> None:
    import time

    deadline = time.monotonic() + 120
    while not any(record.get("event") == event for record in read_journal(run.journal.path)):
        assert time.monotonic() < deadline, f"no {event} event"
        time.sleep(0.02)


@pytest.fixture
def silent_server() -> Iterator[str]:
    """A server that accepts connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


def test_store_that_hangs_does_not_hold_the_run(
    make_run: Any, silent_server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "4")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    run = make_run()
    spec = TrackingSpec(uri=silent_server)
    mirror = MlflowMirror(run.path, spec, run.path.parent)
    mirror.start()
    run.train(0, 3000)  # the journal is written while the store hangs
    assert not mirror.stop("FINISHED", timeout=0.2)
    assert "did not answer within 0.2 s" in _messages(run)[0]
    assert [r["nimg"] for r in read_journal(run.journal.path) if r["kind"] == "metrics"] == [1000, 2000, 3000]
    assert mirror._thread is not None
    assert mirror._thread.daemon
    mirror._thread.join(120)  # ends by itself once the request has timed out
    assert not mirror._thread.is_alive()


def test_mirror_that_is_off_does_nothing(make_run: Any, runs_root: Path) -> None:
    run = make_run().whole()
    assert _mirror(run, "FINISHED", TrackingSpec(mlflow=False))
    assert not (run.path / "mlflow.json").exists()
    assert not (runs_root / "mlflow.db").exists()


def test_replay_refuses_while_another_process_mirrors(make_run: Any, database: Path) -> None:
    run = make_run().whole()
    with hold_lock(run.path / ".mlflow.lock"), pytest.raises(RunError, match="another process holds"):
        replay(run.path)


def test_awkward_names_values_and_paths(make_run: Any, database: Path, tmp_path: Path) -> None:
    run = make_run(note="x" * 20_000, tags={"a@b": "<i>"})
    job = (run.path / "job.yaml").read_text().replace("config: {}", "config: {'a@b': 1, 'a#b': 2}")
    (run.path / "job.yaml").write_text(job + f"comment: {'y' * 9000}\n")
    (tmp_path / "secret.png").write_bytes(b"secret")
    for path in ("../../secret.png", str(tmp_path / "secret.png"), "samples/none.png", 3, None):
        run.journal.write("samples", 0, path=path)
    names = ["kid@2", "a[0]", "/a//b/../c", "..", "", "é ü", "n" * 400, "a\nb"]
    run.journal.write("metrics", 2**63 - 1, values=dict.fromkeys(names, 1e308))
    run.journal.write("metrics", 3, values={"nan": float("nan"), "text": "x", "flag": True, "huge": 10**400, "ok": 2})
    run.journal.write("metrics", 4, values={f"many/{index}": index for index in range(2345)})
    assert _mirror(run, "FAILED")
    store, entry = Store(database), Store(database).only_run()
    assert _messages(run) == []
    assert entry.info.status == "FAILED"
    metrics = set(entry.data.metrics)
    assert {"kid_2", "a_0_", "_/a/_/b/_/c", "_", "é ü", "n" * 250, "a_b", "ok", "many/2344"} <= metrics
    assert metrics.isdisjoint({"nan", "text", "flag", "huge"})
    assert entry.data.params["system.config.a_b"] == "2"
    assert len(entry.data.params["comment"]) == 6000
    assert store.files("samples") == set()


def test_protocols_do_not_share_a_metric(make_run: Any, database: Path) -> None:
    run = make_run()
    run.evaluate(0, 0.5)
    run.evaluate(0, 0.7, samples=50)
    assert _mirror(run, "KILLED")
    run.evaluate(1000, 0.4)
    run.evaluate(1000, 0.6, samples=50)  # the numbering survives a restart
    assert _mirror(run, "FINISHED")
    store = Store(database)
    assert store.points("evaluation/kid_efflite0") == [(0, 0.5), (1000, 0.4)]
    assert store.points("evaluation/kid_efflite0 protocol 2") == [(0, 0.7), (1000, 0.6)]
    assert store.points("best/kid_efflite0") == [(0, 0.5), (1000, 0.4)]


def test_the_best_of_a_share_is_the_highest(make_run: Any, database: Path) -> None:
    run = make_run()
    for nimg, value in ((0, 0.1), (1000, 0.6), (2000, 0.4)):
        run.evaluate(nimg, value, metric="recall_efflite0", higher_is_better=True)
    assert _mirror(run, "FINISHED")
    assert Store(database).points("best/recall_efflite0") == [(0, 0.1), (1000, 0.6), (2000, 0.6)]


def test_changed_job_becomes_a_tag(make_run: Any, database: Path) -> None:
    run = make_run().whole()
    assert _mirror(run, "FINISHED")
    job = run.path / "job.yaml"
    job.write_text(job.read_text().replace("total_kimg: 40.0", "total_kimg: 80.0"))
    run.train(40_000, 41_000)
    assert _mirror(run, "FINISHED")
    entry = Store(database).only_run()
    assert entry.data.params["training.total_kimg"] == "40.0"
    assert entry.data.tags["changed.training.total_kimg"] == "80.0"


def test_run_deleted_in_mlflow_is_made_anew(make_run: Any, database: Path) -> None:
    run = make_run().whole()
    first = replay(run.path)
    store = Store(database)
    store.client.delete_run(first)
    second = replay(run.path)
    assert second != first
    assert len(store.runs()) == 1
    assert set(store.points("loss/generator")) == set(_raw(run, "loss/generator"))


def test_deleted_experiment_is_named(make_run: Any, database: Path) -> None:
    run = make_run().whole()
    replay(run.path)
    store = Store(database)
    store.client.delete_experiment(store.only_run().info.experiment_id)
    with pytest.raises(TrackingError, match=r"tracking\.experiment 'tests' was deleted"):
        replay(run.path)


def test_replay_of_a_damaged_tracking_section(make_run: Any) -> None:
    run = make_run().whole()
    (run.path / "job.yaml").write_text("tracking: {mlflow: perhaps}\n")
    with pytest.raises(TrackingError, match=r"job\.yaml: tracking\.mlflow: .*boolean"):
        replay(run.path)


def test_report_command_sends_what_was_missed(
    make_run: Any, database: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run().whole()
    report_command([str(run.path)], mirror=True)
    store = Store(database)
    assert f"MLflow run: {store.only_run().info.run_id}" in capsys.readouterr().out
    assert "report.html" in store.files()
