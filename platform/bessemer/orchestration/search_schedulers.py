"""Who decides at a rung: Ray Tune's schedulers, one of them our own, behind a clerk who writes everything down first.

Ray Tune does not keep a scheduler's state when its driver dies. The journal does: what was decided is in it, and a new
scheduler is told of every result that the old one saw.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from ray.tune.experiment import Trial as TuneTrial
from ray.tune.schedulers import (
    AsyncHyperBandScheduler,
    FIFOScheduler,
    HyperBandForBOHB,
    HyperBandScheduler,
    MedianStoppingRule,
    TrialScheduler,
)
from ray.tune.schedulers.async_hyperband import _Bracket

from bessemer.orchestration.search_points import Points
from bessemer.orchestration.search_population import IsLegal, Population
from bessemer.spec.search import SearchSpec
from bessemer.tracking.search_journal import Decision, Result, SearchJournal, Trial
from bessemer.tracking.tables import with_error

__all__ = ["Clerk", "NoisyAsha", "scheduler_of"]

_MEDIAN_OF = 3
"""Trials that must have been judged at a rung before the median says anything."""


class _NoisyBracket(_Bracket):
    """Rungs at given moments, and a cut that is lower by what a trial's own error allows."""

    def __init__(self, rungs: tuple[float, ...], reduction: float) -> None:
        super().__init__(1, 1, reduction, 0)
        self._rungs = [(kimg, {}) for kimg in reversed(rungs)]
        self.tolerance = 0.0

    def cutoff(self, recorded: dict[str, float]) -> Any:
        cut = super().cutoff(recorded)
        return None if cut is None else cut - self.tolerance


class NoisyAsha(AsyncHyperBandScheduler):
    """Asynchronous successive halving (Li et al. 2018, arXiv:1810.05934) on values that carry their standard error.

    A trial that is worse than the cut of its rung, the best 1/reduction of those judged there so far, is stopped only
    if it is so by more than `standard_errors` of its own: otherwise, chance could have put it on either side.

    Args:
        rungs_kimg: where trials are judged; at the last they end anyway.
        reduction: one in so many goes on.
        mode: `min` or `max`.
        standard_errors: how much worse than the cut a trial may be, in its own standard errors.
    """

    def __init__(self, rungs_kimg: tuple[float, ...], reduction: float, mode: str, standard_errors: float) -> None:
        super().__init__(
            time_attr="kimg", metric="value", mode=mode, max_t=2**31, grace_period=1, reduction_factor=reduction
        )
        self._noisy = _NoisyBracket(rungs_kimg[:-1], reduction)
        self._brackets = [self._noisy]
        self._standard_errors = standard_errors

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        self._noisy.tolerance = self._standard_errors * (result.get("standard_error") or 0.0)
        return super().on_trial_result(tune_controller, trial, result)


def scheduler_of(
    search: SearchSpec, journal: SearchJournal, copy: Callable[[], None], is_legal: IsLegal
) -> TrialScheduler:
    """The scheduler that a search asks for.

    Args:
        search: the search.
        journal: of the search.
        copy: carries out what the journal says a population copied.
        is_legal: whether a point of the space is a legal job.
    """
    spec, objective = search.scheduler, search.objective
    if spec.name in ("pbt", "pb2"):
        return Population(search, journal, copy, is_legal)
    if spec.name == "asha":
        return NoisyAsha(objective.rungs_kimg, spec.reduction, objective.mode, spec.standard_errors)
    if spec.name == "median":
        return MedianStoppingRule(
            time_attr="rungs",
            metric="value",
            mode=objective.mode,
            grace_period=1,
            min_samples_required=_MEDIAN_OF,
            min_time_slice=2**31,  # a trial that waits gives its workers to nobody
        )
    if spec.name in ("hyperband", "bohb"):
        kind = HyperBandForBOHB if spec.name == "bohb" else HyperBandScheduler
        return kind(
            time_attr="rungs",
            metric="value",
            mode=objective.mode,
            max_t=len(objective.rungs_kimg),
            reduction_factor=spec.reduction,
        )
    return FIFOScheduler()  # type: ignore[no-untyped-call]


