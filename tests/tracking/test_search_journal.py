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


def final_records(*finals: tuple[int, float | None, float | None], mode: str = "min") -> list[dict[str, Any]]:
    """Four trials, the last of which was stopped early; of the others, those that are named were judged once more."""
    found: list[dict[str, Any]] = [{"kind": "session", "number": 1}]
    for number, values in enumerate(((0.5, 0.30), (0.6, 0.20), (0.4, 0.25), (0.1,))):
        found.append({"kind": "trial", "trial": number, "point": {"a": number}})
        for rung, value in enumerate(values):
            decision = "finish" if rung else "stop" if len(values) == 1 else "continue"
            found.append(result(number, rung, value, decision, standard_error=0.04))
    how = {"metric": "fd_efflite0", "mode": mode, "samples": 5000, "draws": 3}
    found.append({"kind": "finalists", "trials": [1, 2, 0], **how})
    for number, value, error in finals:
        what = {"reason": "not finite"} if value is None else {"value": value, "standard_error": error, "seconds": 36.0}
        found.append({"kind": "final", "trial": number, **what})
    return [{**record, "time": 1000.0 + index} for index, record in enumerate(found)]


def order(*finals: tuple[int, float | None, float | None], mode: str = "min") -> tuple[list[int], bool]:
    table = fold(final_records(*finals, mode=mode))
    return [trial.number for trial in table.ranked()], table.final_is_over


def test_the_final_counts_once_all_of_it_is_over() -> None:
    """Half of a final compares what is not comparable: until its end, the last rung says who is best."""
    assert order() == ([1, 2, 0, 3], False)
    assert order((1, 30.0, 1.0)) == ([1, 2, 0, 3], False)
    assert order((1, 30.0, 1.0), (2, 20.0, 1.0)) == ([1, 2, 0, 3], False)
    whole = ((1, 30.0, 1.0), (2, 20.0, 1.0), (0, 25.0, 1.0))
    assert order(*whole) == ([2, 0, 1, 3], True)
    assert order(*whole, mode="max") == ([1, 0, 2, 3], True)
    # A finalist that could not be judged comes after those that were, and before those that did not come so far.
    assert order((1, None, None), *whole[1:]) == ([2, 0, 1, 3], True)
    assert order((1, None, None), (2, None, None), (0, None, None)) == ([1, 2, 0, 3], False)
    again = fold([*final_records(*whole), {"kind": "final", "trial": 2, "value": 90.0, "time": 2000.0}])
    assert again.trials[2].final is not None
    assert again.trials[2].final.value == 20.0, "it counts once"
    assert again.final_hours == pytest.approx(3 * 36 / 3600)
    other = {
        "kind": "finalists",
        "trials": [3],
        "metric": "fid",
        "mode": "min",
        "samples": 9,
        "draws": 1,
        "time": 2001.0,
    }
    assert fold([*final_records(*whole), other]).final == again.final


def test_who_is_as_good_as_the_best_is_said_by_the_same_judgement() -> None:
    def close(*finals: tuple[int, float | None, float | None]) -> list[int]:
        return [trial.number for trial in fold(final_records(*finals)).as_good()]

    assert close() == [2]  # 0.25 and 0.20, each ± 0.04: 0.05 < 0.057; 0.30 is too far, and 0.1 is of another rung
    assert close((2, 20.0, 3.0), (0, 24.9, 4.0), (1, 25.1, 4.0)) == [0]  # 5 = the root of 3² + 4²
    assert close((2, 20.0, None), (0, 20.1, None), (1, 20.2, None)) == []
    # as good as the best by its value, but at an earlier rung
    early = {**result(3, 0, 0.21, "stop", standard_error=0.04), "time": 1006.5}
    others = [one for one in final_records() if not (one["kind"] == "result" and one["trial"] == 3)]
    assert [trial.number for trial in fold([*others, early]).as_good()] == [2]


def test_the_error_of_a_mean_is_the_larger_of_scatter_and_measurement() -> None:
    assert combine([0.5], [0.1]) == (0.5, 0.1)
    assert combine([0.5], [None]) == (0.5, None)
    mean, error = combine([1.0, 3.0], [0.1, 0.1])
    assert (mean, error) == (2.0, pytest.approx(1.0))  # scatter: sqrt(2) / sqrt(2)
    _, error = combine([1.0, 1.0], [0.3, 0.4])
    assert error == pytest.approx(math.hypot(0.3, 0.4) / 2)
