"""The evaluator as a task of the run's Ray cluster: placed beside the workers, and replaced when it is lost."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bessemer.errors import MachineError
from bessemer.orchestration.run_directory import RunDirectory
from bessemer.spec.job import JobSpec

__all__ = ["evaluator_beside"]

_REPLACEMENTS = 20
"""Times that a lost evaluator is replaced; what it did not judge still waits."""


def _evaluate(path: str, threads: int) -> None:
    """What Ray runs."""
    import torch

    from bessemer.orchestration.evaluator import Evaluator

    Evaluator(RunDirectory.open(Path(path)), threads, "cuda" if torch.cuda.is_available() else "cpu").run()


@contextlib.contextmanager
def evaluator_beside(run: RunDirectory, job: JobSpec) -> Iterator[None]:
    """Let an evaluator judge the run's snapshots meanwhile, if the job wants one; at the end, wait for what is left.

    When the block is left by an exception, what waits is left to the next launch.

    Raises:
        MachineError: the cluster has not what workers and evaluator need together.
    """
    if not job.evaluation.beside:
        yield
        return
    import ray

    _check_room(job)
    resources = job.resources
    task = ray.remote(
        num_cpus=resources.evaluator_cpus,
        num_gpus=resources.evaluator_gpus,
        max_retries=_REPLACEMENTS,
        runtime_env={} if resources.evaluator_gpus else {"env_vars": {"CUDA_VISIBLE_DEVICES": ""}},
    )(_evaluate)
    judging = task.remote(str(run.path), math.ceil(resources.evaluator_cpus))
    try:
        yield
    except BaseException:
        ray.cancel(judging, force=True)
        raise
    _wait(judging, run)


def _check_room(job: JobSpec) -> None:
    import ray

    there = ray.cluster_resources()  # type: ignore[no-untyped-call]
    resources = job.resources
    spare = resources.workers - job.least_workers
    for kind, all_, each in (
        ("CPU", job.cpus, resources.cpus_per_worker),
        ("GPU", job.gpus, resources.gpus_per_worker),
    ):
        needed = all_ - spare * each
        if needed > there.get(kind, 0):
            raise MachineError(
                f"evaluation.beside: workers and evaluator need {needed:g} {kind}s together, and the cluster has "
                f"{there.get(kind, 0):g}; lower resources.workers, or set evaluation.beside to false."
            )


def _wait(judging: Any, run: RunDirectory) -> None:
    """Training is over. That the evaluator fails takes nothing from the run: the journal says so."""
    import ray

    try:
        while not ray.wait([judging], timeout=1.0)[0]:
            if run.stop_file.exists():  # somebody is in a hurry
                ray.cancel(judging, force=True)
        ray.get(judging)
    except Exception as e:
        lines = [line for line in str(e).splitlines() if line.strip()] or [type(e).__name__]
        run.journal.write("event", run.newest_nimg(), event="evaluation_failed", reason=lines[-1][:300])
