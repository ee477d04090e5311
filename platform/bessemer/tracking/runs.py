"""What is known of a run from its directory.

A run directory may come from anywhere and be damaged: every value is checked before it is used.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from bessemer.errors import RunError
from bessemer.tracking.files import RUN_LOCK, is_locked, read_json
from bessemer.tracking.journal import Record, finite, protocol_key, read_entries, skim_entries, standing
from bessemer.tracking.search_journal import SEARCH_LOCK

__all__ = [
    "Curve",
    "Point",
    "Run",
    "RunState",
    "Session",
    "evaluation_curves",
    "event_name",
    "flatten",
    "load_run",
    "metric_scores",
    "sessions_of",
    "state_of",
    "text",
]

RunState = Literal["running", "finished", "failed", "stopped", "broken"]

_ENDS: dict[str, RunState] = {
    "finished": "finished",
    "failed": "failed",
    "stopped": "stopped",
    "preempted": "stopped",  # what the workers write; without a driver it is the last word
}
_BEGINS = frozenset({"started", "resumed", "restarted"})
_CLOCK_EVENTS = frozenset({"started", "resumed", "checkpoint", "finished"})
_SILENCE = 900.0  # seconds without a record after which a run whose directory has no lock counts as stopped
_MOST_FIELDS, _DEEPEST_FIELD = 1000, 8


@dataclass(frozen=True)
class Point:
    """One value of a curve."""

    nimg: int
    value: float
    standard_error: float | None = None


@dataclass
class Curve:
    """Evaluations of one metric that were made by one protocol, and may therefore be compared."""

    metric: str
    protocol: Record
    """The latest record; its protocol fields hold for every point."""
    points: list[Point] = field(default_factory=list)
    not_finite: int = 0
    """Evaluations that gave no number."""
    records: dict[int, Record] = field(default_factory=dict)
    """Images seen -> the record of that evaluation."""

    @property
    def higher_is_better(self) -> bool:
        """Whether more is better, as the records say; distances are better the lower they are."""
        return self.protocol.get("higher_is_better") is True

    @property
    def best(self) -> Point:
        """The best value."""
        return (max if self.higher_is_better else min)(self.points, key=lambda point: point.value)


@dataclass(frozen=True)
class Session:
    """A stretch of time in which one group of workers trained the run."""

    begin: float
    """Unix seconds."""
    end: float
    workers: int | None


@dataclass(frozen=True)
class Run:
    """A run as its directory tells it."""

    path: Path
    info: dict[str, Any]
    """run.json; empty when it is missing or damaged."""
    job: dict[str, Any]
    """job.yaml, not validated: an older Bessemer may have written it; empty when missing or damaged."""
    job_text: str
    records: list[Record]
    """The journal as :func:`bessemer.tracking.journal.read_journal` gives it."""
    sessions: list[Session]
    """Stretches of time in which the run was up."""

    @property
    def name(self) -> str:
        """Name of the directory: what a person types."""
        return self.path.absolute().name

    @property
    def nimg(self) -> int:
        """Images seen so far."""
        last = self._last_of_training
        return last["nimg"] if last else 0

    @property
    def seconds(self) -> float | None:
        """Wall time from the first record to the end of training, interruptions included; None before both."""
        last = self._last_of_training
        return max(0.0, last["time"] - self.records[0]["time"]) if last else None

    @property
    def _last_of_training(self) -> Record | None:
        """The last record that training made: an old snapshot can be evaluated at any time."""
        return next(
            (r for r in reversed(self.records) if r["kind"] == "metrics" or event_name(r) in _CLOCK_EVENTS), None
        )

    @property
    def last_word(self) -> RunState | None:
        """How the run ended, if that is the journal's last word."""
        for record in reversed(self.records):
            event = event_name(record)
            if event in _ENDS:
                return _ENDS[event]
            if event in _BEGINS:
                break
        return None

    @property
    def state(self) -> RunState:
        """How the run ended, if that is the journal's last word; otherwise running while its lock is held."""
        return state_of(self.path, self.last_word, self.records[-1]["time"] if self.records else None)

    @property
    def device_hours(self) -> float | None:
        """Hours that its devices were busy with the run: GPUs where the job asks for them, CPU cores otherwise."""
        gpus, cpus = (finite(self.setting("resources", f"{kind}_per_worker")) for kind in ("gpus", "cpus"))
        fallback = self.setting("resources", "workers")
        counts = [session.workers or (fallback if isinstance(fallback, int) else 1) for session in self.sessions]
        seconds = sum(count * (one.end - one.begin) for count, one in zip(counts, self.sessions, strict=True))
        return (gpus or cpus or 1.0) * seconds / 3600 if self.sessions else None

    @property
    def data_hash(self) -> str | None:
        """Hash of the data set: from run.json, an event, or the newest snapshot."""
        events = [event.get("data_hash") for event in self.of_kind("event")]
        snapshots = sorted(self.path.glob("snapshots/*/snapshot.json"))[-1:]
        described = [(read_json(file) or {}).get("data_hash") for file in snapshots]
        return next(filter(None, map(text, [self.info.get("data_hash"), *reversed(events), *described])), None)

    def of_kind(self, kind: str) -> Iterator[Record]:
        """Records of one kind, in the order they were written."""
        return (record for record in self.records if record["kind"] == kind)

    def events(self, *names: str) -> list[Record]:
        """Events of these names."""
        return [record for record in self.records if event_name(record) in names]

    def setting(self, *keys: str) -> Any:
        """A field of the job, such as ``setting("training", "total_kimg")``; None where there is none."""
        value: Any = self.job
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else None
        return value


