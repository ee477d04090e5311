"""Thinned curves: short, in order, and with every spike."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bessemer.tracking.curves import hours_up, metric_series, significant, thin
from bessemer.tracking.runs import Session, load_run


@given(
    values=st.lists(st.floats(-1e6, 1e6, allow_subnormal=False), min_size=1, max_size=300),
    most=st.integers(1, 40),
)
def test_buckets_keep_mean_and_extremes(values: list[float], most: int) -> None:
    y = np.array(values)
    x = np.arange(len(y), dtype=np.float64)
    found = thin(x, 2 * x, y, most)
    assert len(found["x"]) == min(len(values), most)
    assert found["x"] == sorted(found["x"])
    if len(values) <= most:
        assert found["y"] == pytest.approx(values, rel=1e-4)
        return
    assert min(found["low"]) == pytest.approx(y.min(), rel=1e-4)
    assert max(found["high"]) == pytest.approx(y.max(), rel=1e-4)
    starts = [len(values) * index // most for index in range(most)]  # an independent way to cut
    parts = [values[a:b] for a, b in zip(starts, [*starts[1:], len(values)], strict=True)]
    scale = max(1.0, np.abs(y).max())
    assert np.allclose(found["y"], [sum(part) / len(part) for part in parts], atol=1e-4 * scale)
    assert np.allclose(found["h"], [2 * a for a in found["x"]], rtol=1e-4)


def test_one_spike_among_25_000_stays(make_run: Any) -> None:
    run = make_run()
    with run.journal.path.open("w") as file:
        for n in range(25_000):
            loss = 1e4 if n == 12_345 else 1.0
            file.write(json.dumps({"kind": "metrics", "nimg": n, "time": 1e9 + n, "values": {"loss/g": loss}}) + "\n")
    loaded = load_run(run.path)
    series = metric_series(loaded.records, loaded.sessions)["loss/g"]
    assert len(series["x"]) == len(series["low"]) == 320
    assert max(series["high"]) == 1e4
    assert sum(high > 1 for high in series["high"]) == 1


def test_huge_values_do_not_overflow() -> None:
    y = np.full(1000, 1e308)
    found = thin(np.arange(1000.0), np.arange(1000.0), y, 10)
    assert all(np.isfinite(found["y"]))
    assert all(value >= 9e299 for value in found["y"])


def test_time_between_sessions_does_not_count() -> None:
    sessions = [Session(0, 3600, 1), Session(36_000, 43_200, 1)]
    assert hours_up([0, 1800, 3600, 20_000, 36_000, 39_600, 99_999], sessions) == [0, 0.5, 1, 1, 1, 2, 3]


def test_numbers_are_shortened() -> None:
    assert significant([1 / 3, 123456.7, 0.0]) == [0.33333, 123460.0, 0.0]
