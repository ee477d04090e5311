"""Population based training: bad trials go on from copies of good ones, with other settings.

The whole population stands at a rung before anything is copied, so who copies whom is a function of the values there
and of the seed, and the journal has it before a file is touched. A copy is the donor's checkpoint: weights, optimizer
states, averages and the state of the system, of all networks, in the shards in which its workers wrote it.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
import shutil
import warnings
from collections.abc import Callable
from random import Random
from typing import Any

from ray.tune.experiment import Trial as TuneTrial
from ray.tune.schedulers import FIFOScheduler, TrialScheduler

from bessemer.errors import CheckpointError
from bessemer.files import hidden_name, write_atomically
from bessemer.orchestration.run_directory import RunDirectory
from bessemer.orchestration.search_directory import SearchDirectory
from bessemer.spec.search import SearchSpec
from bessemer.spec.space import Point, Space
from bessemer.tracking.search_journal import SearchJournal, SearchTable, Trial
from bessemer.training.checkpoint_files import complete_checkpoints, delete_checkpoint, nimg_of, verify_checkpoint

__all__ = ["IsLegal", "Population", "copies_at", "copy_states"]

IsLegal = Callable[[Point], bool]
_LINEAGE = "lineage.json"


class Population(FIFOScheduler):
    """Lets trials train from rung to rung, all of them as far as each other.

    Args:
        search: the search.
        journal: of the search.
        copy: carries out what the journal says a population copied.
        is_legal: whether a point of the space is a legal job.
    """

    def __init__(self, search: SearchSpec, journal: SearchJournal, copy: Callable[[], None], is_legal: IsLegal) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._search, self._journal, self._copy, self._is_legal = search, journal, copy, is_legal

    def on_trial_result(self, tune_controller: Any, trial: TuneTrial, result: dict[str, Any]) -> str:  # noqa: ARG002
        return TrialScheduler.PAUSE

    def stands(self, is_whole: bool) -> bool:
        """Whether all of the population stand at a rung where nothing was exchanged yet.

        Args:
            is_whole: nobody else is to come, however many the budget would allow.
        """
        table = self._journal.table
        live = table.live
        if not live or (len(table.trials) < self._search.budget.trials and not is_whole):
            return False
        rung = live[0].rung - 1
        return rung >= 0 and rung not in table.exchanges and all(trial.rung - 1 == rung for trial in live)

    def exchange(self) -> None:
        """Exchange settings and states. The population stands at a rung."""
        table = self._journal.table
        rung = table.live[0].rung - 1
        self._journal.write("exchange", rung=rung, copies=copies_at(self._search, table, rung, self._is_legal))
        self._copy()

    def choose_trial_to_run(self, tune_controller: Any) -> TuneTrial | None:
        """A trial that does not wait for others, or that only has to hear that it is over."""
        table = self._journal.table
        for status in (TuneTrial.PENDING, TuneTrial.PAUSED):
            for trial in tune_controller.get_trials():
                known = table.trials[trial.config["trial"]]
                waits = known.rung > 0 and known.rung - 1 not in table.exchanges and not known.is_over
                if trial.status == status and not waits:
                    return trial  # type: ignore[no-any-return]
        return None


def copies_at(
    search: SearchSpec, table: SearchTable, rung: int, is_legal: IsLegal = lambda point: True
) -> list[dict[str, Any]]:
    """Who copies whom at a rung, and goes on with which settings: a function of the values there and of the seed.

    The worst share of the population copies, each from one of the best share, where it is worse by more than
    `scheduler.standard_errors` of its own.
    """
    spec, sign = search.scheduler, -1.0 if search.objective.mode == "max" else 1.0
    ranked = sorted(table.live, key=lambda trial: (sign * trial.results[rung].value, trial.number))
    share = min(max(1, int(len(ranked) * spec.quantile)), len(ranked) // 2)
    best, worst = ranked[:share], ranked[len(ranked) - share :]
    rng = Random(f"{search.seed}/exchange/{rung}")
    copies: list[dict[str, Any]] = []
    for trial in sorted(worst, key=lambda trial: trial.number):
        donor = rng.choice(best)
        mine, theirs = trial.results[rung], donor.results[rung]
        if sign * (mine.value - theirs.value) <= spec.standard_errors * (mine.standard_error or 0.0):
            continue
        if spec.name == "pb2":
            point = _model_step(search, table, donor, [copy["point"] for copy in copies])
        else:
            point = Space(search.space).perturb(donor.point, rng, spec.resample)
        if not is_legal(point):
            point = donor.point
        copies.append({"trial": trial.number, "donor": donor.number, "kimg": theirs.kimg, "point": point})
    return copies


def _model_step(search: SearchSpec, table: SearchTable, donor: Trial, taken: list[Point]) -> Point:
    """Settings by the Gaussian process of PB2 (Parker-Holder et al. 2020, arXiv:2002.02518), as Ray Tune computes it.

    It models how much one stretch of training improved a trial, as a function of when, of how good it was before, and
    of its settings; those of a `loguniform` range by their logarithm.
    """
    import numpy as np
    from ray.tune.schedulers.pb2 import _select_config

    space, sign = Space(search.space), 1.0 if search.objective.mode == "max" else -1.0
    logarithmic = {field: d.loguniform is not None for field, d in space.dimensions.items()}

    def row(point: Point) -> list[float]:
        return [math.log(point[field]) if log else float(point[field]) for field, log in logarithmic.items()]

    known, gains = [], []
    for trial in table.trials.values():
        for before, after in itertools.pairwise(trial.results):
            known.append([after.kimg, sign * before.value, *row(after.point)])
            gains.append(sign * (after.value - before.value) / (after.kimg - before.kimg))
    seed = f"{search.seed}/{len(known)}/{donor.number}/{len(taken)}"
    if len(known) < 2:  # nothing to model yet
        return space.perturb(donor.point, Random(seed), 0.0)
    order = np.argsort([values[0] for values in known], kind="stable")
    ends = {field: d.loguniform or d.uniform or (0, 0) for field, d in space.dimensions.items()}
    low, high = (row({field: pair[end] for field, pair in ends.items()}) for end in (0, 1))
    last = donor.results[-1]
    np.random.seed(Random(seed).randrange(2**32))  # noqa: NPY002  # where the optimizer of the acquisition begins
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # with few points, parameters of the kernel end at their bounds
        chosen = _select_config(
            np.array(known)[order],
            np.array(gains)[order],
            np.array([row(point) for point in taken]) if taken else None,  # type: ignore[arg-type]
            np.array([last.kimg, sign * last.value]),
            dict(zip(ends, zip(low, high, strict=True), strict=True)),
            num_f=2,
        )
    return {
        field: space.within(field, math.exp(value) if log else float(value))
        for (field, log), value in zip(logarithmic.items(), chosen, strict=True)
    }


def copy_states(directory: SearchDirectory, table: SearchTable) -> None:
    """Carry out the last exchange of a population, as far as that was not done. No trial may be trained meanwhile.

    Raises:
        CheckpointError: a donor's checkpoint is damaged.
    """
    if not table.exchanges:
        return
    rung = max(table.exchanges)
    for copy in table.exchanges[rung]["copies"]:
        for index in range(len(directory.seeds)):
            donor, run = (RunDirectory.open(directory.run_path(copy[who], index)) for who in ("donor", "trial"))
            _copy_newest(donor, run, rung)


def _copy_newest(donor: RunDirectory, run: RunDirectory, rung: int) -> None:
    """Replace the checkpoints of `run` by the donor's newest."""
    done = run.path / _LINEAGE
    with contextlib.suppress(OSError, ValueError):
        if json.loads(done.read_text())["rung"] == rung:
            return
    found = complete_checkpoints(donor.checkpoints)
    if not found:
        raise CheckpointError(f"{donor.checkpoints}: holds no checkpoint that {run.path.name} could copy.")
    source = found[-1]
    verify_checkpoint(source)
    run.checkpoints.mkdir(exist_ok=True)
    target = run.checkpoints / source.name
    aside = hidden_name(target)
    shutil.copytree(source, aside, copy_function=_link)
    for old in complete_checkpoints(run.checkpoints):
        delete_checkpoint(old)
    aside.rename(target)
    run.journal.write("event", nimg_of(source), event="copied", donor=donor.path.name, checkpoint=source.name)
    lineage = json.dumps({"rung": rung, "donor": donor.path.name})
    write_atomically(done, lambda file: file.write(lineage.encode()))


def _link(source: str, target: str) -> None:
    """Checkpoints are never written to again, so a second name will do where the file system has such."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