def text(value: object) -> str | None:
    """``value`` if it is text that says something."""
    return value if isinstance(value, str) and value.strip() else None


def flatten(value: Any) -> list[tuple[str, str]]:
    """Dotted names and texts of nested mappings, such as a job; lists as JSON; depth and number are limited."""
    flat: list[tuple[str, str]] = []

    def walk(prefix: str, item: Any, depth: int) -> None:
        if len(flat) >= _MOST_FIELDS:
            return
        if isinstance(item, dict) and item and depth < _DEEPEST_FIELD:
            for key, inner in item.items():
                walk(f"{prefix}.{key}" if prefix else str(key), inner, depth + 1)
        else:
            flat.append((prefix, item if isinstance(item, str) else _as_json(item)))

    walk("", value, 0)
    return [(name, item) for name, item in flat if name]


def event_name(record: Record) -> str:
    """What happened; empty for records that are no event."""
    name = record.get("event") if record["kind"] == "event" else None
    return name if isinstance(name, str) else ""


def load_run(path: str | Path, newest: int | None = None) -> Run:
    """Read a run directory.

    Args:
        path: the directory.
        newest: of the metrics, read only what :func:`bessemer.tracking.journal.skim_entries` reads; None for all.

    Raises:
        RunError: there is nothing of a run in it, or it cannot be read.
    """
    path = Path(path)
    files = [path / name for name in ("job.yaml", "run.json", "journal.jsonl")]
    try:
        if not any(file.is_file() for file in files):
            raise RunError(
                f"{path}: is no run directory (job.yaml, run.json and journal.jsonl are missing); "
                "`bessemer runs` lists the runs"
            )
        job_text = files[0].read_bytes().decode("utf-8", errors="replace") if files[0].is_file() else ""
        entries = read_entries(files[2]) if newest is None else skim_entries(files[2], newest)
    except OSError as error:
        raise RunError(f"{error.filename or path}: cannot be read ({error.strerror}); check its permissions") from error
    written = [entry.record for entry in entries]
    info, job = read_json(files[1]) or {}, _parse_job(job_text)
    return Run(path, info, job, job_text, standing(written), sessions_of(written))


