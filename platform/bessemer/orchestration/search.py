"""Drives a search on Ray Tune: its trials, their placement, its end, and going on after any kind of death.

Ray Tune places trials and replaces lost ones. What must survive lies in the search's journal
(:mod:`bessemer.tracking.search_journal`) and in the run directories of its trials. A resumed search is a new Tune
session that is handed the trials that are not over, under their old numbers; the journal says where each one stands.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from bessemer.errors import MachineError, SpecError, TrainingError
from bessemer.orchestration.launch import ray_session
from bessemer.orchestration.preflight import cluster_address, preflight, with_absolute_paths
from bessemer.orchestration.search_directory import SearchDirectory
from bessemer.orchestration.search_final import Judge, hold_final, judge_run
from bessemer.spec.job import JobSpec
from bessemer.spec.load import load_job, set_field
from bessemer.spec.search import SearchSpec
from bessemer.spec.search_load import (
    check_corners,
    describe_point,
    judged_base,
    load_base,
    load_search,
    trial_job,
)
from bessemer.spec.space import Point, Space
from bessemer.tracking.search_journal import SearchJournal

if TYPE_CHECKING:
    from bessemer.orchestration.search_schedulers import Clerk

__all__ = ["Prepared", "check_search", "create_search", "prepare_search", "run_search"]

Trainable = Callable[[dict[str, Any]], None]

_SETTINGS = {
    # The journal is what survives: Tune's own state and logs would cost time for every trial.
    "TUNE_GLOBAL_CHECKPOINT_S": "3600",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_AUTO_CALLBACK_SYNCER": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
    # How long a process that is to take the next trial waits for the last one to let go.
    "TUNE_FUNCTION_THREAD_TIMEOUT_S": "30",
}


class Prepared(NamedTuple):
    """A search whose file is in order."""

    search: SearchSpec
    base: JobSpec
    """The job with what all trials have in common."""
    original: JobSpec
    """The job as its file says."""


def prepare_search(file: Path, address: str | None = None) -> Prepared:
    """Read a search and its job, and check every corner of the space against the rules of jobs.

    Args:
        file: the search file.
        address: of a Ray cluster to join.

    Raises:
        SpecError: names the field, or the corner, the value, the rule and the fix.
    """
    search = load_search(file)
    base = load_base(search, file.parent)
    if address is not None:
        base = set_field(base, {"resources.address": address})
    base = with_absolute_paths(base)
    check_corners(search, base)
    return Prepared(search, base, with_absolute_paths(load_job(file.parent / search.job)))


def check_search(prepared: Prepared, root: Path) -> None:
    """Check what needs the data, the systems and the machine.

    Raises:
        BessemerError: names the field or file, the value, the rule and the fix.
    """
    from bessemer.orchestration.search_points import check_searcher
    from bessemer.orchestration.worker import check_job

    search = prepared.search
    base = judged_base(search, prepared.base)
    check_searcher(search)
    _check_mode("objective", search.objective.metric, search.objective.mode)
    if search.final is not None:
        _check_mode("final", search.final.metric, search.final.mode)
    preflight(base, root)
    if cluster_address(base) is None and search.concurrency is not None:
        cores, needed = len(os.sched_getaffinity(0)), search.concurrency * base.cpus
        if needed > cores:
            raise MachineError(
                f"concurrency: {search.concurrency} trials with {search.workers} workers and "
                f"{base.resources.cpus_per_worker:g} CPUs each need {needed:g} CPUs, and this machine has {cores}; set "
                f"it to {max(1, int(cores / base.cpus))}, or lower resources.cpus_per_worker of the job."
            )
    for point in _one_at_a_time(Space(search.space)):
        try:
            check_job(trial_job(base, point))
        except SpecError as e:
            raise SpecError(f"space: at {describe_point(point)}: {e}") from None


def _check_mode(section: str, metric: str, mode: str) -> None:
    """Check that `mode` is the way in which `metric` is better.

    Raises:
        SpecError: it is not.
    """
    from bessemer.evaluation.names import KINDS, TARGETS, parse_metric, split_metrics

    compared, _, targets = split_metrics([metric])
    kinds = [KINDS[parse_metric(name).kind] for name in compared] + [TARGETS[name] for name in targets]
    right = "max" if any(kind.higher_is_better for kind in kinds) else "min"
    if mode != right:
        raise SpecError(f"{section}.mode: {mode} is the wrong way for {metric}; set it to {right}.")


def _one_at_a_time(space: Space) -> list[Point]:
    """Corners that show each end of each field once."""
    seen: set[tuple[str, str]] = set()
    found = []
    for corner in space.corners():
        ends = {(field, repr(value)) for field, value in corner.items()}
        if not ends <= seen:
            seen |= ends
            found.append(corner)
    return found


def create_search(prepared: Prepared, path: Path) -> SearchDirectory:
    """Check a search against this machine, and make its directory.

    Raises:
        BessemerError: names the field or file, the value, the rule and the fix.
    """
    check_search(prepared, path.parent)
    return SearchDirectory.create(path, *prepared)


def run_search(
    directory: SearchDirectory,
    say: Callable[[str], None] = lambda line: None,
    trainable: Trainable | None = None,
    judge: Judge | None = None,
) -> None:
    """Run a search to its end, from where it stands.

    Args:
        directory: of the search.
        say: shown one line for each result.
        trainable: what a trial does; benchmarks have another than training.
        judge: how finalists are judged, if trials do not train.

    Raises:
        RunError: another process drives the search.
        MachineError: no trial fits on the cluster, or the cluster is out of reach.
        TrainingError: every trial failed.
    """
    search, base = directory.search, directory.base
    with directory.locked():
        journal = SearchJournal(directory.path)
        journal.write("session", number=journal.table.sessions + 1)
        mirror = _start_mirror(directory, base)
        try:
            address = cluster_address(base)
            cores = len(os.sched_getaffinity(0))
            wanted = search.concurrency * base.cpus if search.concurrency else max(cores, math.ceil(base.cpus))
            with ray_session(address, wanted), mirror or nullcontext():
                reason = _fit(directory, journal, say, trainable)
                hold_final(directory, journal, say, judge or judge_run)
                journal.write("ended", reason=reason)
                directory.forget_sessions()
        finally:
            _write_report(directory)
            if mirror is not None:
                mirror.finish()
        trials = journal.table.trials.values()
        if trials and all(trial.state == "failed" for trial in trials):
            raise TrainingError(f"{directory.path}: every trial failed; the first: {next(iter(trials)).reason}")


def _fit(
    directory: SearchDirectory, journal: SearchJournal, say: Callable[[str], None], trainable: Trainable | None
) -> str:
    """Train what is left to train; says why there is no more."""
    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)
    from ray import tune

    from bessemer.orchestration.search_points import points_of
    from bessemer.orchestration.search_population import copy_states
    from bessemer.orchestration.search_schedulers import Clerk, scheduler_of
    from bessemer.orchestration.search_session import JournalSearcher, Witness
    from bessemer.orchestration.search_trial import run_trial

    search, base, table = directory.search, directory.base, journal.table

    def is_legal(point: Point) -> bool:
        try:
            trial_job(base, point)
        except SpecError:
            return False
        return True

    def copy() -> None:
        copy_states(directory, table)

    copy()  # what a killed driver left half done
    for trial in table.trials.values():
        directory.leave_last_word(trial)  # the same
    points = points_of(search, table)
    inner = scheduler_of(search, journal, copy, is_legal)
    clerk = Clerk(search, journal, inner, points, len(directory.seeds), say, directory.leave_last_word)
    clerk.settle()  # a population may have stood at a rung when the driver died
    left = 0 if clerk.spent() else max(0, search.budget.trials - len(table.trials))
    if table.final is not None or not (table.live or left):
        return _reason(clerk)
    bundle = {"CPU": base.resources.cpus_per_worker}
    if base.resources.gpus_per_worker:
        bundle["GPU"] = base.resources.gpus_per_worker
    fitting = _check_room(bundle, search.workers)
    # Otherwise, Tune starts one process after the other.
    os.environ.setdefault("TUNE_MAX_PENDING_TRIALS_PG", str(fitting))
    is_population = search.scheduler.name in ("pbt", "pb2")

    def room() -> float:
        if is_population:
            return math.inf  # it waits for its last member
        # To a cluster hosts may be added, and an autoscaler does so when somebody waits.
        return fitting if cluster_address(base) is None else _room(bundle, search.workers) + 1

    searcher = JournalSearcher(directory, journal, points, clerk, room)
    tuner = tune.Tuner(
        tune.with_resources(trainable or run_trial, tune.PlacementGroupFactory([dict(bundle)] * search.workers)),
        tune_config=tune.TuneConfig(
            search_alg=searcher,
            scheduler=clerk,
            num_samples=len(table.live) + left,
            max_concurrent_trials=None if is_population else search.concurrency,
            reuse_actors=True,
        ),
        run_config=tune.RunConfig(
            name=f"session-{table.sessions}",
            storage_path=str(directory.path / "tune"),
            failure_config=tune.FailureConfig(max_failures=search.retries),
            callbacks=[Witness(journal, clerk)],
            verbose=0,
        ),
    )
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # the journal says who was lost
    tuner.fit()
    if table.live:
        raise TrainingError(f"{directory.path}: Tune ended before {len(table.live)} trials did; resume the search.")
    return _reason(clerk)


def _reason(clerk: Clerk) -> str:
    return "the budget was spent" if clerk.spent() else "all trials are over"


def _room(bundle: dict[str, float], workers: int) -> int:
    """Trials that the cluster holds at once, as it is now."""
    import ray

    have = ray.cluster_resources()  # type: ignore[no-untyped-call]
    # Ray counts in parts of 1/10,000.
    return min(int(have.get(kind, 0.0) / (workers * each) + 1e-4) for kind, each in bundle.items())


def _check_room(bundle: dict[str, float], workers: int) -> int:
    """Trials that the cluster holds at once. One that fits nowhere would wait for ever.

    Raises:
        MachineError: the cluster is too small for one trial.
    """
    import ray

    have = ray.cluster_resources()  # type: ignore[no-untyped-call]
    for kind, each in bundle.items():
        if workers * each > have.get(kind, 0.0):
            raise MachineError(
                f"workers: {workers} workers with {each:g} {kind} each need {workers * each:g} {kind}, and the cluster "
                f"has {have.get(kind, 0.0):g}; lower workers, or resources of the job."
            )
    return _room(bundle, workers)


def _start_mirror(directory: SearchDirectory, base: JobSpec) -> Any:
    if not base.tracking.mlflow:
        return None
    from bessemer.tracking.search_mlflow import SearchMirror

    return SearchMirror(directory.path, base.tracking)


def _write_report(directory: SearchDirectory) -> None:
    """A report is a view: failing to draw it must not hide how the search ended."""
    from bessemer.tracking.search_report import write_report

    try:
        write_report(directory.path)
    except Exception:
        logging.getLogger(__name__).exception("the report could not be written")
