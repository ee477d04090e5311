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
``ended``      the search has come to its end: `reason`
=============  ========================================================================================
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from bessemer.errors import RunError
from bessemer.tracking.journal import Journal, Record, finite, read_entries

__all__ = [
    "SEARCH_LOCK",
    "Decision",
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

    @property
    def live(self) -> list[Trial]:
        """Trials that are not over."""
        return [trial for trial in self.trials.values() if not trial.is_over]

    def device_hours(self, workers: int) -> float:
        """Hours times workers that all trials took."""
        return sum(trial.seconds for trial in self.trials.values()) * workers / 3600

    def kimg(self, seeds: int = 1) -> float:
        """Thousands of images over all trials."""
        return sum(trial.kimg for trial in self.trials.values()) * seeds

    def best(self, mode: str = "min") -> Trial | None:
        """The trial that is best among those that came furthest: values at other rungs do not compare."""
        judged = [trial for trial in self.trials.values() if trial.results and trial.state != "failed"]
        furthest = max((trial.rung for trial in judged), default=0)
        sign = -1.0 if mode == "max" else 1.0
        there = [trial for trial in judged if trial.rung == furthest]
        return min(there, key=lambda t: (sign * t.results[-1].value, t.number), default=None)


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