def evaluation_curves(run: Run) -> list[Curve]:
    """Evaluations grouped by metric and protocol, points in order of images seen.

    The curves of one metric follow each other, the longest first: it is the run's own, beside which a single
    evaluation by another protocol is a visitor. Of equally long ones the first is that continued last.
    """
    curves: dict[str, Curve] = {}
    for record in run.of_kind("evaluation"):
        metric = text(record.get("metric"))
        if metric is None:
            continue
        key = protocol_key(record)
        curve = curves.pop(key, None) or Curve(metric, record)
        curves[key] = curve  # back at the end: the order tells which was continued last
        curve.protocol = record
        value = finite(record.get("value"))
        if value is None:
            curve.not_finite += 1
        else:
            curve.points.append(Point(record["nimg"], value, finite(record.get("standard_error"))))
            curve.records[record["nimg"]] = record
    for curve in curves.values():
        curve.points.sort(key=lambda point: point.nimg)
    ordered = list(reversed(curves.values()))
    ordered.sort(key=lambda curve: -len(curve.points))
    wanted = run.setting("evaluation", "metrics")
    wanted = list(wanted) if isinstance(wanted, (list, tuple)) else []
    metrics = sorted({curve.metric for curve in ordered})
    metrics.sort(key=lambda metric: wanted.index(metric) if metric in wanted else len(wanted))
    return [curve for metric in metrics for curve in ordered if curve.metric == metric]


def metric_scores(path: str | Path, metric: str | None) -> dict[int, float]:
    """Images seen -> how bad a metric says it was, by the run's own protocol; nothing without a metric.

    The lower the better: values of a metric of which more is better have their sign turned.

    Raises:
        RunError: `path` is no run directory.
    """
    curves = evaluation_curves(load_run(path)) if metric is not None else []
    curve = next((curve for curve in curves if curve.metric == metric), None)
    sign = -1.0 if curve and curve.higher_is_better else 1.0
    return {point.nimg: sign * point.value for point in curve.points} if curve else {}


def state_of(path: Path, last_word: RunState | None, newest: float | None) -> RunState:
    """State of a run whose journal ends with `last_word`, if that is an end, and has its newest record at `newest`.

    The driver still holds the lock while it writes the report of a finished run. A trial that is not over is running
    for as long as its search is.
    """
    if last_word is not None:
        return last_word
    lock = _lock_of(path)
    if lock.exists():
        return "running" if is_locked(lock) else "stopped"
    return "stopped" if newest is None or time.time() - newest > _SILENCE else "running"


def _lock_of(path: Path) -> Path:
    """What is locked while a run goes on: its own file or, for a trial of a search, that of the search."""
    trials = path.absolute().parent
    if trials.name == "trials" and (trials.parent / "search.json").is_file():
        return trials.parent / SEARCH_LOCK
    return path / RUN_LOCK


def sessions_of(written: Iterable[Record]) -> list[Session]:
    """Sessions of all records that were written, those that were taken back included."""
    sessions: list[Session] = []
    for record in written:
        event, moment = event_name(record), record["time"]
        if event in _BEGINS or not sessions:
            workers = record.get("workers")
            workers = workers if isinstance(workers, int) and 0 < workers < 1 << 20 else None
            if event != "started" and sessions and sessions[-1].begin == sessions[-1].end:
                last = sessions.pop()  # the driver had started, and here are its workers
                sessions.append(Session(last.begin, max(last.begin, moment), workers or last.workers))
            else:
                sessions.append(Session(moment, moment, workers))
        elif record["kind"] == "metrics" or event in _CLOCK_EVENTS or event in _ENDS:
            last = sessions.pop()
            sessions.append(Session(last.begin, max(last.end, moment), last.workers))
    return sessions


def _as_json(value: Any) -> str:
    try:
        return json.dumps(value, default=str, ensure_ascii=False)
    except TypeError:  # YAML knows keys that JSON does not
        return str(value)


class _PlainLoader(yaml.SafeLoader):
    """YAML without aliases: a few lines of them can stand for a circle or for gigabytes."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("aliases are not used in job files that Bessemer writes")
        return super().compose_node(parent, index)


def _parse_job(source: str) -> dict[str, Any]:
    try:
        value = yaml.load(source, _PlainLoader)  # noqa: S506  # a SafeLoader, made stricter
    # The parser's own errors, and what odd dates and deep nesting raise inside it.
    except (yaml.YAMLError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}
