"""The final of a search: the best trials are judged once more, by samples and a metric that rungs cannot afford.

Each finalist draws images anew, from latents that no rung has seen, so that luck at the last rung does not count twice;
the latents are the same for all finalists. One judge for each finalist, seed and draw is a Ray task with the resources
of one worker. What a judge finds lies in the run's journal before the search hears of it: a final that is killed goes
on with what is missing.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from bessemer.errors import BessemerError, EvaluationError, RunError
from bessemer.orchestration.failures import first_line
from bessemer.orchestration.run_directory import RunDirectory
from bessemer.orchestration.search_directory import SearchDirectory
from bessemer.spec.search import FinalSpec, SearchSpec
from bessemer.tracking.journal import finite, read_journal
from bessemer.tracking.search_journal import SearchJournal, SearchTable, Trial, combine
from bessemer.tracking.tables import with_error

__all__ = ["Judge", "Judged", "finalists", "hold_final", "judge_run", "latent_seed"]


class Judged(NamedTuple):
    """What one draw of a finalist was worth."""

    value: float
    standard_error: float | None
    """Of the metric itself; None where it has none."""
    seconds: float


Judge = Callable[[Path, float, FinalSpec, int], Judged]
"""Judges a run that was trained to so many kimg, with the images of one draw."""


def finalists(search: SearchSpec, table: SearchTable) -> list[Trial]:
    """The best by the objective of those that came furthest, `final.top` at most; none where none was judged."""
    ranked = table.ranked(search.objective.mode)
    top = search.final.top if search.final is not None else 0
    return [trial for trial in ranked if trial.rung == ranked[0].rung][:top]


def latent_seed(seed: int, draw: int) -> int:
    """Seed of the latents of a draw: never that of the run, which its rungs were judged with."""
    return (seed + 1 + draw) % 2**63


def hold_final(directory: SearchDirectory, journal: SearchJournal, say: Callable[[str], None], judge: Judge) -> None:
    """Judge the finalists that were not judged yet. Needs Ray; no trial may be under way.

    Args:
        directory: of the search; nothing happens where it has no `final`.
        journal: of the search.
        say: shown one line for each finalist.
        judge: what Ray runs.

    Raises:
        RayError: the cluster is out of reach; another session goes on.
    """
    final, table = directory.search.final, journal.table
    if final is None:
        return
    if table.final is None:
        chosen = finalists(directory.search, table)
        if not chosen:
            return
        how = {"metric": final.metric, "mode": final.mode, "samples": final.samples, "draws": final.draws}
        journal.write("finalists", trials=[trial.number for trial in chosen], **how)
    assert table.final is not None
    _Round(directory, journal, say, judge, final).go(table.final.trials)


class _Round:
    """Judges at work, and what they have found."""

    def __init__(
        self,
        directory: SearchDirectory,
        journal: SearchJournal,
        say: Callable[[str], None],
        judge: Judge,
        final: FinalSpec,
    ) -> None:
        import ray

        search, resources = directory.search, directory.base.resources
        self._directory, self._journal, self._say, self._final = directory, journal, say, final
        self._task: Any = ray.remote(
            num_cpus=resources.cpus_per_worker, num_gpus=resources.gpus_per_worker, max_retries=search.retries
        )(judge)
        self._most = search.concurrency * search.workers if search.concurrency else None
        self._found: dict[int, list[list[Judged]]] = {}
        """Finalist -> for each seed what its draws were worth."""

    def go(self, numbers: tuple[int, ...]) -> None:
        """Judge all draws of all of them."""
        import ray

        seeds, trials = len(self._directory.seeds), self._journal.table.trials
        numbers = tuple(number for number in numbers if trials[number].final is None)
        self._found = {number: [[] for _ in range(seeds)] for number in numbers}
        waiting = deque(
            (n, index, draw) for n in numbers for index in range(seeds) for draw in range(self._final.draws)
        )
        working: dict[Any, tuple[int, int]] = {}
        while waiting or working:
            while waiting and (self._most is None or len(working) < self._most):
                number, index, draw = waiting.popleft()
                if trials[number].final is not None:
                    continue  # another draw of it failed
                path, kimg = self._directory.run_path(number, index), trials[number].kimg
                working[self._task.remote(path, kimg, self._final, draw)] = number, index
            for done in ray.wait(list(working))[0] if working else []:
                self._take(*working.pop(done), done)

    def _take(self, number: int, index: int, done: Any) -> None:
        """Take in how one judge ended, and write down what the finalist is worth once all of its judges have."""
        import ray

        trial, found = self._journal.table.trials[number], self._found[number]
        if trial.final is not None:
            return
        try:
            found[index].append(ray.get(done))
        except (ray.exceptions.RayTaskError, ray.exceptions.WorkerCrashedError, ray.exceptions.OutOfMemoryError) as e:
            cause = getattr(e, "cause", e)
            reason = str(cause) if isinstance(cause, BessemerError) else f"{type(cause).__name__}: {first_line(cause)}"
            self._journal.write("final", trial=number, reason=reason)
            self._say(f"{trial.name}  final: not judged: {first_line(cause)}")
            return
        if any(len(draws) < self._final.draws for draws in found):
            return
        means = [combine([d.value for d in draws], [d.standard_error for d in draws]) for draws in found]
        value, error = combine([mean for mean, _ in means], [own for _, own in means])
        seconds = round(sum(d.seconds for draws in found for d in draws), 3)
        self._journal.write("final", trial=number, value=value, standard_error=error, seconds=seconds)
        self._say(f"{trial.name}  final: {self._final.metric} {with_error(value, error)}")


def judge_run(path: Path, kimg: float, final: FinalSpec, draw: int) -> Judged:
    """Judge the averaged weights of a run by the images of one draw, unless its journal has that already.

    Args:
        path: of the run.
        kimg: where it was judged last.
        final: the metric, and how many images.
        draw: number of the draw, from 0.

    Raises:
        EvaluationError: the metric cannot be computed, or is no number.
        CheckpointError: the weights are damaged.
        RunError: the weights of that moment are not there.
    """
    from bessemer.systems.snapshot import newest_snapshot, read_snapshot_info

    run, began = RunDirectory.open(path), time.monotonic()
    seed, snapshot = latent_seed(run.job().seed, draw), newest_snapshot(run.path)
    info = read_snapshot_info(snapshot)
    if info.nimg < kimg * 1000:
        raise RunError(f"{run.path}: has no snapshot of {kimg:g} kimg; the newest is {snapshot.name}.")
    record = _known(run, final, seed, info.weights_sha256)
    if record is None:
        _evaluate(run, snapshot, final, seed)
        record = _known(run, final, seed, info.weights_sha256) or {}
    value = finite(record.get("value"))
    if value is None:
        raise EvaluationError(f"{run.path}: {final.metric} of draw {draw} is no number.")
    return Judged(value, finite(record.get("standard_error")), time.monotonic() - began)


def _known(run: RunDirectory, final: FinalSpec, seed: int, weights_sha256: str) -> dict[str, Any] | None:
    """What the run's journal says of these weights by this metric and these latents."""
    wanted = {"kind": "evaluation", "metric": final.metric, "seed": seed, "weights_sha256": weights_sha256}
    if final.metric != "bits_per_dim":  # which takes fewer where the data has fewer
        wanted["samples"] = final.samples
    found = [r for r in read_journal(run.journal.path) if all(r.get(name) == value for name, value in wanted.items())]
    return found[-1] if found else None


