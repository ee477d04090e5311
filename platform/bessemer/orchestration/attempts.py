"""Trains a run in attempts: each is a group of workers on Ray that goes on from the newest checkpoint.

An attempt ends because the run is at its end, because somebody wants it to stop, because workers were lost, because a
host will be taken away, or because there is room for more workers. The next one takes as many as there is room for, and
the run stays the same.
"""

from __future__ import annotations

import os
import secrets
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bessemer.errors import TrainingError
from bessemer.orchestration.failures import Failure, clear_failures, read_failure
from bessemer.orchestration.room import Room
from bessemer.orchestration.run_directory import RunDirectory
from bessemer.spec.job import JobSpec
from bessemer.tracking.journal import read_entries
from bessemer.training.checkpoint_files import complete_checkpoints

__all__ = ["train_in_attempts"]

_RAY_SETTINGS = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "1",
    # Room was there a moment ago: if it is not, something has died, and another attempt sees more.
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "30",
    # A machine that gives no sign; our own workers notice that in a third of this, unless all of them hang.
    "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": "60",
    # Ours acts on warnings; another process per attempt would only make it start later.
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
}
_LOOK_SECONDS = 2.0


def train_in_attempts(run: RunDirectory, job: JobSpec) -> None:
    """Train until the run is finished, or somebody asked it to stop. This process has joined a Ray cluster.

    Raises:
        TrainingError: workers failed twice at the same place and point, or were lost too often without progress.
        MachineError: the cluster has no room for the workers, and none came.
    """
    for name, value in _RAY_SETTINGS.items():
        os.environ.setdefault(name, value)
    room, lost, before = Room(job), 0, None
    while True:
        size = room.find(run.stop_file.exists, lambda why: _note(run, "waiting", reason=why))
        if size is None:
            return
        began = _newest_checkpoint(run)
        clear_failures(run.failures)
        run.clear_resize()
        if size != job.resources.workers:
            _note(run, "resized", workers=size, wanted=job.resources.workers)
        error = _attempt(run, job, room, size)
        if (left := run.error()) is not None:
            raise TrainingError(left["message"]) from None
        if run.has_finished:  # whatever a worker did after that
            return
        if error is None:
            if run.resize_file.exists() and not run.stop_file.exists():
                continue
            return
        failure = read_failure(run.failures, error)
        _note(run, "workers_lost", reasons=dict(failure.reasons))
        lost = lost + 1 if _newest_checkpoint(run) <= began else 1
        if failure.is_same_as(before) and lost > 1:
            raise TrainingError(
                f"{run.path}: the same error ended the workers twice without progress: {failure.line}\n"
                f"{failure.traceback.rstrip()}"
            )
        if lost > job.resources.max_failures:
            raise TrainingError(_lost_too_often(run, job, lost, failure)) from error
        before = failure


def _lost_too_often(run: RunDirectory, job: JobSpec, lost: int, failure: Failure) -> str:
    more = f"\n{failure.traceback.rstrip()}" if failure.traceback else ""
    return (
        f"{run.path}: workers were lost {lost} times in a row without a new checkpoint (resources.max_failures = "
        f"{job.resources.max_failures}); the last time: {failure.line}. Logs: {run.path / 'logs'}. "
        f"Go on with: bessemer resume {run.path}{more}"
    )


def _attempt(run: RunDirectory, job: JobSpec, room: Room, size: int) -> Exception | None:
    """Let a group of `size` workers train; what ended it, or None if it ended by itself."""
    import ray.train
    from ray.train.torch import TorchConfig, TorchTrainer
    from ray.train.v2.api.config import FailureConfig

    trainer = TorchTrainer(
        _worker_loop,
        train_loop_config={"run": str(run.path)},
        torch_config=TorchConfig(backend="nccl" if job.resources.gpus_per_worker else "gloo", timeout_s=300),
        scaling_config=ray.train.ScalingConfig(
            num_workers=size,
            use_gpu=job.resources.gpus_per_worker > 0,
            resources_per_worker=room.each,
            placement_strategy=job.resources.placement.upper(),
        ),
        run_config=ray.train.RunConfig(
            # A name of its own for each attempt: Ray would take an old name as a run to restore.
            name=f"attempt-{secrets.token_hex(4)}",
            storage_path=str(run.path / "ray"),
            failure_config=FailureConfig(max_failures=0, max_preemption_failures=0, controller_failure_limit=0),
        ),
    )
    placed = _Placed(run)
    with room.more_than(size, run.request_resize, placed), _preemption_stops(run, placed):
        try:
            trainer.fit()
        except Exception as e:  # Ray wraps whatever ended the workers in classes of its own
            return e
    return None


class _Placed:
    """Whether workers have found each other since this was made, and on which hosts."""

    def __init__(self, run: RunDirectory) -> None:
        entries = read_entries(run.journal.path)
        self._journal, self._offset = run.journal.path, entries[-1].end if entries else 0
        self._lock = threading.Lock()
        self.hosts: frozenset[str] = frozenset()

    def __call__(self) -> bool:
        with self._lock:
            for entry in read_entries(self._journal, self._offset):
                self._offset = entry.end
                if entry.record.get("event") == "placed":
                    self.hosts = frozenset(entry.record["hosts"])
        return bool(self.hosts)


@contextmanager
def _preemption_stops(run: RunDirectory, placed: _Placed) -> Iterator[None]:
    """Meanwhile, let the workers write a checkpoint and move when one of their hosts is about to be taken away."""
    over = threading.Event()

    def watch() -> None:
        while not over.wait(_LOOK_SECONDS):
            if placed() and (going := placed.hosts & Room.draining()):
                _note(run, "note", reason=f"{', '.join(sorted(going))} will be taken away; the workers move")
                run.request_resize()
                return

    thread = threading.Thread(target=watch, name="preemption", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _worker_loop(config: dict[str, Any]) -> None:
    """What Ray runs in every worker process."""
    from bessemer.orchestration.worker import run_worker

    # An error ends the whole group. Where run_worker left it for the driver, the next group stops at once.
    run_worker(Path(config["run"]))


def _newest_checkpoint(run: RunDirectory) -> str:
    """Names are in the order of images seen."""
    return max((path.name for path in complete_checkpoints(run.checkpoints)), default="")


def _note(run: RunDirectory, event: str, **fields: Any) -> None:
    run.journal.write("event", run.newest_nimg(), event=event, **fields)
