"""How a run is right now, from its directory: what `bessemer status` shows."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path

from bessemer.tracking.files import path_inside, read_json
from bessemer.tracking.journal import Record, finite
from bessemer.tracking.runs import Run, RunState, evaluation_curves, event_name, load_run, text

__all__ = ["Evaluated", "RunStatus", "status_of"]

_RECENT_LINES = 20
_TROUBLES = ("waiting", "workers_lost", "checkpoint_failed", "upload_failed", "rolled_back", "evaluation_failed")


@dataclass(frozen=True)
class Evaluated:
    """One value of a metric."""

    metric: str
    value: float
    kimg: float
    best: float
    """Of this run so far."""


@dataclass(frozen=True)
class RunStatus:
    """A run as its journal tells it; unknown values are None."""

    name: str
    path: str
    state: RunState
    kimg: float
    total_kimg: float | None
    img_per_s: float | None
    """Median of the last lines of the journal."""
    eta_s: float | None
    """Seconds to the end at this speed, while the run is going on."""
    losses: dict[str, float] = field(default_factory=dict)
    """Of the last line, without the prefix `loss/`."""
    evaluation: Evaluated | None = None
    """The last one, of the job's first metric."""
    checkpoint_kimg: float | None = None
    checkpoint_age_s: float | None = None
    """Seconds since the newest checkpoint became complete: what would be lost now."""
    workers: int | None = None
    wanted_workers: int | None = None
    nodes: dict[str, int] = field(default_factory=dict)
    """Host name -> workers on it."""
    restarts: int = 0
    trouble: str | None = None
    """The last thing that went wrong, if nothing has gone on since."""
    seen_s: float | None = None
    """Seconds since the last record."""
    mlflow: str | None = None
    """Where MLflow shows the run, if it does."""
    dashboard: str | None = None
    """Where Ray shows it, if it was submitted, as whoever submitted it reached the cluster."""


def status_of(path: str | Path, now: float | None = None) -> RunStatus:
    """Read a run directory.

    Args:
        path: the run.
        now: Unix seconds that ages are taken from; those of this moment when unset.

    Raises:
        RunError: `path` is no run directory.
    """
    run, now = load_run(path), time.time() if now is None else now
    total, lines = finite(run.setting("training", "total_kimg")), _recent_lines(run)
    speeds = [speed for line in lines if (speed := finite(line.get("throughput/img_per_s"))) is not None]
    speed = statistics.median(speeds) if speeds else None
    left = None if total is None else max(0.0, total * 1000 - run.nimg)
    checkpoints = run.events("checkpoint")
    placed = (run.events("placed") or [{}])[-1].get("hosts")
    nodes = {str(k): v for k, v in placed.items() if isinstance(v, int)} if isinstance(placed, dict) else {}
    return RunStatus(
        name=run.name,
        path=str(run.path),
        state=run.state,
        kimg=run.nimg / 1000,
        total_kimg=total,
        img_per_s=speed,
        eta_s=left / speed if left is not None and speed and run.state == "running" else None,
        losses=_losses(lines[-1]) if lines else {},
        evaluation=_evaluated(run),
        checkpoint_kimg=checkpoints[-1]["nimg"] / 1000 if checkpoints else None,
        checkpoint_age_s=_checkpoint_age(run, checkpoints[-1], now) if checkpoints else None,
        workers=sum(nodes.values()) or None,
        wanted_workers=run.setting("resources", "workers"),
        nodes=nodes,
        restarts=len(run.events("resumed")),
        trouble=_trouble(run),
        seen_s=_age(run.path / "journal.jsonl", now) if run.records else None,
        mlflow=_mlflow(run),
        dashboard=_dashboard(run),
    )


def _checkpoint_age(run: Run, event: Record, now: float) -> float:
    """By the store's clock, which wrote the time of the file: that of the first worker's host may be off."""
    manifest = path_inside(run.path / "checkpoints", f"{event.get('path')}/manifest.json")
    return max(0.0, now - event["time"]) if manifest is None else _age(manifest, now)


def _age(file: Path, now: float) -> float:
    return max(0.0, now - file.stat().st_mtime)


def _recent_lines(run: Run) -> list[Record]:
    values = [record.get("values") for record in run.of_kind("metrics")]
    return [line for line in values if isinstance(line, dict)][-_RECENT_LINES:]


def _losses(line: Record) -> dict[str, float]:
    found = {name: finite(value) for name, value in line.items() if name.startswith("loss/")}
    return {name.removeprefix("loss/"): value for name, value in found.items() if value is not None}


def _evaluated(run: Run) -> Evaluated | None:
    curve = next((curve for curve in evaluation_curves(run) if curve.points), None)
    if curve is None:
        return None
    last = curve.points[-1]
    return Evaluated(curve.metric, last.value, last.nimg / 1000, curve.best.value)


def _trouble(run: Run) -> str | None:
    """What went wrong after the last line of training."""
    for record in reversed(run.records):
        if record["kind"] == "metrics":
            return None
        name = event_name(record)
        if name == "failed":
            return text(record.get("error"))
        if name in _TROUBLES:
            reasons = record.get("reasons")
            if isinstance(reasons, dict):
                return "; ".join(f"worker {rank}: {reason}" for rank, reason in reasons.items())
            return text(record.get("reason")) or name
    return None


def _mlflow(run: Run) -> str | None:
    uri, state = run.setting("tracking", "uri"), read_json(run.path / "mlflow.json") or {}
    experiment, identity = text(state.get("experiment_id")), text(state.get("run_id"))
    if run.setting("tracking", "mlflow") is False or not isinstance(uri, str) or identity is None:
        return None
    from bessemer.tracking.mlflow_store import how_to_open, redact

    if uri.startswith(("http://", "https://")) and experiment is not None:
        return f"{redact(uri).rstrip('/')}/#/experiments/{experiment}/runs/{identity}"
    return how_to_open(uri, run.path.absolute().parent)


def _dashboard(run: Run) -> str | None:
    """Of its newest start."""
    starts = [path for path in (run.path / "provenance").glob("*") if path.name.isdecimal()]
    newest = max(starts, key=lambda path: int(path.name), default=None)
    record = read_json(newest / "provenance.json") if newest is not None else None
    return text((record or {}).get("dashboard"))
