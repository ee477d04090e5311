"""The journal of a search, and the table of its trials that follows from it.

``search.jsonl`` holds one record per line, as a run's journal does, and is written by the search's driver alone. It is
the memory of a search: whoever resumes one, or asks how it stands, reads nothing else. A record reaches the disk before
what it says is acted upon, so that a search killed at any moment knows every trial that it began.

=============  ========================================================================================
``session``    the driver started: `number`
``trial``      a point was chosen: `trial`, `point`
``result``     a trial was judged at a rung: `trial`, `rung`, `kimg`, `value`, `standard_error`, `values`, `seconds`,
               and what follows from it: `decision`
``exchange``   a population stood at a rung: `rung`, and `copies`, each with `trial`, `donor`, `kimg`, `point`
``failed``     a trial cannot go on: `trial`, `reason`
``stopped``    a trial that waited at a rung will not go on: `trial`, `reason`
``refused``    a point that the searcher wanted is no legal job: `point`, `reason`
``retried``    the workers of a trial were lost, and it goes on: `trial`, `reason`
``finalists``  all trials are over, and the best are judged once more: `trials`, and how: `metric`, `mode`, `samples`,
               `draws`
``final``      a finalist was judged once more: `trial`, `value`, `standard_error`, `seconds`; or could not be: `reason`
``ended``      the search has come to its end: `reason`
=============  ========================================================================================
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from bessemer.errors import RunError
from bessemer.tracking.journal import Journal, Record, finite, read_entries

__all__ = [
    "SEARCH_LOCK",
    "Decision",
    "Final",
    "FinalResult",
    "Judgement",
    "Result",
    "SearchJournal",
    "SearchTable",
    "Trial",
    "TrialState",
    "combine",
    "fold",
    "read_search",
    "trial_name",
]

SEARCH_LOCK = ".lock"
"""Lock file of a search; its driver holds it."""

Decision = Literal["continue", "stop", "finish", "pause", "budget"]
TrialState = Literal["waiting", "running", "stopped", "finished", "failed"]

_ENDS: dict[str, TrialState] = {"stop": "stopped", "budget": "stopped", "finish": "finished"}


@dataclass(frozen=True)
class Result:
    """What a trial was worth at one rung."""

    rung: int
    """Counted from 0."""
    kimg: float
    value: float
    """Mean over the seeds."""
    standard_error: float | None
    seconds: float
    """Of training and evaluation since the rung before, over all seeds."""
    decision: Decision
    values: dict[str, float]
    """Further objectives."""
    point: dict[str, Any]
    """Settings with which the trial came here."""
    time: float


@dataclass(frozen=True)
class FinalResult:
    """What a finalist was worth when it was judged once more."""

    value: float | None
    """Mean over draws and seeds; None where it could not be judged."""
    standard_error: float | None
    seconds: float
    """That its judges took, all together."""
    reason: str | None
    """Why it could not be judged."""


@dataclass(frozen=True)
class Final:
    """How finalists are judged once more."""

    trials: tuple[int, ...]
    """Numbers of the finalists, the best by the objective first."""
    metric: str
    mode: str
    samples: int
    draws: int


@dataclass
class Trial:
    """One trial, as the journal tells it."""

    number: int
    point: dict[str, Any]
    """Its settings now."""
    began: float
    state: TrialState = "waiting"
    results: list[Result] = field(default_factory=list)
    retries: int = 0
    reason: str | None = None
    """Why it failed, or was stopped."""
    donors: list[tuple[int, int]] = field(default_factory=list)
    """Rung and trial that it copied."""
    final: FinalResult | None = None
    """What it was worth as a finalist."""

    @property
    def name(self) -> str:
        """Directory of the trial below ``trials/``."""
        return trial_name(self.number)

    @property
    def rung(self) -> int:
        """Rungs at which it was judged."""
        return len(self.results)

    @property
    def last(self) -> Result | None:
        """What it was worth when it was judged last."""
        return self.results[-1] if self.results else None

    @property
    def is_over(self) -> bool:
        """Whether nothing more will happen to it."""
        return self.state in ("stopped", "finished", "failed")

    @property
    def kimg(self) -> float:
        """Thousands of images until it was judged last."""
        return self.results[-1].kimg if self.results else 0.0

    @property
    def seconds(self) -> float:
        """Time that it took until it was judged last."""
        return sum(result.seconds for result in self.results)


def trial_name(number: int) -> str:
    """Name of a trial: ``t0007``."""
    return f"t{number:04d}"


@dataclass
class SearchTable:
    """All that a search's journal says."""

    trials: dict[int, Trial] = field(default_factory=dict)
    exchanges: dict[int, Record] = field(default_factory=dict)
    """Rung -> what a population did there."""
    refused: int = 0
    sessions: int = 0
    seconds: float = 0.0
    """Time that the search went on, interruptions not counted."""
    final: Final | None = None
    """Who is judged once more, and how; None before all trials are over."""
    ended: str | None = None
    """Why the search is over; None while it is not."""
    _since: float = 0.0

    def fold(self, record: Record) -> None:
        """Take in one record. What does not fit is left out: a journal may be damaged."""
        kind = record["kind"]
        now = float(record["time"])
        if kind == "session":
            self.sessions += 1
            self._since, self.ended = now, None
        self.seconds += max(0.0, now - self._since)
        self._since = now
        number = record.get("trial")
        trial = self.trials.get(number) if isinstance(number, int) else None
        if kind == "trial" and isinstance(number, int) and trial is None and isinstance(record.get("point"), dict):
            self.trials[number] = Trial(number, dict(record["point"]), now)
        elif kind == "result" and trial is not None:
            self._judge(trial, record)
        elif kind == "failed" and trial is not None:
            trial.state, trial.reason = "failed", str(record.get("reason"))
        elif kind == "stopped" and trial is not None:
            trial.state, trial.reason = "stopped", str(record.get("reason"))
        elif kind == "retried" and trial is not None:
            trial.retries += 1
        elif kind == "exchange":
            self._exchange(record)
        elif kind == "finalists":
            self._choose_finalists(record)
        elif kind == "final" and trial is not None and trial.final is None:
            value, reason = finite(record.get("value")), record.get("reason")
            error, seconds = finite(record.get("standard_error")), finite(record.get("seconds")) or 0.0
            trial.final = FinalResult(value, error, seconds, None if reason is None else str(reason))
        elif kind == "refused":
            self.refused += 1
        elif kind == "ended":
            self.ended = str(record.get("reason"))

    @staticmethod
    def _judge(trial: Trial, record: Record) -> None:
        value, rung = finite(record.get("value")), record.get("rung")
        if value is None or rung != trial.rung or trial.is_over:
            return
        decision: Decision = record.get("decision", "continue")
        further = record.get("values")
        trial.results.append(
            Result(
                rung=rung,
                kimg=finite(record.get("kimg")) or 0.0,
                value=value,
                standard_error=finite(record.get("standard_error")),
                seconds=finite(record.get("seconds")) or 0.0,
                decision=decision,
                values={str(k): float(v) for k, v in further.items()} if isinstance(further, dict) else {},
                point=trial.point,
                time=float(record["time"]),
            )
        )
        trial.state = _ENDS.get(decision, "running")
        if decision == "budget":
            trial.reason = "the budget was spent"

    def _exchange(self, record: Record) -> None:
        rung, copies = record.get("rung"), record.get("copies")
        if not isinstance(rung, int) or not isinstance(copies, list):
            return
        self.exchanges[rung] = record
        for copy in copies:
            trial = self.trials.get(copy.get("trial"))
            if trial is not None:
                trial.point = dict(copy["point"])
                trial.donors.append((rung, copy["donor"]))

    def _choose_finalists(self, record: Record) -> None:
        numbers = record.get("trials")
        if self.final is not None or not isinstance(numbers, list):
            return
        known = tuple(number for number in numbers if isinstance(number, int) and number in self.trials)
        samples, draws = (value if isinstance(value := record.get(k), int) else 0 for k in ("samples", "draws"))
        self.final = Final(known, str(record.get("metric")), str(record.get("mode")), samples, draws)

    @property
    def final_is_over(self) -> bool:
        """Whether every finalist was judged once more, or could not be, and at least one was."""
        if self.final is None:
            return False
        found = [self.trials[number].final for number in self.final.trials]
        return all(one is not None for one in found) and any(one and one.value is not None for one in found)

    @property
    def live(self) -> list[Trial]:
        """Trials that are not over."""
        return [trial for trial in self.trials.values() if not trial.is_over]

    def device_hours(self, workers: int) -> float:
        """Hours times workers that all trials took."""
        return sum(trial.seconds for trial in self.trials.values()) * workers / 3600

    @property
    def final_hours(self) -> float:
        """Hours that the judges of the finalists took, together; each has the devices of one worker."""
        return sum(trial.final.seconds for trial in self.trials.values() if trial.final is not None) / 3600

    def kimg(self, seeds: int = 1) -> float:
        """Thousands of images over all trials."""
        return sum(trial.kimg for trial in self.trials.values()) * seeds

    def ranked(self, mode: str = "min") -> list[Trial]:
        """Trials that were judged and did not fail, best first.

        Those that came furthest come first, by their last value: values at other rungs do not compare. Once all
        finalists were judged once more, those with a final value come before everybody, by that; before, final values
        say nothing, since others would have to be compared with something else.

        Args:
            mode: of the objective; the final judgement knows its own.
        """
        judged = [trial for trial in self.trials.values() if trial.results and trial.state != "failed"]
        sign = -1.0 if mode == "max" else 1.0
        rest = sorted(judged, key=lambda t: (-t.rung, sign * t.results[-1].value, t.number))
        if self.final is None or not self.final_is_over:
            return rest
        sign = -1.0 if self.final.mode == "max" else 1.0
        place = {
            trial.number: sign * trial.final.value
            for trial in rest
            if trial.final is not None and trial.final.value is not None
        }
        return sorted(rest, key=lambda t: (t.number not in place, place.get(t.number, 0.0)))

    def best(self, mode: str = "min") -> Trial | None:
        """The first of :meth:`ranked`."""
        return next(iter(self.ranked(mode)), None)

    def as_good(self, mode: str = "min") -> list[Trial]:
        """Trials that were judged as the best one was, and that chance could have put in its place.

        They are worse than it by no more than the standard error of the difference, the root of the sum of squares.
        """
        ranked, found = self.ranked(mode), []
        best = self.judgement(ranked[0]) if ranked else None
        for trial in ranked[1:]:
            mine = self.judgement(trial)
            if mine is None or best is None or mine.rung != best.rung:
                continue
            error = math.hypot(mine.standard_error or 0.0, best.standard_error or 0.0)
            if abs(mine.value - best.value) <= error:
                found.append(trial)
        return found

    def judgement(self, trial: Trial) -> Judgement | None:
        """What counts for a trial now: its final value once the final is over, its last result otherwise."""
        if self.final_is_over and trial.final is not None and trial.final.value is not None:
            return Judgement(trial.final.value, trial.final.standard_error, None)
        last = trial.last
        return Judgement(last.value, last.standard_error, last.rung) if last else None


