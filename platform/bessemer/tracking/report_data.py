"""What the report and the board show of runs, as plain data: the page's script draws it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bessemer.tracking.curves import hours_up, metric_series, significant
from bessemer.tracking.journal import PROTOCOL_FIELDS, Record, finite
from bessemer.tracking.pictures import MOST_BYTES, Link, inline, pictures_of
from bessemer.tracking.ranking import PROTOCOL_LABELS, short
from bessemer.tracking.runs import Curve, Run, evaluation_curves, event_name, flatten
from bessemer.tracking.summary import summarise
from bessemer.tracking.tables import differing

__all__ = ["report_data", "run_data"]

MARKED = {
    "resumed": "restart",
    "worker_lost": "restart",
    "workers_lost": "restart",
    "restarted": "restart",
    "resized": "resize",
    "failed": "failure",
    "stopped": "stop",
    "preempted": "stop",
    "stopped_early": "stop",
    "rolled_back": "guard",
    "collapse_suspected": "guard",
    "update_skipped": "guard",
    "alert": "alert",
}
"""Events that stand on the curves, and what kind of thing they are."""

_MOST_EVENTS = 2000
_MOST_SERIES = 400
_LONGEST = 2000


def report_data(runs: Sequence[Run], link: Link | None = None) -> dict[str, Any]:
    """The content of a page about some runs, in their order.

    Args:
        runs: the runs.
        link: makes the addresses of pictures; they are put into the data if not given.
    """
    rows = [summarise(run) for run in runs]
    fields = differing(rows) if len(rows) > 1 else []
    return {
        "runs": [run_data(run, MOST_BYTES // max(len(runs), 1), link or inline) for run in runs],
        "differing": [[name, [row.job.get(name) for row in rows]] for name in fields],
    }


def run_data(run: Run, most_bytes: int = MOST_BYTES, link: Link = inline) -> dict[str, Any]:
    """One run of the page."""
    row = summarise(run)
    series = metric_series(run.records, run.sessions)
    failed = run.events("failed")
    return {
        "name": run.name,
        "path": str(run.path),
        "state": row.state,
        "system": row.system,
        "preset": row.preset,
        "created": row.created,
        "kimg": row.kimg,
        "total_kimg": row.total_kimg,
        "img_per_s": row.img_per_s,
        "workers": row.workers,
        "worlds": _worlds(run),
        "restarts": row.restarts,
        "hours": sum(one.end - one.begin for one in run.sessions) / 3600 if run.sessions else None,
        "device_hours": row.device_hours,
        "failure": str(failed[-1].get("error") or "The run failed.") if failed and row.state == "failed" else None,
        "warnings": _open_warnings(run),
        "metrics": [_curve(curve, run) for curve in evaluation_curves(run)],
        "series": dict(list(series.items())[:_MOST_SERIES]),
        "events": _events(run),
        "pictures": pictures_of(run, most_bytes, link),
        "facts": _facts(run),
        "job": run.job_text,
        "records": len(run.records),
    }


def _curve(curve: Curve, run: Run) -> dict[str, Any]:
    records = [curve.records.get(point.nimg) for point in curve.points]
    hours = hours_up([record["time"] if record else 0.0 for record in records], run.sessions)
    protocol = [
        [PROTOCOL_LABELS[name], short(name, curve.protocol[name]), str(curve.protocol[name])]
        for name in PROTOCOL_FIELDS
        if name in curve.protocol
    ]
    return {
        "metric": curve.metric,
        "higher": curve.higher_is_better,
        "protocol": protocol,
        "x": significant([point.nimg / 1000 for point in curve.points], 8),
        "h": significant(hours),
        "y": [point.value for point in curve.points],
        "error": [point.standard_error for point in curve.points],
        "best": curve.points.index(curve.best) if curve.points else None,
        "bad": curve.not_finite,
    }


def _worlds(run: Run) -> list[list[float]]:
    """[kimg, workers] wherever their number changed."""
    found: list[list[float]] = []
    for event in run.events("started", "resumed", "restarted", "resized", "finished"):
        workers = event.get("workers")
        if isinstance(workers, int) and (not found or found[-1][1] != workers):
            found.append([event["nimg"] / 1000, workers])
    return found


def _open_warnings(run: Run) -> list[str]:
    """The last warning about each thing that has not recovered since."""
    last = {str(event.get("about")): event for event in run.events("warning", "recovered")}
    return [f"{about}: {event.get('message')}" for about, event in last.items() if event["event"] == "warning"]


def _events(run: Run) -> list[dict[str, Any]]:
    events = [record for record in run.of_kind("event") if event_name(record)][-_MOST_EVENTS:]
    hours = hours_up([event["time"] for event in events], run.sessions)
    return [
        {
            "kimg": event["nimg"] / 1000,
            "hours": significant([hour])[0],
            "time": event["time"],
            "event": event_name(event).replace("_", " "),
            "mark": MARKED.get(event_name(event)),
            "detail": _details(event),
        }
        for event, hour in zip(events, hours, strict=True)
    ]


def _details(event: Record) -> str:
    known = ("kind", "nimg", "time", "event")
    fields = {name: value for name, value in event.items() if name not in known}
    return ", ".join(f"{name} {value}" for name, value in flatten(fields))[:1000]


def _facts(run: Run) -> list[list[str]]:
    facts = [["run directory", str(run.path.absolute())]]
    facts += [[name, value[:_LONGEST]] for name, value in flatten(run.info) if name != "created"]
    if "data_hash" not in run.info and run.data_hash is not None:
        facts.append(["data_hash", run.data_hash])
    created = finite(run.info.get("created"))
    return facts if created is None else [*facts, ["created", str(created)]]
