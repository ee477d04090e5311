"""The mirror of a run's journal in MLflow.

A thread of the driver follows the journal and sends what is new; training never waits for it. The mirror remembers
in mlflow.json how far it came. That offset moves after the store has taken a batch, so a crash between the two
sends the batch again: MLflow's stores keep one copy of a point whose name, step, time and value are equal, and all
four come from the journal. Nothing is lost and nothing shows twice.

One run is one MLflow run, whatever happens to the driver: mlflow.json names it, and if that file was lost, or the
driver died between creating the run and writing it down, the tag ``bessemer.run_id`` finds it again.

What cannot be sent stays in the journal, is tried again every minute at most, and :func:`replay` completes it later.
"""

from __future__ import annotations

import contextlib
import json
import logging
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import ValidationError

from bessemer.errors import TrackingError
from bessemer.files import write_atomically
from bessemer.spec.job import TrackingSpec
from bessemer.tracking.files import hold_lock, path_inside, read_json
from bessemer.tracking.journal import Journal, Record, finite, protocol_key, read_entries
from bessemer.tracking.mlflow_store import check_uri, quiet_mlflow, redact, resolve_uri
from bessemer.tracking.runs import flatten, load_run

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric

__all__ = ["FinalStatus", "MlflowMirror", "replay"]

FinalStatus = Literal["FINISHED", "FAILED", "KILLED"]

_STATE_FILE = "mlflow.json"
_LOCK_FILE = ".mlflow.lock"
_RUN_TAG = "bessemer.run_id"
_MAX_METRICS, _MAX_ENTITIES = 1000, 100  # MLflow's limits for one log_batch
_MAX_KEY, _MAX_VALUE = 250, 6000
_INTERVAL, _LONGEST_INTERVAL = 2.0, 60.0  # seconds
_FINAL_STATUS: dict[str, FinalStatus] = {"finished": "FINISHED", "failed": "FAILED"}

_log = logging.getLogger(__name__)


class MlflowMirror:
    """Mirrors one run from a thread of this process. No method raises: what goes wrong becomes a warning event.

    Args:
        run_dir: directory of the run.
        spec: where to; with ``mlflow: false`` the mirror does nothing.
        runs_root: where relative sqlite paths start.
        interval: seconds between two looks at the journal.
    """

    def __init__(
        self, run_dir: str | Path, spec: TrackingSpec, runs_root: str | Path, *, interval: float = _INTERVAL
    ) -> None:
        self._run_dir = Path(run_dir)
        self._spec = spec
        self._uri = resolve_uri(spec.uri, runs_root)
        self._interval = interval
        self._stopping = threading.Event()
        self._final_status: FinalStatus = "KILLED"
        self._thread: threading.Thread | None = None
        self._transfer: _Transfer | None = None
        self._failing = False
        self._complete = False

    def start(self) -> None:
        """Begin to follow the journal; returns at once."""
        if self._spec.mlflow and self._thread is None:
            # A daemon: a store that hangs does not keep the driver from ending.
            self._thread = threading.Thread(target=self._follow, name="mlflow-mirror", daemon=True)
            self._thread.start()

    def stop(self, final_status: FinalStatus, timeout: float = 60.0) -> bool:
        """Send the rest, with report.html if it is there, and end the MLflow run.

        Waits ``timeout`` seconds at most. Returns whether MLflow has everything; if not, a warning event says how to
        complete it.
        """
        if self._thread is None:
            return True
        self._final_status = final_status
        self._stopping.set()
        self._thread.join(timeout)
        if self._thread.is_alive():
            self._warn(f"the store did not answer within {timeout:g} s; {self._remedy}")
        return self._complete

    def _follow(self) -> None:
        wait = 0.0
        with contextlib.ExitStack() as locks:
            while True:
                stopping = self._stopping.wait(wait)
                try:
                    if self._transfer is None:
                        locks.enter_context(hold_lock(self._run_dir / _LOCK_FILE))
                        self._transfer = _Transfer(self._run_dir, self._uri, self._spec.experiment)
                    self._transfer.connect()
                    self._transfer.send_new()
                    if stopping:
                        self._transfer.finish(self._final_status)
                        self._complete = True
                # Whatever MLflow, its database driver or the disk raise: tracking may fail, training goes on.
                except Exception as error:
                    if stopping or not self._failing:
                        remedy = self._remedy if stopping else "training goes on, and it is tried again"
                        self._warn(f"{_reason(error, self._uri)}; {remedy}")
                    self._failing = True
                    if self._transfer is not None:
                        self._transfer.disconnect()
                    wait = min(2 * max(wait, self._interval), _LONGEST_INTERVAL)
                else:
                    if self._failing:
                        self._note(event="recovered")
                    self._failing = False
                    wait = self._interval
                if stopping:
                    return

    @property
    def _remedy(self) -> str:
        return f"the journal has everything: `bessemer report {self._run_dir.name} --mirror` sends it later"

    def _warn(self, message: str) -> None:
        self._note(event="warning", message=message)

    def _note(self, **fields: str) -> None:
        try:
            _write_note(self._run_dir, **fields)
        except Exception:  # the disk is full, say; the note goes to the log then
            _log.warning("MLflow: %s", fields)


