"""Stores that runs share, and that go away: four runs at once, and a server that dies in the middle of a run."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from tests.orchestration.processes import bessemer, digits_job, images_seen, torchrun, wait_for
from tests.tracking.databases import NO_POSTGRESQL, POSTGRESQL, free_port, mlflow_server, postgresql

from bessemer.tracking.journal import read_entries, read_journal
from bessemer.tracking.mlflow_mirror import replay

pytestmark = [
    pytest.mark.multiprocess,
    pytest.mark.slow,
    # MLflow's own use of SQLAlchemy; Python hides it from people, pytest does not.
    pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy is deprecated:DeprecationWarning"),
]

RUNS, LINES = 4, 300


@pytest.fixture(params=["sqlite", "postgresql"])
def shared_store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """Address of a store in which there is nothing yet, not even tables."""
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path / 'mlflow.db'}"
        return
    if POSTGRESQL is None:
        pytest.skip(NO_POSTGRESQL)
    with postgresql() as uri:
        yield uri


def test_four_runs_lose_no_point_in_one_store(make_run: Any, shared_store: str) -> None:
    runs = [make_run(f"run-{number}") for number in range(RUNS)]
    command = [sys.executable, "-m", "tests.tracking.mirrored_run", shared_store, str(LINES), "0.01"]
    done = subprocess.run([*command, *(str(run.path) for run in runs)], stdout=subprocess.PIPE, timeout=300, check=True)
    assert json.loads(done.stdout)["complete"] == RUNS
    stored = points_of(shared_store)
    assert stored.keys() == {run.path.name for run in runs}
    for run in runs:
        wanted = {name: {(n + 1, value(n)) for n in range(LINES)} for name, value in VALUES.items()}
        assert stored[run.path.name] == wanted
        assert not [r for r in read_journal(run.journal.path) if r.get("event") == "warning"]
    files = (
        runs[0].path.parent
        if shared_store.startswith("postgresql")
        else Path(shared_store.removeprefix("sqlite://")).parent
    )
    assert len(list((files / "mlartifacts").glob("*/artifacts/journal.jsonl"))) == RUNS


VALUES = {"loss/a": lambda n: n / 7, "loss/b": lambda n: float(-n)}


def points_of(uri: str) -> dict[str, dict[str, set[tuple[int, float]]]]:
    """Run -> metric -> (images seen, value) of everything that a store holds; nothing may be there twice."""
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=uri)
    found: dict[str, dict[str, set[tuple[int, float]]]] = {}
    for run in client.search_runs([e.experiment_id for e in client.search_experiments()]):
        metrics = found.setdefault(run.info.run_name, {})
        for name in run.data.metrics:
            history = [(one.step, one.value) for one in client.get_metric_history(run.info.run_id, name)]
            metrics[name] = set(history)
            assert len(metrics[name]) == len(history)
    return found


JOB = """
name: third
seed: 3
system: {name: biggan, preset: tiny32}
data: {path: DATA}
training: {total_kimg: 0.6, batch_size: 8, slice_size: 8, log_every_kimg: 0.008}
checkpoint: {every_kimg: 0.3}
evaluation: {metrics: [], every_kimg: 0.3, grid: 2}
tracking: {mlflow: true, uri: "http://127.0.0.1:PORT", experiment: third}
resources: {workers: 1, cpus_per_worker: 0.5}
"""
TOTAL = 600


def test_a_server_that_is_dead_for_the_middle_third_of_a_run(tmp_path: Path) -> None:
    port, database, run = free_port(), tmp_path / "store" / "mlflow.db", tmp_path / "run"
    database.parent.mkdir()
    job = digits_job(tmp_path, JOB.replace("PORT", str(port)))
    with ExitStack() as first:
        first.enter_context(mlflow_server(database, port))
        process = bessemer("train", job, "--run-dir", run)
        wait_for("a third of the run", lambda: images_seen(run) >= TOTAL // 3 and offset(run) > 0, process)
    died_at = images_seen(run)
    wait_for("two thirds of the run", lambda: images_seen(run) >= 2 * TOTAL // 3, process)
    with mlflow_server(database, port) as uri:
        output, _ = process.communicate(timeout=300)
        assert process.returncode == 0, output
        assert TOTAL // 3 <= died_at < 2 * TOTAL // 3
        replay(run)
        stored = points_of(uri)["run"]
    wanted: dict[str, set[tuple[int, float]]] = defaultdict(set)
    for record, _ in read_entries(run / "journal.jsonl"):
        for name, value in record.get("values", {}).items() if record["kind"] == "metrics" else ():
            if value is not None:
                wanted[name].add((record["nimg"], value))
    assert stored == wanted
    assert {nimg for nimg, _ in wanted["loss/generator"]} == set(range(8, TOTAL + 1, 8))

    # The run is the one that nobody tracks, to the last bit.
    quiet = job.with_name("quiet.yaml")
    quiet.write_text(job.read_text().replace("mlflow: true", "mlflow: false"))
    undisturbed = torchrun(quiet, tmp_path / "quiet", workers=1)
    output, _ = undisturbed.communicate(timeout=300)
    assert undisturbed.returncode == 0, output
    weights = Path("snapshots") / "kimg-000000.600" / "weights.safetensors"
    assert (run / weights).read_bytes() == (tmp_path / "quiet" / weights).read_bytes()


def offset(run: Path) -> int:
    """Bytes of the journal that MLflow has."""
    state = run / "mlflow.json"
    return int(json.loads(state.read_text())["offset"]) if state.exists() else 0
