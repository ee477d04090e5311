"""Carries the journal of one run to one MLflow store: which run it is there, what it is called, what is sent.

The state file remembers how far a run came. Its offset moves after the store has taken a batch, so a crash between the
two sends the batch again: MLflow's stores keep one copy of a point whose name, step, time and value are equal, and all
four come from the journal. Nothing is lost and nothing shows twice.

One run is one MLflow run, whatever happens to the driver: mlflow.json names it, and if that file was lost, or the
driver died between creating the run and writing it down, the tag ``bessemer.run_id`` finds it again.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from bessemer.errors import TrackingError
from bessemer.files import write_atomically
from bessemer.tracking.files import hold_lock, path_inside, read_json
from bessemer.tracking.journal import Record, finite, protocol_key, read_entries
from bessemer.tracking.mlflow_store import check_uri, quiet_mlflow, redact
from bessemer.tracking.registry import Entry, register
from bessemer.tracking.runs import flatten, load_run

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric

__all__ = ["FinalStatus", "Transfer", "open_experiment"]

FinalStatus = Literal["FINISHED", "FAILED", "KILLED"]

_STATE_FILE = "mlflow.json"
_SQLITE = "sqlite:///"
_CREATION_LOCK = 0x6265_7373  # any number that others are not likely to lock in the same database
_RUN_TAG = "bessemer.run_id"
_MAX_METRICS, _MAX_ENTITIES = 1000, 100  # MLflow's limits for one log_batch
_MAX_KEY, _MAX_VALUE = 250, 6000


class Transfer:
    """Carries one run's journal to one store. Raises whatever the store raises."""

    def __init__(self, run_dir: Path, uri: str, experiment: str) -> None:
        self._run_dir = run_dir
        self._journal = run_dir / "journal.jsonl"
        self._uri = uri
        self._experiment = experiment
        self._client: MlflowClient | None = None
        self.run_id = ""
        self._experiment_id = ""
        self._offset = 0
        self._names: dict[str, str] = {}  # protocol -> name of its curve
        self._best: dict[str, float] = {}

    def disconnect(self) -> None:
        """Look for the run again before the next transfer: the store may have been replaced."""
        self._client = None

    def connect(self) -> None:
        """Find or make the MLflow run and describe it, unless that is done."""
        if self._client is not None:
            return
        client, self._experiment_id = open_experiment(self._uri, self._experiment, self._run_dir.parent)
        self._find_run(client)
        self._describe(client)
        self._names, self._best = {}, {}
        for record, end in read_entries(self._journal):
            if end <= self._offset:
                list(self._points(record))  # what was sent decides the names of what follows
        self._client = client

    def send_new(self) -> None:
        """Send everything that the journal has beyond the offset."""
        from mlflow.entities import Metric

        client = self._connected
        batch: list[Metric] = []
        end = self._offset
        for record, next_end in read_entries(self._journal, self._offset):
            points = [
                Metric(_key(name), value, int(record["time"] * 1000), record["nimg"])
                for name, value in self._points(record)
            ]
            if batch and len(batch) + len(points) > _MAX_METRICS:
                self._send(client, batch, end)
                batch = []
            batch += points
            end = next_end
            if record["kind"] in ("samples", "sheet"):
                path = path_inside(self._run_dir, record.get("path"))
                if path is not None:
                    client.log_artifact(self.run_id, str(path), "samples")
        if end > self._offset:
            self._send(client, batch, end)

    def finish(self, status: FinalStatus) -> None:
        """Add the files that people look for and end the MLflow run."""
        client = self._connected
        for name in ("journal.jsonl", "report.html"):
            path = path_inside(self._run_dir, name)
            if path is not None:
                client.log_artifact(self.run_id, str(path))
        entries = read_entries(self._journal)
        end_time = int(entries[-1].record["time"] * 1000) if entries else None
        client.set_terminated(self.run_id, status=status, end_time=end_time)

    def register(self, model: str | None = None) -> list[Entry]:
        """Put the run's newest and best snapshot into the model registry."""
        return register(self._connected, self._run_dir, self.run_id, model)

    @property
    def _connected(self) -> MlflowClient:
        assert self._client is not None, "connect() first"
        return self._client

    def _send(self, client: MlflowClient, batch: list[Metric], end: int) -> None:
        for start in range(0, len(batch), _MAX_METRICS):
            client.log_batch(self.run_id, metrics=batch[start : start + _MAX_METRICS])
        self._offset = end
        self._save_state()

    def _points(self, record: Record) -> Iterator[tuple[str, float]]:
        """Names and values of one record; evaluations of different protocols get different names."""
        if record["kind"] == "metrics" and isinstance(record.get("values"), dict):
            for name, item in record["values"].items():
                value = finite(item)
                if value is not None:
                    yield name, value
        elif record["kind"] == "evaluation" and isinstance(record.get("metric"), str):
            value = finite(record.get("value"))
            if value is None:
                return
            name = self._curve_name(record)
            better = max if record.get("higher_is_better") is True else min
            self._best[name] = better(value, self._best.get(name, value))
            yield f"evaluation/{name}", value
            yield f"best/{name}", self._best[name]  # MLflow's table shows the last value only
            error = finite(record.get("standard_error"))
            if error is not None:
                yield f"standard_error/{name}", error

    def _curve_name(self, record: Record) -> str:
        """The metric's own name for the first protocol it was measured by, a numbered one for each other."""
        key, metric = protocol_key(record), record["metric"]
        if key not in self._names:
            taken = set(self._names.values())
            number = 1
            while (name := metric if number == 1 else f"{metric} protocol {number}") in taken:
                number += 1
            self._names[key] = name
        return self._names[key]

    def _find_run(self, client: MlflowClient) -> None:
        info = read_json(self._run_dir / "run.json") or {}
        label = re.sub(r"[^\w.-]", "_", str(info.get("id") or self._run_dir.absolute().name))
        state = read_json(self._run_dir / _STATE_FILE) or {}
        found = client.search_runs([self._experiment_id], f"tags.`{_RUN_TAG}` = '{label}'", max_results=1)
        if found:
            self.run_id = found[0].info.run_id
            if found[0].info.status != "RUNNING":
                client.update_run(self.run_id, status="RUNNING")
        else:
            created = finite(info.get("created"))
            self.run_id = client.create_run(
                self._experiment_id,
                start_time=None if created is None else int(created * 1000),
                tags={_RUN_TAG: label},
                run_name=str(info.get("name") or self._run_dir.absolute().name)[:_MAX_KEY],
            ).info.run_id
        # The offset holds for this MLflow run in this store alone; any other gets the journal from its beginning.
        same = state.get("run_id") == self.run_id and state.get("uri") == redact(self._uri)
        offset = state.get("offset")
        self._offset = offset if found and same and isinstance(offset, int) and offset >= 0 else 0
        self._save_state()

    def _describe(self, client: MlflowClient) -> None:
        """Params, tags and the job file. Params cannot change in MLflow: later values become tags."""
        from mlflow.entities import Param, RunTag

        run = load_run(self._run_dir)
        known = client.get_run(self.run_id).data.params
        job = {_key(name): value[:_MAX_VALUE] for name, value in flatten(run.job)}
        params = [Param(key, value) for key, value in job.items() if key not in known]
        changed = {f"changed.{key}": value for key, value in job.items() if known.get(key, value) != value}
        facts = {f"bessemer.{name}": value for name, value in flatten(run.info) if name not in ("id", "command")}
        facts |= {"bessemer.data_hash": run.data_hash} if run.data_hash is not None else {}
        facts |= {"bessemer.run_dir": str(self._run_dir.absolute())}
        if isinstance(run.info.get("git_sha"), str):
            facts["mlflow.source.git.commit"] = run.info["git_sha"]
        labels = {_key(name): value[:_MAX_VALUE] for name, value in (changed | facts).items()}
        tags = [RunTag(key, value) for key, value in labels.items()]
        for start in range(0, max(len(params), len(tags)), _MAX_ENTITIES):
            part = slice(start, start + _MAX_ENTITIES)
            client.log_batch(self.run_id, params=params[part], tags=tags[part])
        job_file = path_inside(self._run_dir, "job.yaml")
        if job_file is not None:
            client.log_artifact(self.run_id, str(job_file))

    def _save_state(self) -> None:
        state = {
            "uri": redact(self._uri),
            "experiment": self._experiment,
            "experiment_id": self._experiment_id,
            "run_id": self.run_id,
            "offset": self._offset,
        }
        data = json.dumps(state, indent=2).encode() + b"\n"
        write_atomically(self._run_dir / _STATE_FILE, lambda file: file.write(data))


