"""Alerts: rules of the job that watch the journal of a running run and tell somebody.

A thread follows the journal, as the mirror does; training never waits for it and never fails by it. What it finds goes
to the log, to the journal as an event (so that it stands on the curves), and where the job says, to a file and a
webhook. Everything is judged from records, so that each rule can be tried on an old journal.
"""

from __future__ import annotations

import json
import logging
import statistics
import threading
import urllib.request
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bessemer.spec.job import AlertsSpec
from bessemer.tracking.journal import Journal, Record, finite, protocol_key, read_entries
from bessemer.tracking.runs import event_name

__all__ = ["Alert", "AlertWatch", "Rules"]

_INTERVAL = 5.0  # seconds
_TIMEOUT = 10.0
_THROUGHPUT = "throughput/img_per_s"
_USUAL, _RECENT, _LEAST = 100, 5, 20  # lines of metrics
_COLLAPSE = frozenset({"collapse_suspected", "rolled_back"})
_LOST = frozenset({"workers_lost", "worker_lost"})

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Alert:
    """One thing that somebody should look at."""

    rule: str
    nimg: int
    time: float
    message: str


class Rules:
    """The rules of a job. Fed with records in the order of the journal; each speaks once until it has recovered."""

    def __init__(self, spec: AlertsSpec) -> None:
        self._spec = spec
        self._best: dict[str, tuple[float, int]] = {}  # protocol -> best value, and where it was reached
        self._first: str | None = None
        self._speeds: deque[float] = deque(maxlen=_USUAL)
        self._losses: deque[float] = deque()
        self._said: set[str] = set()

    def feed(self, record: Record) -> list[Alert]:
        """What this record gives reason to say."""
        event = event_name(record)
        found: list[str | None] = []
        if record["kind"] == "evaluation":
            found.append(self._stall(record))
        elif record["kind"] == "metrics":
            found.append(self._throughput(record))
        elif event in _COLLAPSE and self._spec.collapse:
            reason = record.get("reason") or f"guards.{record.get('rule')}"
            found.append(f"collapse: {event.replace('_', ' ')} ({reason})")
        elif event in _LOST:
            found.append(self._restarts(record))
        elif event == "failed" and self._spec.failure:
            found.append(f"failure: {record.get('error')}")
        return [
            Alert(message.partition(":")[0], record["nimg"], record["time"], message)
            for message in found
            if message is not None
        ]

    def _stall(self, record: Record) -> str | None:
        """The run's first metric has not improved, by more than its standard error, for so long."""
        limit, value = self._spec.stall_kimg, finite(record.get("value"))
        if limit is None or value is None:
            return None
        self._first = self._first or protocol_key(record)
        key = protocol_key(record)
        if key != self._first:
            return None
        sign = -1.0 if record.get("higher_is_better") is True else 1.0
        margin = finite(record.get("standard_error")) or 0.0
        best, reached = self._best.get(key, (float("inf"), record["nimg"]))
        if sign * value < best - margin or reached > record["nimg"]:  # better, or the run went back
            self._best[key] = (sign * value, record["nimg"])
            self._said.discard("stall")
            return None
        since = (record["nimg"] - reached) / 1000
        if since < limit:
            return None
        return self._once("stall", f"{record['metric']} has not improved for {since:g} kimg (best {sign * best:.4g})")

    def _throughput(self, record: Record) -> str | None:
        """The last lines are much slower than the median of those before."""
        share, values = self._spec.throughput_drop, record.get("values")
        speed = finite(values.get(_THROUGHPUT)) if isinstance(values, dict) else None
        if share is None or speed is None:
            return None
        self._speeds.append(speed)
        if len(self._speeds) < _LEAST + _RECENT:
            return None
        before, recent = list(self._speeds)[:-_RECENT], list(self._speeds)[-_RECENT:]
        usual, now = statistics.median(before), statistics.median(recent)
        if now > (1 - share) * usual:
            self._said.discard("throughput")
            return None
        return self._once("throughput", f"{now:.4g} images per second instead of {usual:.4g}")

    def _restarts(self, record: Record) -> str | None:
        """Workers were lost so many times within an hour."""
        limit = self._spec.restarts_per_hour
        if limit is None:
            return None
        self._losses.append(record["time"])
        while self._losses and self._losses[0] < record["time"] - 3600:
            self._losses.popleft()
        if len(self._losses) < limit:
            self._said.discard("restarts")
            return None
        return self._once("restarts", f"workers were lost {len(self._losses)} times within an hour")

    def _once(self, rule: str, message: str) -> str | None:
        if rule in self._said:
            return None
        self._said.add(rule)
        return f"{rule}: {message}"