def replay(run_dir: str | Path, spec: TrackingSpec | None = None, runs_root: str | Path | None = None) -> str:
    """Send to MLflow what it lacks of a run that is not mirrored at the moment, and set how the run ended.

    Args:
        run_dir: directory of the run.
        spec: where to; None takes it from the run's job.yaml.
        runs_root: where relative sqlite paths start; None takes the directory that holds ``run_dir``.

    Returns:
        The id of the MLflow run.

    Raises:
        TrackingError: the store refuses or is out of reach, or the job's tracking section is damaged.
        RunError: not a run directory, or a running process mirrors it.
    """
    run = load_run(run_dir)
    if spec is None:
        try:
            spec = TrackingSpec.model_validate(run.job.get("tracking") or {})
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            field = ".".join(["tracking", *map(str, first["loc"])])
            raise TrackingError(f"{run.path / 'job.yaml'}: {field}: {first['msg']}; mend the file") from None
    root = Path(run_dir).absolute().parent if runs_root is None else runs_root
    uri = resolve_uri(spec.uri, root)
    with hold_lock(run.path / _LOCK_FILE):
        transfer = _Transfer(run.path, uri, spec.experiment)
        try:
            transfer.connect()
            transfer.send_new()
            if run.state != "running":
                transfer.finish(_FINAL_STATUS.get(run.state, "KILLED"))
        except TrackingError:  # says already what to do
            raise
        except Exception as error:
            raise TrackingError(
                f"tracking.uri {redact(uri)!r}: {_reason(error, uri)}; bring the store up and try again"
            ) from error
        events = run.events("warning", "recovered")
        if events and events[-1]["event"] == "warning":
            _write_note(run.path, event="recovered")
    return transfer.run_id


class _Transfer:
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
        # MLflow itself retries a store that cannot be opened for almost two minutes.
        check_uri(self._uri, self._run_dir.parent)
        quiet_mlflow()
        from mlflow import MlflowClient

        with _database_creation_lock(self._uri):
            client = MlflowClient(tracking_uri=self._uri)
            self._experiment_id = self._find_experiment(client)
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
            if record["kind"] == "samples":
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

    def _find_experiment(self, client: MlflowClient) -> str:
        experiment = client.get_experiment_by_name(self._experiment)
        if experiment is None:
            # Files of a local database belong beside it; a server knows where its own files go.
            database = self._uri.removeprefix("sqlite:///") if self._uri.startswith("sqlite:///") else None
            place = (Path(database).parent / "mlartifacts").as_uri() if database else None
            try:
                return str(client.create_experiment(self._experiment, artifact_location=place))
            except Exception:
                experiment = client.get_experiment_by_name(self._experiment)  # somebody else was quicker
                if experiment is None:
                    raise
        if experiment.lifecycle_stage != "active":
            raise TrackingError(
                f"tracking.experiment {self._experiment!r} was deleted in MLflow; restore it "
                f"(`mlflow experiments restore -x {experiment.experiment_id}`) or name another one"
            )
        return str(experiment.experiment_id)

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


def _write_note(run_dir: Path, **fields: str) -> None:
    """An event about MLflow, at the point that the run had reached."""
    path = run_dir / "journal.jsonl"
    entries = read_entries(path)
    Journal(path).write("event", entries[-1].record["nimg"] if entries else 0, about="mlflow", **fields)


def _database_creation_lock(uri: str) -> contextlib.AbstractContextManager[None]:
    """Lets one process at a time open an SQLite database: two that create its tables at once break it for good."""
    if not uri.startswith("sqlite:///"):
        return contextlib.nullcontext()
    path = Path(uri.removeprefix("sqlite:///"))
    return hold_lock(path.with_name(f".{path.name}.lock"), wait=True)


def _key(name: object) -> str:
    """``name`` in the characters that MLflow takes, as a path that stays as it is when normalised."""
    parts = re.sub(r"[^\w\-. :/]", "_", str(name))[:_MAX_KEY].split("/")
    return "/".join(part if part.strip(".") else "_" for part in parts)[:_MAX_KEY]


def _reason(error: Exception, uri: str) -> str:
    """One line that says what went wrong, without a password."""
    words = " ".join(str(error).replace(uri, redact(uri)).split())
    return (words if isinstance(error, TrackingError) else f"{type(error).__name__}: {words}")[:400]