def open_experiment(uri: str, name: str, root: Path) -> tuple[MlflowClient, str]:
    """A client of the store, and the id of an experiment there, which is made if there is none.

    Args:
        uri: of the store, resolved.
        name: of the experiment.
        root: directory that holds the runs; their files go there where no server and no database file says more.

    Raises:
        TrackingError: the store does not answer, or the experiment was deleted.
    """
    # MLflow itself retries a store that cannot be opened for almost two minutes.
    check_uri(uri, root)
    quiet_mlflow()
    from mlflow import MlflowClient

    with _database_creation_lock(uri):
        client = MlflowClient(tracking_uri=uri)
        experiment = client.get_experiment_by_name(name)
        if experiment is None:
            try:
                return client, str(client.create_experiment(name, artifact_location=_artifacts(uri, root)))
            except Exception:
                experiment = client.get_experiment_by_name(name)  # somebody else was quicker
                if experiment is None:
                    raise
    if experiment.lifecycle_stage != "active":
        raise TrackingError(
            f"tracking.experiment {name!r} was deleted in MLflow; restore it "
            f"(`mlflow experiments restore -x {experiment.experiment_id}`) or name another one"
        )
    return client, str(experiment.experiment_id)


def _artifacts(uri: str, root: Path) -> str | None:
    """Where the files of an experiment without a server go; a server knows it of its own."""
    if uri.startswith("http"):
        return None
    # Beside a database that is a file, and beside the runs otherwise; MLflow takes the working directory.
    place = Path(uri.removeprefix(_SQLITE)).parent if uri.startswith(_SQLITE) else root
    return (place.absolute() / "mlartifacts").as_uri()


@contextlib.contextmanager
def _database_creation_lock(uri: str) -> Iterator[None]:
    """Lets one process at a time open a database: two that create its tables at once break it, or fail themselves."""
    if uri.startswith(_SQLITE):
        path = Path(uri.removeprefix(_SQLITE))
        with hold_lock(path.with_name(f".{path.name}.lock"), wait=True):
            yield
    elif uri.startswith("postgresql"):
        import sqlalchemy

        engine = sqlalchemy.create_engine(uri)
        try:
            with engine.connect() as connection:  # which holds the lock for as long as it is open
                connection.execute(sqlalchemy.text(f"SELECT pg_advisory_lock({_CREATION_LOCK})"))
                yield
        finally:
            engine.dispose()
    else:
        yield


def _key(name: object) -> str:
    """``name`` in the characters that MLflow takes, as a path that stays as it is when normalised."""
    parts = re.sub(r"[^\w\-. :/]", "_", str(name))[:_MAX_KEY].split("/")
    return "/".join(part if part.strip(".") else "_" for part in parts)[:_MAX_KEY]