class AlertWatch:
    """Follows the journal of one run from a thread of this process. No method raises.

    Args:
        run_dir: directory of the run.
        spec: the rules, and whom to tell.
        interval: seconds between two looks.
    """

    def __init__(self, run_dir: str | Path, spec: AlertsSpec, *, interval: float = _INTERVAL) -> None:
        self._run_dir = Path(run_dir)
        self._journal = self._run_dir / "journal.jsonl"
        self._spec, self._interval = spec, interval
        self._rules = Rules(spec)
        self._offset = 0
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin to follow; returns at once. What the journal holds already is taken note of, and not told again."""
        if not self._spec.any_rule:
            return
        try:
            self._take_new()
        except Exception:  # see below
            _log.exception("alerts cannot be judged")
        self._thread = threading.Thread(target=self._follow, name="alerts", daemon=True)
        self._thread.start()

    def stop(self, timeout: float = 15.0) -> None:
        """Judge the rest and end."""
        if self._thread is not None:
            self._stopping.set()
            self._thread.join(timeout)

    def _follow(self) -> None:
        while True:
            stopping = self._stopping.wait(self._interval)
            try:
                for alert in self._take_new():
                    self._tell(alert)
            except Exception:  # whatever is wrong with the disk: training goes on
                _log.exception("alerts cannot be judged")
            if stopping:
                return

    def _take_new(self) -> list[Alert]:
        alerts: list[Alert] = []
        for record, end in read_entries(self._journal, self._offset):
            alerts += self._rules.feed(record)
            self._offset = end
        return alerts

    def _tell(self, alert: Alert) -> None:
        _log.warning("alert at %g kimg: %s", alert.nimg / 1000, alert.message)
        ways: Sequence[tuple[str, Callable[[Alert], None]]] = (
            ("journal", self._to_journal),
            ("alerts.file", self._to_file),
            ("alerts.webhook", self._to_webhook),
        )
        for name, way in ways:
            try:
                way(alert)
            except Exception as error:
                _log.warning("%s: the alert could not be sent (%s)", name, error)

    def _to_journal(self, alert: Alert) -> None:
        Journal(self._journal).write("event", alert.nimg, event="alert", rule=alert.rule, message=alert.message)

    def _to_file(self, alert: Alert) -> None:
        if self._spec.file is not None:
            with Path(self._spec.file).open("a", encoding="utf-8") as file:
                file.write(json.dumps(self._content(alert), ensure_ascii=False) + "\n")

    def _to_webhook(self, alert: Alert) -> None:
        if self._spec.webhook is None:
            return
        body = json.dumps(self._content(alert)).encode()
        headers = {"Content-Type": "application/json", "User-Agent": "bessemer"}
        # The job's rule allows http and https only.
        request = urllib.request.Request(self._spec.webhook, body, headers, method="POST")  # noqa: S310
        urllib.request.urlopen(request, timeout=_TIMEOUT).close()  # noqa: S310

    def _content(self, alert: Alert) -> dict[str, Any]:
        """What is sent; `text` is what chat services show."""
        run = self._run_dir.name
        return {
            "text": f"{run} at {alert.nimg / 1000:g} kimg: {alert.message}",
            "run": run,
            "rule": alert.rule,
            "message": alert.message,
            "nimg": alert.nimg,
            "time": alert.time,
        }