def _evaluate(run: RunDirectory, snapshot: Path, final: FinalSpec, seed: int) -> None:
    """Judge a snapshot by the protocol of the run's job, but for the metric, the number of images and their latents."""
    import torch

    from bessemer.data.reading.opening import open_job_data
    from bessemer.evaluation.judging import judge_weights
    from bessemer.evaluation.names import split_metrics
    from bessemer.orchestration.evaluation import held_out_images
    from bessemer.systems.snapshot import load_snapshot

    job, failures = run.job(), list[str]()
    torch.set_num_threads(job.training.threads_per_worker)
    device = "cuda" if job.resources.gpus_per_worker and torch.cuda.is_available() else "cpu"
    system, info = load_snapshot(snapshot, device)
    with open_job_data(job.data) as dataset, held_out_images(job, dataset) as held_out:
        records = judge_weights(
            system,
            info,
            dataset,
            held_out,
            split_metrics([final.metric]),
            failures,
            samples=final.samples,
            importance_samples=job.evaluation.importance_samples,
            seed=seed,
            device=device,
            batch_size=job.evaluation.batch_size,
            truncation=job.evaluation.truncation,
        )
    if failures:
        raise EvaluationError("\n".join(failures))
    for record in records:
        run.journal.write("evaluation", info.nimg, **record.as_dict())
