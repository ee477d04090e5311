"""The mirror of a run's journal in MLflow.

A thread of the driver follows the journal and sends what is new (:mod:`bessemer.tracking.mlflow_transfer`); training
never waits for it. What cannot be sent stays in the journal, is tried again every minute at most, and :func:`replay`
completes it later.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable
from pathlib import Path

from pydantic import ValidationError

from bessemer.errors import BessemerError, TrackingError
from bessemer.spec.job import TrackingSpec
from bessemer.tracking.files import hold_lock
from bessemer.tracking.journal import Journal, read_entries
from bessemer.tracking.mlflow_store import redact, resolve_uri
from bessemer.tracking.mlflow_transfer import FinalStatus, Transfer
from bessemer.tracking.registry import Entry
from bessemer.tracking.runs import Run, load_run

__all__ = ["MlflowMirror", "register_run", "replay"]

_LOCK_FILE = ".mlflow.lock"
_INTERVAL, _LONGEST_INTERVAL, _UPLOAD = 5.0, 60.0, 540.0  # seconds
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
        self._transfer: Transfer | None = None
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

        Waits ``timeout`` seconds at most, and nine minutes more where weights are registered. Returns whether MLflow
        has everything; if not, a warning event says how to complete it.
        """
        if self._thread is None:
            return True
        self._final_status = final_status
        self._stopping.set()
        timeout += _UPLOAD if self._spec.registry else 0
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
                        self._transfer = Transfer(self._run_dir, self._uri, self._spec.experiment)
                    self._transfer.connect()
                    self._transfer.send_new()
                    if stopping:
                        self._transfer.finish(self._final_status)
                        if self._spec.registry and self._final_status == "FINISHED":
                            self._transfer.register()
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

    A finished run whose job says `tracking.registry` is registered, too.

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
    return _replayed(load_run(run_dir), spec, runs_root, lambda run, spec: spec.registry and run.state == "finished")[0]


def register_run(run_dir: str | Path, model: str | None = None) -> list[Entry]:
    """Send to MLflow what it lacks of a run, and put its newest and its best snapshot into the model registry.

    Args:
        run_dir: directory of the run; its job says where MLflow is.
        model: name of the registered model; that of the job if None.

    Raises:
        TrackingError: the store refuses or is out of reach, or the run has no snapshot.
        RunError: not a run directory, or a running process mirrors it.
    """
    return _replayed(load_run(run_dir), None, None, lambda run, spec: True, model)[1]


def _replayed(
    run: Run,
    spec: TrackingSpec | None,
    runs_root: str | Path | None,
    registers: Callable[[Run, TrackingSpec], bool],
    model: str | None = None,
) -> tuple[str, list[Entry]]:
    """Id of the MLflow run, and the versions that were registered."""
    if spec is None:
        try:
            spec = TrackingSpec.model_validate(run.job.get("tracking") or {})
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            field = ".".join(["tracking", *map(str, first["loc"])])
            raise TrackingError(f"{run.path / 'job.yaml'}: {field}: {first['msg']}; mend the file") from None
    root = run.path.absolute().parent if runs_root is None else runs_root
    uri = resolve_uri(spec.uri, root)
    entries: list[Entry] = []
    with hold_lock(run.path / _LOCK_FILE):
        transfer = Transfer(run.path, uri, spec.experiment)
        try:
            transfer.connect()
            transfer.send_new()
            if run.state != "running":
                transfer.finish(_FINAL_STATUS.get(run.state, "KILLED"))
            if registers(run, spec):
                entries = transfer.register(model)
        except BessemerError:  # says already what to do
            raise
        except Exception as error:
            raise TrackingError(
                f"tracking.uri {redact(uri)!r}: {_reason(error, uri)}; bring the store up and try again"
            ) from error
        events = run.events("warning", "recovered")
        if events and events[-1]["event"] == "warning":
            _write_note(run.path, event="recovered")
    return transfer.run_id, entries


def _write_note(run_dir: Path, **fields: str) -> None:
    """An event about MLflow, at the point that the run had reached."""
    path = run_dir / "journal.jsonl"
    entries = read_entries(path)
    Journal(path).write("event", entries[-1].record["nimg"] if entries else 0, about="mlflow", **fields)


def _reason(error: Exception, uri: str) -> str:
    """One line that says what went wrong, without a password."""
    words = " ".join(str(error).replace(uri, redact(uri)).split())
    return (words if isinstance(error, TrackingError) else f"{type(error).__name__}: {words}")[:400]
