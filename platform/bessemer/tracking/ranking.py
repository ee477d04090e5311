"""Ranking of runs by one metric: only what was measured by one protocol is ranked together."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from bessemer.tracking.journal import PROTOCOL_FIELDS
from bessemer.tracking.summary import CurveSummary, RunSummary

__all__ = ["PROTOCOL_LABELS", "Board", "Place", "protocol_text", "rank", "separation", "short"]

PROTOCOL_LABELS = {
    "estimator": "estimator",
    "samples": "generated images",
    "reference_samples": "real images",
    "reference_hash": "reference",
    "extractor": "extractor",
    "extractor_sha256": "extractor's weights",
    "preprocessing": "preprocessing",
    "seed": "seed of latents",
    "truncation": "truncation",
    "balance": "classes as in",
    "weights": "weights sampled",
}
"""Words for the fields of a protocol."""

_REQUIRED = ("samples", "reference_hash", "seed", "weights")
_WITHOUT_EXTRACTOR = frozenset({"bits_per_dim"})
_SIGMAS = 2.0


@dataclass(frozen=True)
class Place:
    """A run in a ranking."""

    rank: int
    row: RunSummary
    curve: CurveSummary
    behind: float
    """How much worse than the first, in the metric's own unit; 0 for the first."""
    sigmas: float | None
    """The same in standard errors of the difference; None where the metric has none."""

    @property
    def tied(self) -> bool:
        """Whether the difference to the first is within what repeating the evaluation would change."""
        return self.rank > 1 and self.sigmas is not None and self.sigmas < _SIGMAS


@dataclass(frozen=True)
class Board:
    """Runs that one protocol measured, best first."""

    metric: str
    higher_is_better: bool
    protocol: dict[str, Any]
    places: list[Place]
    differs: dict[str, tuple[Any, Any]]
    """Field -> its value here and in the first board: why the two are not one."""
    problem: str | None = None
    """Why these runs are not even ranked among each other."""


def rank(rows: Sequence[RunSummary], metric: str) -> list[Board]:
    """Boards of a metric, one per protocol, that of most runs first; runs that lack the metric are in none.

    A record that does not say by which protocol it was measured is comparable with nothing: it is listed, not ranked.
    """
    groups: dict[str, list[tuple[RunSummary, CurveSummary]]] = {}
    for row in rows:
        for curve in row.curves:
            if curve.metric == metric:
                groups.setdefault(_key(curve), []).append((row, curve))
    ordered = sorted(groups.values(), key=lambda group: (_missing(group[0][1]) != [], -len(group)))
    boards: list[Board] = []
    for group in ordered:
        protocol = group[0][1].protocol
        first = boards[0].protocol if boards else protocol
        differs = {
            name: (protocol.get(name), first.get(name))
            for name in PROTOCOL_FIELDS
            if protocol.get(name) != first.get(name)
        }
        missing = _missing(group[0][1])
        problem = f"the records do not say: {', '.join(PROTOCOL_LABELS[name] for name in missing)}" if missing else None
        higher = group[0][1].higher_is_better
        boards.append(Board(metric, higher, protocol, _places(group, higher), differs, problem))
    return boards


def separation(a: CurveSummary, b: CurveSummary) -> float | None:
    """Distance of two best values in standard errors of their difference; None where one has none."""
    if a.standard_error is None or b.standard_error is None:
        return None
    error = math.hypot(a.standard_error, b.standard_error)
    return abs(a.best - b.best) / error if error > 0 else None


def protocol_text(protocol: dict[str, Any]) -> str:
    """A protocol in one line, hashes shortened."""
    shown = {name: protocol[name] for name in PROTOCOL_FIELDS if protocol.get(name) not in (None, "")}
    return ", ".join(f"{PROTOCOL_LABELS[name]} {short(name, value)}" for name, value in shown.items())


def short(name: str, value: Any) -> str:
    """A value of a protocol for people."""
    return str(value)[:10] if name.endswith(("hash", "sha256")) else str(value)


def _places(group: list[tuple[RunSummary, CurveSummary]], higher: bool) -> list[Place]:
    sign = -1.0 if higher else 1.0
    group = sorted(group, key=lambda item: (sign * item[1].best, item[0].name))
    first = group[0][1]
    return [
        Place(number, row, curve, sign * (curve.best - first.best), separation(curve, first))
        for number, (row, curve) in enumerate(group, 1)
    ]


def _missing(curve: CurveSummary) -> list[str]:
    """What a protocol must say and this one does not."""
    needed = _REQUIRED if curve.metric in _WITHOUT_EXTRACTOR else (*_REQUIRED, "extractor", "extractor_sha256")
    return [name for name in needed if name not in curve.protocol]


def _key(curve: CurveSummary) -> str:
    return json.dumps(curve.protocol, sort_keys=True, default=str)
