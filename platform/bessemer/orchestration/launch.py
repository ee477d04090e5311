"""Runs a job on Ray: joins or starts it, mirrors the journal, passes signals on, reports the end."""

from __future__ import annotations

import logging
import os
import secrets
import shutil
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from typing import Any

from bessemer.errors import BessemerError, MachineError, RunError
from bessemer.orchestration.attempts import train_in_attempts
from bessemer.orchestration.failures import first_line
from bessemer.orchestration.nodes import check_nodes
from bessemer.orchestration.preflight import cluster_address
from bessemer.orchestration.ray_evaluator import evaluator_beside
from bessemer.orchestration.run_directory import RunDirectory
from bessemer.spec.job import JobSpec
from bessemer.tracking.alerts import AlertWatch

__all__ = ["Stopped", "launch", "ray_session"]

_STARTS = 3


class Stopped(Exception):  # noqa: N818  # nothing went wrong
    """The run was asked to stop before its end, has written a checkpoint, and can be resumed."""


@contextmanager
def ray_session(address: str | None, cpus: float) -> Iterator[None]:
    """A Ray of our own on loopback with so many cores, or the cluster at `address`."""
    # Ray chooses an authentication mode by itself when it is unset, and then processes disagree.
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    if address is None:
        # Ray's workers let all others go first (nice 15), and whatever else this machine does slows every step.
        os.environ.setdefault("RAY_worker_niceness", "0")
    own_token = address is None and os.environ["RAY_AUTH_MODE"] == "token"
    if own_token and not os.environ.get("RAY_AUTH_TOKEN"):
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_TRAIN_ENABLE_V2_MIGRATION_WARNINGS", "0")
    # GPUs stay visible to processes that reserve none; the driver's own choice of devices stands.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    import ray

    temporary: str | None = None
    common: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
    try:
        if address is None:
            # Sockets live below the directory, and their paths must stay below 107 bytes.
            temporary = tempfile.mkdtemp(prefix="bsm-", dir="/tmp" if len(tempfile.gettempdir()) > 20 else None)  # noqa: S108
            local = {"num_cpus": max(1, round(cpus + 0.499)), "include_dashboard": False}
            _start_ray(**common, **local, _temp_dir=temporary, object_store_memory=128 << 20)
            with suppress(Exception):  # there is no public way
                # It looks ten times a second for what workers print, which nobody asked for: 1 % of a core.
                ray._private.worker._global_node.kill_log_monitor()  # type: ignore[attr-defined]
        else:
            try:
                ray.init(address=address, **common)
            except (ConnectionError, ValueError, RuntimeError, ray.exceptions.AuthenticationError) as e:
                raise MachineError(
                    f"resources.address: no Ray cluster answers at {address} ({first_line(e)}); check the address, "
                    "RAY_AUTH_MODE and RAY_AUTH_TOKEN, or leave out the field and RAY_ADDRESS to start Ray on this "
                    "machine."
                ) from None
        yield
    finally:
        ray.shutdown()
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


def _start_ray(**options: Any) -> None:
    """Start Ray here. It gives its own processes 30 s, which a very busy machine may exceed once.

    Raises:
        MachineError: it did not start.
    """
    import ray

    for attempts_left in reversed(range(_STARTS)):
        try:
            ray.init(address="local", **options)
        except Exception as e:
            if "timed out during startup" not in str(e):
                raise
            ray.shutdown()
            if not attempts_left:
                raise MachineError(
                    f"Ray did not start within 30 seconds, {_STARTS} times: this machine is too busy; try again when "
                    "less runs on it."
                ) from None
        else:
            return


def launch(run: RunDirectory, follow: Callable[[RunDirectory], Any] | None = None) -> None:
    """Train `run` to its end on Ray, from where it stands.

    Lost workers are replaced (:mod:`bessemer.orchestration.attempts`); the new ones go on from the newest checkpoint.

    Args:
        run: a new run, or one that was interrupted.
        follow: makes a context manager that shows progress while it is entered.

    Raises:
        RunError: the run is being trained by another process, or has ended already.
        Stopped: this process got SIGTERM; the workers have written a checkpoint.
        BessemerError: what stopped the run.
    """
    job = run.job()
    with run.locked():
        if run.has_finished:
            raise RunError(f"{run.path}: has finished already; `bessemer report {run.path}` shows it.")
        run.clear_error()
        run.clear_stop()
        run.journal.write("event", 0, event="started", workers=job.resources.workers, job=job.name)
        status = "FAILED"
        mirror = _start_mirror(run, job)
        alerts = AlertWatch(run.path, job.alerts)
        alerts.start()
        try:
            with (
                follow(run) if follow else nullcontext(),
                _sigterm_stops(run),  # also while Ray starts, which then replaces the handler by its own
                ray_session(cluster_address(job), job.cpus),
                _sigterm_stops(run),
                evaluator_beside(run, job),
            ):
                if cluster_address(job) is not None:
                    for note in check_nodes(run.path, job):
                        run.journal.write("event", run.newest_nimg(), event="note", reason=note)
                train_in_attempts(run, job)
                if not run.has_finished:
                    raise Stopped
            status = "FINISHED"
        except Stopped:
            status = "KILLED"
            run.journal.write("event", run.newest_nimg(), event="stopped", reason="SIGTERM")
            raise
        except KeyboardInterrupt:
            status = "KILLED"
            run.journal.write("event", run.newest_nimg(), event="stopped", reason="interrupted")
            raise
        except BessemerError as e:
            run.journal.write("event", run.newest_nimg(), event="failed", error=str(e))
            raise
        finally:
            alerts.stop()
            _write_report(run)
            if mirror is not None:
                mirror.stop(status)


@contextmanager
def _sigterm_stops(run: RunDirectory) -> Iterator[None]:
    """Pass SIGTERM on to the workers meanwhile. Ray's own handler, which is replaced, would end this process."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may handle signals
        return
    before = signal.signal(signal.SIGTERM, lambda signum, frame: run.request_stop())
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before if before is not None else signal.SIG_DFL)


def _start_mirror(run: RunDirectory, job: JobSpec) -> Any:
    if not job.tracking.mlflow:
        return None
    from bessemer.tracking.mlflow_mirror import MlflowMirror

    mirror = MlflowMirror(run.path, job.tracking, run.runs_root)
    mirror.start()
    return mirror


def _write_report(run: RunDirectory) -> None:
    """A report is a view: failing to draw it must not hide how the run ended."""
    from bessemer.tracking.report import write_report

    try:
        write_report(run.path)
    except Exception:
        logging.getLogger(__name__).exception("the report could not be written")
