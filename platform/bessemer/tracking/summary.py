"""The row of a run: what tables, leaderboard and board show of it, small enough to keep for all runs."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from bessemer.errors import RunError
from bessemer.tracking.journal import PROTOCOL_FIELDS, Record, finite
from bessemer.tracking.runs import Curve, Point, Run, RunState, evaluation_curves, flatten, load_run, text

__all__ = ["CurveSummary", "RunSummary", "read_summary", "summarise"]

_THROUGHPUT = "throughput/img_per_s"
_RECENT_LINES = 20
_SPARKS = 32
_LONGEST_TEXT = 200
_FACTS = ("git_sha", "git_dirty", "bessemer", "python", "packages", "command")


@dataclass(frozen=True)
class CurveSummary:
    """One metric of one run by one protocol."""

    metric: str
    higher_is_better: bool
    protocol: dict[str, Any]
    """The fields of :data:`bessemer.tracking.journal.PROTOCOL_FIELDS` that the records have."""
    evaluations: int
    best: float
    best_kimg: float
    standard_error: float | None
    """Of the best value."""
    weights_sha256: str | None
    """Of the snapshot with the best value."""
    first: float
    last: float
    spark: list[list[float]] = field(default_factory=list)
    """[kimg, value] of at most 32 evaluations, for a small picture."""


@dataclass(frozen=True)
class RunSummary:
    """One row of `bessemer runs`; unknown values are None. Best and last belong to :attr:`metric`, by one protocol."""

    name: str
    path: str
    state: RunState
    system: str | None = None
    preset: str | None = None
    kimg: float = 0.0
    total_kimg: float | None = None
    metric: str | None = None
    best: float | None = None
    standard_error: float | None = None
    best_kimg: float | None = None
    last: float | None = None
    img_per_s: float | None = None
    """Median of the last lines of the journal."""
    workers: int | None = None
    restarts: int = 0
    device_hours: float | None = None
    """GPU-hours, or core-hours of a run without GPUs."""
    created: float | None = None
    """Unix seconds."""
    newest: float | None = None
    """Unix seconds of the newest record."""
    last_word: RunState | None = None
    """How the journal says that the run ended."""
    note: str | None = None
    """Why a directory is broken."""
    curves: list[CurveSummary] = field(default_factory=list)
    job: dict[str, str] = field(default_factory=dict)
    """Fields of the job by their dotted names."""
    facts: dict[str, str] = field(default_factory=dict)
    """Where the run comes from: commit, versions, hash of the data."""

    def curve(self, metric: str | None) -> CurveSummary | None:
        """The run's own curve of a metric; of its first metric if that is None."""
        return next((curve for curve in self.curves if metric in (None, curve.metric)), None)

    def judged_by(self, metric: str | None) -> RunSummary:
        """The row with best and last of another metric."""
        curve = self.curve(metric)
        if curve is None:
            return replace(self, metric=None, best=None, standard_error=None, best_kimg=None, last=None)
        return replace(
            self,
            metric=curve.metric,
            best=curve.best,
            standard_error=curve.standard_error,
            best_kimg=curve.best_kimg,
            last=curve.last,
        )

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, kept: Mapping[str, Any]) -> RunSummary:
        """What :meth:`as_dict` gave.

        Raises:
            TypeError, KeyError: it is something else.
        """
        return cls(**{**kept, "curves": [CurveSummary(**curve) for curve in kept["curves"]]})


def read_summary(path: Path) -> RunSummary | None:
    """The row of a directory; None if it holds no file of a run, and a note if it is broken."""
    try:
        present = {name for name in ("job.yaml", "run.json", "journal.jsonl") if (path / name).is_file()}
        if not present:
            return None
        run = load_run(path, newest=_RECENT_LINES)
    except (RunError, OSError) as error:
        return RunSummary(path.name, str(path), "broken", note=str(error))
    for name, content in (("run.json", run.info), ("job.yaml", run.job)):
        if not content:
            problem = "damaged" if name in present else "missing"
            return RunSummary(path.name, str(path), "broken", kimg=run.nimg / 1000, note=f"{name} is {problem}")
    return summarise(run)


def summarise(run: Run) -> RunSummary:
    """The row of one run."""
    workers = [event.get("workers") for event in run.events("started", "resumed", "restarted", "finished")]
    workers = [count for count in workers if isinstance(count, int)] or [run.setting("resources", "workers")]
    speeds = [
        speed
        for record in run.of_kind("metrics")
        if isinstance(record.get("values"), dict) and (speed := finite(record["values"].get(_THROUGHPUT))) is not None
    ]
    created = finite(run.info.get("created"))
    if created is None and run.records:
        created = run.records[0]["time"]
    facts = {name: value for name, value in flatten(run.info) if name.partition(".")[0] in _FACTS}
    if run.data_hash is not None:
        facts["data_hash"] = run.data_hash
    row = RunSummary(
        name=run.name,
        path=str(run.path),
        state=run.state,
        system=text(run.setting("system", "name")),
        preset=text(run.setting("system", "preset")),
        kimg=run.nimg / 1000,
        total_kimg=finite(run.setting("training", "total_kimg")),
        img_per_s=statistics.median(speeds[-_RECENT_LINES:]) if speeds else None,
        workers=workers[-1] if isinstance(workers[-1], int) else None,
        restarts=len(run.events("resumed")),
        device_hours=run.device_hours,
        created=created,
        newest=run.records[-1]["time"] if run.records else None,
        last_word=run.last_word,
        curves=[_curve(curve) for curve in evaluation_curves(run) if curve.points],
        job={name: value[:_LONGEST_TEXT] for name, value in flatten(run.job)},
        facts={name: value[:_LONGEST_TEXT] for name, value in facts.items()},
    )
    return row.judged_by(None)


def _curve(curve: Curve) -> CurveSummary:
    best = curve.best
    record = curve.records.get(best.nimg, {})
    return CurveSummary(
        metric=curve.metric,
        higher_is_better=curve.higher_is_better,
        protocol=_protocol(curve.protocol),
        evaluations=len(curve.points),
        best=best.value,
        best_kimg=best.nimg / 1000,
        standard_error=best.standard_error,
        weights_sha256=text(record.get("weights_sha256")),
        first=curve.points[0].value,
        last=curve.points[-1].value,
        spark=_sparks(curve.points),
    )


def _protocol(record: Record) -> dict[str, Any]:
    """Protocol fields of plain values: what else a journal may hold there is turned to text."""
    plain = (str, int, float, bool, type(None))
    found = {name: record[name] for name in PROTOCOL_FIELDS if name in record}
    return {name: value if isinstance(value, plain) else str(value)[:_LONGEST_TEXT] for name, value in found.items()}


def _sparks(points: list[Point]) -> list[list[float]]:
    most = min(len(points), _SPARKS)
    chosen = [points[index * (len(points) - 1) // max(most - 1, 1)] for index in range(most)]
    return [[point.nimg / 1000, point.value] for point in chosen]
