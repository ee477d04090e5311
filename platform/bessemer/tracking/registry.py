"""Entries of runs in MLflow's model registry: averaged weights, what they are, and a model card; never a pickle.

One model per name of a job, one version per snapshot that was worth keeping. MLflow itself calls the version that was
made last `latest`: the newest snapshot of the run that was registered last. The alias `best` is on the best of all
runs that one protocol measured: values of different protocols are never compared, so it stays where it is until
somebody moves it.
"""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bessemer.errors import TrackingError
from bessemer.tracking.journal import finite, protocol_key
from bessemer.tracking.model_card import model_card
from bessemer.tracking.runs import Curve, Run, evaluation_curves, load_run, text

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

    from bessemer.systems.snapshot import SnapshotInfo

__all__ = ["Entry", "register"]

_BEST, _LATEST = "best", "latest"
_WEIGHTS, _PROTOCOL, _METRIC, _VALUE = (
    f"bessemer.{name}" for name in ("weights_sha256", "protocol", "metric", "value")
)


@dataclass(frozen=True)
class Entry:
    """A version of a model, as it is after a run was registered."""

    model: str
    version: str
    snapshot: str
    """Such as `kimg-000012.800`."""
    aliases: tuple[str, ...]
    note: str | None = None
    """Why the alias `best` is elsewhere."""


def register(client: MlflowClient, run_dir: Path, run_id: str, model: str | None = None) -> list[Entry]:
    """Register the newest snapshot of a run and its best one, and move `best`. Doing it again changes nothing.

    Args:
        client: of the store that has the run.
        run_dir: directory of the run.
        run_id: the run's id in MLflow.
        model: name of the registered model; that of the run's job if None.

    Returns:
        One entry per snapshot, the newest first.

    Raises:
        TrackingError: the run has no snapshot, or a damaged one.
    """
    from mlflow.exceptions import MlflowException

    from bessemer.systems.snapshot import read_snapshot_info, snapshot_dirs

    run = load_run(run_dir)
    name = model or text(run.job.get("name")) or run.name
    found = {path: read_snapshot_info(path) for path in snapshot_dirs(run.path)}
    if not found:
        raise TrackingError(f"{run.path}: has no snapshot to register; they are written at each evaluation.")
    newest = list(found)[-1]
    curve = next((curve for curve in evaluation_curves(run) if curve.points), None)
    best = _best_snapshot(curve, found)
    try:
        client.create_registered_model(name, description="Trained by Bessemer. `weights.safetensors`, no pickle.")
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    chosen = dict.fromkeys(path for path in (best, newest) if path is not None)  # the newest last: `latest` is its
    versions = {path: _version(client, name, run, run_id, path, found[path], curve) for path in chosen}
    note = "no evaluated snapshot is left" if best is None else _move_best(client, name, versions[best], curve)
    last = max(int(one.version) for one in client.search_model_versions(f"name = '{_quoted(name)}'"))
    return [
        Entry(
            model=name,
            version=str(one.version),
            snapshot=path.name,
            aliases=(
                *([_BEST] if path == best and note is None else []),
                *([_LATEST] if int(one.version) == last else []),
            ),
            note=note,
        )
        for path, one in reversed(versions.items())
    ]


def _best_snapshot(curve: Curve | None, found: dict[Path, SnapshotInfo]) -> Path | None:
    """The snapshot with the best value of the run's first metric; None where it is gone, or nothing was measured."""
    if curve is None:
        return None
    weights = {nimg: record.get("weights_sha256") for nimg, record in curve.records.items()}
    measured = {path: info.nimg for path, info in found.items() if weights.get(info.nimg) == info.weights_sha256}
    values = {point.nimg: point.value for point in curve.points}
    choose = max if curve.higher_is_better else min
    return choose(measured, key=lambda path: values[measured[path]], default=None)


def _version(
    client: MlflowClient, name: str, run: Run, run_id: str, path: Path, info: SnapshotInfo, curve: Curve | None
) -> ModelVersion:
    """The version of a snapshot, made unless it is there."""
    for known in client.search_model_versions(f"name = '{_quoted(name)}'"):
        if known.run_id == run_id and known.tags.get(_WEIGHTS) == info.weights_sha256:
            return known
    from bessemer.systems.snapshot import verified_weights

    folder = f"model/{path.name}"
    with tempfile.TemporaryDirectory() as aside:
        for file in (verified_weights(path, info), path / "snapshot.json"):
            # A link where that is possible: the weights may be larger than the disk for temporary files.
            target = Path(aside) / file.name
            try:
                target.symlink_to(file.absolute())
            except OSError:
                shutil.copyfile(file, target)
        (Path(aside) / "README.md").write_text(model_card(run, info))
        client.log_artifacts(run_id, aside, folder)
    root = client.get_run(run_id).info.artifact_uri
    tags = {_WEIGHTS: info.weights_sha256, "bessemer.nimg": str(info.nimg), "bessemer.system": info.system}
    point = next((p for p in curve.points if p.nimg == info.nimg), None) if curve else None
    if curve is not None and point is not None:
        tags |= {_METRIC: curve.metric, _VALUE: repr(point.value), _PROTOCOL: _protocol(curve)}
    return client.create_model_version(
        name, f"{root}/{folder}", run_id, tags=tags, description=model_card(run, info, brief=True)
    )


def _move_best(client: MlflowClient, name: str, version: ModelVersion, curve: Curve | None) -> str | None:
    """Put the alias on `version` if that is better than what has it; the reason if not."""
    from mlflow.exceptions import MlflowException

    try:
        holder = client.get_model_version_by_alias(name, _BEST)
    except MlflowException:  # nobody has it
        holder = None
    if holder is not None and str(holder.version) != str(version.version):
        if holder.tags.get(_PROTOCOL) != version.tags.get(_PROTOCOL):
            return f"version {holder.version} was measured by another protocol"
        theirs, ours = (finite(_number(one.tags.get(_VALUE))) for one in (holder, version))
        sign = -1.0 if curve is not None and curve.higher_is_better else 1.0
        if theirs is not None and (ours is None or sign * theirs <= sign * ours):
            return f"version {holder.version} has {theirs:.4g}"
    client.set_registered_model_alias(name, _BEST, version.version)
    return None


def _protocol(curve: Curve) -> str:
    return hashlib.sha256(protocol_key(curve.protocol).encode()).hexdigest()[:24]


def _number(value: Any) -> float | None:
    try:
        return float(value)
    except (TypeError, ValueError):
        return None


def _quoted(name: str) -> str:
    return name.replace("'", "\\'")
