"""What connects one session of Ray Tune with the journal of a search: who is tried next, and who was lost."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ray.tune import Callback
from ray.tune.search import Searcher

from bessemer.errors import SpecError
from bessemer.orchestration.search_directory import SearchDirectory
from bessemer.orchestration.search_points import Points
from bessemer.orchestration.search_schedulers import Clerk
from bessemer.spec.search_load import trial_job
from bessemer.tracking.search_journal import SearchJournal

__all__ = ["JournalSearcher", "Witness"]

_MOST_ATTEMPTS = 50


class JournalSearcher(Searcher):
    """Hands Tune the trials that an earlier session left, then new ones, each written down before Tune hears of it.

    Args:
        directory: of the search.
        journal: of the search.
        points: who chooses new points.
        clerk: who knows whether the budget is spent, and how many trials are under way.
        room: trials that may be under way at once. More would be chosen before they can start, and so without what the
            others found meanwhile.
    """

    def __init__(
        self,
        directory: SearchDirectory,
        journal: SearchJournal,
        points: Points,
        clerk: Clerk,
        room: Callable[[], float] = lambda: math.inf,
    ) -> None:
        super().__init__(metric="value", mode=directory.search.objective.mode)
        self._room = room
        self._directory, self._journal, self._points, self._clerk = directory, journal, points, clerk
        self._left = [trial.number for trial in journal.table.live]
        self._numbers: dict[str, int] = {}
        self._exhausted = False

    def suggest(self, trial_id: str) -> Any:
        if self._clerk.busy >= self._room():
            return None  # Tune asks again
        number = next((number for number in self._left if not self._waits(number)), None)
        if number is not None:
            self._left.remove(number)
        else:
            number = self._new()
        if number is None:
            if self._left:
                return None  # Tune asks again
            self._exhausted = True
            return Searcher.FINISHED
        self._numbers[trial_id] = number
        return {"search": str(self._directory.path), "trial": number}

    def _waits(self, number: int) -> bool:
        """Whether a trial of a population has to wait for the others. Tune would start at once what it is handed."""
        table, rung = self._journal.table, self._journal.table.trials[number].rung
        is_population = self._directory.search.scheduler.name in ("pbt", "pb2")
        return is_population and rung > 0 and rung - 1 not in table.exchanges

    def _new(self) -> int | None:
        table, search = self._journal.table, self._directory.search
        if self._exhausted or len(table.trials) >= search.budget.trials or self._clerk.spent():
            return None
        number = len(table.trials)
        for attempt in range(_MOST_ATTEMPTS):
            point = self._points.choose(number, attempt)
            if point is None:
                return None
            try:
                trial_job(self._directory.base, point)
            except SpecError as e:
                self._journal.write("refused", point=point, reason=str(e))
                self._points.refused(number)
                continue
            self._journal.write("trial", trial=number, point=point)
            return number
        return None

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:  # noqa: ARG002
        """A trial that no judgement ended, Tune's scheduler stopped while it waited."""
        known = self._journal.table.trials[self._numbers[trial_id]]
        if not known.is_over and not error:
            self._journal.write("stopped", trial=known.number, reason="others of its bracket were better")
            self._clerk.ended(known)

    def on_pause(self, trial_id: str) -> None:
        """Hyperband's for BOHB wants to say so."""

    def on_unpause(self, trial_id: str) -> None:
        """Hyperband's for BOHB wants to say so."""

    def save(self, checkpoint_path: str) -> None:
        """The journal has it."""

    def restore(self, checkpoint_path: str) -> None:
        """The journal has it."""


class Witness(Callback):
    """Writes down trials whose workers were lost."""

    def __init__(self, journal: SearchJournal, clerk: Clerk) -> None:
        self._journal, self._clerk = journal, clerk

    def on_trial_recover(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:  # noqa: ARG002
        self._journal.write("retried", trial=trial.config["trial"], reason=_reason(trial))

    def on_trial_error(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:  # noqa: ARG002
        known = self._journal.table.trials[trial.config["trial"]]
        self._clerk.failed(known, f"its workers were lost {known.retries + 1} times: {_reason(trial)}")


def _reason(trial: Any) -> str:
    """The last line of what ended a trial."""
    try:
        lines = [line.strip() for line in Path(trial.error_file).read_text(errors="replace").splitlines()]
    except (OSError, TypeError):
        lines = []
    return next((line[:300] for line in reversed(lines) if line), "unknown")
