"""One trial of a search: what Ray Tune runs in the process that it placed.

A trial's resources are one placement group, so it has all of its workers or none of them, and trials that wait for
each other's workers do not exist. The process that Tune starts in the first bundle is the first worker itself; the
others are actors in the other bundles. All of them call :func:`bessemer.orchestration.worker.run_worker`, as every
run's workers do, once for each stretch between two rungs. When a trial is over, or waits, they go on with another one
without starting Python and torch again. A lost worker ends the trial's process; Tune starts it anew, and the run goes
on from its newest checkpoint.

What a trial does next it reads from the search's journal, and what it has done from its run directory: Tune itself
keeps nothing that would be missed.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from bessemer.errors import BessemerError, RunError, TrainingError
from bessemer.files import write_atomically
from bessemer.orchestration.run_directory import RunDirectory
from bessemer.orchestration.search_directory import SearchDirectory
from bessemer.spec.job import JobSpec
from bessemer.spec.load import dump_job
from bessemer.spec.search_load import trial_job
from bessemer.tracking.journal import finite, read_journal
from bessemer.tracking.search_journal import combine, read_search, trial_name
from bessemer.training.checkpoint_files import complete_checkpoints, nimg_of

__all__ = ["run_trial"]

_formed: list[_Group] = []
"""The workers of this process, from its first trial on."""


def run_trial(config: dict[str, Any]) -> None:
    """Train a trial from rung to rung, and let Tune's scheduler judge it at each; Tune ends it there if it is bad.

    Args:
        config: `search`, the directory of the search, and `trial`, the number of the trial.
    """
    from ray import tune

    directory, number = SearchDirectory(Path(config["search"])), int(config["trial"])
    group = _worker_group(directory.search.workers)
    while True:
        # Afresh at each rung: a population may have changed the trial's settings meanwhile.
        trial = read_search(directory.path).trials[number]
        rungs = directory.search.objective.rungs_kimg
        if trial.is_over or trial.rung >= len(rungs):
            return
        result: dict[str, Any] = {"trial": number, "rung": trial.rung, "kimg": rungs[trial.rung]}
        try:
            result |= _judge(directory, number, trial.point, trial.rung, group)
        except BessemerError as e:
            result["failed"] = str(e)
        # Tune flattens mappings, and leaves out empty ones. Some of its schedulers count in rungs.
        further = json.dumps(result.pop("values", {}))
        tune.report({**result, "further": further, "rungs": trial.rung + 1})
        if "failed" in result:
            # Workers may be out of step now. Tune lets no process go on that ends like this.
            raise TrainingError(result["failed"])


def _judge(directory: SearchDirectory, number: int, point: dict[str, Any], rung: int, group: _Group) -> dict[str, Any]:
    """Train every seed of a trial to a rung.

    Returns:
        The fields of the journal's record: `value`, `standard_error`, `values`, `seconds`.
    """
    search, began = directory.search, time.monotonic()
    kimg, metric = search.objective.rungs_kimg[rung], search.objective.metric
    found: dict[str, list[tuple[float, float | None]]] = {}
    for index, seed in enumerate(directory.seeds):
        job = trial_job(
            directory.base, point, name=trial_name(number), seed=seed, evaluation__samples=search.samples_at(rung)
        )
        run = _prepare(directory, directory.run_path(number, index), job)
        if not _has_been_judged(run, kimg, job):
            group.train(run.path, kimg)
            if (left := run.error()) is not None:
                raise TrainingError(left["message"])
        for name in job.evaluation.metrics:
            found.setdefault(name, []).append(_evaluation(run, kimg, name, job.evaluation.samples))
    means = {name: combine([v for v, _ in pairs], [e for _, e in pairs]) for name, pairs in found.items()}
    value, error = means.pop(metric)
    return {
        "value": value,
        "standard_error": error,
        "values": {name: mean for name, (mean, _) in means.items()},
        "seconds": round(time.monotonic() - began, 3),
    }


def _prepare(directory: SearchDirectory, path: Path, job: JobSpec) -> RunDirectory:
    """The run of a trial, with `job` as its job from now on."""
    if not (path / "run.json").is_file():
        shutil.rmtree(path, ignore_errors=True)  # killed while it was made
        run = RunDirectory.create(path.parent, job, path, directory.provenance)
        run.journal.write("event", 0, event="started", workers=job.resources.workers, job=job.name)
        return run
    run = RunDirectory.open(path)
    text = dump_job(job)
    if (path / "job.yaml").read_text() != text:
        write_atomically(path / "job.yaml", lambda file: file.write(text.encode()))
    return run


def _has_been_judged(run: RunDirectory, kimg: float, job: JobSpec) -> bool:
    """Whether a trial was killed after its rung, and before the search heard of it."""
    if not any(nimg_of(path) >= kimg * 1000 for path in complete_checkpoints(run.checkpoints)):
        return False
    try:
        for name in job.evaluation.metrics:
            _evaluation(run, kimg, name, job.evaluation.samples)
    except RunError:
        return False
    return True


def _evaluation(run: RunDirectory, kimg: float, metric: str, samples: int) -> tuple[float, float | None]:
    """Value and standard error of a metric at a rung, as the run's journal says.

    Raises:
        RunError: there is none, or it is no number.
    """
    records = [
        record
        for record in read_journal(run.journal.path)
        if record["kind"] == "evaluation" and record.get("metric") == metric and record["nimg"] >= kimg * 1000
    ]
    if metric != "bits_per_dim":  # which takes fewer where the data has fewer
        records = [record for record in records if record.get("samples") == samples]
    value = finite(records[-1].get("value")) if records else None
    if value is None:
        failed = [r for r in read_journal(run.journal.path) if r.get("event") == "evaluation_failed"]
        why = f": {failed[-1].get('reason')}" if failed else " that is a number"
        raise RunError(f"{run.path}: has no {metric} at {kimg:g} kimg{why}.")
    return value, finite(records[-1].get("standard_error"))


class _Group:
    """The workers of a trial, this process among them."""

    def __init__(self, others: list[Any], held: ExitStack) -> None:
        self._others, self._held = others, held

    def train(self, run: Path, until_kimg: float) -> None:
        """Train a run on all workers up to a rung."""
        import ray

        from bessemer.orchestration.worker import run_worker

        pending = [other.train.remote(str(run), until_kimg) for other in self._others]
        if not run_worker(run, until_kimg):
            raise RuntimeError("the trial was asked to stop")
        ray.get(pending)


class _OtherWorker:
    """A worker of a trial in a process of its own."""

    def __init__(self, environment: dict[str, str]) -> None:
        os.environ.update(environment)
        self._held = ExitStack()

    def join(self) -> None:
        """Join the process group. Returns when all others have, too."""
        from bessemer.training.distributed import join_workers

        self._held.enter_context(join_workers())

    def train(self, run: str, until_kimg: float) -> None:
        from bessemer.orchestration.worker import run_worker

        run_worker(Path(run), until_kimg)


def _worker_group(size: int) -> _Group:
    """The workers of the trials that this process trains, in the bundles of its placement group.

    They are made once: Tune lets the process go on with the next trial, and DeepSpeed remembers the group that it saw
    first. When the process ends, Ray ends the others.
    """
    if _formed:
        return _formed[0]
    import ray
    from ray.util.placement_group import get_current_placement_group
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    from bessemer.training.distributed import join_workers

    address = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
    # Ray gives each worker its own GPUs, so each is the first of its node.
    common = {"WORLD_SIZE": str(size), "LOCAL_RANK": "0", "MASTER_ADDR": address}
    if size > 1:
        with socket.socket() as probe:
            probe.bind(("", 0))
            common["MASTER_PORT"] = str(probe.getsockname()[1])
    os.environ.update({**common, "RANK": "0"})
    bundles: Any = get_current_placement_group()
    others: list[Any] = []
    for rank in range(1, size):
        resources = dict(bundles.bundle_specs[rank])
        actor: Any = ray.remote(_OtherWorker)
        actor = actor.options(
            num_cpus=resources.get("CPU", 0),
            num_gpus=resources.get("GPU", 0),
            scheduling_strategy=PlacementGroupSchedulingStrategy(bundles, placement_group_bundle_index=rank),
        )
        others.append(actor.remote({**common, "RANK": str(rank)}))
    joined = [other.join.remote() for other in others]
    held = ExitStack()
    held.enter_context(join_workers())
    ray.get(joined)
    _formed.append(_Group(others, held))
    return _formed[0]
