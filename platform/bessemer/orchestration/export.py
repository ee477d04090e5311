"""A snapshot from any checkpoint of a run: averaged weights as safetensors, and JSON that says what they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bessemer.data.reading.opening import open_job_data
from bessemer.errors import CheckpointError, DataError, RunError, StoreError
from bessemer.evaluation.sampling import recompute_batch_norm
from bessemer.orchestration.run_directory import RunDirectory
from bessemer.spec.job import EmaSpec
from bessemer.systems.snapshot import (
    SnapshotInfo,
    read_snapshot_info,
    sampled_state,
    save_snapshot,
    snapshot_dirs,
    system_of,
)
from bessemer.training.checkpoint_files import all_checkpoints, damage, newest_undamaged, nimg_of, read_state
from bessemer.training.export import averaged_weights, stored_system

__all__ = ["choose_checkpoint", "ema_profile", "export_snapshot"]


def ema_profile(spec: EmaSpec) -> dict[str, Any]:
    """What a snapshot of the main average says of it."""
    profile = spec.model_dump(include={"half_life_kimg", "rampup"})
    return profile | ({"batch_norm": "recomputed"} if spec.batch_norm == "recomputed" else {})


def choose_checkpoint(run: RunDirectory, name: str | None) -> Path:
    """The checkpoint of this name, such as `kimg-000012.800`, or the newest undamaged one.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    names = [p.name for p in all_checkpoints(run.checkpoints)]
    if name is None:
        path, _ = newest_undamaged(run.checkpoints)
        if path is None:
            raise CheckpointError(f"{run.checkpoints}: holds no undamaged checkpoint.")
        return path
    if name not in names:
        raise CheckpointError(
            f"--checkpoint {name}: {run.path} has no such checkpoint; it has {', '.join(names) or 'none'}."
        )
    wrong = damage(run.checkpoints / name)
    if wrong is not None:
        raise CheckpointError(f"{wrong} Choose another with --checkpoint.")
    return run.checkpoints / name


def export_snapshot(run: RunDirectory, checkpoint: Path, out: Path) -> SnapshotInfo:
    """Write the averaged weights of a checkpoint to the new directory `out`.

    Raises:
        CheckpointError: the checkpoint lacks something.
        RunError: `out` exists or cannot be written, or nothing here knows the names of the classes.
    """
    if out.exists():
        raise RunError(f"--out {out}: exists already; choose a new directory.")
    job, identity = run.job(), read_state(checkpoint)["identity"]
    names, counts = _classes(run, identity["data_hash"])
    info = SnapshotInfo(
        system=identity["system"],
        config=identity["config"],
        nimg=nimg_of(checkpoint),
        ema=ema_profile(job.ema),
        seed=identity["seed"],
        data_hash=identity["data_hash"],
        class_names=names,
        class_counts=counts,
    )
    weights = averaged_weights(checkpoint, stored_system(checkpoint))
    if job.ema.batch_norm == "recomputed":
        system = system_of(info, weights)
        recompute_batch_norm(system, counts, seed=job.seed, device="cpu")
        weights = sampled_state(system)
    try:
        return save_snapshot(out, weights, info)
    except OSError as e:
        raise RunError(f"--out {out}: cannot be written ({e.strerror or e}); choose another place.") from None


def _classes(run: RunDirectory, data_hash: str) -> tuple[list[str], list[int]]:
    """Names and sizes of the classes: from a snapshot of the run, or from its data set."""
    for directory in snapshot_dirs(run.path):
        info = read_snapshot_info(directory)
        if info.data_hash == data_hash:
            return info.class_names, info.class_counts
    path = run.job().data.path
    try:
        with open_job_data(run.job().data) as dataset:
            manifest = dataset.manifest
    except (DataError, StoreError) as e:
        raise RunError(
            f"{run.path}: has no snapshot that names the classes, and the data set does not open: {e}"
        ) from None
    if manifest.hash != data_hash:
        raise RunError(f"data.path {path}: is not the data set that {run.path} was trained on; its hash differs.")
    return list(manifest.sampled_classes), list(manifest.sampled_classes.values())
