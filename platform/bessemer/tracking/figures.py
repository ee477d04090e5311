"""Curves of runs as figures for papers: PNG and SVG by matplotlib, one figure per metric and per training curve."""

from __future__ import annotations

import re
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bessemer.errors import MachineError
from bessemer.files import write_atomically
from bessemer.tracking.curves import metric_series
from bessemer.tracking.journal import protocol_key
from bessemer.tracking.runs import Run, evaluation_curves, load_run

__all__ = ["draw_figures"]

_DPI = 200
_SIZE = (4.8, 3.2)  # inches: a column of a paper
_MOST = 200
_STYLE: Any = {
    "font.size": 9.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "bessemer",  # the same figure is the same file
    "text.parse_math": False,  # names of runs are no formulas
}


def draw_figures(run_dirs: Sequence[str | Path], directory: Path) -> list[Path]:
    """Draw every metric and every training curve of some runs, one line per run and protocol.

    Args:
        run_dirs: directories of the runs; they are only read.
        directory: where to write `NAME.png` and `NAME.svg`; made if it is not there.

    Returns:
        The files.

    Raises:
        RunError: not a run directory.
        MachineError: the directory cannot be written.
    """
    runs = [load_run(path) for path in run_dirs]
    written: list[Path] = []
    with rc_context(_STYLE):
        series = [metric_series(run.records, run.sessions) for run in runs]
        metrics = dict.fromkeys(curve.metric for run in runs for curve in evaluation_curves(run) if curve.points)
        names = dict.fromkeys(name for one in series for name in one if one[name]["x"])
        for name in [*metrics, *names][:_MOST]:
            figure = Figure(_SIZE, dpi=_DPI, layout="constrained")
            axes = figure.subplots()
            if name in metrics:
                _draw_metric(axes, runs, name)
            else:
                _draw_series(axes, runs, series, name)
            axes.set_xlabel("kimg")
            axes.set_ylabel(name)
            if len(axes.get_legend_handles_labels()[1]) > 1:
                axes.legend()
            stem = _stem(name)
            copies = sum(path.stem.rstrip("_") == stem for path in written) // 2
            written += _save(figure, directory, stem + "_" * copies)
    return written


def _draw_metric(axes: Axes, runs: Sequence[Run], metric: str) -> None:
    """Values with their standard errors; each protocol has a line of its own."""
    curves = [
        (run, curve) for run in runs for curve in evaluation_curves(run) if curve.metric == metric and curve.points
    ]
    protocols = list(dict.fromkeys(protocol_key(curve.protocol) for _, curve in curves))
    for run, curve in curves:
        which = f", protocol {1 + protocols.index(protocol_key(curve.protocol))}" if len(protocols) > 1 else ""
        x, y = [point.nimg / 1000 for point in curve.points], [point.value for point in curve.points]
        errors = [point.standard_error or 0.0 for point in curve.points]
        axes.errorbar(x, y, yerr=errors if any(errors) else None, marker="o", markersize=3, linewidth=1.2, capsize=2,
                      label=_label(run.name + which))  # fmt: skip


def _draw_series(axes: Axes, runs: Sequence[Run], series: Sequence[dict[str, dict[str, Any]]], name: str) -> None:
    """Means of neighbouring lines, and their range as a band."""
    for run, one in zip(runs, series, strict=True):
        curve = one.get(name)
        if curve is None or not curve["x"]:
            continue
        (line,) = axes.plot(curve["x"], curve["y"], linewidth=1.2, label=_label(run.name))
        if "low" in curve:
            axes.fill_between(curve["x"], curve["low"], curve["high"], color=line.get_color(), alpha=0.15, linewidth=0)


def _label(text: str) -> str:
    return re.sub(r"^_+", "", text) or "run"  # matplotlib leaves out of a legend what begins with an underscore


def _stem(name: str) -> str:
    """A name from anywhere as the name of a file."""
    return re.sub(r"[^\w.-]+", "-", name).strip(".-_")[:120] or "curve"


def _save(figure: Figure, directory: Path, stem: str) -> list[Path]:
    return [_write(figure, directory / f"{stem}.{ending}") for ending in ("png", "svg")]


def _write(figure: Figure, path: Path) -> Path:
    drawn = BytesIO()
    ending = path.suffix[1:]
    figure.savefig(drawn, format=ending, metadata={"Date": None} if ending == "svg" else None)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, lambda file: file.write(drawn.getvalue()))
    except OSError as error:
        raise MachineError(
            f"--figures {path}: cannot be written ({error.strerror}); choose another directory."
        ) from None
    return path
