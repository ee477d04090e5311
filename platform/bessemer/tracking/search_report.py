"""What a search found: which parameters matter, the Pareto front of quality against cost, and a page that shows both.

Everything comes from the search's directory: its file and its journal. Neither Ray nor MLflow is needed.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bessemer.files import write_atomically
from bessemer.spec.search import SearchSpec
from bessemer.spec.search_load import load_search
from bessemer.spec.space import Space
from bessemer.tracking.files import read_json
from bessemer.tracking.report import render_page
from bessemer.tracking.search_journal import SearchTable, Trial, read_search
from bessemer.tracking.tables import with_error

__all__ = [
    "LINES",
    "Importance",
    "axis_ends",
    "best_in_words",
    "described_final",
    "importance",
    "pareto_front",
    "positions",
    "rows",
    "search_page",
    "search_report",
    "write_report",
]

_FEWEST_TRIALS = 4
"""Fewer say nothing about which parameter matters."""
_PER_FIELD = 5
"""Trials per field that make a later rung, where values say more, worth more than the first, where there are most."""
LINES = 300
"""Trials that the picture of parallel coordinates shows at most, the best ones."""


@dataclass(frozen=True)
class Importance:
    """How much of what is known of the objective depends on one field."""

    field: str
    share: float
    """Of the sum over the fields; 0 to 1."""
    spread: float
    """Standard deviation of the share over the permutations."""


def rows(search: SearchSpec, table: SearchTable) -> list[dict[str, Any]]:
    """One row per trial, best first, as :meth:`SearchTable.ranked` says; then those that nothing is known of or that
    failed.
    """
    ranked = table.ranked(search.objective.mode)
    rest = sorted(
        (trial for trial in table.trials.values() if not trial.results or trial.state == "failed"),
        key=lambda trial: (trial.state == "failed", -trial.rung, trial.number),
    )
    return [_row(search, trial) for trial in (*ranked, *rest)]


def _row(search: SearchSpec, trial: Trial) -> dict[str, Any]:
    last, final = trial.last, trial.final
    return {
        "trial": trial.name,
        "state": trial.state,
        "kimg": trial.kimg,
        "rung": trial.rung,
        "value": last.value if last else None,
        "standard_error": last.standard_error if last else None,
        "values": last.values if last else {},
        "final": final.value if final else None,
        "final_standard_error": final.standard_error if final else None,
        "device_hours": trial.seconds * search.workers / 3600,
        "retries": trial.retries,
        "donors": [f"t{donor:04d}" for _, donor in trial.donors],
        "reason": trial.reason or (final.reason if final else None),
        "point": trial.point,
    }


def described_final(table: SearchTable) -> dict[str, Any] | None:
    """How finalists are judged once more, and how far that is; None before all trials are over, or without a final."""
    final = table.final
    if final is None:
        return None
    found = [table.trials[number].final for number in final.trials]
    return {
        "metric": final.metric,
        "mode": final.mode,
        "samples": final.samples,
        "draws": final.draws,
        "finalists": len(found),
        "judged": sum(one is not None for one in found),
        "counts": table.final_is_over,
    }


def best_in_words(search: SearchSpec, table: SearchTable) -> str | None:
    """What the best trial is worth, and by which judgement; None before any.

    `t0003 with fd_efflite0 30.1 ± 0.4 (final, 3 draws of 10000 samples; kid_efflite0 0.012 ± 0.001 at 45 kimg)`
    """
    trial = table.best(search.objective.mode)
    if trial is None or trial.last is None:
        return None
    last = with_error(trial.last.value, trial.last.standard_error)
    rung = f"{search.objective.metric} {last} at {trial.kimg:g} kimg"
    final = table.final
    if final is None:
        return f"{trial.name} with {rung}"
    found = described_final(table) or {}
    if trial.final is not None and trial.final.value is not None and table.final_is_over:
        measured = with_error(trial.final.value, trial.final.standard_error)
        how = f"{final.draws} draw{'s' * (final.draws > 1)} of {final.samples} samples"
        return f"{trial.name} with {final.metric} {measured} (final, {how}; {rung})"
    if found["judged"] < found["finalists"]:
        return (
            f"{trial.name} with {rung} (the final is under way: {found['judged']} of {found['finalists']} are judged)"
        )
    return f"{trial.name} with {rung} (the final judged nobody: {trial.final.reason if trial.final else 'no finalist'})"


def importance(search: SearchSpec, table: SearchTable) -> list[Importance]:
    """How much the objective depends on each field of the space, largest first; nothing where too few trials ended.

    A forest of random trees learns the rank of each trial among those that were judged at the same rung; importance is
    what it loses when one field is shuffled (:mod:`bessemer.tracking.forest`).
    """
    judged = _ranked(search, table)
    if len(judged) < _FEWEST_TRIALS:
        return []
    import numpy as np

    from bessemer.tracking.forest import permutation_importance

    space = Space(search.space)
    features = np.array([_features(space, point) for point, _ in judged])
    ranks = np.array([rank for _, rank in judged])
    lost = np.maximum(permutation_importance(features, ranks), 0.0)
    total = float(lost.mean(axis=1).sum()) or 1.0
    each = [
        Importance(field, float(values.mean()) / total, float(values.std()) / total)
        for field, values in zip(space.dimensions, lost, strict=True)
    ]
    return sorted(each, key=lambda one: -one.share)


def _ranked(search: SearchSpec, table: SearchTable) -> list[tuple[Mapping[str, Any], float]]:
    """Point and rank (0 best, 1 worst) of each trial at the furthest rung where enough were judged to compare."""
    sign = -1.0 if search.objective.mode == "max" else 1.0
    for rung in reversed(range(len(search.objective.rungs_kimg))):
        there = [trial.results[rung] for trial in table.trials.values() if trial.rung > rung]
        if len(there) >= max(_FEWEST_TRIALS, _PER_FIELD * len(search.space)) or (rung == 0 and there):
            there.sort(key=lambda result: sign * result.value)
            return [(result.point, index / max(1, len(there) - 1)) for index, result in enumerate(there)]
    return []


def _features(space: Space, point: Mapping[str, Any]) -> list[float]:
    """A point as numbers between 0 and 1; -1 for a field that is not varied there."""
    return [_position(space, field, point[field]) if field in point else -1.0 for field in space.dimensions]


def _position(space: Space, field: str, value: Any) -> float:
    """Where a value lies between the ends of its field, 0 to 1."""
    dimension = space.dimensions[field]
    if dimension.choice is not None:
        return dimension.choice.index(value) / max(1, len(dimension.choice) - 1)
    if dimension.loguniform is not None:
        low, high, value = (math.log(v) for v in (*dimension.loguniform, value))
    else:
        low, high = dimension.uniform or (0, 1)
    return float((value - low) / (high - low))


def pareto_front(costs: Sequence[Sequence[float]]) -> list[int]:
    """Indices of the points that no other point beats or equals in every objective while it beats them in one.

    Args:
        costs: of each point, one number per objective; less is better.
    """
    order = sorted(range(len(costs)), key=lambda index: (list(costs[index]), index))
    front: list[int] = []
    for index in order:
        mine = costs[index]
        beaten = any(
            all(a <= b for a, b in zip(costs[other], mine, strict=True)) and list(costs[other]) != list(mine)
            for other in front
        )
        if not beaten:
            front.append(index)
    return sorted(front)


def search_report(directory: Path) -> dict[str, Any]:
    """Everything that can be said of a search, as plain values for JSON.

    Raises:
        SpecError: its file is damaged.
        RunError: its journal cannot be read.
    """
    search, table = load_search(directory / "search.yaml"), read_search(directory)
    found = rows(search, table)
    sign = -1.0 if search.objective.mode == "max" else 1.0
    judged = [row for row in found if row["value"] is not None and row["state"] != "failed"]
    # Values at different rungs do not compare, so the front is that of the furthest rung.
    last = max((row["rung"] for row in judged), default=0)
    furthest = [row for row in judged if row["rung"] == last]
    further = [name for name in search.objective.also if name != "device_hours"]
    costs = [[sign * row["value"], row["device_hours"], *(row["values"][n] for n in further)] for row in furthest]
    best = table.best(search.objective.mode)
    return {
        "name": search.name,
        "metric": search.objective.metric,
        "mode": search.objective.mode,
        "scheduler": search.scheduler.name,
        "searcher": search.searcher.name,
        "sessions": table.sessions,
        "hours": table.seconds / 3600,
        "kimg": table.kimg(len(search.seeds or (0,))),
        "device_hours": table.device_hours(search.workers),
        "ended": table.ended,
        "refused": table.refused,
        "final": described_final(table),
        "final_hours": table.final_hours,
        "best": best.name if best else None,
        "as_good": [trial.name for trial in table.as_good(search.objective.mode)],
        "importance": [asdict(one) for one in importance(search, table)],
        "pareto": [furthest[index]["trial"] for index in pareto_front(costs)],
        "exchanges": [record["copies"] for _, record in sorted(table.exchanges.items())],
        "trials": found,
    }


def write_report(directory: Path) -> dict[str, Any]:
    """Write report.html and report.json.

    A report that is there already is returned as it is if nothing happened since: a search that ends writes one.

    Returns:
        What :func:`search_report` says.
    """
    journal = directory / "search.jsonl"
    said = journal.stat().st_size if journal.exists() else 0
    known = read_json(directory / "report.json")
    if known is not None and known.get("journal_bytes") == said:
        return known
    report = {**search_report(directory), "journal_bytes": said}
    text = json.dumps(report, indent=1, allow_nan=False, default=str) + "\n"
    page = search_page(load_search(directory / "search.yaml"), json.loads(text)).encode("utf-8", errors="replace")
    write_atomically(directory / "report.html", lambda file: file.write(page))
    write_atomically(directory / "report.json", lambda file: file.write(text.encode()))  # last: it stands for all
    return report


def search_page(search: SearchSpec, report: Mapping[str, Any]) -> str:
    """One HTML file of a search, which needs no other: settings, what matters, cost, all trials.

    Args:
        search: its file.
        report: what :func:`search_report` says, as JSON knows it.
    """
    space = Space(search.space)
    judged = [row for row in report["trials"] if row["value"] is not None and row["state"] != "failed"]
    values = [row["value"] for row in judged]
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    lines = [
        {
            "trial": row["trial"],
            "at": [*positions(space, row["point"]), (row["value"] - low) / (high - low or 1.0)],
        }
        for row in judged[:LINES]
    ]
    names = ("low", "high")
    axes = [
        {"field": field} | dict(zip(names, ends, strict=True))
        for field, ends in zip(space.dimensions, axis_ends(space), strict=True)
    ]
    states = Counter(row["state"] for row in report["trials"])
    data = {"search": {**report, "axes": axes, "lines": lines, "states": dict(states)}}
    return render_page(f"{search.name} - Bessemer", data, ("base.js", "search.js"))


def positions(space: Space, point: Mapping[str, Any]) -> list[float | None]:
    """Where a point lies on each axis, 0 to 1; None for a field that is not varied there."""
    return [_position(space, field, point[field]) if field in point else None for field in space.dimensions]


def axis_ends(space: Space) -> list[tuple[str, str]]:
    """What stands below and above each axis."""
    ends = []
    for dimension in space.dimensions.values():
        values: Sequence[Any] = dimension.choice or dimension.uniform or dimension.loguniform or ()
        low, high = (f"{v:.3g}" if isinstance(v, float) else str(v) for v in (values[0], values[-1]))
        ends.append((low, high))
    return ends
