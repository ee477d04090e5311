"""Pictures of a search as files: importance of its parameters, parallel coordinates, and the Pareto front.

The page of a search draws its own (:mod:`bessemer.tracking.search_report`); these are for MLflow, slides and papers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from bessemer.files import write_atomically
from bessemer.spec.search_load import load_search
from bessemer.spec.space import Space
from bessemer.tracking.search_report import LINES, axis_ends, positions

__all__ = ["draw_pictures"]

_COLOURS = "viridis"
_DPI = 100


def _save(figure: Figure, path: Path) -> None:
    canvas = FigureCanvasAgg(figure)
    write_atomically(path, lambda file: canvas.print_png(file))  # type: ignore[no-untyped-call]


def draw_pictures(directory: Path, report: Mapping[str, Any]) -> list[Path]:
    """Draw importance.png, parallel.png and pareto.png where they show something; return the paths of those.

    Args:
        directory: of the search.
        report: what :func:`bessemer.tracking.search_report.write_report` says.
    """
    space = Space(load_search(directory / "search.yaml").space)
    importance, parallel, pareto = (directory / f"{name}.png" for name in ("importance", "parallel", "pareto"))
    drawn = []
    if report["importance"]:
        _draw_importance(importance, report["importance"])
        drawn.append(importance)
    judged = [row for row in report["trials"] if row["value"] is not None]
    if len(judged) > 1:
        lines = [(positions(space, row["point"]), row) for row in judged[:LINES]]
        _draw_parallel(parallel, list(space.dimensions), axis_ends(space), lines, report)
        _draw_pareto(pareto, report)
        drawn += [parallel, pareto]
    return drawn


def _draw_importance(path: Path, found: Sequence[Mapping[str, Any]]) -> None:
    """Bars: the share of each field, with its spread."""
    figure = Figure((8, 1 + 0.4 * len(found)), dpi=_DPI, layout="constrained")
    axes = figure.subplots()
    names = [one["field"] for one in reversed(found)]
    axes.barh(names, [one["share"] for one in reversed(found)], xerr=[one["spread"] for one in reversed(found)])
    axes.set_xlim(left=0)
    axes.set_xlabel("permutation importance, share")
    _save(figure, path)


def _draw_parallel(
    path: Path,
    fields: Sequence[str],
    ends: Sequence[tuple[str, str]],
    lines: Sequence[tuple[Sequence[float | None], Mapping[str, Any]]],
    report: Mapping[str, Any],
) -> None:
    """One axis per field and one line per trial, coloured by its place among all; gaps where a field is not varied.

    Args:
        path: of the picture.
        fields: names of the axes.
        ends: what stands below and above each axis.
        lines: best first: position on each axis, 0 to 1, and the trial's row.
        report: what `search_report` says.
    """
    figure = Figure((max(6.0, 2.2 * len(fields)), 4.5), dpi=_DPI, layout="constrained")
    axes = figure.subplots()
    segments: list[list[tuple[float, float]]] = []
    places: list[float] = []
    # The worst first, so that the best lie on top.
    for place, (heights, _) in reversed(list(enumerate(lines))):
        known = [(float(x), y) for x, y in enumerate(heights) if y is not None]
        for left, right in zip(known, known[1:] or known, strict=False):
            if right[0] - left[0] <= 1:
                segments.append([left, right])
                places.append(place)
        axes.plot(*zip(*known, strict=True), ".", color="0.4", markersize=2)
    axes.add_collection(
        LineCollection(segments, array=places, cmap=_COLOURS, norm=Normalize(0, max(1, len(lines) - 1)), linewidths=1.2)
    )
    for x, (low, high) in enumerate(ends):
        axes.axvline(x, color="0.7", linewidth=0.8)
        axes.text(x, -0.04, low, ha="center", va="top", fontsize=8)
        axes.text(x, 1.04, high, ha="center", va="bottom", fontsize=8)
    axes.set_xticks(range(len(fields)), [field.replace(".", ".\n") for field in fields], fontsize=8)
    axes.tick_params(axis="x", pad=16)
    axes.set_yticks([])
    axes.set_ylim(-0.02, 1.02)
    axes.set_xlim(-0.3, len(fields) - 0.7)
    axes.spines[:].set_visible(False)
    axes.set_title(f"{report['name']}: {len(lines)} trials, the darkest is the best by {report['metric']}", pad=24)
    _save(figure, path)


def _draw_pareto(path: Path, report: Mapping[str, Any]) -> None:
    """Quality against device-hours: every judged trial, and the front of those that came furthest."""
    figure = Figure((7, 4.5), dpi=_DPI, layout="constrained")
    axes = figure.subplots()
    judged = [row for row in report["trials"] if row["value"] is not None]
    for rung in sorted({row["rung"] for row in judged}):
        there = [row for row in judged if row["rung"] == rung]
        axes.errorbar(
            [row["device_hours"] for row in there],
            [row["value"] for row in there],
            yerr=[row["standard_error"] or 0.0 for row in there],
            fmt="o",
            markersize=4,
            linewidth=0.8,
            label=f"{there[0]['kimg']:g} kimg",
        )
    front = sorted((row["device_hours"], row["value"]) for row in judged if row["trial"] in report["pareto"])
    if front:
        axes.plot(*zip(*front, strict=True), color="0.2", linewidth=1, label="Pareto front")
    axes.set_xlabel("device-hours")
    axes.set_ylabel(report["metric"])
    axes.legend(fontsize=8)
    _save(figure, path)
