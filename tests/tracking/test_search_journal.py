"""The table of trials follows from the journal alone, wherever it breaks off."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from bessemer.tracking.search_journal import SearchJournal, combine, fold, read_search


def result(trial: int, rung: int, value: float, decision: str = "continue", **fields: Any) -> dict[str, Any]:
    given = {"kimg": float(rung + 1), "standard_error": 0.1, "seconds": 36.0, "values": {}, **fields}
    return {"kind": "result", "trial": trial, "rung": rung, "value": value, "decision": decision, **given}


def records() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = [
        {"kind": "session", "number": 1},
        {"kind": "trial", "trial": 0, "point": {"a": 1}},
        {"kind": "trial", "trial": 1, "point": {"a": 2}},
        result(0, 0, 0.5),
        result(1, 0, 0.9, "stop"),
        {"kind": "trial", "trial": 2, "point": {"a": 3}},
        {"kind": "retried", "trial": 2, "reason": "lost"},
        {"kind": "failed", "trial": 2, "reason": "nan"},
        result(0, 1, 0.2, "finish"),
        {"kind": "ended", "reason": "all trials are over"},
    ]
    return [{**record, "time": 1000.0 + 10 * index} for index, record in enumerate(found)]


def test_the_table_says_what_happened() -> None:
    table = fold(records())
    states = {number: (trial.state, trial.rung) for number, trial in table.trials.items()}
    assert states == {0: ("finished", 2), 1: ("stopped", 1), 2: ("failed", 0)}
    assert table.trials[2].reason == "nan"
    assert table.trials[2].retries == 1
    assert table.live == []
    assert table.kimg(seeds=2) == 2 * (2.0 + 1.0)
    assert table.device_hours(workers=2) == pytest.approx(2 * 3 * 36 / 3600)
    assert table.seconds == 90.0
    assert table.ended == "all trials are over"


def test_time_between_two_sessions_does_not_count() -> None:
    first, second = records()[:4], records()[:1]
    later = [{**record, "time": record["time"] + 5000} for record in [*second, *records()[4:6]]]
    assert fold([*first, *later]).seconds == 30.0 + 50.0


@pytest.mark.parametrize("cut", range(10))
def test_a_journal_that_breaks_off_tells_of_its_beginning(tmp_path: Path, cut: int) -> None:
    journal = SearchJournal(tmp_path)
    for record in records():
        kind, fields = record["kind"], {k: v for k, v in record.items() if k not in ("kind", "time")}
        journal.write(kind, **fields)
    lines = (tmp_path / "search.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "search.jsonl").write_bytes(b"".join(lines[:cut]) + lines[cut][:-3])
    expected = fold(records()[:cut])
    found = read_search(tmp_path)
    assert {n: (t.state, t.point, t.rung) for n, t in found.trials.items()} == {
        n: (t.state, t.point, t.rung) for n, t in expected.trials.items()
    }
    # and a writer that goes on there loses nothing of its own
    SearchJournal(tmp_path).write("trial", trial=9, point={"a": 9})
    assert set(read_search(tmp_path).trials) == {*expected.trials, 9}


def test_a_result_counts_once() -> None:
    table = fold([*records()[:4], {**result(0, 0, 0.1), "time": 2000.0}])
    assert [r.value for r in table.trials[0].results] == [0.5]
    after_its_end = fold([*records()[:5], {**result(1, 1, 0.1), "time": 2000.0}])
    assert after_its_end.trials[1].rung == 1


def test_an_exchange_changes_settings_and_not_the_past() -> None:
    copies = [{"trial": 1, "donor": 0, "kimg": 1.0, "point": {"a": 7}}]
    table = fold(
        [
            *records()[:4],
            {**result(1, 0, 0.9, "pause"), "time": 1500.0},
            {"kind": "exchange", "rung": 0, "copies": copies, "time": 1501.0},
        ]
    )
    assert table.trials[1].point == {"a": 7}
    assert table.trials[1].results[0].point == {"a": 2}
    assert table.trials[1].donors == [(0, 0)]


def test_the_best_is_looked_for_among_those_that_came_furthest() -> None:
    table = fold(records())
    assert table.best() is table.trials[0]
    early = fold(records()[:5])
    assert early.best("min") is early.trials[0]
    assert early.best("max") is early.trials[1]
    assert fold(records()[:3]).best() is None


def test_the_error_of_a_mean_is_the_larger_of_scatter_and_measurement() -> None:
    assert combine([0.5], [0.1]) == (0.5, 0.1)
    assert combine([0.5], [None]) == (0.5, None)
    mean, error = combine([1.0, 3.0], [0.1, 0.1])
    assert (mean, error) == (2.0, pytest.approx(1.0))  # scatter: sqrt(2) / sqrt(2)
    _, error = combine([1.0, 1.0], [0.3, 0.4])
    assert error == pytest.approx(math.hypot(0.3, 0.4) / 2)