class _Recalled:
    """Stands for a trial of an earlier session that is over."""

    def __init__(self, number: int) -> None:
        self.trial_id = f"recalled-{number}"


class Clerk(TrialScheduler):
    """Writes results and decisions to the journal before Tune acts on them, and watches the budget.

    Args:
        search: the search.
        journal: of the search; the one that its searcher has.
        inner: who decides.
        points: who is told of results.
        seeds: with which each point is trained.
        say: shown one line for each result.
        over: told of each trial that is over, after the journal.
    """

    def __init__(
        self,
        search: SearchSpec,
        journal: SearchJournal,
        inner: TrialScheduler,
        points: Points,
        seeds: int,
        say: Callable[[str], None] = lambda line: None,
        over: Callable[[Trial], None] = lambda trial: None,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._search, self._journal, self._inner, self._points = search, journal, inner, points
        self._seeds, self._say, self._over = seeds, say, over
        self._metric = "value"
        self._controller: Any = None
        # Hyperband compares trials that run at the same time: what is over belongs to brackets that are gone.
        remembers = isinstance(inner, NoisyAsha | MedianStoppingRule)
        self._to_recall = [t for t in journal.table.trials.values() if t.results] if remembers else []

    def on_trial_add(self, tune_controller: Any, trial: TuneTrial) -> None:
        self._recall_ended(tune_controller)
        self._inner.on_trial_add(tune_controller, trial)
        for known in [t for t in self._to_recall if t.number == trial.config["trial"]]:
            self._to_recall.remove(known)
            self._recall(tune_controller, trial, known)

    def _recall_ended(self, tune_controller: Any) -> None:
        for known in [t for t in self._to_recall if t.is_over]:
            self._to_recall.remove(known)
            stand_in = _Recalled(known.number)
            self._inner.on_trial_add(tune_controller, stand_in)  # type: ignore[arg-type]
            self._recall(tune_controller, stand_in, known)

    def _recall(self, tune_controller: Any, trial: Any, known: Trial) -> None:
        """Tell the scheduler what it saw in an earlier session; what it decides is decided already."""
        for result in known.results:
            fields: dict[str, Any] = {"kimg": self._search.objective.rungs_kimg[result.rung], "rungs": result.rung + 1}
            fields["value"] = result.value  # its error only mattered for that decision
            self._inner.on_trial_result(tune_controller, trial, fields)

    def on_trial_result(self, tune_controller: Any, trial: TuneTrial, result: dict[str, Any]) -> str:
        known = self._journal.table.trials[trial.config["trial"]]
        if "failed" in result:
            self.failed(known, result["failed"])
            trial.max_failures = 0  # its process ends with an error, so that no other trial goes on there
            return TrialScheduler.CONTINUE
        if result["rung"] != known.rung:
            return TrialScheduler.CONTINUE  # heard of already
        action, decision = self._decide(tune_controller, trial, known, result)
        fields = {name: result[name] for name in ("rung", "kimg", "value", "standard_error", "seconds")}
        fields["values"] = json.loads(result["further"])
        self._journal.write("result", trial=known.number, decision=decision, **fields)
        self._points.judged(known, known.results[-1])
        self._say(_line(self._search, known, known.results[-1]))
        if decision in ("stop", "budget", "finish"):
            self.ended(known)
            if decision != "stop":
                self._leave(tune_controller, trial, result)
        self.settle()
        return action

    def _decide(
        self, tune_controller: Any, trial: TuneTrial, known: Trial, result: dict[str, Any]
    ) -> tuple[str, Decision]:
        if result["rung"] == len(self._search.objective.rungs_kimg) - 1:
            return TrialScheduler.STOP, "finish"
        # A population is ended as a whole: those that were judged first would go on alone otherwise.
        if not isinstance(self._inner, Population) and self.spent(known, result):
            return TrialScheduler.STOP, "budget"
        action = self._inner.on_trial_result(tune_controller, trial, result)
        if action == TrialScheduler.STOP:
            return action, "stop"
        return action, "continue" if action == TrialScheduler.CONTINUE else "pause"

    def spent(self, known: Trial | None = None, result: dict[str, Any] | None = None) -> bool:
        """Whether a limit of the budget is reached, with a trial's result that is not in the journal yet."""
        budget, table, workers = self._search.budget, self._journal.table, self._search.workers
        more_kimg = more_seconds = 0.0
        if known is not None and result is not None:
            more_kimg, more_seconds = (result["kimg"] - known.kimg) * self._seeds, result["seconds"]
        spent = (
            (budget.kimg, table.kimg(self._seeds) + more_kimg),
            (budget.device_hours, table.device_hours(workers) + more_seconds * workers / 3600),
            (budget.hours, table.seconds / 3600),
        )
        return any(limit is not None and used >= limit for limit, used in spent)

    def _leave(self, tune_controller: Any, trial: TuneTrial, result: dict[str, Any]) -> None:
        """Tell the scheduler that a trial ends which it did not stop."""
        if not isinstance(self._inner, FIFOScheduler) or isinstance(self._inner, MedianStoppingRule):
            self._inner.on_trial_complete(tune_controller, trial, result)

    def ended(self, known: Trial) -> None:
        """Pass on that a trial is over, as the journal says."""
        self._points.over(known)
        self._over(known)

    def failed(self, known: Trial, reason: str) -> None:
        """Write down that a trial cannot go on."""
        if known.is_over:
            return
        self._journal.write("failed", trial=known.number, reason=reason)
        self.ended(known)
        self._say(f"{known.name}  failed: {reason.splitlines()[0]}")
        self.settle()

    def settle(self) -> None:
        """Let a population that stands at a rung exchange and go on, or end all of it where the budget is spent."""
        if not isinstance(self._inner, Population) or not self._inner.stands(is_whole=(spent := self.spent())):
            return
        if not spent:
            self._inner.exchange()
            return
        for known in self._journal.table.live:
            self._journal.write("stopped", trial=known.number, reason="the budget was spent")
            self.ended(known)

    def on_trial_error(self, tune_controller: Any, trial: TuneTrial) -> None:
        self._inner.on_trial_error(tune_controller, trial)

    def on_trial_complete(self, tune_controller: Any, trial: TuneTrial, result: dict[str, Any]) -> None:
        """Everything was said when the trial was judged."""

    def on_trial_remove(self, tune_controller: Any, trial: TuneTrial) -> None:
        self._inner.on_trial_remove(tune_controller, trial)

    def choose_trial_to_run(self, tune_controller: Any) -> TuneTrial | None:
        """Who is next: nobody whose process starts already.

        A process that is free goes to the chosen trial at once, and Tune then gives up the one that it started for it:
        where trials take no longer than processes need to start, most of them would never be there.
        """
        self._controller = tune_controller
        chosen = self._inner.choose_trial_to_run(tune_controller)
        return None if chosen is not None and _is_starting(tune_controller, chosen) else chosen

    @property
    def busy(self) -> int:
        """Trials that have a process, or wait for one; those that wait for others of their rung do not count."""
        live = self._controller.get_live_trials() if self._controller is not None else ()
        return sum(trial.status in (TuneTrial.PENDING, TuneTrial.RUNNING) for trial in live)

    def debug_string(self) -> str:
        return self._inner.debug_string()


def _is_starting(tune_controller: Any, trial: TuneTrial) -> bool:
    """Whether a trial has its place, and its process is on its way. There is no public way to ask."""
    return bool(tune_controller._actor_manager.is_actor_started(tune_controller._trial_to_actor.get(trial)))


def _line(search: SearchSpec, trial: Trial, result: Result) -> str:
    worth = with_error(result.value, result.standard_error)
    what = {"continue": "goes on", "pause": "waits", "finish": "finished", "stop": "stopped", "budget": "budget spent"}
    return (
        f"{trial.name}  {result.kimg:g} of {search.length_kimg:g} kimg  "
        f"{search.objective.metric} {worth}  {what[result.decision]}"
    )
