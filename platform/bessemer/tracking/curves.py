"""Curves of a run, small enough for a page: buckets keep their mean and their extremes, so that no spike is lost."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bessemer.tracking.journal import Record, finite
from bessemer.tracking.runs import Session

__all__ = ["MOST_POINTS", "hours_up", "metric_series", "significant", "thin"]

MOST_POINTS = 320
"""Buckets of a curve: about one for each two pixels of a wide chart."""

_LARGEST = 1e300  # beyond, means overflow


def hours_up(times: Sequence[float], sessions: Sequence[Session]) -> list[float]:
    """Hours that the run had been up at each moment: time between its sessions does not count.

    Args:
        times: Unix seconds, in any order.
        sessions: of the run, in order.
    """
    found = []
    for moment in times:
        seconds = sum(min(max(moment, one.begin), one.end) - one.begin for one in sessions)
        found.append(seconds / 3600)
    return found


def metric_series(records: Sequence[Record], sessions: Sequence[Session]) -> dict[str, dict[str, Any]]:
    """Name -> curve of every value in the lines of metrics.

    Returns:
        Per name `x` (kimg), `h` (hours up), `y` (means), and `low` and `high` where buckets hold several values, all of
        the same length; `bad` counts the values that were not finite.
    """
    columns: dict[str, tuple[list[int], list[float]]] = {}
    bad: dict[str, int] = {}
    lines = [record for record in records if record["kind"] == "metrics" and isinstance(record.get("values"), dict)]
    for index, record in enumerate(lines):
        for name, item in record["values"].items():
            value = finite(item)
            if value is None:
                bad[name] = bad.get(name, 0) + 1
                continue
            where, values = columns.setdefault(name, ([], []))
            where.append(index)
            values.append(value)
    kimg = np.array([record["nimg"] for record in lines], dtype=np.float64) / 1000
    hours = np.array(hours_up([record["time"] for record in lines], sessions))
    found = {name: thin(kimg[where], hours[where], np.array(values)) for name, (where, values) in columns.items()}
    for name, count in bad.items():
        found.setdefault(name, {"x": [], "h": [], "y": []})["bad"] = count
    return found


def thin(
    x: NDArray[np.float64], h: NDArray[np.float64], y: NDArray[np.float64], most: int = MOST_POINTS
) -> dict[str, Any]:
    """At most `most` points: means of neighbours, with their lowest and highest.

    Args:
        x, h, y: [N] kimg, hours, values.
        most: number of buckets; each holds the same number of values, but for one.
    """
    order = np.argsort(x, kind="stable")
    x, h, y = x[order], h[order], np.clip(y[order], -_LARGEST, _LARGEST)
    if len(x) <= most:
        return {"x": significant(x, 8), "h": significant(h), "y": significant(y)}
    starts = np.linspace(0, len(x), most, endpoint=False).astype(np.int64)
    sizes = np.diff(np.append(starts, len(x)))
    shares = np.repeat(sizes, sizes)  # means are sums of shares: the sum of huge values would overflow
    return {
        "x": significant(np.add.reduceat(x / shares, starts), 8),
        "h": significant(np.add.reduceat(h / shares, starts)),
        "y": significant(np.add.reduceat(y / shares, starts)),
        "low": significant(np.minimum.reduceat(y, starts)),
        "high": significant(np.maximum.reduceat(y, starts)),
    }


def significant(values: NDArray[np.float64] | Sequence[float], digits: int = 5) -> list[float]:
    """Rounded to so many significant digits: half the page would be digits that nobody sees."""
    return [float(f"{value:.{digits}g}") if math.isfinite(value) else 0.0 for value in np.asarray(values).tolist()]
