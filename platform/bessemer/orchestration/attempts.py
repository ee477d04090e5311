"""Trains a run in attempts: each is a group of workers on Ray that goes on from the newest checkpoint.

An attempt ends because the run is at its end, because somebody wants it to stop, because workers were lost, because a
host will be taken away, or because there is room for more workers. The next one takes as many as there is room for, and
the run stays the same.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from bessemer.errors import TrainingError
from bessemer.orchestration.failures import Failure, clear_failures, read_failure
from bessemer.orchestration.group import Spares, WorkersLost, train_with_workers
from bessemer.orchestration.preflight import cluster_address
from bessemer.orchestration.room import Room
from bessemer.orchestration.run_directory import RunDirectory
from bessemer.spec.job import JobSpec
from bessemer.tracking.journal import read_entries
from bessemer.training.checkpoint_files import complete_checkpoints

__all__ = ["train_in_attempts"]

_LOOK_SECONDS = 2.0


def train_in_attempts(run: RunDirectory, job: JobSpec) -> None:
    """Train until the run is finished, or somebody asked it to stop. This process has joined a Ray cluster.

    Raises:
        TrainingError: workers failed twice at the same place and point, or were lost too often without progress.
        MachineError: the cluster has no room for the workers, and none came.
    """
    spares = Spares(job, wanted=job.resources.spares and cluster_address(job) is not None)
    try:
        _train_in_attempts(run, job, Room(job), spares)
    finally:
        spares.end()


def _train_in_attempts(run: RunDirectory, job: JobSpec, room: Room, spares: Spares) -> None:
    lost, before = 0, None
    while True:
        with room.taken(run.stop_file.exists, lambda why: _note(run, "waiting", reason=why)) as places:
            if places is None:
                return
            began = _newest_checkpoint(run)
            clear_failures(run.failures)
            run.clear_resize()
            size = len(places.bundle_specs)
            if size != job.resources.workers:
                _note(run, "resized", workers=size, wanted=job.resources.workers)
            error = _attempt(run, room, places, spares)
        if (left := run.error()) is not None:
            raise TrainingError(left["message"]) from None
        if run.has_finished:  # whatever a worker did after that
            return
        if error is None:
            if run.resize_file.exists() and not run.stop_file.exists():
                continue
            return
        failure = read_failure(run.failures, error.failures, str(error))
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


def _attempt(run: RunDirectory, room: Room, places: Any, spares: Spares) -> WorkersLost | None:
    """Let a group of workers train at `places`; what ended it, or None if it ended by itself."""
    placed = _Placed(run)

    def grow(nodes: list[str], over: threading.Event) -> None:
        spares.prepare(nodes, over)  # the others train while the new ones import
        if not over.is_set():
            run.request_resize()

    with room.more_than(len(places.bundle_specs), grow, placed), _preemption_stops(run, placed):
        try:
            train_with_workers(run, places, spares, lambda: bool(_newest_checkpoint(run)))
        except WorkersLost as e:
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


def _newest_checkpoint(run: RunDirectory) -> str:
    """Names are in the order of images seen."""
    return max((path.name for path in complete_checkpoints(run.checkpoints)), default="")


def _note(run: RunDirectory, event: str, **fields: Any) -> None:
    run.journal.write("event", run.newest_nimg(), event=event, **fields)
