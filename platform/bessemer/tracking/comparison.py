"""Runs side by side: one row per result or field, one column per run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from bessemer.tracking.journal import PROTOCOL_FIELDS
from bessemer.tracking.ranking import PROTOCOL_LABELS, separation
from bessemer.tracking.summary import CurveSummary, RunSummary
from bessemer.tracking.tables import Table, differing, with_error

__all__ = ["compare_runs", "difference"]

_RESULTS: tuple[tuple[str, Callable[[RunSummary], Any]], ...] = (
    ("state", lambda row: row.state),
    ("system", lambda row: " ".join(filter(None, (row.system, row.preset))) or None),
    ("kimg", lambda row: row.kimg),
    ("device-hours", lambda row: row.device_hours),
    ("images per second", lambda row: row.img_per_s),
    ("workers", lambda row: row.workers),
    ("restarts", lambda row: row.restarts),
)
_SHOWN = ("system.name", "system.preset")


def compare_runs(rows: Sequence[RunSummary], *, every: bool = False) -> Table:
    """The table of a comparison: first the metrics, then how far and how fast, then the fields that differ.

    Args:
        rows: the runs; the first is what the others are compared with.
        every: also fields in which the runs agree.
    """
    lines: list[tuple[Any, ...]] = []
    for metric in dict.fromkeys(curve.metric for row in rows for curve in row.curves):
        curves = [row.curve(metric) for row in rows]
        better = next("higher" if curve.higher_is_better else "lower" for curve in curves if curve is not None)
        lines.append((f"{metric}, best ({better})", *(_value(curve) for curve in curves)))
        lines.append(("  at kimg", *(None if curve is None else curve.best_kimg for curve in curves)))
        lines.append(("  against the first", *(difference(curve, curves[0]) for curve in curves)))
    lines += [(label, *map(read, rows)) for label, read in _RESULTS]
    fields = dict.fromkeys(name for row in rows for name in row.job) if every else differing(rows)
    lines += [(name, *(row.job.get(name) for row in rows)) for name in fields if name not in _SHOWN]
    facts = dict.fromkeys(name for row in rows for name in row.facts if name != "command")
    for name in facts:
        values = [row.facts.get(name) for row in rows]
        if every or len(set(values)) > 1:
            lines.append((name, *values))
    return Table(("", *(row.name for row in rows)), lines)


def difference(curve: CurveSummary | None, first: CurveSummary | None) -> str | None:
    """How the best value compares with that of the first run, in words; None where there is nothing to compare."""
    if curve is None or first is None or curve is first:
        return None
    unlike = [PROTOCOL_LABELS[name] for name in PROTOCOL_FIELDS if curve.protocol.get(name) != first.protocol.get(name)]
    if unlike:
        return f"not comparable: {', '.join(unlike)}"
    better = curve.best > first.best if first.higher_is_better else curve.best < first.best
    word = "same" if curve.best == first.best else "better" if better else "worse"
    sigmas = separation(curve, first)
    return word if sigmas is None or word == "same" else f"{word}, {sigmas:.1f} standard errors"


def _value(curve: CurveSummary | None) -> str | None:
    return None if curve is None else with_error(curve.best, curve.standard_error)