class Judgement(NamedTuple):
    """A value with its standard error."""

    value: float
    standard_error: float | None
    rung: int | None
    """None for a final value."""


class SearchJournal:
    """Writes the journal of a search, and keeps the table that follows from it. For one thread of one process."""

    def __init__(self, directory: Path) -> None:
        self._journal = Journal(directory / "search.jsonl")
        self.table = read_search(directory)

    def write(self, kind: str, **fields: Any) -> None:
        """Append a record, which is on the disk when this returns.

        Raises:
            RunError: it cannot be written.
        """
        self._journal.write(kind, 0, **fields)
        self.table.fold({"kind": kind, "time": time.time(), **fields})


def read_search(directory: Path) -> SearchTable:
    """The table of a search.

    Raises:
        RunError: the journal cannot be read.
    """
    try:
        return fold(entry.record for entry in read_entries(directory / "search.jsonl"))
    except OSError as e:
        raise RunError(f"{directory / 'search.jsonl'}: cannot be read ({e.strerror}).") from None


def fold(records: Iterable[Record]) -> SearchTable:
    """The table that follows from records."""
    table = SearchTable()
    for record in records:
        table.fold(record)
    return table


def combine(values: list[float], errors: list[float | None]) -> tuple[float, float | None]:
    """Mean over the seeds, and its standard error.

    With several seeds that is the larger of what the seeds' scatter says, s/√n, and of what the metric says of its own
    error, √Σσ²/n: few seeds may agree by chance.
    """
    count = len(values)
    mean = sum(values) / count
    known = [e for e in errors if e is not None]
    own = math.sqrt(sum(e * e for e in known)) / count if known else None
    if count == 1:
        return mean, own
    scatter = math.sqrt(sum((v - mean) ** 2 for v in values) / (count - 1) / count)
    return mean, max(scatter, own or 0.0)
