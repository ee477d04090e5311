"""Alerts: each rule over a journal, and every way of telling, those that fail included."""

from __future__ import annotations

import http.server
import json
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bessemer.spec.job import AlertsSpec
from bessemer.tracking.alerts import AlertWatch, Rules
from bessemer.tracking.journal import read_journal


def _feed(spec: AlertsSpec, records: list[dict[str, Any]]) -> list[tuple[int, str]]:
    rules = Rules(spec)
    return [(alert.nimg, alert.message) for record in records for alert in rules.feed({"time": 0.0, **record})]


def _kid(nimg: int, value: float, **more: Any) -> dict[str, Any]:
    return {"kind": "evaluation", "nimg": nimg, "metric": "kid", "value": value, "standard_error": 0.01, **more}


def test_a_metric_that_stalls_is_told_once_until_it_improves() -> None:
    values = [0.5, 0.3, 0.295, 0.296, 0.31, 0.3, 0.2, 0.2, 0.2, 0.2]
    found = _feed(AlertsSpec(stall_kimg=2), [_kid(1000 * n, value) for n, value in enumerate(values)])
    assert found == [
        (3000, "stall: kid has not improved for 2 kimg (best 0.3)"),  # 0.295 is within the standard error
        (8000, "stall: kid has not improved for 2 kimg (best 0.2)"),
    ]
    shares = [_kid(1000 * n, 0.5 + 0.1 * n, higher_is_better=True) for n in range(5)]
    assert _feed(AlertsSpec(stall_kimg=2), shares) == []
    others = [_kid(1000 * n, 0.5, metric="fd") if n % 2 else _kid(1000 * n, 1 / (n + 1)) for n in range(9)]
    assert _feed(AlertsSpec(stall_kimg=2), others) == []  # the first metric alone is judged
    assert _feed(AlertsSpec(), [_kid(1000 * n, 0.5) for n in range(99)]) == []


def test_a_run_that_went_back_does_not_stall() -> None:
    assert _feed(AlertsSpec(stall_kimg=3), [_kid(0, 0.5), _kid(5000, 0.1), _kid(2000, 0.4), _kid(4000, 0.4)]) == []


def test_a_drop_of_throughput() -> None:
    speeds = [100.0 + n % 3 for n in range(50)] + [40.0] * 10 + [100.0] * 10 + [45.0] * 10
    lines = [
        {"kind": "metrics", "nimg": n, "values": {"throughput/img_per_s": speed}} for n, speed in enumerate(speeds)
    ]
    found = _feed(AlertsSpec(), lines)
    # Three of the last five lines have to be slow: one slow line is no drop.
    assert found == [
        (52, "throughput: 40 images per second instead of 101"),
        (72, "throughput: 45 images per second instead of 100"),
    ]
    assert _feed(AlertsSpec(throughput_drop=0.8), lines) == _feed(AlertsSpec(throughput_drop=None), lines) == []


def test_losses_of_workers_within_an_hour() -> None:
    def lost(*seconds: float) -> list[tuple[int, str]]:
        events = [{"kind": "event", "nimg": 0, "event": "workers_lost", "time": second} for second in seconds]
        return _feed(AlertsSpec(restarts_per_hour=3), events)

    assert lost(0, 2000, 3500, 3550) == [(0, "restarts: workers were lost 3 times within an hour")]
    assert lost(0, 2000, 3700, 5700) == []


def test_collapse_and_failure() -> None:
    events = [
        {"kind": "event", "nimg": 1, "event": "collapse_suspected", "rule": "diversity"},
        {"kind": "event", "nimg": 2, "event": "rolled_back", "reason": "loss/g was nan"},
        {"kind": "event", "nimg": 3, "event": "failed", "error": "no"},
        {"kind": "event", "nimg": 4, "event": "checkpoint"},
    ]
    assert _feed(AlertsSpec(), events) == [
        (1, "collapse: collapse suspected (guards.diversity)"),
        (2, "collapse: rolled back (loss/g was nan)"),
        (3, "failure: no"),
    ]
    assert _feed(AlertsSpec(collapse=False, failure=False), events) == []


@pytest.fixture
def webhook() -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """A server that keeps what is posted to it."""
    posted: list[dict[str, Any]] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            posted.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(204)
            self.end_headers()

        def log_message(self, *args: object) -> None:
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/hook", posted
    server.shutdown()
    server.server_close()


def test_everybody_is_told(make_run: Any, tmp_path: Path, webhook: tuple[str, list[dict[str, Any]]]) -> None:
    run, file = make_run(), tmp_path / "alerts.jsonl"
    run.event("rolled_back", 1000, reason="old")
    watch = AlertWatch(run.path, AlertsSpec(webhook=webhook[0], file=str(file)), interval=0.02)
    watch.start()
    run.event("rolled_back", 2000, reason="loss/g was nan")
    deadline = time.monotonic() + 30
    while not webhook[1]:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    run.event("failed", 3000, error="no")
    watch.stop()
    assert [alert["text"] for alert in webhook[1]] == [
        "quickstart at 2 kimg: collapse: rolled back (loss/g was nan)",
        "quickstart at 3 kimg: failure: no",
    ]  # what the journal held before is not told again
    assert [json.loads(line) for line in file.read_text().splitlines()] == webhook[1]
    alerts = [r for r in read_journal(run.journal.path) if r.get("event") == "alert"]
    assert [(r["nimg"], r["rule"]) for r in alerts] == [(2000, "collapse"), (3000, "failure")]


def test_nobody_who_cannot_be_told_stops_the_others(make_run: Any, tmp_path: Path) -> None:
    run = make_run()
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{unused.getsockname()[1]}/"
        spec = AlertsSpec(webhook=address, file=str(tmp_path / "absent" / "alerts.jsonl"))
        watch = AlertWatch(run.path, spec, interval=0.02)
        watch.start()
        run.event("failed", 3000, error="no")
        watch.stop()
    assert [r["event"] for r in read_journal(run.journal.path)] == ["failed", "alert"]
    assert not AlertsSpec(collapse=False, failure=False, throughput_drop=None, restarts_per_hour=None).any_rule
