"""Runs a job on Ray: places the workers, replaces lost ones, mirrors the journal, reports the end."""

from __future__ import annotations

import logging
import os
import secrets
import shutil
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from bessemer.errors import BessemerError, MachineError, RunError, TrainingError
from bessemer.orchestration.preflight import cluster_address
from bessemer.orchestration.ray_evaluator import evaluator_beside
from bessemer.orchestration.run_directory import RunDirectory
from bessemer.spec.job import JobSpec
from bessemer.tracking.journal import read_journal

__all__ = ["Stopped", "launch", "ray_session"]


class Stopped(Exception):  # noqa: N818  # nothing went wrong
    """The run was asked to stop before its end, has written a checkpoint, and can be resumed."""


@contextmanager
def ray_session(address: str | None, cpus: float) -> Iterator[None]:
    """A Ray of our own on loopback with so many cores, or the cluster at `address`."""
    # Ray chooses an authentication mode by itself when it is unset, and then processes disagree.
    os.environ.setdefault("RAY_AUTH_MODE", "token")
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
            ray.init(
                address="local",
                num_cpus=max(1, round(cpus + 0.499)),
                include_dashboard=False,
                _temp_dir=temporary,
                object_store_memory=128 << 20,
                **common,
            )
        else:
            try:
                ray.init(address=address, **common)
            except (ConnectionError, ValueError, RuntimeError, ray.exceptions.AuthenticationError) as e:
                raise MachineError(
                    f"resources.address: no Ray cluster answers at {address} ({_first_line(e)}); check the address, "
                    "RAY_AUTH_MODE and RAY_AUTH_TOKEN, or leave out the field and RAY_ADDRESS to start Ray on this "
                    "machine."
                ) from None
        yield
    finally:
        ray.shutdown()
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


def _worker_loop(config: dict[str, Any]) -> None:
    """What Ray runs in every worker process."""
    from bessemer.orchestration.worker import run_worker

    # An error ends the whole group. Where run_worker left it for the driver, the next group stops at once.
    run_worker(Path(config["run"]))


def launch(run: RunDirectory, follow: Callable[[RunDirectory], Any] | None = None) -> None:
    """Train `run` to its end on Ray, from where it stands.

    Lost workers are replaced up to `resources.max_failures` times; the new ones go on from the newest checkpoint.

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
        if _has_finished(run):
            raise RunError(f"{run.path}: has finished already; `bessemer report {run.path}` shows it.")
        run.clear_error()
        run.clear_stop()
        run.journal.write("event", 0, event="started", workers=job.resources.workers, job=job.name)
        status = "FAILED"
        mirror = _start_mirror(run, job)
        try:
            with (
                follow(run) if follow else nullcontext(),
                ray_session(cluster_address(job), job.cpus),
                _sigterm_stops(run),
                evaluator_beside(run, job),
            ):
                _fit(run, job)
                if not _has_finished(run):
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
            _write_report(run)
            if mirror is not None:
                mirror.stop(status)


def _has_finished(run: RunDirectory) -> bool:
    return any(r.get("event") == "finished" for r in read_journal(run.path / "journal.jsonl") if r["kind"] == "event")


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


def _fit(run: RunDirectory, job: JobSpec) -> None:
    import ray.train
    from ray.train.torch import TorchConfig, TorchTrainer
    from ray.train.v2.api.config import FailureConfig

    resources = job.resources
    per_worker = {"CPU": resources.cpus_per_worker}
    if resources.gpus_per_worker:
        per_worker["GPU"] = resources.gpus_per_worker
    trainer = TorchTrainer(
        _worker_loop,
        train_loop_config={"run": str(run.path)},
        torch_config=TorchConfig(backend="nccl" if resources.gpus_per_worker else "gloo", timeout_s=300),
        scaling_config=ray.train.ScalingConfig(
            num_workers=resources.workers,
            use_gpu=resources.gpus_per_worker > 0,
            resources_per_worker=per_worker,
        ),
        run_config=ray.train.RunConfig(
            # A name of its own for each launch: Ray would take an old name as a run to restore.
            name=f"launch-{secrets.token_hex(4)}",
            storage_path=str(run.path / "ray"),
            failure_config=FailureConfig(max_failures=resources.max_failures, controller_failure_limit=3),
            callbacks=[_journal_restarts(run)],
        ),
    )
    error: Exception | None = None
    try:
        trainer.fit()
    except Exception as e:  # Ray wraps whatever ended the workers in classes of its own
        error = e
    if (left := run.error()) is not None:
        raise TrainingError(left["message"]) from None
    if error is not None:
        raise TrainingError(
            f"{run.path}: workers were lost {resources.max_failures + 1} times (resources.max_failures = "
            f"{resources.max_failures}); the last error: {_first_line(error)}. Logs: {run.path / 'logs'}. "
            f"Go on with: bessemer resume {run.path}"
        ) from error


def _journal_restarts(run: RunDirectory) -> Any:
    """A Ray callback that writes each replacement of lost workers to the journal."""
    from ray.train import UserCallback

    class JournalRestarts(UserCallback):
        def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:  # noqa: ARG002
            reasons = {str(rank): _first_line(e) for rank, e in worker_exceptions.items()}
            run.journal.write("event", run.newest_nimg(), event="workers_lost", reasons=reasons)

    return JournalRestarts()


def _first_line(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[0].strip()[:300] if lines else type(error).__name__


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
